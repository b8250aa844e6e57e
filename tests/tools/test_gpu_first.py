"""tools.gpu_first: whatever becomes of a step, the others run and what was finished is kept."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import fake_gpu
import pytest
import torch

from benchmarks.workloads import BY_NAME
from tools import gpu_first
from tools.gpu_first import Step

SLUG = "gpu-nvidia-fake-1"
LONG = 60  # seconds that no test waits for
# In place of Python: notes what it is called with, and does what the step's first argument says.
PYTHON = f"""#!/bin/sh
echo "called with $* ${{CUDAARCHS-no CUDAARCHS}} ${{FSP_KERNELS_CPU-}}"
case "$*" in *--output*)
    for last; do :; done
    mkdir -p "$last/{SLUG}" && echo "$*" >"$last/{SLUG}/results.csv"
esac
if [ "$1" = sleep ]; then
    sleep {LONG} &
    echo $! >"$2"
    wait
fi
case "$*" in *"${{FAILING-nothing}}"*) exit 3; esac
"""


@pytest.fixture
def python(monkeypatch, tmp_path):
    """Every step's interpreter; ``FAILING`` in the environment says which steps fail."""
    fake_gpu.install(monkeypatch)
    program = tmp_path / "python"
    program.write_text(PYTHON)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("CUDAARCHS", raising=False)
    monkeypatch.delenv("FSP_KERNELS_CPU", raising=False)
    return monkeypatch


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "results" / SLUG
    found.mkdir(parents=True)
    return found


def outcomes_in(folder: Path) -> dict[str, str]:
    rows = [line.split(" | ") for line in (folder / "first.md").read_text().splitlines()]
    rows = rows[4 : 4 + [len(row) for row in rows[4:]].index(1)]
    return {name.removeprefix("| "): words for name, words, _ in rows}


NAMES = [
    "install",
    "smoke, triton",
    "smoke, cuda",
    "memcheck",
    *(f"times, {name}" for name in gpu_first.WORKLOADS),
]


def test_all_steps_run_in_order_and_their_results_are_kept(python, folder, capsys):  # noqa: ARG001
    assert gpu_first.main(["--output", str(folder.parent), "--jobs", "4"]) == 0
    assert outcomes_in(folder) == dict.fromkeys(NAMES, "ok")
    names = {"first.md", "first.log", *(f"first-{name}.csv" for name in gpu_first.WORKLOADS)}
    assert {path.name for path in folder.iterdir()} == names
    called = [x for x in (folder / "first.log").read_text().splitlines() if x.startswith("called")]
    assert called[0] == (
        "called with -m pip install --no-build-isolation --no-deps --editable . native 0"
    )
    assert "tools.smoke --backend triton --jobs 4" in called[1]
    assert "tools.smoke --backend cuda" in called[2]
    assert "tools.sanitize --tool memcheck --jobs 4" in called[3]
    assert set(gpu_first.WORKLOADS) <= set(BY_NAME)
    for name in gpu_first.WORKLOADS:
        text = (folder / f"first-{name}.csv").read_text()
        assert f"benchmarks loss --device cuda --workload {name} --dtype bf16 --dtype fp32" in text
    text = (folder / "first.md").read_text()
    for line in ("| gpu | NVIDIA Fake 1 |", f"| torch | {torch.__version__} |", "| commit | "):
        assert line in text
    printed = capsys.readouterr().out
    assert "all went well" in printed
    assert all(line in printed for line in called)


@pytest.mark.parametrize("failing", ["pip install", "triton", "memcheck", "tokens-vit-b"])
def test_a_failing_step_fails_the_whole_but_not_the_rest(python, folder, failing):
    python.setenv("FAILING", failing)
    assert gpu_first.main(["--output", str(folder.parent)]) == 1
    found = outcomes_in(folder)
    assert list(found) == NAMES
    assert sorted(found.values())[:2] == ["FAILED, exit status 3", "ok"]
    assert (folder / "first-wide-late-2048.csv").exists()


@pytest.mark.usefixtures("python")
def test_a_step_is_ended_at_its_limit_with_all_it_has_started(folder, tmp_path):
    child = tmp_path / "child"
    steps = [
        Step("slow", ("sleep", str(child)), 0.5),
        Step("next", ("anything",), LONG),
    ]
    start = time.monotonic()
    found = gpu_first.run_all(steps, folder, seconds=LONG)
    assert time.monotonic() - start < LONG / 2
    assert [x.words for x in found] == ["STOPPED at its limit of 0.5 s", "ok"]
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert outcomes_in(folder) == {"slow": "STOPPED at its limit of 0.5 s", "next": "ok"}


def test_steps_that_there_is_no_time_for_say_so(python, folder):  # noqa: ARG001
    steps = [Step("slow", ("sleep", str(folder / "pid")), LONG), Step("next", ("anything",), LONG)]
    found = gpu_first.run_all(steps, folder, seconds=0.5)
    assert [x.good for x in found] == [False, False]
    assert found[1].words == "NOT STARTED, no time left"


@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_was_finished(python, folder, number):
    run = gpu_first.run

    def interrupted(step, *arguments):
        if step.name == "times, wide-late-512":
            os.kill(os.getpid(), number)
        return run(step, *arguments)

    python.setattr(gpu_first, "run", interrupted)
    assert gpu_first.main(["--output", str(folder.parent)]) == gpu_first.INTERRUPTED
    assert list(outcomes_in(folder)) == NAMES[:6]
    assert (folder / "first-tokens-vit-b.csv").exists()
    assert not (folder / "unfinished").exists()


def test_results_of_an_older_run_are_not_mixed_in(python, folder):
    old = folder / "first-wide-late-512.csv"
    old.touch()
    (folder / "results.csv").write_text("another run's")
    python.setattr(gpu_first, "WORKLOADS", ("tokens-vit-b",))
    gpu_first.main(["--output", str(folder.parent)])
    assert not old.exists()
    assert (folder / "results.csv").read_text() == "another run's"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_first.main(["--output", str(tmp_path)]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
