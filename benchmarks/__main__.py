"""``python -m benchmarks [CASE ...] [--json FILE] [--markdown]``: a table per case, with the command that makes it.

``--against COMMIT CASE ...`` runs the cases there and here, and fails when they have become slower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import (
    against,
    averager,
    churn,
    compute,
    dropped,
    following,
    homes,
    keeping,
    matrix,
    newcomers,
    onslaught,
    partition,
    scrape,
    serving,
    simulated,
    sleepers,
    stall,
    throughput,
    traffic,
)
from benchmarks.table import Table, layout, markdown
from p2p_diloco.core.errors import UsageError

CASES: dict[str, Callable[[], Table]] = {
    "throughput": throughput.main,
    "stall": stall.main,
    "sleepers": sleepers.main,
    "bytes": traffic.main,
    "averager": averager.main,
    "compute": compute.main,
    "simulated": simulated.main,
    "serving": serving.main,
    "scrape": scrape.main,
    "following": following.main,
    "keeping": keeping.main,
}
"""In the order in which they run: throughput makes the swarm that stall and bytes look at, between its plain runs."""
RELIABILITY: dict[str, Callable[[], Table]] = {
    "matrix": matrix.main,
    "onslaught": onslaught.main,
    "partition": partition.main,
    "churn": churn.main,
}
"""For an hour or so; only when they are asked for."""
HOMES: dict[str, Callable[[], Table]] = {"homes": homes.main}
"""For 23 minutes; only when it is asked for."""
NEWCOMERS: dict[str, Callable[[], Table]] = {"newcomers": newcomers.main}
"""For 3 minutes; only when it is asked for."""
PAPER: dict[str, Callable[[], Table]] = {"dropped": dropped.main}
"""For 20 minutes; only when it is asked for."""


def liars() -> Table:
    """Imported only when it is asked for: the liars are the tests', which need more than the package does."""
    from benchmarks import liars

    return liars.main()


IN_MEMORY: dict[str, Callable[[], Table]] = {"liars": liars}
"""For up to a quarter of an hour; only when it is asked for."""
ALL = CASES | RELIABILITY | HOMES | NEWCOMERS | PAPER | IN_MEMORY
DESCRIPTION = (
    f"By default {', '.join(CASES)}: 9 to 13 minutes. {', '.join(RELIABILITY)}: an hour. "
    f"{', '.join(HOMES)}: 23 minutes. {', '.join(NEWCOMERS)}: 3 minutes. {', '.join(PAPER)}: 20 minutes. "
    f"{', '.join(IN_MEMORY)}: up to 15 minutes."
)


def main(names: list[str], json_file: Path | None, show: Callable[[Table], str]) -> int:
    machine = about_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    cases: dict[str, Any] = {}
    failed = False
    for name in (name for name in ALL if name in names):
        command, load, started_s = f"python -m benchmarks {name}", os.getloadavg()[0], time.monotonic()
        try:
            table = ALL[name]()
        except (RuntimeError, TimeoutError) as error:
            failed = True
            print(f"\n$ {command}\nfailed: {error}", flush=True)
            continue
        seconds = time.monotonic() - started_s
        print(f"\n$ {command}    # {seconds:.0f} s; load average before it {load:.1f}\n{show(table)}", flush=True)
        for bound in table.missed:
            failed = True
            print(f"missed: {bound}", flush=True)
        cases[name] = {"command": command, "seconds": seconds, "load_average": load, **asdict(table)}
    write_figures(json_file, {"machine": machine, "cases": cases})
    return int(failed)


def compare(commit: str, names: list[str], json_file: Path | None, show: Callable[[Table], str]) -> int:
    """Returns 1 when a case is above its bounds, or fails. UsageError where the commit or a case is none."""
    against.check_cases(names)
    full_name, machine = against.resolve(commit), about_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    command = f"python -m benchmarks --against {commit} {' '.join(names)}"
    try:
        table, compared = against.main(full_name, names)
    except RuntimeError as error:
        print(f"\n$ {command}\nfailed: {error}", flush=True)
        return 1
    print(f"\n$ {command}\n{show(table)}", flush=True)
    write_figures(json_file, {"machine": machine, "command": command, "compared": [asdict(one) for one in compared]})
    return int(not all(one.within_bounds for one in compared))


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def about_machine() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "hivemind", "numpy")}
    python, system = platform.python_version(), platform.platform()
    return {"cores": str(os.cpu_count()), "Python": python, **versions, "system": system}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(ALL))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument(
        "--against", metavar="COMMIT", help=f"compare these with that commit: {', '.join(against.TIMED)}"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    show = markdown if arguments.markdown else layout
    if arguments.against is not None:
        try:
            sys.exit(compare(arguments.against, arguments.cases, arguments.json, show))
        except UsageError as error:
            parser.exit(2, f"error: {error}\n")
    if unknown := set(arguments.cases) - set(ALL):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are: {', '.join(ALL)}")
    sys.exit(main(arguments.cases or list(CASES), arguments.json, show))
