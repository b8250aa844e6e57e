"""The first signal is noted, the second obeyed, and afterwards all is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from fsp_kernels.distill.interruption import InterruptedRunError, Interruption

pytestmark = pytest.mark.usefixtures("heeding_ctrl_c")
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_the_first_signal_is_noted(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert interruption.requested == 0
        os.kill(os.getpid(), number)
        assert interruption.requested == number


def test_the_second_ctrl_c_is_obeyed() -> None:
    def interrupt_twice() -> None:
        with Interruption():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_what_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert interruption.requested == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested == signal.SIGTERM


@BOTH
def test_a_sigterm_after_any_other_signal_ends_the_process(number: signal.Signals) -> None:
    code = f"""
import os
from fsp_kernels.distill.interruption import Interruption
with Interruption():
    os.kill(os.getpid(), {int(number)})
    print("alive", flush=True)
    os.kill(os.getpid(), {int(signal.SIGTERM)})
    print("still alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "alive\n"
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("end", ["alone", "signalled", "by an error"])
def test_handlers_are_as_they_were_after_the_block(end: str) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with suppress(KeyError), Interruption():
        inside = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        if end == "signalled":
            os.kill(os.getpid(), signal.SIGTERM)
        elif end == "by an error":
            raise KeyError
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert after == before
    assert not set(inside) & set(before)


def test_a_block_can_be_entered_again() -> None:
    interruption = Interruption()
    for _ in range(2):
        with interruption:
            os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested == signal.SIGTERM


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_is_a_shells_for_the_signal(number: signal.Signals, code: int) -> None:
    error = InterruptedRunError("stopped", number)
    assert error.exit_code == code
    assert str(error) == "stopped"
