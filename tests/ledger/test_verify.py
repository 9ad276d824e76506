"""The whole check of a run on disk: what is sound is found sound, and one thing that is changed is found, and where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core import grid
from p2p_diloco.core.anchor import Anchor, Anchors
from p2p_diloco.core.certificate import Certificate, Certified
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.update import UpdateHeader, part_places
from p2p_diloco.ledger import chain
from p2p_diloco.ledger.anchors import keep_anchors, read_anchors
from p2p_diloco.ledger.chain import CHAIN_MAGIC, checksum, read_entries
from p2p_diloco.ledger.snapshot import save_snapshot
from p2p_diloco.ledger.verify import (
    Verified,
    Wrong,
    check_anchors,
    check_chain,
    check_snapshot_file,
    check_update_file,
    verify_ledger,
)
from tests.support.builders import OWNER, identity
from tests.support.whole_runs import whole_run

STEPS, EVERY, N = 200, 50, 250
PARTS = 3


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "PART_VALUES", 100)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def made(small_parts: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunManifest]:
    """The folder of a run of 200 outer steps that has kept everything, and its manifest. Nobody writes there."""
    folder = tmp_path_factory.mktemp("run") / "simulated"
    return folder, whole_run(folder, n=N, steps=STEPS, snapshot_every=EVERY, keep_snapshots=9)


@pytest.fixture(scope="module")
def all_sound(made: tuple[Path, RunManifest]) -> Verified:
    """What is found there. The tests that spoil one file look at that file again, and at nothing else."""
    return verify_ledger(made[0] / "ledger", made[1])


@pytest.fixture
def ledger(made: tuple[Path, RunManifest], tmp_path: Path) -> Path:
    """A copy of its ledger, to be spoilt."""
    shutil.copytree(made[0] / "ledger", tmp_path / "ledger", copy_function=os.link)
    return tmp_path / "ledger"


def write(path: Path, data: bytes) -> None:
    """The file itself is shared with the run that all tests have."""
    path.unlink()
    path.write_bytes(data)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    write(path, bytes(data))


def update_path(ledger: Path, step: int) -> Path:
    return ledger / "updates" / f"{step:010d}.update"


def test_a_whole_run_is_sound(made: tuple[Path, RunManifest], ledger: Path, all_sound: Verified) -> None:
    before = {path: path.read_bytes() for path in ledger.rglob("*") if path.is_file()}
    found = verify_ledger(ledger, made[1])
    assert found == replace(all_sound, snapshots=found.snapshots)
    assert found.wrongs == []
    assert (found.certificates, len(found.headers), len(found.heads)) == (STEPS, STEPS, STEPS + 1)
    assert sorted(found.snapshots) == sorted(found.replayed) == [0, 50, 100, 150, 200]
    assert {step: info.digest for step, info in found.snapshots.items()} == found.replayed
    assert (len(found.anchors.chain), found.anchored_step) == (2, 100)
    assert {path: path.read_bytes() for path in ledger.rglob("*") if path.is_file()} == before


def test_a_peer_that_has_pruned_what_is_old(small_parts: None, tmp_path: Path) -> None:
    manifest = whole_run(tmp_path, n=N, steps=30, snapshot_every=5)
    found = verify_ledger(tmp_path / "ledger", manifest)
    assert (found.wrongs, found.certificates, sorted(found.headers)) == ([], 30, [25, 26, 27, 28, 29])
    assert (sorted(found.replayed), found.anchored_step) == ([25, 30], 20)


def test_what_is_not_there_yet_is_not_wrong(made: tuple[Path, RunManifest], ledger: Path) -> None:
    """A peer that catches up has the chain first; one that went on by a snapshot has none of the updates between."""
    update_path(ledger, STEPS - 1).unlink()
    (ledger / "snapshots" / f"{STEPS:010d}.safetensors").unlink()
    update_path(ledger, 49).unlink()
    found = verify_ledger(ledger, made[1])
    assert (found.wrongs, len(found.headers), max(found.replayed)) == ([], STEPS - 2, STEPS - 1)


def test_a_ledger_that_holds_nothing(made: tuple[Path, RunManifest], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds nothing of the run yet"):
        verify_ledger(tmp_path / "ledger", made[1])


# -- the chain ---------------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


HEADERS: dict[str, Callable[[UpdateHeader], UpdateHeader]] = {
    "step": lambda header: replace(header, step=header.step + 1),
    "parent": lambda header: replace(header, parent=flipped(header.parent)),
    "a contributor": lambda header: replace(
        header, contributors=((identity(9).peer_id, header.contributors[0][1]), *header.contributors[1:])
    ),
    "a weight": lambda header: replace(header, contributors=((header.contributors[0][0], 6), *header.contributors[1:])),
    "a hash": lambda header: replace(header, part_hashes=(*header.part_hashes[:-1], flipped(header.part_hashes[-1]))),
}
CERTIFICATES: dict[str, Callable[[Certificate], Certificate]] = {
    "leader": lambda one: replace(one, roster=replace(one.roster, leader=identity(9).peer_id)),
    "a member": lambda one: replace(
        one, roster=replace(one.roster, members=(flipped(one.roster.members[0]), *one.roster.members[1:]))
    ),
    "one more absent": lambda one: replace(one, roster=replace(one.roster, absent=(b"x",))),
    "the leader's signature": lambda one: replace(
        one, roster=replace(one.roster, signature=flipped(one.roster.signature))
    ),
    "who is in most parts": lambda one: replace(one, full=b"\x03"),
    "the state": lambda one: replace(one, state=flipped(one.state or bytes(32))),
    "who signed": lambda one: replace(
        one, signatures=((one.signatures[0][0], one.signatures[1][1]), one.signatures[1])
    ),
    "a signature": lambda one: replace(
        one, signatures=((one.signatures[0][0], flipped(one.signatures[0][1])), *one.signatures[1:])
    ),
    "too few signatures": lambda one: replace(one, signatures=one.signatures[:1]),
    "the witness": lambda one: replace(one, witness=flipped(one.witness or bytes(64))),
}


@pytest.fixture(scope="module")
def entries(made: tuple[Path, RunManifest]) -> list[Certified]:
    return list(read_entries(made[0] / "ledger" / "chain", made[1].grid))


def chain_file(path: Path, entries: list[Certified]) -> Path:
    """Written as a chain is, whatever is in it: its checksums are right."""
    pieces = [CHAIN_MAGIC]
    for one in entries:
        data = one.to_bytes()
        pieces += [len(data).to_bytes(4, "big"), checksum(data), data]
    path.write_bytes(b"".join(pieces))
    return path


@pytest.mark.parametrize("step", [0, 17, 50])
def test_every_field_of_a_header_and_of_a_certificate_is_checked(
    step: int, entries: list[Certified], made: tuple[Path, RunManifest], tmp_path: Path
) -> None:
    good = entries[step]
    bad = {name: replace(good, header=change(good.header)) for name, change in HEADERS.items()}
    bad |= {name: replace(good, certificate=change(good.certificate)) for name, change in CERTIFICATES.items()}
    for name, one in bad.items():
        if (step, name) == (0, "parent"):
            continue  # the first one names the genesis: whose signatures these are decides, and they are others then
        path = chain_file(tmp_path / "chain", [*entries[:step], one, *entries[step + 1 : step + 2]])
        found = Verified(manifest=made[1])
        check_chain(path, found)
        assert found.wrong is not None, name
        assert (found.wrong.step, found.certificates, found.chain_is_whole) == (step, step, False), name


def test_the_last_entry_of_a_long_chain_is_checked(
    entries: list[Certified], made: tuple[Path, RunManifest], ledger: Path
) -> None:
    last = replace(entries[-1], certificate=CERTIFICATES["a signature"](entries[-1].certificate))
    (ledger / "chain").unlink()
    chain_file(ledger / "chain", [*entries[:-1], last])
    wrong = verify_ledger(ledger, made[1]).wrong
    assert wrong is not None
    assert wrong.step == STEPS - 1
    assert "the chain is not sound: a certificate with a signature that is not that of member" in wrong.reason


def test_an_entry_that_is_damaged_or_gone(
    entries: list[Certified], made: tuple[Path, RunManifest], ledger: Path
) -> None:
    flip(ledger / "chain", chain.START_OF_ENTRY_BYTES + len(CHAIN_MAGIC) + 60)
    found = verify_ledger(ledger, made[1])
    assert [(wrong.step, wrong.reason) for wrong in found.wrongs] == [
        (0, "the chain is not sound: its bytes are not what was written")
    ]
    (ledger / "chain").unlink()
    chain_file(ledger / "chain", [*entries[:9], *entries[10:]])
    wrong = verify_ledger(ledger, made[1]).wrong
    assert (wrong.step if wrong else None) == 9
    (ledger / "chain").unlink()
    wrong = verify_ledger(ledger, made[1]).wrong
    assert wrong is not None
    assert (wrong.step, wrong.reason) == (0, "0000000000.update: the chain has another one there, or none")


# -- updates and snapshots ---------------------------------------------------------------------------------------------


def looked_at(path: Path, all_sound: Verified) -> list[Wrong]:
    found = replace(all_sound, headers={}, wrongs=[])
    check_update_file(path, found)
    return found.wrongs


@pytest.mark.parametrize("step", [0, 123, 199])
def test_a_byte_in_every_part_of_an_update(step: int, ledger: Path, all_sound: Verified) -> None:
    path = update_path(ledger, step)
    sound, places = path.read_bytes(), part_places(all_sound.headers[step], all_sound.manifest.grid)
    assert (looked_at(path, all_sound), len(places)) == ([], PARTS)
    for part, place in enumerate(places):
        for at in (place.start, place.start + 1, place.stop - 1):
            flip(path, at)
            (wrong,) = looked_at(path, all_sound)
            assert wrong.step == step
            assert f"part {part} does not have the hash that its header names" in wrong.reason
            write(path, sound)


def test_a_byte_in_any_update(ledger: Path, all_sound: Verified) -> None:
    for step in range(STEPS):
        path = update_path(ledger, step)
        flip(path, (step * 997) % path.stat().st_size)
        assert [wrong.step for wrong in looked_at(path, all_sound)] == [step]


def test_an_update_that_others_are_in_than_its_certificate_counts(ledger: Path, all_sound: Verified) -> None:
    """Who is known follows from the certificate: most of a round may have signed that somebody else is in it."""
    fulls = [*all_sound.fulls[:7], b"\x03", *all_sound.fulls[8:]]
    found = replace(all_sound, fulls=fulls, headers={}, wrongs=[])
    for step in (7, 8):
        check_update_file(update_path(ledger, step), found)
    why = "0000000007.update: others are in most of its parts than its certificate counts"
    assert (found.wrongs, set(found.headers)) == ([Wrong(step=7, reason=why)], {8})


def test_what_is_wrong_first_is_told(made: tuple[Path, RunManifest], ledger: Path) -> None:
    flip(update_path(ledger, 150), -1)
    flip(update_path(ledger, 80), -1)
    found = verify_ledger(ledger, made[1])
    assert found.wrong is not None
    assert found.wrong.step == 80
    assert "0000000080.update: part 2 does not have the hash" in found.wrong.reason
    assert sorted({wrong.step for wrong in found.wrongs}) == [80, 81, 150, STEPS]


def test_an_update_under_another_name_and_one_that_is_missing(made: tuple[Path, RunManifest], ledger: Path) -> None:
    write(update_path(ledger, 60), update_path(ledger, 61).read_bytes())
    wrong = verify_ledger(ledger, made[1]).wrong
    assert wrong is not None
    assert (wrong.step, wrong.reason) == (60, "0000000060.update: it is that of outer step 61")
    for step in range(50, 61):
        update_path(ledger, step).unlink()
    wrong = verify_ledger(ledger, made[1]).wrong
    assert wrong is not None
    assert wrong.step == 61
    assert "nothing leads to the update of outer step 61" in wrong.reason


@pytest.mark.parametrize("step", range(0, STEPS + 1, EVERY))
def test_a_byte_in_every_snapshot(step: int, ledger: Path, all_sound: Verified) -> None:
    path = ledger / "snapshots" / f"{step:010d}.safetensors"
    flip(path, -1)
    found = replace(all_sound, snapshots={}, wrongs=[])
    check_snapshot_file(path, found)
    (wrong,) = found.wrongs
    assert (wrong.step, path.name in wrong.reason, found.snapshots) == (step, True, {})


def test_sound_snapshots_of_other_bits(ledger: Path, all_sound: Verified) -> None:
    """One that a certificate contradicts, and the newest one, of which no certificate says anything yet."""
    manifest = all_sound.manifest
    for step, reason in ((150, "it has other bits than its certificate names"), (STEPS, "leads to other bits")):
        good = all_sound.snapshots[step]
        values = np.ones(100, np.float32)
        parts = [(values[: manifest.grid.n_values(part)],) * 2 for part in range(PARTS)]
        path = ledger / "snapshots" / good.path.name
        save_snapshot(parts, path, step=step, head=good.head, n=N, run_id=manifest.run_id)
        wrong = verify_ledger(ledger, manifest).wrong
        assert wrong is not None
        assert (wrong.step, reason in wrong.reason) == (step, True)
        path.unlink()


# -- anchors -----------------------------------------------------------------------------------------------------------

ANCHORS: dict[str, Callable[[Anchor], Anchor]] = {
    "run": lambda one: replace(one, run_id="cd" * 20),
    "number": lambda one: replace(one, number=one.number + 1),
    "what it follows": lambda one: replace(one, follows=(bytes(32),)),
    "step": lambda one: replace(one, step=one.step - 1),
    "head": lambda one: replace(one, head=flipped(one.head)),
    "state": lambda one: replace(one, state=flipped(one.state)),
    "signature": lambda one: replace(one, signature=flipped(one.signature)),
}


def with_anchors(ledger: Path, all_sound: Verified, *anchors: Anchor) -> Verified:
    keep_anchors(ledger, Anchors(chain=anchors))
    found = replace(all_sound, wrongs=[])
    check_anchors(ledger, found)
    return found


@pytest.mark.parametrize("name", ANCHORS)
def test_every_field_of_an_anchor_is_checked(name: str, ledger: Path, all_sound: Verified) -> None:
    manifest = all_sound.manifest
    first, second = read_anchors(ledger, manifest)[0].chain
    found = with_anchors(ledger, all_sound, first, ANCHORS[name](second))
    assert found.wrong is not None
    assert found.wrong.step == first.step
    assert "the anchors after number 1 are not sound" in found.wrong.reason
    assert found.anchored_step == first.step


def test_the_chain_leaves_out_an_anchor_or_has_other_bits_there(ledger: Path, all_sound: Verified) -> None:
    first, second = all_sound.anchors.chain
    for change, reason in (("head", "the history leaves out anchor 2"), ("state", "anchor 2 names other bits")):
        wrong = with_anchors(ledger, all_sound, first, ANCHORS[change](second).signed_by(OWNER)).wrong
        assert wrong is not None
        assert wrong.step == 100
        assert reason in wrong.reason


def test_what_an_owner_has_taken_back_is_not_looked_at(ledger: Path, all_sound: Verified) -> None:
    """It had signed two that contradict each other, and one above them."""
    manifest = all_sound.manifest
    first, second = all_sound.anchors.chain
    elsewhere = ANCHORS["head"](second).signed_by(OWNER)
    mine = Anchors(chain=(first, elsewhere)).offered([second])
    settles = mine.next(manifest.run_id, step=second.step, head=second.head, state=second.state, owner=OWNER)
    found = with_anchors(ledger, all_sound, *mine.offered([settles]).chain)
    assert (found.wrong, found.anchored_step, len(found.anchors.chain)) == (None, 100, 3)


def test_without_an_anchor_nobody_but_the_members_speaks_for_a_history(small_parts: None, tmp_path: Path) -> None:
    """Three keys of one's own, and a ledger that is whole from its genesis."""
    manifest = whole_run(tmp_path, n=N, steps=30, snapshot_every=5, anchored=False)
    found = verify_ledger(tmp_path / "ledger", manifest)
    assert (found.wrong, found.anchored_step) == (None, None)
