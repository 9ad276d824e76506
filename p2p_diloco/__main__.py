"""``python -m p2p_diloco`` and the console script. Ctrl+C is quiet from here on, while the rest is still imported."""

import os
import sys

from p2p_diloco.core.interpreter import SERVING, begin, end


def end_quietly(number: int, _frame: object) -> None:
    """Ends the process at once, for an exception in the midst of imports may get lost: Python ignores those in
    callbacks of its own."""
    os._exit(0 if sys.argv[1:2] and sys.argv[1] in SERVING else 128 + number)


def main() -> int:
    begin(sys.argv)
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_quietly)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, end_quietly)
    from p2p_diloco.cli.cli import main as run_command

    return end(run_command())


if __name__ == "__main__":
    sys.exit(main())
