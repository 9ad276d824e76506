from __future__ import annotations

import asyncio
import io
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from p2p_diloco.core.errors import Stopped
from p2p_diloco.core.interruption import (
    STEP_GRACE_S,
    ending_signals,
    importing,
    interrupted,
    interruptible,
    run_cancellable,
    stop_signals,
    undisturbed,
)


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """Also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


def test_a_closed_terminal_that_is_told_twice_leaves_the_tidying_up_alone() -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
            await asyncio.sleep(60)
        finally:
            signal.raise_signal(signal.SIGHUP)
            await asyncio.sleep(0)
            done.append("tidied up")

    with interruptible() as received:
        with pytest.raises(KeyboardInterrupt):
            run_cancellable(work())
        assert done == ["tidied up"]
        assert received == [signal.SIGHUP]


def test_work_that_is_not_interrupted_has_a_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    before = signal.getsignal(signal.SIGINT)
    assert run_cancellable(work()) == 7
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        *(("peer", signal.SIGINT, 0), ("status", signal.SIGINT, 130), ("status", signal.SIGTERM, 143)),
        *(("swarm", signal.SIGHUP, 0), ("simulate", signal.SIGHUP, 129)),
    ],
)
def test_a_signal_in_the_midst_of_an_import_ends_the_process_there(
    command: str, number: signal.Signals, code: int
) -> None:
    program = f"""
import signal
from p2p_diloco.core.interruption import importing
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


def test_a_closed_terminal_is_told_twice_and_ends_once() -> None:
    """By the shell, and by the system when the shell is gone: the goodbye is not cut short."""
    done: list[str] = []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            done.append("said goodbye")

    with interruptible() as received, pytest.raises(KeyboardInterrupt):
        command()
    assert (done, received) == (["said goodbye"], [signal.SIGHUP] * 2)


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_ends_training_once(first: signal.Signals) -> None:
    with stop_signals() as stop:
        with pytest.raises(Stopped):
            signal.raise_signal(first)
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested
    with stop_signals() as watched, watched.when_checked():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGHUP)
        assert watched.requested


def test_under_nohup_a_closed_terminal_cancels_no_work() -> None:
    async def work() -> int:
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0)
        return 7

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_cancellable(work()) == 7
    except KeyboardInterrupt:
        pytest.fail("it was cancelled")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as received, stop_signals() as stop, undisturbed() as waiting:
            signal.raise_signal(signal.SIGHUP)
        assert (received, stop.requested, waiting) == ([], False, [])
        assert ending_signals() == (signal.SIGINT, signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in ending_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


# -- a polite end: Stopped, at once or when what is under way has ended -----------------------------------------------


def test_a_signal_stops_at_once_but_for_an_inner_step() -> None:
    with stop_signals() as stop:
        with stop.after_inner_step():
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested, "and the inner step goes on"
            with pytest.raises(Stopped), stop.at_once():
                pytest.fail("nothing else begins")
        assert signal.alarm(0) == 0, "nobody is interrupted later"
    with stop_signals() as stop, pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_the_midst_of_a_line_of_the_log_comes_through() -> None:
    class Interrupted:
        def __str__(self) -> str:
            signal.raise_signal(signal.SIGTERM)
            return "never"

    handler = logging.StreamHandler(io.StringIO())
    with stop_signals(), pytest.raises(Stopped):
        handler.handle(logging.LogRecord("train", logging.INFO, __file__, 1, "%s", (Interrupted(),), None))


def test_an_inner_step_has_some_seconds_to_end_in() -> None:
    with stop_signals() as stop, stop.after_inner_step():
        signal.raise_signal(signal.SIGTERM)
        assert 0 < signal.alarm(0) <= STEP_GRACE_S
        with pytest.raises(Stopped, match="in the middle of an inner step"):
            signal.raise_signal(signal.SIGALRM)


def test_the_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        with pytest.raises(Stopped):
            stop.on_signal(signal.SIGTERM, None)
        assert raised == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_checks_is_stopped_there_and_nowhere_else() -> None:
    with stop_signals() as stop, stop.when_checked():
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert signal.alarm(0) == 0, "however long it takes"
        with pytest.raises(Stopped):
            stop.check()


def test_what_comes_between_two_waits_is_over_with_its_block() -> None:
    with stop_signals() as stop, stop.when_checked():
        with stop.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested, "and it is waited for a check"
