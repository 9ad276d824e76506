"""The command line. Checks what the user gave before anything is started, runs one command, and ends in an exit code.

    0    done; or a seed, peer, swarm or monitor stopped by Ctrl+C or SIGTERM
    1    something failed: network, disk, data; or doctor has found a problem
    2    a flag, file or address that the user can mend
    130, 143    any other command, interrupted

Whatever goes wrong is one line on stderr. Options of a command may also come from the environment,
``P2P_DILOCO_PEER_THREADS`` for one command and ``P2P_DILOCO_THREADS`` for all, and from a TOML file named by
``--config``; the command line comes before the environment, and that before the file.

torch takes seconds to import, so the commands (``commands_*``) import what they need themselves.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from p2p_diloco import __version__
from p2p_diloco.cli.arguments import refuse_tokens
from p2p_diloco.cli.commands_invite import invite, revoke
from p2p_diloco.cli.commands_join import peer, seed, swarm
from p2p_diloco.cli.commands_look import doctor, manifest, monitor, status
from p2p_diloco.cli.commands_model import export, sample
from p2p_diloco.cli.commands_study import experiment, simulate
from p2p_diloco.cli.commands_verify import verify
from p2p_diloco.cli.options import OUTPUT, settings
from p2p_diloco.core.config import compiled_folder
from p2p_diloco.core.errors import LocalError, Stopped, disk_failure
from p2p_diloco.core.interruption import interrupted, interruptible
from p2p_diloco.look.display import STDOUT, is_live, plain

log = logging.getLogger(__name__)

app = App(
    name="p2p-diloco",
    version=__version__,
    help="Volunteers on the internet train one language model together.",
    help_format="plaintext",
    help_epilogue="Options may also come from the environment: P2P_DILOCO_PEER_THREADS=2 is --threads 2 of peer, "
    "P2P_DILOCO_THREADS=2 that of every command.",
    config=settings,
)
COMMANDS: tuple[Callable[..., int | None], ...] = (
    *(seed, peer, swarm),
    *(invite, revoke),
    *(status, monitor, export, sample, doctor, manifest, verify),
    *(experiment, simulate),
)
"""In the order in which --help lists them."""
for place, function in enumerate(COMMANDS):
    app.command(function, sort_key=place)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, and returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command, output = "", OUTPUT
    received: list[int] = []
    try:
        # torch makes this folder when it is imported, by default in the temporary folder, and leaves it there.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_folder()))
        words = sys.argv[1:] if argv is None else argv
        refuse_tokens(words)
        function, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False, verbose=False)
        command, output = function.__name__, bound.arguments.get("output", OUTPUT)
        set_up_logging(command, verbose=output.verbose)
        with interruptible() as received:
            result = function(*bound.args, **bound.kwargs)
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return interrupted(command, received)
    except CycloptsError as error:
        return fail(str(error), 2)
    except Stopped as error:
        log.info("%s", error)
        return error.exit_code
    except LocalError as error:
        return fail(str(error), error.exit_code, debug=output.debug)
    except Exception as error:
        if received:  # some imports turn an interruption into an error of their own
            return interrupted(command, received)
        if isinstance(error, BrokenPipeError) and error.filename is not None:
            return 1  # nobody reads on: ``interpreter.Outlet`` names itself; any other pipe is not meant to break
        if isinstance(error, OSError) and (full := disk_failure(error)) is not None:
            return fail(str(full), full.exit_code, debug=output.debug)
        what = f"internal error: {type(error).__name__}: {error}; run again with --debug and report it"
        return fail(what, 1, debug=output.debug)


def fail(message: str, exit_code: int, *, debug: bool = False) -> int:
    """Prints the error in one line, and returns the exit code."""
    if debug:
        traceback.print_exc()
    print(f"error: {plain(' '.join(message.split()))}", file=sys.stderr)
    return exit_code


class PlainFormatter(logging.Formatter):
    """Formats log lines so that what they quote of other peers shows, and does nothing else."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t")


def set_up_logging(command: str, *, verbose: bool) -> None:
    """Logs ours from INFO on, everybody else's from WARNING on: to stderr, or above the live table."""
    handler: logging.Handler
    if command in ("seed", "peer") and is_live(STDOUT):
        handler = RichHandler(console=STDOUT, show_path=False, highlighter=NullHighlighter(), log_time_format="%X")
        handler.setFormatter(PlainFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    quietly = logging.ERROR if command == "doctor" else logging.INFO  # its findings say it all
    logging.getLogger("p2p_diloco").setLevel(logging.DEBUG if verbose else quietly)
    logging.captureWarnings(True)
