"""Invitations on the disk: what the owner of a run has given out and revoked, and the seat of a volunteer's peer.

    PEER-FOLDER/RUNID.seat                  under which this peer takes part: made once from its token
    RUN-FOLDER/invitations/*.invitation     at the owner's: what was given out, signed, without the token's secret
    RUN-FOLDER/ledger/revocations           the newest list of revocations, the owner's own or heard of

All are for this user alone, and written whole. Raises LedgerError when the disk fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.core.admission import LAPSED, Claim, Lapsed
from p2p_diloco.core.errors import LedgerError, UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import (
    INVITATION_NAME,
    MAX_REVOCATIONS_BYTES,
    Invitation,
    Revocations,
    Token,
    make_token,
    open_invitation,
    open_revocations,
    seal_revocations,
    with_revoked,
)
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import MAX_RECORD_BYTES, MAX_SEAT_BYTES
from p2p_diloco.ledger.disk import disk_errors, replacing
from p2p_diloco.ledger.folder import read_manifest

DAY_S = 86_400
OWN_PERMISSIONS = 0o600


def write_own(path: Path, data: bytes) -> None:
    """Writes a file whole, for this user alone. Raises LedgerError."""
    with disk_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, OWN_PERMISSIONS) as file:
            file.write(data)


def read_bounded(path: Path, most_bytes: int) -> bytes | None:
    """Returns what is in a file; None where there is none, or one that is larger. Raises LedgerError."""
    with disk_errors(path):
        try:
            if path.stat().st_size > most_bytes:
                return None
            return path.read_bytes()
        except FileNotFoundError:
            return None


# -- a volunteer's peer --------------------------------------------------------------------------------------------


def seat_path(folder: Path, run_id: str) -> Path:
    """Returns where a peer keeps its seat in a run. ``folder`` is the peer's."""
    return folder / f"{run_id[:12]}.seat"


def take_seat(folder: Path, identity: Identity, token: Token) -> None:
    """Makes the seat of a peer, and keeps it in the peer's folder: from now on the peer needs no token."""
    write_own(seat_path(folder, token.invitation.run_id), token.seat(identity.peer_id))


def read_seat(folder: Path, run_id: str) -> bytes:
    """Returns what is kept as a peer's seat in a run, which may be unsound; nothing where there is none."""
    return read_bounded(seat_path(folder, run_id), MAX_SEAT_BYTES) or b""


def require_seat(folder: Path, manifest: RunManifest, peer_id: str, now_s: float) -> bytes:
    """Returns the seat under which a peer takes part in a run; empty where it needs none. UsageError, which says whom
    to ask, where it has none that is good at Unix time ``now_s``."""
    admission = manifest.admission()
    if not admission.by_invitation or peer_id == manifest.owner:
        return b""
    seat = read_seat(folder, manifest.run_id)
    if not seat:
        raise UsageError(
            f"run {manifest.spec.name} is by invitation: ask its owner, {manifest.owner}, for one, and give it with "
            f"--invite FILE; status, monitor and export need none"
        )
    try:
        admission.check(Claim(peer_id=peer_id, seat=seat), now_s=now_s, step=0)
    except Lapsed as error:
        raise UsageError(LAPSED) from error
    except ValueError as error:
        path = seat_path(folder, manifest.run_id)
        raise UsageError(f"{path}: not a seat of this peer in this run; give the invitation again: --invite") from error
    return seat


# -- revocations -----------------------------------------------------------------------------------------------------


def read_revocations(ledger: Path, manifest: RunManifest) -> bytes | None:
    """Returns the list of revocations in a ledger's folder, sealed and sound; None where there is none. Raises
    LedgerError for one that is not sound."""
    path = ledger / "revocations"
    sealed = read_bounded(path, MAX_REVOCATIONS_BYTES)
    if sealed is None:
        return None
    try:
        open_revocations(sealed, run_id=manifest.run_id, owner=manifest.owner)
    except ValueError as error:
        raise LedgerError(f"{path}: damaged ({error}); move it away: the list comes back from other peers") from error
    return sealed


def keep_revocations(ledger: Path, sealed: bytes) -> None:
    """Writes a list of revocations into a ledger's folder."""
    write_own(ledger / "revocations", sealed)


