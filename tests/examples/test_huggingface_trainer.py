"""``examples/huggingface_trainer.py`` distils what it says, with nothing downloaded."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"


@pytest.mark.slow
def test_the_fsp_loss_falls_and_the_student_learns(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("huggingface_trainer", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        script.main(steps=100)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    start, end = map(float, re.search(r"^FSP loss: (\S+) -> (\S+)$", printed, re.M).groups())
    assert 0 < end < 0.5 * start
    [found] = re.findall(r"^accuracy of the student: (\S+) -> (\S+)$", printed, re.M)
    before, after = map(float, found)
    assert before < 0.3 < after
