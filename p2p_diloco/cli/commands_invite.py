"""Commands of a run's owner, where the run is by invitation: who may train in it."""

from __future__ import annotations

import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from p2p_diloco.cli.options import OUTPUT, Flag, Output
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.interruption import importing

if TYPE_CHECKING:
    from p2p_diloco.ledger.seats import OwnedRun

Days = Annotated[int, Parameter(validator=Number(gte=1, lte=3650))]
Places = Annotated[int, Parameter(validator=Number(gte=1, lte=100))]


def invite(
    folder: Path,
    /,
    *,
    name: Annotated[str, Parameter(show_default=False)] = "",
    days: Days | None = None,
    places: Places = 1,
    out: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    listed: Annotated[Flag, Parameter(name="--list", negative="", show_default=False)] = False,
    identity: Path | None = None,
    run_id: str | None = None,
    output: Output = OUTPUT,
) -> None:
    """Make an invitation to a run of yours, for a run file with membership = "invite".

    Parameters
    ----------
    folder
        Of the run's seed, which may be running.
    name
        Whom it is for; everybody in the run can see it.
    days
        How long its peers may take part, 1 to 3650.
    places
        How many of its peers may be in one round, 1 to 100.
    out
        File to write, or - for standard output; NAME.invitation by default.
    listed
        List all invitations instead of making one.
    identity
        Key file of the seed; identity.key in its folder by default.
    run_id
        Which run, where there are several.
    """
    run = owned_run(folder, identity, run_id)
    from p2p_diloco.ledger.seats import write_own

    now_s = time.time()
    if listed:
        for line in listing(run, now_s):
            print(line)
        return
    if not name or days is None:
        raise UsageError("give --name and --days, or --list")
    run.check_name(name, now_s)
    path, shown = out or Path(f"{name}.invitation"), out == Path("-")
    if not shown and path.exists():
        raise UsageError(f"--out {path}: there is such a file; choose another")
    token = run.invite(name, days=days, places=places, now_s=now_s)
    if shown:
        sys.stdout.write(token.text())
        return
    write_own(path, token.text().encode())
    print(f"{path}: invitation of {name}, {many(places)}, until {day(token.invitation.expires_s)}")
    print(f"whoever has it can take part: p2p-diloco peer --initial-peers ADDRESS --invite {shlex.quote(str(path))}")


def revoke(
    folder: Path,
    whom: str,
    /,
    *,
    identity: Path | None = None,
    run_id: str | None = None,
    output: Output = OUTPUT,
) -> None:
    """Take an invitation back: its peers are in no round from the next outer step on.

    Parameters
    ----------
    folder
        Of the run's seed, which may be running.
    whom
        Name of the invitation, or the id that invite --list shows.
    identity
        Key file of the seed; identity.key in its folder by default.
    run_id
        Which run, where there are several.
    """
    run = owned_run(folder, identity, run_id)
    step = run.newest_step() + 1
    for invitation in run.revoke(whom, step=step):
        print(f"{invitation.name} {invitation.token}: revoked from outer step {step} on; the seed tells the others")


def owned_run(folder: Path, identity: Path | None, run_id: str | None) -> OwnedRun:
    """Returns the run in a seed's folder, with its owner's key. UsageError where it is not this seed's, or open."""
    from p2p_diloco.cli.arguments import check_run_id

    check_run_id(run_id)
    with importing("invite"):
        from p2p_diloco.core.identity import Identity
        from p2p_diloco.ledger.folder import find_run
        from p2p_diloco.ledger.seats import OwnedRun

    run = find_run(folder, run_id)
    beside = [place / "identity.key" for place in (folder, run.parent) if (place / "identity.key").is_file()]
    path = identity or next(iter(beside), folder / "identity.key")
    return OwnedRun.open(run, Identity.load(path), path)


def listing(run: OwnedRun, now_s: float) -> list[str]:
    """Returns a line for each invitation."""
    admission = run.manifest.admission(run.revocations())
    lines = []
    for one in run.invitations():
        revoked_from = admission.revoked.get(one.token)
        state = f"until {day(one.expires_s)}" if now_s < one.expires_s else f"expired {day(one.expires_s)}"
        state = state if revoked_from is None else f"revoked from outer step {revoked_from} on"
        lines.append(f"{one.name:<32}  {one.token}  {many(one.places)}, {state}")
    return lines


def many(places: int) -> str:
    """Returns "1 place" or "N places"."""
    return f"{places} place{'' if places == 1 else 's'}"


def day(unix_s: int) -> str:
    """Returns a moment as people of this time zone write it."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M %Z")
