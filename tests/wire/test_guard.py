"""The guard with processes that stand in for p2pd and for the network process. Signals are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2p_diloco.wire import guard

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
LIMITS = "import os, resource; print(os.environ['GOMEMLIMIT'], *resource.getrlimit(resource.RLIMIT_NOFILE))"
PARENT = "import subprocess, sys, os; print(subprocess.Popen([*sys.argv[1:5], str(os.getpid()), *sys.argv[5:]]).wait())"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sockets = tmp_path / "s"
    sockets.mkdir()
    for name in ("p2pd-u.sock", "p2pclient-u.sock"):
        (sockets / name).touch()
    return sockets


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def command(program: str, folder: Path) -> list[str]:
    """A stand-in for p2pd with p2pd's flag, which Python hands to the program unread."""
    return [sys.executable, "-c", program, f"-listen=/unix{folder}/p2pd-u.sock"]


def guarded(program: str, folder: Path, **more: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command(program, folder)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload,no-any-return]


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def eventually(condition: Callable[[], bool], limit_s: float = 3.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def cpu_s(pid: int) -> float:
    """Returns the processor time that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("code", [0, 3])
def test_ends_with_p2pd_and_its_code(folder: Path, started: list[subprocess.Popen[str]], code: int) -> None:
    process = guarded(f"raise SystemExit({code})", folder)
    started.append(process)
    assert process.wait(5) == code
    assert not folder.exists()


def test_says_which_signal_killed_p2pd(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(SLEEPER, folder)
    started.append(process)
    wait_for_line(process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(5) == 128 + signal.SIGKILL
    assert time.monotonic() - killed < 0.2


def test_asked_to_end(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(SLEEPER, folder)
    started.append(process)
    wait_for_line(process)
    (p2pd,) = children(process.pid)
    process.terminate()
    assert process.wait(1.5) == 128 + signal.SIGTERM
    assert gone(p2pd)
    assert not folder.exists()


def test_does_not_wait_for_ever(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(STUBBORN, folder)
    started.append(process)
    wait_for_line(process)
    process.terminate()
    assert process.wait(guard.TERMINATE_S + 1.5) == 128 + signal.SIGKILL


def test_ctrl_c_in_the_terminal_does_not_reach_p2pd(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(SLEEPER, folder)
    started.append(process)
    wait_for_line(process)
    assert os.getsid(process.pid) == os.getsid(children(process.pid)[0]) == process.pid != os.getsid(0)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has death signals")
def test_p2pd_dies_with_a_killed_guard(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(SLEEPER, folder)
    started.append(process)
    wait_for_line(process)
    (p2pd,) = children(process.pid)
    process.kill()
    assert eventually(lambda: gone(p2pd))


def test_a_signal_ends_one_wait_only() -> None:
    wake, wake_write = os.pipe()
    os.write(wake_write, b"\x11\x12")
    guard.wait_for_signal(wake)
    os.close(wake_write)
    assert os.read(wake, 1) == b""
    os.close(wake)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_does_not_spin_after_p2pd_was_stopped(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(SLEEPER, folder)
    started.append(process)
    wait_for_line(process)
    (p2pd,) = children(process.pid)
    os.kill(p2pd, signal.SIGSTOP)
    assert eventually(lambda: "\nState:\tT" in Path(f"/proc/{p2pd}/status").read_text())
    os.kill(p2pd, signal.SIGCONT)
    before_s = cpu_s(process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4 * guard.POLL_S)
    assert cpu_s(process.pid) - before_s < guard.POLL_S / 2


@pytest.mark.parametrize("death_signal", [True, False])
def test_nothing_outlives_a_killed_parent(
    folder: Path, started: list[subprocess.Popen[str]], tmp_path: Path, death_signal: bool
) -> None:
    """Without a death signal, as on macOS, polling finds out."""
    program = Path(guard.__file__)
    if not death_signal:
        program = tmp_path / "guard.py"
        program.write_text(Path(guard.__file__).read_text().replace('"linux"', '"elsewhere"'))
    arguments = [sys.executable, "-c", PARENT, sys.executable, "-I", "-S", str(program), *command(SLEEPER, folder)]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    started.append(parent)
    wait_for_line(parent)
    (its_guard,) = children(parent.pid)
    (p2pd,) = children(its_guard)
    parent.kill()
    parent.wait()
    assert eventually(lambda: gone(its_guard) and gone(p2pd))
    assert not folder.exists()


def test_leaves_files_of_others(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    (folder / "p2pd-other.sock").touch()
    process = guarded("", folder)
    started.append(process)
    assert process.wait(5) == 0
    assert [path.name for path in folder.iterdir()] == ["p2pd-other.sock"]


def test_limits(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    process = guarded(LIMITS, folder, env={})
    started.append(process)
    memory, soft, hard = wait_for_line(process).split()
    assert memory == guard.MEMORY_LIMIT
    assert int(soft) == int(hard) <= guard.MAX_OPEN_FILES


def test_says_what_it_cannot_start(tmp_path: Path) -> None:
    arguments = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(tmp_path / "none")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=5, check=False)
    assert result.returncode == 127
    assert "none: No such file" in result.stderr
