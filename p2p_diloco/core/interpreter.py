"""How a Python process of ours begins and ends: what it may import, how it spells paths, where its output goes.

    begin             first of all in the command line: the three standard descriptors are open, text is UTF-8, and the
                      current folder is no place to import from
    end               last of all: what could not be written to standard output is said
    python_command    the same for the processes that we start

Nothing is imported here but what Python itself has imported by then: a ``random.py`` in the current folder is the
user's, and no module of ours.
"""

import errno
import gc
import io
import os
import sys

TYPE_CHECKING = False  # as in typing, which is not imported yet
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SERVING = ("seed", "peer", "swarm", "monitor")
"""Commands that end when the user wants it: to be interrupted is no failure of theirs."""
LASTING = (*SERVING, "simulate", "experiment")
"""Commands that train or serve for hours: they go on when nobody reads any more what they print."""
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""Where the package lies."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RUN_MODULE = f"""\
import sys
sys.path[:] = [folder for folder in sys.path if folder]
if {ROOT!r} not in sys.path: sys.path.insert(0, {ROOT!r})
import runpy
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""``python -m`` without the current folder, which ``-P`` takes off the path from Python 3.11 on only."""


def python_command(*arguments: str) -> list[str]:
    """Returns the command ``python ARGUMENTS``, in which a module that ``-m`` names imports nothing of the current
    folder. What PYTHONPATH names stays."""
    isolated = ["-c", RUN_MODULE] if arguments[0] == "-m" else []
    return [sys.executable, *isolated, *arguments]


class Outlet(io.FileIO):
    """Standard output or error, which may go away: its reader ends, its terminal is closed, its disk is full. What is
    written after that is dropped. The first loss is raised, but not in a lasting command, whose work is worth more, nor
    that of a terminal, whose end a signal tells."""

    def __init__(self, descriptor: int, name: str, *, lasting: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost: OSError | None = None
        self._name, self._lasting = name, lasting

    def write(self, data: "ReadableBuffer", /) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
                if not self._lasting and error.errno != errno.EIO:
                    error.filename = self._name
                    raise
        return memoryview(data).nbytes


def begin(argv: list[str]) -> None:
    """Makes this process ready, before anything else is imported. ``argv``: as ``sys.argv``."""
    open_standard_descriptors()
    use_utf8()
    leave_current_folder()
    lasting = argv[1:2] != [] and argv[1] in LASTING
    sys.stdout = text_stream(Outlet(1, "standard output", lasting=lasting), getattr(sys.stdout, "encoding", "utf-8"))
    sys.stderr = text_stream(Outlet(2, "standard error", lasting=True), getattr(sys.stderr, "encoding", "utf-8"))
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


def end(exit_code: int) -> int:
    """Returns the exit code: 1 instead of 0, with a line that says why, where the disk of standard output is full.

    Python ends sooner from here on: it does not look for garbage once more, for which it takes ten seconds where it has
    imported transformers and the machine is busy."""
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    outlet = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if exit_code or not isinstance(outlet, Outlet) or outlet.lost is None or outlet.lost.errno not in FULL:
        return exit_code
    print(f"error: standard output: {outlet.lost.strerror}; the rest of it is lost, free space", file=sys.stderr)
    return 1


def open_standard_descriptors() -> None:
    """Opens those that are closed, so that they lead nowhere: a socket or file that got one of their numbers would be
    read, or printed to."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            assert opened == descriptor
            os.set_inheritable(descriptor, True)


def use_utf8() -> None:
    """Begins anew in Python's UTF-8 mode where the locale's encoding is another one: a path is bytes of the file system
    whatever the locale. Child processes are in that mode, too."""
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode:
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.orig_argv[0], "-X", "utf8", *sys.orig_argv[1:]])


def leave_current_folder() -> None:
    """Takes the current folder off the path of imports, unless PYTHONPATH names it or the package lies in it. ``python
    -m`` puts it before everything else there, and so does an empty entry of PYTHONPATH, most often by accident."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [folder for folder in named if folder]
    if kept != named != [""]:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)
    here = os.path.realpath(os.curdir)
    if here not in (ROOT, *map(os.path.realpath, kept)):
        sys.path[:] = [folder for folder in sys.path if folder not in ("", here)]


def text_stream(outlet: Outlet, encoding: str) -> io.TextIOWrapper:
    """Returns a text stream to ``outlet`` that shows as numbers what cannot be encoded, like the bytes of a path that
    are no text."""
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=outlet.isatty() or outlet.fileno() == 2,
    )
