"""``python -m p2p_diloco`` and the console script. Ctrl+C is quiet from here on, while the rest is still imported."""

import signal
import sys
from types import FrameType


def stop_quietly(number: int, _frame: FrameType | None) -> None:
    sys.exit(0 if sys.argv[1:2] in (["seed"], ["peer"], ["swarm"]) else 128 + number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_quietly)
    from p2p_diloco.cli import main as run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
