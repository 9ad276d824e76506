"""The command that checks a run on this disk from its first outer step to its last: verify."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_diloco.cli.arguments import check_run_id
from p2p_diloco.cli.options import OUTPUT, JsonFlag, Output
from p2p_diloco.core.errors import LedgerError, LocalError, OtherProtocol, UsageError
from p2p_diloco.core.interruption import importing
from p2p_diloco.look.display import plain

if TYPE_CHECKING:
    from p2p_diloco.ledger.verify import Verified


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Holds what ``verify --json`` prints; nothing but a reason, where nothing could be verified."""

    ok: bool = False
    """All that is here is sound."""
    anchored: bool = False
    """The run's owner has signed a state of this history."""
    run_id: str = ""
    owner: str = ""
    step: int = 0
    """The outer step to which sound certificates, and snapshots, lead."""
    head: str = ""
    certificates: int = 0
    updates: int = 0
    snapshots: list[int] = field(default_factory=list)
    replayed_from: int | None = None
    replayed_to: int | None = None
    anchors: int = 0
    anchored_step: int | None = None
    wrong_step: int | None = None
    reason: str
    """What is wrong, at ``wrong_step``, or why nothing could be verified; or how to get an anchor; empty where nothing
    is to be said."""


def verify(
    folder: Path,
    /,
    *,
    run_id: str | None = None,
    as_json: JsonFlag = False,
    output: Output = OUTPUT,
) -> int:
    """Check a run on this disk: every signature, every hash, and every outer step that its files lead through.

    Parameters
    ----------
    folder
        Of a seed or a peer, which may be running, or of one run in it.
    run_id
        Which run, where there are several.
    as_json
        One JSON object on stdout.
    """
    check_run_id(run_id)
    try:
        found = verified(folder, run_id)
    except LocalError as error:
        if as_json:
            print_json(Findings(reason=str(error)))
        raise
    findings = findings_of(found)
    if as_json:
        print_json(findings)
    else:
        for line in lines_of(findings, found):
            print(line)
    return 0 if findings.ok and findings.anchored else 1


def verified(folder: Path, run_id: str | None) -> Verified:
    """Returns what comes of a run in a folder. LocalError where there is nothing to be verified, or it cannot be
    read."""
    with importing("verify"):
        from p2p_diloco.ledger.folder import find_run, read_manifest, same_files
        from p2p_diloco.ledger.verify import verify_ledger

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    refuse_unsound_manifests(folder)
    run = find_run(folder, run_id)
    manifest = read_manifest(run)
    with same_files(run) as view:
        try:
            return verify_ledger(view / "ledger", manifest)
        except UsageError as error:  # the view is gone when a person reads this
            raise UsageError(f"{run}: {error}") from error


def print_json(findings: Findings) -> None:
    """Prints findings as one JSON object."""
    print(json.dumps(asdict(findings), indent=2))


def refuse_unsound_manifests(folder: Path) -> None:
    """Raises LedgerError where a manifest in a folder is not what its owner has signed: nothing can be verified by it,
    and that is no mistake of whoever named the folder."""
    from p2p_diloco.ledger.folder import MANIFEST_FILE, read_manifest

    for path in [*folder.glob(MANIFEST_FILE), *sorted(folder.glob(f"*/{MANIFEST_FILE}"))]:
        try:
            read_manifest(path)
        except OtherProtocol:
            continue
        except UsageError as error:
            raise LedgerError(str(error)) from error


def findings_of(found: Verified) -> Findings:
    """Returns what a verification has come to."""
    wrong, newest = found.wrong, max(found.snapshots, default=0)
    step = max(len(found.heads) - 1, newest)
    head = found.head_at(step) or (found.snapshots[newest].head if found.snapshots else b"")
    anchored_step = found.anchored_step
    reason = wrong.reason if wrong else "" if anchored_step is not None else without_anchor(found)
    return Findings(
        ok=wrong is None,
        anchored=anchored_step is not None,
        run_id=found.manifest.run_id,
        owner=found.manifest.owner,
        step=step,
        head=head.hex(),
        certificates=found.certificates,
        updates=len(found.headers),
        snapshots=sorted(found.snapshots),
        replayed_from=min(found.replayed, default=None),
        replayed_to=max(found.replayed, default=None),
        anchors=len(found.anchors.chain),
        anchored_step=anchored_step,
        wrong_step=wrong.step if wrong else None,
        reason=reason,
    )


def without_anchor(found: Verified) -> str:
    """Returns why the owner does not stand behind a history, and how to get its word."""
    why = "no anchor of the run's owner is here" if not found.anchors.chain else "its anchors are of later outer steps"
    return (
        f"{why}, so certificates alone speak for this history; let a peer on this folder catch up while the run's seed "
        f"is there: it fetches the anchors, of which the first is signed two snapshots after the first one"
    )


def lines_of(findings: Findings, found: Verified) -> list[str]:
    """Returns the lines that a person reads."""
    spec, anchored = found.manifest.spec, findings.anchored_step
    replayed = "nothing"
    if findings.replayed_from is not None:
        replayed = f"outer steps {findings.replayed_from} to {findings.replayed_to}, {len(found.replayed)} digests"
    rows = {
        "run": f"{spec.name} {findings.run_id}",
        "manifest": f"signed by its owner, {findings.owner}",
        "chain": f"outer steps 0 to {findings.step}, {findings.certificates} certificates",
        "updates": f"{findings.updates}"
        + (f", outer steps {min(found.headers)} to {max(found.headers)}" if found.headers else ""),
        "snapshots": ", ".join(map(str, findings.snapshots)) or "none",
        "replayed": replayed,
        "anchors": f"{findings.anchors}" + (f", up to outer step {anchored}" if anchored is not None else ""),
        "head": findings.head,
    }
    lines = [f"{name:<12} {plain(value)}" for name, value in rows.items()]
    if not findings.ok:
        more = f" (and {len(found.wrongs) - 1} more)" if len(found.wrongs) > 1 else ""
        return [*lines, f"wrong        outer step {findings.wrong_step}: {plain(findings.reason)}{more}"]
    if not findings.anchored:
        return [*lines, f"not anchored {findings.reason}"]
    return [*lines, f"sound        anchored up to outer step {anchored}"]
