"""``python -m p2p_diloco`` and the console script. Ctrl+C is quiet from here on, while the rest is still imported."""

import os
import signal
import sys
from types import FrameType

from p2p_diloco import SERVING


def end_quietly(number: int, _frame: FrameType | None) -> None:
    """At once, for an exception in the midst of imports may get lost: Python ignores those in callbacks of its own."""
    os._exit(0 if sys.argv[1:2] and sys.argv[1] in SERVING else 128 + number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_quietly)
    from p2p_diloco.cli import main as run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
