"""tools.tune from its options to the table, with processes and timings that need no GPU."""

from __future__ import annotations

import json
import os
import signal
import time

import fake_gpu
import pytest
import torch

pytest.importorskip("triton")

from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import Configuration, Row, read, write
from tools import tune
from tools.calls import Case
from tools.trials import Situation, candidates
from tools.workers import Result

# Of every family one row, and on the fake GPU's own two that workloads use and one that none does.
CONFIGURATION = Configuration(64, 64, 64, 4, 3)
OTHERS = [
    Row("sm_80", "one_pass", "half", "aligned", 64, CONFIGURATION, None),
    Row("sm_120", "one_pass", "half", "aligned", 64, CONFIGURATION, None),
]
LONE, TF32, HALF = ROWS = [
    Row("sm_90", "one_pass", "half", "odd", 16, CONFIGURATION._replace(block_m=16), None),
    Row("sm_90", "gradients", "tf32", "aligned", 0, CONFIGURATION, None),
    Row("sm_90", "gradients", "half", "aligned", 0, CONFIGURATION, None),
]
CHIP = f"NVIDIA Fake 1, torch {torch.__version__}, triton {tune.triton.__version__}"


class Here:
    """``apart.Workers`` without processes; ``ends`` makes one end at a candidate.

    There is time to compile the first ``compiled`` candidates.
    """

    ends: tuple[Configuration, ...] = ()
    compiled: int | None = None

    def __init__(self, jobs):
        assert jobs >= 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, function, *arguments, seconds, quiet, on_message):
        assert seconds > 0
        assert quiet == tune.QUIET

        def tell(message):
            on_message(message)
            if message[0] == "trying" and message[1] in self.ends:
                raise ChildProcessError

        try:
            return Result(function(tell, *arguments))
        except ChildProcessError:
            return Result(reason="its process ended with status -11")
        except RuntimeError as error:
            return Result(reason=str(error))

    def run_all(self, function, calls, seconds, together):
        assert seconds > 0
        assert together > 0
        found = []
        for arguments in calls[: self.compiled]:
            try:
                found.append(Result(function(None, *arguments)))
            except RuntimeError as error:
                found.append(Result(reason=str(error)))
        return found + [None] * (len(calls) - len(found))


def situations(row, _):
    workload = None if row.access == "odd" else "imagenet-resnet50"
    return [Situation(Case(row, torch.float32), workload, 32)]


class Gpu:
    """What trials would find: ratios by candidate, 1 where nothing is said."""

    def __init__(self):
        self.measured: list[Row] = []
        self.ratios: dict[Configuration, float] = {}
        self.refused: dict[Configuration, str] = {}
        self.before = lambda _: None  # called with each row that is measured
        self.each = lambda _: None  # and with each candidate

    def compile_trial(self, _, table, trial, used):  # noqa: ARG002
        assert trial in table
        return self.refused.get(trial.configuration, "")

    def measure(self, tell, table, row, used, chosen, deadline):  # noqa: ARG002
        assert row in table
        self.measured.append(row)
        self.before(row)
        tell(("in force", [2.0, 0.5]))
        for candidate in chosen:
            if time.time() > deadline:
                return
            tell(("trying", candidate))
            try:
                self.each(candidate)
            except RuntimeError as error:
                tell(("dropped", candidate, str(error)))
                raise
            tell(("timed", candidate, self.ratios.get(candidate, 1.0)))


@pytest.fixture
def gpu(monkeypatch):
    fake_gpu.install(monkeypatch)
    found = Gpu()
    monkeypatch.setattr(tune, "Workers", Here)
    monkeypatch.setattr(Here, "ends", ())
    for name, stub in (
        ("situations", situations),
        ("compile_trial", found.compile_trial),
        ("measure", found.measure),
    ):
        monkeypatch.setattr(tune, name, stub)
    return found


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "configurations.json"
    write([*OTHERS, *ROWS], path)
    return path


def tune_it(table, *arguments):
    return tune.main(["--table", str(table), *arguments])


def by_key(path):
    return {row[:5]: row for row in read(path)}


# --- what comes of a row --------------------------------------------------------------------------