# -- the owner -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnedRun:
    """A run by invitation as it lies in its owner's folder, with the owner's key."""

    folder: Path
    """Of the run."""
    manifest: RunManifest
    owner: Identity

    @classmethod
    def open(cls, folder: Path, owner: Identity | None, identity_path: Path) -> OwnedRun:
        """Returns the run in ``folder``. Raises UsageError when it is open to all, or when ``owner``, the identity at
        ``identity_path``, is not its owner's."""
        manifest = read_manifest(folder)
        if manifest.spec.membership == "open":
            raise UsageError(
                f"{folder}: this run is open, whoever has an address may train; invitations are for a run file with "
                f'membership = "invite"'
            )
        if owner is None:
            raise UsageError(
                f"{identity_path}: no such key; the folder of the run's seed has it, or name it: --identity"
            )
        if owner.peer_id != manifest.owner:
            raise UsageError(f"{identity_path}: not the key of the run's owner; name the folder of the run's seed")
        return cls(folder=folder, manifest=manifest, owner=owner)

    @property
    def ledger(self) -> Path:
        """Returns the folder of the run's ledger."""
        return self.folder / "ledger"

    def newest_step(self) -> int:
        """Returns the outer step to which the files of the ledger lead, by their names: its seed may be running."""
        after = [int(path.stem) + 1 for path in self.ledger.glob("updates/*.update") if path.stem.isdecimal()]
        at = [int(path.stem) for path in self.ledger.glob("snapshots/*.safetensors") if path.stem.isdecimal()]
        return max(after + at, default=0)

    def invitations(self) -> list[Invitation]:
        """Returns all that have been given out, by name; those that expire last come first. A file that is none is left
        out."""
        found: list[Invitation] = []
        for path in self.folder.glob("invitations/*.invitation"):
            try:
                found.append(open_invitation(read_bounded(path, MAX_RECORD_BYTES) or b""))
            except ValueError:
                continue
        return sorted(found, key=lambda invitation: (invitation.name, -invitation.expires_s))

    def revocations(self) -> Revocations | None:
        """Returns the newest list that is here; None where nothing has been revoked."""
        sealed = read_revocations(self.ledger, self.manifest)
        run_id, owner = self.manifest.run_id, self.manifest.owner
        return None if sealed is None else open_revocations(sealed, run_id=run_id, owner=owner)

    def check_name(self, name: str, now_s: float) -> None:
        """Raises UsageError for a name that is no name, or that an invitation has which is still good."""
        if re.fullmatch(INVITATION_NAME, name) is None:
            raise UsageError(
                f"--name {name}: 1 to 32 letters, digits, dots, hyphens and underscores, a letter or digit first"
            )
        revoked = self.manifest.admission(self.revocations()).revoked
        for other in self.invitations():
            if other.name == name and other.expires_s > now_s and other.token not in revoked:
                raise UsageError(f"--name {name}: there is such an invitation; choose another name, or revoke it")

    def invite(self, name: str, *, days: int, places: int, now_s: float) -> Token:
        """Returns a new token, and keeps its invitation. Raises UsageError as ``check_name``."""
        self.check_name(name, now_s)
        expires_s, run_id = int(now_s) + days * DAY_S, self.manifest.run_id
        key = Identity.generate()
        token = make_token(self.owner, run_id=run_id, name=name, places=places, expires_s=expires_s, key=key)
        write_own(self.folder / "invitations" / f"{token.invitation.token}.invitation", token.sealed)
        return token

    def revoke(self, whom: str, *, step: int) -> list[Invitation]:
        """Revokes invitations from outer step ``step`` on, and returns them: all of a name that are not revoked, or the
        one of a token's id. UsageError when there is none."""
        before = self.revocations()
        revoked = self.manifest.admission(before).revoked
        named = [one for one in self.invitations() if whom in (one.name, one.token)]
        if not named:
            raise UsageError(f"{whom}: no invitation of this name or id; 'p2p-diloco invite FOLDER --list' has all")
        chosen = [one for one in named if one.token not in revoked]
        if not chosen:
            raise UsageError(f"{whom}: revoked already, from outer step {revoked[named[0].token]} on")
        run_id, owner = self.manifest.run_id, self.manifest.owner
        for one in chosen:
            try:
                before = with_revoked(before, run_id=run_id, owner=owner, token=one.token, step=step)
            except ValueError as error:
                raise UsageError(f"{whom}: {error}; start another run") from error
        if before is not None:
            keep_revocations(self.ledger, seal_revocations(before, self.owner))
        return chosen
