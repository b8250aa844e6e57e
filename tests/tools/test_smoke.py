"""The smoke test for sanitizers, on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fsp_kernels as fsp
from tools import smoke
from tools.smoke import CASES, Case, alike


def test_every_case_is_right_and_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--backend", "torch", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(CASES) + 1
    assert all(line.endswith("ok") for line in printed[:-1])


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_wrong_case_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    loss = fsp.fsp_loss
    monkeypatch.setattr(fsp, "fsp_loss", lambda *a, **k: loss(*a, **k) * value)
    monkeypatch.setattr(smoke, "CASES", (Case("scaled", alike(4, 3, 3)),))
    assert smoke.main(["--backend", "torch", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_shares_together_are_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Case] = []
    monkeypatch.setattr(smoke, "error_of", lambda case, *_: ran.append(case) or 0.0)
    for number in (1, 2, 3):
        before = len(ran)
        options = ["--backend", "torch", "--device", "cpu", "--share", f"{number}/3"]
        assert smoke.main(options) == 0
        assert abs(len(ran) - before - len(CASES) / 3) < 1
    assert sorted(ran, key=CASES.index) == list(CASES)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b"])
def test_a_share_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smoke.main(["--backend", "torch", "--share", text])
    assert "must be like 2/4" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [None, "2/3"])
def test_side_by_side_each_process_has_a_share_and_a_failing_one_fails_all(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    failing: str | None,
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*"\ncase "$*" in *{failing}*) exit 1;; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    status = smoke.main(["--backend", "triton", "--device", "cpu", "--jobs", "3"])
    assert status == (failing is not None)
    command = "-m tools.smoke --backend triton --device cpu --share"
    assert capsys.readouterr().out.splitlines() == [f"{command} {i}/3" for i in (1, 2, 3)]


def test_cases_cover_what_kernels_are_chosen_by() -> None:
    assert {c.dtype for c in CASES} == {"fp32", "bf16", "fp16"}
    assert {c.norm for c in CASES} == {"frobenius", "mse", "column"}
    assert {c.pool for c in CASES} == {"max", "avg"}
    assert {c.layout for c in CASES} == {"contiguous", "channels_last", "tokens", "unaligned"}
    assert {c.teacher for c in CASES} == {"maps", "gradients", "ready"}
    assert any(not c.student for c in CASES)
    assert any(c.matrix for c in CASES)


def test_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


def test_an_unaligned_map_starts_one_element_late() -> None:
    x = torch.rand(2, 3, 4)
    y = smoke.placed(x, "unaligned", "cpu")
    assert torch.equal(x, y)
    assert y.storage_offset() == 1


@pytest.mark.parametrize(
    ("layout", "stride"), [("contiguous", (60, 20, 5, 1)), ("channels_last", (60, 1, 15, 3))]
)
def test_a_copy_keeps_its_strides(layout: str, stride: tuple[int, ...]) -> None:
    x = smoke.laid_out((2, 3, 4, 5), layout, torch.Generator())
    assert smoke.placed(x, layout, "cpu").stride() == stride