def test_a_faster_candidate_takes_the_row_and_says_where_it_was_measured(gpu, table):
    faster = candidates(HALF)[5]
    gpu.ratios[faster] = 0.8
    assert tune_it(table) == 0
    found = by_key(table)[HALF[:5]]
    assert found.configuration == faster
    assert found.measured.startswith(f"{CHIP}, 20")
    assert tune.is_measured(found, CHIP)


def test_a_gain_within_the_noise_changes_only_what_was_measured(gpu, table):
    gpu.ratios[candidates(HALF)[5]] = 0.98
    tune_it(table)
    found = by_key(table)[HALF[:5]]
    assert found.configuration == HALF.configuration
    assert tune.is_measured(found, CHIP)


def test_the_table_stays_complete_and_other_chips_rows_as_they_are(gpu, table):  # noqa: ARG001
    tune_it(table)
    assert set(by_key(table)) == {row[:5] for row in [*OTHERS, *ROWS]}
    assert [row for row in read(table) if row.family != "sm_90"] == OTHERS


def test_the_packages_table_is_where_one_elsewhere_starts_from(gpu, tmp_path):  # noqa: ARG001
    before = configurations.TABLE.read_bytes()
    new = tmp_path / "new.json"
    assert tune_it(new, "--kernel", "gram", "--kind", "tf32") == 0
    assert set(by_key(new)) == {row[:5] for row in configurations.rows()}
    changed = {row for row in read(new) if row.measured}
    assert {(r.family, r.kernel, r.kind) for r in changed} == {("sm_90", "gram", "tf32")}
    assert configurations.TABLE.read_bytes() == before


# --- order and time -------------------------------------------------------------------------------


def test_rows_that_workloads_use_come_first_and_what_is_used_by_default_before_tf32(gpu, table):
    tune_it(table)
    assert gpu.measured == [HALF, TF32, LONE]


def test_a_second_run_goes_on_with_what_is_left(gpu, table):
    def interrupt(row):
        if row == TF32:
            raise KeyboardInterrupt

    gpu.before = interrupt
    assert tune_it(table) == tune.INTERRUPTED
    gpu.before = lambda _: None
    gpu.measured.clear()
    assert tune_it(table) == 0
    assert gpu.measured == [TF32, LONE]
    gpu.measured.clear()
    assert tune_it(table) == 0
    assert gpu.measured == []
    assert tune_it(table, "--again") == 0
    assert [row[:5] for row in gpu.measured] == [row[:5] for row in (HALF, TF32, LONE)]


@pytest.mark.parametrize("other", ["NVIDIA H100, torch 1, triton 1, 2026-01-01", None])
def test_what_another_chip_or_version_measured_is_measured_again(gpu, table, other):
    write([HALF._replace(measured=other)], table)
    tune_it(table)
    assert len(gpu.measured) == 1


