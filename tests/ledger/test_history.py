"""What a chain says of its run's history, compared with the updates that have made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.known import WINDOW_STEPS
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.update import Part, Update, UpdateHeader
from p2p_diloco.ledger.chain import Chain
from p2p_diloco.ledger.files import LedgerFiles
from p2p_diloco.ledger.history import ChainHistory
from tests.support.builders import identity
from tests.support.certificates import certificate_for, certified, group_at, unsigned
from tests.support.fakes import make_manifest

OWNER = identity(1000)
MANIFEST = make_manifest(4, np.zeros(4, np.float32), OWNER, codec="fp32")
GENESIS = bytes([7]) * 32
PART = Part(mask=b"\x01", data=bytes(16))


def history_of(folder: Path, names: str) -> ChainHistory:
    """Whose first contributors are ``names``, one an outer step."""
    history = ChainHistory(MANIFEST, Chain(LedgerFiles(folder), MANIFEST.grid))
    head = GENESIS
    for step, name in enumerate(names):
        header = UpdateHeader(step=step, parent=head, contributors=((name, 5),), part_hashes=(PART.hash,))
        update = Update(header=header, parts=(PART,))
        history.chain.append(certified(update, unsigned(update, bytes([step]) * 32)))
        head = header.head
    return history


def test_a_head_has_its_outer_step(tmp_path: Path) -> None:
    history = history_of(tmp_path, "abc")
    assert [history.chain.head_at(step) for step in (0, 4)] == [GENESIS, None]
    assert [history.step_of(history.chain.head_at(step) or b"") for step in range(4)] == [0, 1, 2, 3]
    assert history.step_of(bytes(32)) is None


def test_who_has_a_vote(tmp_path: Path) -> None:
    names = "a" * 12 + "bcdd" + "d" * 4
    history, owner = history_of(tmp_path, names), OWNER.peer_id
    assert history.electors(0) == {owner}
    for step in range(WINDOW_STEPS):
        assert history.electors(step) == {owner, *names[:step]}, "in the beginning, whoever has contributed"
    assert history.electors(16) == {owner, "a"}, "later on, whoever is known"
    assert history.electors(18) == {owner, "a", "d"}
    assert history.electors(20) == {owner, "a", "d"}
    assert history.electors(99) == history.electors(20), "beyond the chain, as at its end"


def test_the_digests_that_are_certified(tmp_path: Path) -> None:
    history = history_of(tmp_path, "abc")
    assert history.certified_digest(0) == bytes.fromhex(MANIFEST.genesis)
    assert [history.certified_digest(step) for step in (1, 2, 3)] == [bytes([1]) * 32, bytes([2]) * 32, b""]


@pytest.mark.parametrize("signing", [(0, 1), (2,), (0, 1, 2)])
def test_who_has_signed(tmp_path: Path, signing: tuple[int, ...]) -> None:
    history = history_of(tmp_path, "ab")
    head, members = history.chain.head_at(2) or b"", [identity(i) for i in range(3)]
    group = group_at(members, RosterRules.of(MANIFEST), history.chain.known_at(2), head)
    header = group.header([PART.hash])
    signers = [members[i] for i in signing]
    history.chain.append(
        Certified(header=header, certificate=certificate_for(group, header, signers, owner=OWNER, full=b"\x07"))
    )
    assert sorted(history.signers(2)) == sorted(who.peer_id for who in signers)
    assert history.signers(1) == (), "nobody has, there"
    assert history.signers(3) == (), "there is no such entry"
