"""Invitations on the disk: the owner's, a volunteer's seat, and what is revoked."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from p2p_diloco.core.errors import LedgerError, UsageError
from p2p_diloco.core.invitation import MAX_REVOCATIONS_BYTES, open_seat
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import MAX_SEAT_BYTES
from p2p_diloco.core.runfile import Membership, RunSpec
from p2p_diloco.ledger.folder import MANIFEST_FILE, run_folder
from p2p_diloco.ledger.seats import (
    DAY_S,
    OwnedRun,
    keep_revocations,
    read_revocations,
    read_seat,
    require_seat,
    seat_path,
    take_seat,
)
from tests.support.builders import NOW_S, identity
from tests.support.invited import revocations_of, token_of

OWNER, ME = identity(1000), identity(1)


def manifest_of(membership: Membership) -> RunManifest:
    spec = {"name": "tiny", "model": {"config": {"model_type": "llama"}}, "membership": membership}
    return RunManifest(
        spec=RunSpec.model_validate(spec),
        model_config_json='{"model_type":"llama"}',
        n_params=1000,
        layout_digest="1" * 64,
        vocab_size=256,
        data_fingerprint="",
        genesis="2" * 64,
        owner=OWNER.peer_id,
    )


MANIFEST = manifest_of("invite")


def run_in(folder: Path, membership: Membership = "invite") -> Path:
    manifest = manifest_of(membership)
    run = run_folder(folder, manifest)
    (run / "ledger" / "updates").mkdir(parents=True)
    (run / "ledger" / "snapshots").mkdir()
    (run / MANIFEST_FILE).write_bytes(manifest.signed(OWNER))
    return run


@pytest.fixture
def owned(tmp_path: Path) -> OwnedRun:
    return OwnedRun.open(run_in(tmp_path / "seed"), OWNER, tmp_path / "seed" / "identity.key")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- the owner -----------------------------------------------------------------------------------------------------


def test_an_invitation_leads_to_a_seat(owned: OwnedRun, tmp_path: Path) -> None:
    token = owned.invite("attic", days=30, places=2, now_s=NOW_S)
    assert (token.invitation.name, token.invitation.places) == ("attic", 2)
    assert token.invitation.expires_s == NOW_S + 30 * DAY_S
    take_seat(tmp_path / "peer", ME, token)
    seat = require_seat(tmp_path / "peer", MANIFEST, ME.peer_id, NOW_S)
    assert open_seat(seat, ME.peer_id) == token.invitation
    assert permissions(seat_path(tmp_path / "peer", MANIFEST.run_id)) == 0o600


def test_what_the_owner_keeps_brings_nobody_in(owned: OwnedRun) -> None:
    token = owned.invite("attic", days=30, places=1, now_s=NOW_S)
    kept = [path for path in owned.folder.rglob("*") if path.is_file()]
    secret = token.key.key.private_bytes_raw()
    assert not any(secret in path.read_bytes() for path in kept)
    assert [permissions(path) for path in owned.folder.glob("invitations/*")] == [0o600]


def test_an_open_run_and_another_key_are_refused(tmp_path: Path) -> None:
    open_run, run = run_in(tmp_path / "open", "open"), run_in(tmp_path / "seed")
    path = tmp_path / "identity.key"
    with pytest.raises(UsageError, match="this run is open, whoever has an address may train"):
        OwnedRun.open(open_run, OWNER, path)
    with pytest.raises(UsageError, match=r"identity\.key: not the key of the run's owner"):
        OwnedRun.open(run, ME, path)
    with pytest.raises(UsageError, match=r"identity\.key: no such key"):
        OwnedRun.open(run, None, path)


@pytest.mark.parametrize("name", ["", "a b", "-a", "x" * 33, "a/b", "a\n"])
def test_a_name_is_one(owned: OwnedRun, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 32 letters"):
        owned.invite(name, days=1, places=1, now_s=NOW_S)
    assert owned.invitations() == []


def test_of_one_name_one_invitation_is_good_at_a_time(owned: OwnedRun) -> None:
    first = owned.invite("attic", days=1, places=1, now_s=NOW_S)
    with pytest.raises(UsageError, match="there is such an invitation"):
        owned.invite("attic", days=1, places=1, now_s=NOW_S + DAY_S - 1)
    second = owned.invite("attic", days=1, places=1, now_s=NOW_S + DAY_S)
    assert owned.revoke("attic", step=4) == [second.invitation, first.invitation]
    owned.invite("attic", days=1, places=1, now_s=NOW_S + DAY_S)


def test_revoked_by_name_or_by_id_once(owned: OwnedRun) -> None:
    attic, barn = (owned.invite(name, days=1, places=1, now_s=NOW_S) for name in ("attic", "barn"))
    assert owned.revocations() is None
    assert owned.revoke("attic", step=4) == [attic.invitation]
    assert owned.revoke(barn.invitation.token, step=6) == [barn.invitation]
    listed = owned.revocations()
    assert listed is not None
    assert (listed.number, listed.steps) == (2, [4, 6])
    assert listed.tokens == [attic.invitation.token, barn.invitation.token]
    with pytest.raises(UsageError, match="attic: revoked already, from outer step 4 on"):
        owned.revoke("attic", step=9)
    with pytest.raises(UsageError, match="cellar: no invitation of this name or id"):
        owned.revoke("cellar", step=9)


def test_a_list_that_came_from_others_goes_on(owned: OwnedRun) -> None:
    """The owner's folder may have been restored from a backup."""
    keep_revocations(owned.ledger, revocations_of({"x": 3}, number=7, run_id=MANIFEST.run_id, owner=OWNER))
    owned.invite("attic", days=1, places=1, now_s=NOW_S)
    owned.revoke("attic", step=9)
    listed = owned.revocations()
    assert listed is not None
    assert (listed.number, listed.steps) == (8, [3, 9])


