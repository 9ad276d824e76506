"""Proofs on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_diloco.core.barred import Barred
from p2p_diloco.core.equivocation import pack_proof
from p2p_diloco.core.records import MAX_BARRED
from p2p_diloco.ledger.proofs import keep_proofs, read_proofs
from tests.core.test_barred import proof_of
from tests.support.builders import OWNER, RUN_ID, identity

A, B = identity(1), identity(2)


def barred(*favoured: str) -> Barred:
    return Barred(run_id=RUN_ID, me=identity(99).peer_id, owner=OWNER.peer_id, favoured=favoured)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "barred").iterdir())


def test_proofs_come_back_from_the_disk(tmp_path: Path) -> None:
    before, after = barred(), barred()
    read_proofs(tmp_path, before)
    assert len(before) == 0
    for who in (A, B):
        before.add(proof_of(who))
        keep_proofs(tmp_path, before)
    assert files(tmp_path) == sorted(f"{who.peer_id}.proof" for who in (A, B))
    read_proofs(tmp_path, after)
    assert set(after) == {A.peer_id, B.peer_id}
    assert after.proof(A.peer_id) == pack_proof(proof_of(A))


@pytest.mark.parametrize("data", [b"", b"x", pack_proof(proof_of(A, (1, 1))), bytes(2**20 + 1)])
def test_a_file_that_proves_nothing_bars_nobody_and_makes_room(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "barred").mkdir()
    (tmp_path / "barred" / f"{A.peer_id}.proof").write_bytes(data)
    here = barred()
    read_proofs(tmp_path, here)
    assert len(here) == 0
    assert "comes back from other peers" in caplog.text
    assert files(tmp_path) == []


def test_who_has_made_room_is_forgotten_on_the_disk_too(tmp_path: Path) -> None:
    here = barred(B.peer_id)
    for i in range(MAX_BARRED):
        here.add(proof_of(identity(100 + i)))
    keep_proofs(tmp_path, here)
    here.add(proof_of(B))
    keep_proofs(tmp_path, here)
    assert len(files(tmp_path)) == MAX_BARRED
    assert f"{B.peer_id}.proof" in files(tmp_path)
    assert f"{identity(100).peer_id}.proof" not in files(tmp_path)
