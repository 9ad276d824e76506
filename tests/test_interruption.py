from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from p2p_diloco.interruption import importing, interrupted, interruptible, run_cancellable, undisturbed


def test_a_signal_waits_for_the_end_of_what_is_undisturbed() -> None:
    done: list[str] = []

    def work() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
            done.append("worked")

    with interruptible() as received:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert (done, received) == (["worked"], [signal.SIGTERM])
        with undisturbed():
            done.append("undisturbed")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_cancels_work_and_comes_through_when_that_has_tidied_up() -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            done.append("not torn out of the middle")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            done.append("tidied up")

    with interruptible() as received:
        with pytest.raises(KeyboardInterrupt):
            run_cancellable(work())
        assert done == ["not torn out of the middle", "tidied up"]
        assert received == [signal.SIGTERM]


def test_work_that_is_not_interrupted_has_a_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    before = signal.getsignal(signal.SIGINT)
    assert run_cancellable(work()) == 7
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [("peer", signal.SIGINT, 0), ("status", signal.SIGINT, 130), ("status", signal.SIGTERM, 143)],
)
def test_a_signal_in_the_midst_of_an_import_ends_the_process_there(
    command: str, number: signal.Signals, code: int
) -> None:
    program = f"""
import signal
from p2p_diloco.interruption import importing
with importing({command!r}):
    signal.raise_signal({int(number)})
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert interrupted(command, [number]) == code


def test_after_the_imports_signals_do_what_they_did() -> None:
    with interruptible() as received:
        with importing("peer"):
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
