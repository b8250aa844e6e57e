"""When the Triton backend serves, and what it says when it does not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from calls import BF16, DEVICE, FP16, FP32

import fsp_kernels as fsp
from fsp_kernels import backends, functional
from fsp_kernels.__main__ import environment
from fsp_kernels.backends import triton as package
from fsp_kernels.backends.cuda import CudaBackend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    def forget():
        package._why_unavailable.cache_clear()
        package._why_too_old.cache_clear()
        package.why_not_this_triton.cache_clear()
        functional._checked_plan.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def backend():
    return backends.registered_backends()["triton"]


@pytest.fixture
def machine(monkeypatch):
    """A machine that is not this one: its GPUs by compute capability."""

    def _machine(*capabilities: tuple[int, int], interpreting: bool = False):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreting else "0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
        )
        monkeypatch.setattr(package, "_compile_as_triton_does", lambda: None)

    return _machine


def pair(dtype=FP32, device=DEVICE):
    return tuple(torch.randn(2, c, 3, 3, device=device).to(dtype) for c in (4, 5))


# --- on which machines ----------------------------------------------------------------------------


def test_it_needs_the_package_triton(backend, machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    assert backend.why_unavailable() == "the package triton is not installed"


@pytest.mark.parametrize("interpreting", [False, True])
def test_an_older_triton_is_a_reason_that_names_what_is_needed(
    backend, machine, monkeypatch, interpreting
):
    machine((9, 0), interpreting=interpreting)
    for version in ("3.6.0", "3.10.1+git", "4.0.0", "3.5.1"):
        package.why_not_this_triton.cache_clear()
        monkeypatch.setattr(package, "version", {"triton": version}.get)
        if version != "3.5.1":
            assert package.why_not_this_triton() is None
    assert backend.why_unavailable() == (
        "its kernels need triton 3.6 or newer, which PyTorch 2.10 and newer come with; "
        "3.5.1 is installed"
    )


def test_a_triton_of_another_name_tells_its_version_itself(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(package, "version", version)
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    assert "3.5.0 is installed" in package.why_not_this_triton()


def test_a_folder_named_triton_is_not_the_package(backend, machine, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    machine(interpreting=True)
    monkeypatch.setattr(package, "version", version)
    monkeypatch.delattr(triton, "__version__")
    assert backend.why_unavailable() == "the package triton is not installed"


def test_it_needs_a_gpu(backend, machine):
    machine()
    assert backend.why_unavailable() == "PyTorch sees no NVIDIA GPU"


def test_it_needs_a_gpu_of_nvidia(backend, machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in backend.why_unavailable()


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_it_needs_ampere_or_newer(backend, machine, capability):
    machine(capability)
    assert backend.why_unavailable() == (
        "its kernels need compute capability 8.0 (Ampere) or newer, "
        f"cuda:0 has {capability[0]}.{capability[1]}"
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_it_works_from_ampere_on(backend, machine, capability):
    machine(capability)
    assert backend.why_unavailable() is None
    assert backend.automatic
    assert backend.why_unsupported(GPU, (FP32, FP16, BF16)) is None


def test_one_gpu_that_is_new_enough_is_enough_and_the_other_is_not_served(backend, machine):
    machine((7, 5), (9, 0))
    assert backend.why_unavailable() is None
    assert "cuda:0 has 7.5" in backend.why_unsupported(torch.device("cuda", 0), (FP32,))
    assert backend.why_unsupported(torch.device("cuda", 1), (FP32,)) is None


# --- with a Triton that cannot compile ------------------------------------------------------------


@pytest.fixture
def broken(machine, monkeypatch):
    """A GPU, and a Triton that fails where it first compiles; how often that was tried."""
    machine((9, 0))
    tried = []

    def fail():
        tried.append(1)
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(package, "_compile_as_triton_does", fail)
    return tried


REASON = "Triton cannot compile its launcher: Failed to find C compiler. Please specify one."


def test_it_needs_a_triton_that_can_compile(backend, broken):
    assert backend.why_unavailable() == REASON
    assert backend.why_unavailable() == REASON
    assert broken == [1]


def test_a_machine_without_a_gpu_compiles_nothing(backend, broken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_unavailable() == "PyTorch sees no NVIDIA GPU"
    assert broken == []


@pytest.mark.usefixtures("broken")
def test_the_report_says_why_triton_cannot_compile(monkeypatch):
    chip = SimpleNamespace(name="Fake", major=9, minor=0, total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chip)  # noqa: ARG005
    assert environment()["backend triton"] == f"not available: {REASON}"


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(("cuda", "wanted"), [(None, "cuda"), ("it is not built", "torch")])
def test_the_next_backend_takes_over_from_a_triton_that_cannot_compile(cuda, wanted, monkeypatch):
    monkeypatch.setattr(CudaBackend, "why_unavailable", lambda self: cuda)  # noqa: ARG005
    monkeypatch.setattr(CudaBackend, "why_not_on", lambda self, device: None)  # noqa: ARG005
    monkeypatch.setattr(CudaBackend, "automatic", True)
    assert backends.select_backend(None, GPU, (FP32,)).name == wanted


def test_what_triton_needs_to_compile_is_found_by_trying(over_the_stub, tmp_path):
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "compiling.py"],
        env=over_the_stub | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout)
    assert found.pop("nothing") is None
    assert all(
        reason.startswith("Triton cannot compile its launcher: ") for reason in found.values()
    )
    assert "Failed to find C compiler" in found["a compiler"]
    assert "Python.h" in found["Python.h"]
    assert "Not a directory" in found["a cache"]
    assert "Not a directory" in found["a cache that can be written"]


# --- which tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float64,), (FP32, torch.float64, FP16)], ids=str)
def test_it_does_not_take_fp64(backend, machine, dtypes):
    machine((9, 0))
    assert backend.why_unsupported(GPU, dtypes) == (
        "its kernels take fp32, fp16 and bf16, not fp64"
    )


def test_it_does_not_take_tensors_of_a_cpu(backend, machine):
    machine((9, 0))
    assert backend.why_unsupported(CPU, (FP32,)) == "its kernels run on NVIDIA GPUs, not on cpu"


def test_the_interpreter_takes_tensors_of_a_cpu_alone(backend, machine):
    machine((9, 0), interpreting=True)
    assert backend.why_unsupported(CPU, (FP32,)) is None
    assert "TRITON_INTERPRET=1" in backend.why_unsupported(GPU, (FP32,))


def test_the_interpreter_works_without_a_gpu_but_is_never_chosen_unasked(backend, machine):
    machine(interpreting=True)
    assert backend.why_unavailable() is None
    assert not backend.automatic
    maps = pair(device="cpu")
    assert fsp.explain([maps], [maps]).backend != "triton"


# --- as one backend among others ------------------------------------------------------------------


def test_it_is_registered_before_torch():
    names = list(backends.registered_backends())
    assert names.index("triton") < names.index("torch")


def test_it_is_available_where_it_works():
    assert fsp.available_backends()[0] == "triton"


def test_fp64_is_refused_by_name():
    maps = pair(torch.float64)
    for call in (
        lambda: fsp.fsp_loss([maps], [maps], backend="triton"),
        lambda: fsp.explain([maps], [maps], backend="triton"),
        lambda: fsp.fsp_matrix(*maps, backend="triton"),
    ):
        with pytest.raises(
            ValueError, match=r"^backend 'triton' cannot serve these tensors: .* not fp64$"
        ):
            call()


def test_fp64_unnamed_is_served_by_torch():
    maps = pair(torch.float64)
    assert fsp.explain([maps], [maps]).backend == "torch"
    assert fsp.fsp_loss([maps], [maps]).dtype == torch.float64


def test_a_backend_that_does_not_work_here_is_an_error_by_name(machine):
    machine()
    maps = pair(device="cpu")
    with pytest.raises(
        RuntimeError,
        match=r"^backend 'triton' is not available on this machine: PyTorch sees no NVIDIA GPU$",
    ):
        fsp.fsp_loss([maps], [maps], backend="triton")
    assert fsp.fsp_loss([maps], [maps]).isfinite()


@pytest.mark.parametrize("how", ["use_backend", "environment"])
def test_it_can_be_asked_for_in_every_way(how, monkeypatch):
    maps = pair()
    if how == "environment":
        monkeypatch.setenv("FSP_KERNELS_BACKEND", "triton")
        plan = fsp.explain([maps], [maps])
    else:
        with fsp.use_backend("triton"):
            plan = fsp.explain([maps], [maps])
    assert plan.backend == "triton"
    assert plan.pairs[0].evaluation == "one pass"


def test_importing_the_library_imports_no_triton():
    # Not even where it is there: TRITON_INTERPRET can still be set.
    code = (
        "import sys, fsp_kernels as fsp, torch\n"
        "x = torch.randn(2, 3, 4, 4)\n"
        "fsp.available_backends(); fsp.fsp_loss([(x, x)], [(x, x)], backend='torch')\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert result.stdout.strip() == "[]"


def test_explain_tells_the_evaluation():
    maps = pair()
    text = str(fsp.explain([maps], [maps], backend="triton"))
    assert "triton backend" in text
    assert "difference, matrix form, one pass" in text
