from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import base58
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2p_diloco.core.errors import LedgerError, UsageError
from p2p_diloco.core.identity import Identity, public_key_of, verify

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(bytes([1] * 32))


def test_the_peer_id_of_a_known_key_is_libp2ps() -> None:
    # The Ed25519 example of libp2p's peer-id specification: private key protobuf, then the id of its public key.
    seed = bytes.fromhex("7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d")
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    identity = Identity.from_seed(seed)
    assert identity.to_bytes() == bytes.fromhex("08011240") + seed + public
    assert base58.b58decode(identity.peer_id) == bytes.fromhex("002408011220") + public


def test_a_signature_holds_for_its_key_and_message_alone() -> None:
    signature = ALICE.sign(b"message")
    assert verify(ALICE.peer_id, b"message", signature)
    assert not verify(BOB.peer_id, b"message", signature)
    assert not verify(ALICE.peer_id, b"massage", signature)
    assert not verify(ALICE.peer_id, b"message", signature[:-1])
    assert not verify(ALICE.peer_id, b"message", bytes([signature[0] ^ 1]) + signature[1:])


@given(st.text(max_size=80), st.binary(max_size=80))
@example("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", bytes(64))
@example(ALICE.peer_id + "\n", ALICE.sign(b""))
@example(" " + ALICE.peer_id, ALICE.sign(b""))
@example("1" + ALICE.peer_id, ALICE.sign(b""))
@example(ALICE.peer_id[:-1], ALICE.sign(b""))
def test_what_is_no_ed25519_id_verifies_nothing(peer_id: str, signature: bytes) -> None:
    assert public_key_of(peer_id) is None
    assert not verify(peer_id, b"", signature)


def test_a_key_file_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    made = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


@given(st.binary(max_size=100))
@example(b"")
@example(ALICE.to_bytes() + b"\0")
@example(ALICE.to_bytes()[:-1])
def test_any_other_file_is_refused_and_named(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "other.key"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"other\.key"):
        Identity.load_or_create(path)
    assert path.read_bytes() == data


@given(st.integers(0, 68 * 8 - 1))
def test_a_flipped_bit_in_a_key_file_is_found(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    data = bytearray(ALICE.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "flipped.key"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"flipped\.key"):
        Identity.load_or_create(path)


def test_a_folder_in_the_place_of_a_key_file_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Identity.load_or_create(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be"):
        Identity.load_or_create(blocked / "identity.key")


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LedgerError, match=r"identity .*new\.key: disk full, free 1 MB or move the folder"):
        Identity.load_or_create(tmp_path / "new.key")
    assert list(tmp_path.iterdir()) == []
