"""What is recorded with a result."""

import json
import platform
import re
from types import SimpleNamespace

import fake_gpu
import pytest
import torch

from benchmarks import environment


def test_the_machine_is_described_without_its_name():
    described = environment.machine()
    assert described["threads"] == torch.get_num_threads()
    assert described["torch"] == torch.__version__
    assert platform.node() not in json.dumps(described).split('"')
    assert all(described.values())
    assert re.fullmatch(r"cpu-[a-z0-9-]+-cores", environment.device_slug())


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (SimpleNamespace(instruction_sets=["avx512", "avx2"]), "avx512"),
        (SimpleNamespace(instruction_sets=[]), "none"),
        ("its extension _cpu was not built", "its extension _cpu was not built"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_instruction_set_of_our_kernels_is_recorded(monkeypatch, module, said):
    monkeypatch.setattr(environment, "compiled_module", lambda name: {"cpu": module}[name])
    assert environment.machine()["cpu_kernels"] == said


def test_the_commit_is_known_or_said_not_to_be():
    words = r"([0-9a-f]{40}|none)( with uncommitted changes)?"
    assert re.fullmatch(words, environment.commit())


def test_a_gpu_is_described_with_what_drives_it(monkeypatch):
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(environment, "output_of", lambda *_: "580.1, 1980 MHz, 1980 MHz, 2619 MHz")
    described = environment.machine("cuda")
    assert described["gpu"] == "NVIDIA Fake 1"
    assert described["driver"] == "580.1"
    assert described["sm_clock_after_the_run"] == "1980 MHz"
    assert described["torch"] == torch.__version__
    assert environment.device_slug("cuda") == "gpu-nvidia-fake-1"
    monkeypatch.setattr(environment, "output_of", lambda *_: "")  # no nvidia-smi
    assert "driver" not in environment.machine("cuda")