def test_the_newest_step_by_the_names_of_files(owned: OwnedRun) -> None:
    assert owned.newest_step() == 0
    for name in ("snapshots/0000000010.safetensors", "updates/0000000010.update", "updates/0000000011.update"):
        (owned.ledger / name).touch()
    (owned.ledger / "updates" / "x.update").touch()
    assert owned.newest_step() == 12


def test_a_file_that_is_no_invitation_is_left_out(owned: OwnedRun) -> None:
    token = owned.invite("attic", days=1, places=1, now_s=NOW_S)
    (owned.folder / "invitations" / "x.invitation").write_bytes(b"x")
    (owned.folder / "invitations" / "y.invitation").write_bytes(bytes(10_000))
    assert owned.invitations() == [token.invitation]


# -- a volunteer's peer --------------------------------------------------------------------------------------------


def test_who_needs_no_seat(tmp_path: Path) -> None:
    assert require_seat(tmp_path, manifest_of("open"), ME.peer_id, NOW_S) == b""
    assert require_seat(tmp_path, MANIFEST, OWNER.peer_id, NOW_S) == b""


def test_without_a_seat_it_is_said_whom_to_ask(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        require_seat(tmp_path, MANIFEST, ME.peer_id, NOW_S)
    assert str(error.value) == (
        f"run tiny is by invitation: ask its owner, {OWNER.peer_id}, for one, and give it with --invite FILE; status, "
        f"monitor and export need none"
    )


def test_a_seat_of_another_key_or_a_damaged_one(tmp_path: Path) -> None:
    token = token_of(run_id=MANIFEST.run_id, owner=OWNER)
    take_seat(tmp_path, identity(2), token)
    with pytest.raises(UsageError, match=r"\.seat: not a seat of this peer in this run"):
        require_seat(tmp_path, MANIFEST, ME.peer_id, NOW_S)
    for data in (b"x", bytes(MAX_SEAT_BYTES), bytes(MAX_SEAT_BYTES + 1)):
        seat_path(tmp_path, MANIFEST.run_id).write_bytes(data)
        with pytest.raises(UsageError, match="invitation"):
            require_seat(tmp_path, MANIFEST, ME.peer_id, NOW_S)
    assert read_seat(tmp_path, MANIFEST.run_id) == b""


def test_a_seat_that_has_expired(tmp_path: Path) -> None:
    take_seat(tmp_path, ME, token_of(run_id=MANIFEST.run_id, owner=OWNER, expires_s=int(NOW_S)))
    assert require_seat(tmp_path, MANIFEST, ME.peer_id, NOW_S - 1)
    with pytest.raises(UsageError, match="has expired, or was revoked; ask the run's owner for another one"):
        require_seat(tmp_path, MANIFEST, ME.peer_id, NOW_S)


# -- revocations ---------------------------------------------------------------------------------------------------


def test_a_list_is_kept_as_it_was_signed(tmp_path: Path) -> None:
    sealed = revocations_of({"x": 3}, run_id=MANIFEST.run_id, owner=OWNER)
    assert read_revocations(tmp_path, MANIFEST) is None
    keep_revocations(tmp_path, sealed)
    assert read_revocations(tmp_path, MANIFEST) == sealed


@pytest.mark.parametrize("data", [b"", b"x", revocations_of({"x": 3}, owner=ME), revocations_of({"x": 3})])
def test_a_damaged_list_is_named(tmp_path: Path, data: bytes) -> None:
    keep_revocations(tmp_path, data)
    with pytest.raises(LedgerError, match=r"revocations: damaged \(.*\); move it away"):
        read_revocations(tmp_path, MANIFEST)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    keep_revocations(tmp_path, bytes(MAX_REVOCATIONS_BYTES + 1))
    assert read_revocations(tmp_path, MANIFEST) is None
