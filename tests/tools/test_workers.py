"""Work in processes of its own: whatever becomes of it, there is a result or a reason."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tools.workers import MOST_WORDS, Workers, describe

LONG = 60.0  # seconds that no test waits for


def twice(_, value):
    return 2 * value


def fails(_, message):
    raise ValueError(message)


def dies(tell):
    tell("last words")
    os._exit(7)


def crashes(_):
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps(_, started: Path):
    started.touch()
    time.sleep(LONG)


def hangs(tell):
    tell("trying")
    time.sleep(LONG)


def meets(_, own: Path, other: Path):
    """Ends once another call of it runs, too."""
    own.touch()
    while not other.exists():
        time.sleep(0.01)


def counts(tell, most):
    for number in range(most):
        tell(number)
    return most


@pytest.fixture
def workers():
    with Workers(2) as found:
        yield found


def test_a_function_returns_its_value(workers):
    assert workers.run(twice, 21, seconds=LONG) == (42, None)


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (fails, ("too many registers",), "ValueError at test_workers.py:"),
        (dies, (), "its process ended with status 7"),
        (crashes, (), "its process ended with status -11"),
    ],
)
def test_a_failure_is_a_reason(workers, function, arguments, reason):
    found = workers.run(function, *arguments, seconds=LONG)
    assert found.value is None
    assert found.reason.startswith(reason)


def test_a_function_that_takes_too_long_is_ended(workers, tmp_path):
    start = time.monotonic()
    found = workers.run(sleeps, tmp_path / "started", seconds=0.3)
    assert found.reason == "not done after 0.3 s"
    assert time.monotonic() - start < LONG / 2


def test_a_function_that_tells_nothing_for_too_long_is_ended(workers):
    heard: list = []
    found = workers.run(hangs, seconds=LONG, quiet=0.5, on_message=heard.append)
    assert found.reason == "not done after 0.5 s"
    assert heard == ["trying"]


def test_what_it_tells_is_heard_in_order_also_before_it_dies(workers):
    heard: list = []
    assert workers.run(counts, 3, seconds=LONG, on_message=heard.append).value == 3
    assert workers.run(dies, seconds=LONG, on_message=heard.append).value is None
    assert heard == [0, 1, 2, "last words"]


def test_calls_run_side_by_side_and_keep_their_order(workers, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    found = workers.run_all(meets, [(one, two), (two, one)], seconds=LONG, together=LONG)
    assert [x.reason for x in found] == [None, None]
    doubled = workers.run_all(twice, [(i,) for i in range(5)], seconds=LONG, together=LONG)
    assert [x.value for x in doubled] == [0, 2, 4, 6, 8]


def test_calls_that_the_time_for_all_was_too_short_for_have_no_result(workers, tmp_path):
    calls = [(tmp_path / str(i),) for i in range(5)]
    assert workers.run_all(sleeps, calls, seconds=LONG, together=0.3) == [None] * 5
    assert len(list(tmp_path.iterdir())) <= 2


def test_one_call_that_takes_too_long_has_a_reason(workers, tmp_path):
    found = workers.run_all(sleeps, [(tmp_path / "started",)], seconds=0.3, together=LONG)
    assert found == [(None, "not done after 0.3 s")]


def test_leaving_ends_what_still_runs(tmp_path):
    found: list = []
    with Workers(1) as workers:
        running = threading.Thread(
            target=lambda: found.append(workers.run(sleeps, tmp_path / "started", seconds=LONG))
        )
        running.start()
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
    running.join(LONG)
    assert found == [(None, "its process ended with status -9")]
    assert workers.run(twice, 1, seconds=LONG) == (None, "stopped")


def test_an_error_is_told_in_one_short_line():
    try:
        raise RuntimeError("ptxas failed\n" + "word " * 1000)
    except RuntimeError as error:
        found = describe(error)
    assert found.startswith("RuntimeError at test_workers.py:")
    assert ": ptxas failed word" in found
    assert "\n" not in found
    assert len(found) < MOST_WORDS + 60