def test_at_the_end_of_its_time_a_row_keeps_the_best_and_is_gone_on_with(gpu, table, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def ten_seconds(_):
        now[0] += 10

    gpu.each = ten_seconds
    second = candidates(HALF)[1]
    gpu.ratios[second] = 0.5
    assert tune_it(table, "--seconds", "45") == 0
    assert gpu.measured == [HALF]
    found = by_key(table)[HALF[:5]]
    assert found.configuration == second
    assert found.measured.endswith(f", 5 of {len(candidates(HALF))} candidates")
    assert not tune.is_measured(found, CHIP)


def test_candidates_there_was_no_time_to_compile_are_left_for_the_next_run(gpu, table, monkeypatch):
    monkeypatch.setattr(Here, "compiled", 3)
    tune_it(table, "--kind", "half", "--kernel", "gradients")
    found = by_key(table)[HALF[:5]]
    assert found.measured.endswith(f", 3 of {len(candidates(HALF))} candidates")
    monkeypatch.setattr(Here, "compiled", None)
    tune_it(table, "--kind", "half", "--kernel", "gradients")
    assert tune.is_measured(by_key(table)[HALF[:5]], CHIP)
    assert len(gpu.measured) == 2


def test_without_time_for_a_row_none_is_begun(gpu, table, capsys):
    assert tune_it(table, "--seconds", "5") == 0
    assert gpu.measured == []
    assert "of 3 rows 0 measured, 0 failed" in capsys.readouterr().out


# --- failures -------------------------------------------------------------------------------------


def test_a_candidate_that_may_not_be_shipped_is_not_timed(gpu, table, capsys):
    spilling = candidates(HALF)[2]
    gpu.refused[spilling], gpu.ratios[spilling] = "spills 8 bytes to the stack", 0.1
    tune_it(table)
    assert by_key(table)[HALF[:5]].configuration == HALF.configuration
    assert f"dropped {tuple(spilling)}: spills 8 bytes" in capsys.readouterr().out


def test_a_candidate_that_ends_its_process_is_dropped_and_the_rest_is_timed(
    gpu, table, capsys, monkeypatch
):
    _, deadly, fast, *_ = candidates(HALF)
    monkeypatch.setattr(Here, "ends", (deadly,))
    gpu.ratios[deadly], gpu.ratios[fast] = 0.1, 0.5
    assert tune_it(table, "--kind", "half", "--kernel", "gradients") == 0
    assert by_key(table)[HALF[:5]].configuration == fast
    assert len(gpu.measured) == 2
    printed = capsys.readouterr().out
    assert f"dropped {tuple(deadly)}: its process ended with status -11" in printed
    assert ", 1 dropped, 0 left" in printed


def test_after_an_error_that_ended_the_gpus_use_the_rest_is_timed(gpu, table, capsys):
    _, deadly, fast, *_ = candidates(HALF)
    gpu.ratios[fast] = 0.5

    def break_the_gpu(candidate):
        if candidate == deadly:  # as trials.measure tells it before its process ends
            raise RuntimeError("CUDA error: misaligned address")

    gpu.each = break_the_gpu
    assert tune_it(table, "--kind", "half", "--kernel", "gradients") == 0
    assert by_key(table)[HALF[:5]].configuration == fast
    assert f"dropped {tuple(deadly)}: CUDA error" in capsys.readouterr().out


def test_a_row_whose_own_configuration_fails_stays_and_the_next_is_tried(gpu, table, capsys):
    def fail(row):
        if row == HALF:
            raise RuntimeError("no situation fits this GPU's memory")

    gpu.before = fail
    assert tune_it(table) == 1
    assert by_key(table)[HALF[:5]] == HALF
    assert gpu.measured == [HALF, TF32, LONE]
    assert "not measured, no situation fits" in capsys.readouterr().out


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_best_known_so_far(gpu, table, number, capsys):
    _, fast, *_ = candidates(TF32)
    gpu.ratios[fast] = 0.5
    third = candidates(TF32)[2]

    def stop(candidate):
        if gpu.measured[-1] == TF32 and candidate == third:
            os.kill(os.getpid(), number)

    gpu.each = stop
    before = signal.getsignal(signal.SIGTERM)
    assert tune_it(table) == tune.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before
    assert gpu.measured == [HALF, TF32]
    found = by_key(table)
    assert tune.is_measured(found[HALF[:5]], CHIP)
    assert found[TF32[:5]].configuration == fast
    assert " 2 of " in found[TF32[:5]].measured
    assert found[LONE[:5]] == LONE
    assert len(found) == 5
    assert "has the best that is known so far" in capsys.readouterr().out


def test_the_table_is_whole_at_every_moment(gpu, table):
    seen: list = []
    gpu.each = lambda _: seen.append(len(json.loads(table.read_text())))
    tune_it(table)
    assert set(seen) == {5}
    assert [path.name for path in table.parent.iterdir()] == [table.name]


# --- the parts together ---------------------------------------------------------------------------


def test_trials_run_in_processes_of_their_own(monkeypatch, table, capsys):
    """Where a process cannot use a GPU, each row says why, and the table stays."""
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(tune, "situations", situations)
    monkeypatch.setattr(tune, "candidates", lambda row: candidates(row)[:2])
    monkeypatch.setattr(tune, "compile_trial", fails_to_compile)
    before = table.read_text()
    assert tune_it(table, "--kernel", "one_pass", "--jobs", "1") == 1
    printed = capsys.readouterr().out
    assert "ptxas says no" in printed
    assert "not measured" in printed
    assert table.read_text() == before


def fails_to_compile(_, table, trial, used):  # noqa: ARG001
    raise RuntimeError("ptxas says no")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_the_table(capsys):
    before = configurations.TABLE.read_text()
    assert tune.main([]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().out
    assert configurations.TABLE.read_text() == before
