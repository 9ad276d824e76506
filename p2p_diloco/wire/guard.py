"""Parent of p2pd: neither it nor its sockets outlive the network process, however that ends.

    python -I -S guard.py PARENT-PID P2PD -listen=/unix/FOLDER/p2pd-UID.sock ...

    the network process is gone     p2pd is killed
    SIGTERM                         p2pd is asked to end, and killed after 2 s
    p2pd ends                       we exit at once, with its code

and each time the two sockets are removed, with their folder when nothing else is in it. Which of the three it was is
not always known: p2pd itself notices that the network process is gone, and a dying parent's signal may come before it
has stopped to be the parent.

Standard library only, and no site-packages: it starts in 20 ms and costs 10 MB. It has a session of its own, so that
Ctrl+C in a terminal reaches the network process alone, which then says goodbye through a p2pd that is still there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

POLL_S = 0.25
TERMINATE_S = 2.0
MAX_OPEN_FILES = 32768
MEMORY_LIMIT = "1GiB"
GARBAGE_PERCENT = "400"  # collect less often: p2pd is small, and its processor time is what a round waits for
"""Of Go's heap; Go collects harder near it rather than failing."""
PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int | None:
    """Runs ``command`` until it ends or is to end. Returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):
        os.setsid()
    asked_to_stop = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    die_with_parent(signal.SIGTERM)
    sockets = sockets_of(command)

    p2pd = os.fork()
    if p2pd == 0:
        become_p2pd(os.getppid(), command)
    code = None
    while code is None and os.getppid() == parent and not asked_to_stop:
        wait_for_signal(wake)
        code = exit_code(p2pd)
    if code is None:
        orphaned = os.getppid() != parent
        code = end(p2pd, 0.0 if orphaned else TERMINATE_S)
    for path in sockets:
        with contextlib.suppress(OSError):
            os.unlink(path)
    for folder in {os.path.dirname(path) for path in sockets}:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return code


def wait_for_signal(wake: int) -> None:
    """Returns as soon as a signal has come, or after ``POLL_S``. It takes the bytes that signals have left in the pipe
    ``wake``: a stopped p2pd is a signal, too, and a byte that stays would end every later wait at once."""
    if select.select([wake], [], [], POLL_S)[0]:
        os.read(wake, 4096)


def become_p2pd(guard: int, command: list[str]) -> None:
    """Turns this process into p2pd; it never returns."""
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)
        limit_open_files()
        os.environ.setdefault("GOMEMLIMIT", MEMORY_LIMIT)
        os.environ.setdefault("GOGC", GARBAGE_PERCENT)
        os.execv(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(127)


def die_with_parent(number: int) -> None:
    """Has the system send this process the signal ``number`` when its parent ends. On Linux only; elsewhere polling
    finds that the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def limit_open_files() -> None:
    """Lets this process have as many open files as p2pd or the network process may need, one for every stream. The hard
    limit is set, too: Go raises the soft one to it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def sockets_of(command: list[str]) -> list[str]:
    """Returns p2pd's own socket, and the one beside it on which the network process accepts streams."""
    prefix = "-listen=/unix"
    listen = [argument[len(prefix) :] for argument in command if argument.startswith(prefix + "/")]
    return [os.path.join(os.path.dirname(path), os.path.basename(path).replace("p2pd-", name, 1))
            for path in listen for name in ("p2pd-", "p2pclient-")]  # fmt: skip


def exit_code(process: int, options: int = os.WNOHANG) -> int | None:
    """Returns a child's exit code: None while it runs; 128 and the signal's number where a signal ended it, as shells
    have it."""
    done, status = os.waitpid(process, options)
    if done == 0:
        return None
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def end(process: int, patience_s: float) -> int | None:
    """Ends a child: asks it to, unless ``patience_s`` is 0, and kills it after that time. Returns its exit code."""
    if patience_s:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        code = exit_code(process)
        if code is not None:
            return code
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    return exit_code(process, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
