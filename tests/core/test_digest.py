"""The hash."""

from __future__ import annotations

from p2p_diloco.core.digest import digest


def test_pieces_that_join_to_the_same_bytes_have_different_digests() -> None:
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"abc", b"")}) == 4
