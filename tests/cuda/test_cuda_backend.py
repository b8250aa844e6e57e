"""When the CUDA C++ backend serves, and what it says when it does not."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from calls import BF16, DEVICE, FP16, FP32
from cuda_entries import plain_product
from cuda_on_host.module import extension_is

import fsp_kernels as fsp
from fsp_kernels import backends, functional
from fsp_kernels.backends import compiled, cuda
from fsp_kernels.backends.cuda import extension

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOO_OLD = "the provided PTX was compiled with an unsupported toolchain."


@pytest.fixture(autouse=True)
def _nothing_remembered():
    functional._checked_plan.cache_clear()
    yield
    functional._checked_plan.cache_clear()


@pytest.fixture
def cuda_backend():
    return backends.registered_backends()["cuda"]


@pytest.fixture
def _missing(monkeypatch, tmp_path):
    """Nothing was built, and nothing says why."""
    monkeypatch.setattr(compiled, "NOTES", tmp_path)
    with extension_is(None):
        yield


@pytest.fixture
def machine(monkeypatch):
    """A machine that is not this one: its GPUs by compute capability.

    The list that it returns grows by each GPU that is made current, and ``None`` when it no longer
    is.
    """
    current: list[int | None] = []

    @contextlib.contextmanager
    def made_current(index):
        current.append(index)
        yield
        current.append(None)

    def _machine(*capabilities: tuple[int, int]):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[device]
        )
        monkeypatch.setattr(torch.cuda, "device", made_current)
        monkeypatch.setattr(extension, "raw_stream", lambda device: 1000 + device.index)
        extension.why_unavailable.cache_clear()
        return current

    return _machine


@pytest.fixture
def built():
    """An extension for GPUs: what CUDA says of each, by device and stream, is to be filled in."""
    said: dict[tuple[int, int], str] = {}
    module = SimpleNamespace(
        architectures="80-real 90-real 90-virtual",
        why_not_on=lambda device, stream: said.get((device, stream), ""),
    )
    with extension_is(module):
        yield said


def pair(dtype=FP32, device=DEVICE):
    return tuple(torch.randn(2, c, 3, 3, device=device).to(dtype) for c in (4, 5))


# --- on every call --------------------------------------------------------------------------------


@pytest.mark.usefixtures("built")
def test_the_machine_is_asked_once(cuda_backend, machine, monkeypatch):
    machine((9, 0))
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not asked.append(1))
    assert [cuda_backend.why_unavailable() for _ in range(3)] == [None] * 3
    assert len(asked) == 1


# --- with which extension -------------------------------------------------------------------------


@pytest.mark.usefixtures("_missing")
def test_it_needs_its_extension(cuda_backend):
    assert cuda_backend.why_unavailable() == (
        f"its extension is not built: {compiled.HOW_TO_BUILD['cuda']}"
    )


# --- on which machines ----------------------------------------------------------------------------


@pytest.mark.usefixtures("built")
def test_it_needs_a_gpu(cuda_backend, machine):
    machine()
    assert cuda_backend.why_unavailable() == "PyTorch sees no NVIDIA GPU"


@pytest.mark.usefixtures("built")
def test_it_needs_a_gpu_of_nvidia(cuda_backend, machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in cuda_backend.why_unavailable()


@pytest.mark.usefixtures("built")
def test_it_works_where_its_extension_has_kernels(cuda_backend, machine):
    machine((9, 0))
    assert cuda_backend.why_unavailable() is None
    assert cuda_backend.automatic
    assert cuda_backend.why_unsupported(GPU, (FP32, FP16, BF16)) is None


@pytest.mark.usefixtures("built")
def test_a_chip_that_it_was_not_built_for_is_told_from_an_extension_that_is_missing(
    cuda_backend, machine
):
    machine((7, 0))
    reason = (
        "its extension, built for 80-real 90-real 90-virtual, has no kernels for cuda:0 (sm_70)"
    )
    assert cuda_backend.why_unavailable() == reason
    assert cuda_backend.why_unsupported(GPU, (FP32,)) == reason


@pytest.mark.usefixtures("built")
def test_one_gpu_with_kernels_is_enough_and_the_other_is_not_served(cuda_backend, machine):
    machine((7, 0), (9, 0))
    assert cuda_backend.why_unavailable() is None
    assert "cuda:0 (sm_70)" in cuda_backend.why_unsupported(torch.device("cuda", 0), (FP32,))
    assert cuda_backend.why_unsupported(torch.device("cuda", 1), (FP32,)) is None


@pytest.mark.usefixtures("built")
def test_no_gpu_is_used_to_tell_whether_there_is_one(cuda_backend, machine):
    current = machine((9, 0), (9, 0))
    assert cuda_backend.why_unavailable() is None
    assert current == []


def test_kernels_are_tried_on_the_gpu_in_question_alone(cuda_backend, machine, built):
    built[1, 1001] = TOO_OLD  # in the current stream of cuda:1
    current = machine((9, 0), (9, 0))
    assert cuda_backend.why_unsupported(torch.device("cuda", 1), (FP32,)) == (
        f"its extension does not run on cuda:1: {TOO_OLD}"
    )
    assert current == [1, None]
    assert cuda_backend.why_unsupported(torch.device("cuda", 0), (FP32,)) is None


@pytest.mark.parametrize(
    ("code", "chips"),
    [
        ("80-real", "8.0 8.6 8.9"),
        ("86-real", "8.6 8.9"),
        ("90-virtual", "9.0 10.0 12.1"),
        ("80", "8.0 8.6 8.9 9.0 10.0 12.1"),
        ("90a", "9.0"),
        ("100f", "10.0"),
        ("120-real", "12.1"),
        ("all", "7.5 8.0 8.6 8.9 9.0 10.0 12.1"),
    ],
)
def test_code_runs_on_the_chips_that_cuda_says(code, chips):
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)]
    found = [
        f"{major}.{minor}" for major, minor in every if extension._runs_on((major, minor), code)
    ]
    assert " ".join(found) == chips


# --- which tensors --------------------------------------------------------------------------------


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtypes", [(torch.float64,), (FP32, torch.float64, FP16)], ids=str)
def test_it_does_not_take_fp64(cuda_backend, machine, dtypes):
    machine((9, 0))
    assert cuda_backend.why_unsupported(GPU, dtypes) == (
        "its kernels take fp32, fp16 and bf16, not fp64"
    )


@pytest.mark.usefixtures("built")
def test_it_does_not_take_tensors_of_a_cpu(cuda_backend, machine):
    machine((9, 0))
    assert cuda_backend.why_unsupported(CPU, (FP32,)) == (
        "its kernels run on NVIDIA GPUs, not on cpu"
    )


def test_a_build_for_the_host_takes_tensors_of_a_cpu_alone(cuda_backend):
    with extension_is(SimpleNamespace(architectures="host")):
        assert cuda_backend.why_unsupported(CPU, (FP32,)) is None
        assert "built for the host" in cuda_backend.why_unsupported(GPU, (FP32,))


def test_a_build_for_the_host_works_without_a_gpu_but_is_never_chosen_unasked(
    cuda_backend, machine
):
    machine()
    maps = pair(device="cpu")
    with extension_is(SimpleNamespace(architectures="host")):
        assert cuda_backend.why_unavailable() is None
        assert not cuda_backend.automatic
        assert fsp.explain([maps], [maps]).backend != "cuda"


# --- as one backend among others ------------------------------------------------------------------


def test_it_is_registered_after_triton_and_before_torch():
    names = list(backends.registered_backends())
    assert names.index("triton") < names.index("cuda") < names.index("torch")


@pytest.mark.usefixtures("cuda_extension")
def test_it_is_available_where_it_works():
    assert "cuda" in fsp.available_backends()


@pytest.mark.usefixtures("cuda_extension")
def test_fp64_is_refused_by_name():
    maps = pair(torch.float64)
    for call in (
        lambda: fsp.fsp_loss([maps], [maps], backend="cuda"),
        lambda: fsp.explain([maps], [maps], backend="cuda"),
        lambda: fsp.fsp_matrix(*maps, backend="cuda"),
    ):
        with pytest.raises(
            ValueError, match=r"^backend 'cuda' cannot serve these tensors: .* not fp64$"
        ):
            call()


@pytest.mark.usefixtures("_missing")
def test_a_backend_that_does_not_work_here_is_an_error_by_name():
    maps = pair()
    with pytest.raises(
        RuntimeError,
        match=r"^backend 'cuda' is not available on this machine: its extension is not built: ",
    ):
        fsp.fsp_loss([maps], [maps], backend="cuda")
    assert fsp.fsp_loss([maps], [maps]).isfinite()


@pytest.mark.usefixtures("cuda_extension")
@pytest.mark.parametrize("how", ["use_backend", "environment"])
def test_it_can_be_asked_for_in_every_way(how, monkeypatch):
    maps = pair()
    if how == "environment":
        monkeypatch.setenv("FSP_KERNELS_BACKEND", "cuda")
        plan = fsp.explain([maps], [maps])
    else:
        with fsp.use_backend("cuda"):
            plan = fsp.explain([maps], [maps])
    assert plan.backend == "cuda"
    assert plan.pairs[0].evaluation == "one pass"


@pytest.mark.usefixtures("cuda_extension")
def test_explain_tells_the_evaluation():
    maps = pair()
    text = str(fsp.explain([maps], [maps], backend="cuda"))
    assert "cuda backend" in text
    assert "difference, matrix form, one pass" in text


# --- errors of CUDA -------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
def test_an_error_of_cuda_names_the_call_and_what_cuda_says(programs, monkeypatch):
    maps = pair()
    with monkeypatch.context() as patch:
        patch.setattr(cuda.loss, "index_of", lambda _: 99)
        with pytest.raises(
            RuntimeError,
            match=r"^fsp_kernels: fsp_loss of \(B=2, 4 x 5, K=9\): "
            r"CUDA error: invalid device ordinal \(cudaErrorInvalidDevice\)$",
        ):
            fsp.fsp_loss([maps], [maps])
    assert len(programs) == 0
    assert fsp.fsp_loss([maps], [maps]) == 0


@pytest.mark.usefixtures("backend")
def test_an_error_of_a_launch_names_the_kernel():
    module = extension.module()
    nothing = plain_product(module, samples=0)  # so the launch has no blocks
    program = module.LaunchSequence(0, "a call of no samples")
    program.add_residual(module.Scalar.fp32, [nothing])
    with pytest.raises(
        RuntimeError,
        match=r"^fsp_kernels: fsp_residual on a call of no samples: CUDA error: "
        r"invalid configuration argument \(cudaErrorInvalidConfiguration\)$",
    ):
        program(0, [], [1.0])
