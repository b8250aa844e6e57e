"""What is recorded with a result."""

from __future__ import annotations

import json
import platform
import re

import torch

from benchmarks import environment


def test_the_machine_is_described_without_its_name() -> None:
    described = environment.machine()
    assert described["threads"] == torch.get_num_threads()
    assert described["torch"] == torch.__version__
    assert platform.node() not in json.dumps(described).split('"')
    assert all(described.values())


def test_the_commit_is_known_or_said_not_to_be() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}|none", environment.commit()["id"])


def test_a_device_has_a_folder_name() -> None:
    assert re.fullmatch(r"cpu-[a-z0-9-]+-cores", environment.device_slug())


def test_the_load_is_a_number_of_processes() -> None:
    assert environment.load() >= 0
