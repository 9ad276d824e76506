"""Anchors: the word of a run's owner that a state belongs to the run's history. Pure.

    anchor       the owner's signature over an outer step, its head and the digest of its state; numbered, and it names
                 the anchor before
    Anchors      those that a peer goes by, from the first one on, and one that contradicts them, if it has seen any

Certificates say who has made an update, and votes which of two branches most follow. Both can be liars' own: who was
known once can sign another history from there on. An anchor is above both: no history that leaves out the newest one is
followed.

An owner that is set back to an old copy of its folder could sign a second anchor under a number that it has used. Two
anchors contradict each other when the later one does not name the earlier one, or both have one number. Then everybody
stays with what it has, and says so, until the owner signs one with a higher number that names both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgpack

from p2p_diloco.core.digest import HASH_BYTES, digest
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity, verify
from p2p_diloco.core.records import unpack_plain

ANCHOR_CONTEXT = b"p2p-diloco anchor\0"
MAX_ANCHOR_BYTES = 512
MAX_FOLLOWED = 2
"""Anchors that one may name: the one before, and one that contradicts it."""
MAX_ANCHORS = 65536
"""Of one run. ``anchored_steps`` spaces them so that there are no more."""
ANCHORED_AFTER = 2
"""Snapshots that are due between a state and the time at which it is anchored: it has settled by then."""
RUN_ID_CHARS = 40


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Says which state a run's history has at one outer step."""

    run_id: str
    number: int
    """From 1 on, rising."""
    follows: tuple[bytes, ...]
    """The digest of the anchor before, and of one that contradicted it, if there was any; none of the first one."""
    step: int
    head: bytes
    state: bytes
    """The digest of the state there."""
    signature: bytes

    @cached_property
    def digest(self) -> bytes:
        """Returns the digest of all but the signature, by which a later anchor names this one."""
        return digest(b"anchor", msgpack.packb(self._content()))

    def _content(self) -> list[object]:
        return [self.run_id, self.number, list(self.follows), self.step, self.head, self.state]

    def signed_by(self, owner: Identity) -> Anchor:
        """Returns the same with the owner's signature."""
        return replace(self, signature=owner.sign(ANCHOR_CONTEXT + self.digest))

    def to_bytes(self) -> bytes:
        """Returns the anchor as it travels and lies on disk."""
        packed: bytes = msgpack.packb([*self._content(), self.signature])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Anchor:
        """Returns the anchor that ``data`` is; its signature is not verified. ValueError when ``data`` is not exactly
        what ``to_bytes`` would give."""
        if len(data) > MAX_ANCHOR_BYTES:
            raise ValueError("an anchor that is too large")
        content: Any = unpack_plain(data)
        try:
            run_id, number, follows, step, head, state, signature = content
            anchor = cls(
                run_id=run_id,
                number=number,
                follows=tuple(follows),
                step=step,
                head=head,
                state=state,
                signature=signature,
            )
        except (TypeError, ValueError) as error:
            raise ValueError("not an anchor") from error
        if not anchor._is_sound() or anchor.to_bytes() != data:
            raise ValueError("not an anchor: a field is out of its bounds")
        return anchor

    def _is_sound(self) -> bool:
        """Tells whether every field is of its type and size."""
        return (
            type(self.run_id) is str
            and len(self.run_id) == RUN_ID_CHARS
            and type(self.number) is int
            and 0 < self.number < 2**60
            and len(self.follows) <= MAX_FOLLOWED
            and bool(self.follows) == (self.number > 1)
            and type(self.step) is int
            and 0 < self.step < 2**40
            and all(type(one) is bytes and len(one) == HASH_BYTES for one in (*self.follows, self.head, self.state))
            and type(self.signature) is bytes
            and len(self.signature) == SIGNATURE_BYTES
        )


def open_anchor(data: bytes, *, run_id: str, owner: str) -> Anchor:
    """Returns the anchor that ``data`` is. ValueError unless this owner has signed it for this run."""
    anchor = Anchor.from_bytes(data)
    if anchor.run_id != run_id:
        raise ValueError("an anchor of another run")
    if not verify(owner, ANCHOR_CONTEXT + anchor.digest, anchor.signature):
        raise ValueError(f"anchor {anchor.number} is not signed by the run's owner")
    return anchor


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Holds the anchors that a peer goes by, each of which names the one before."""

    chain: tuple[Anchor, ...] = ()
    contrary: Anchor | None = None
    """One that contradicts them, and has no lower number; None where none was seen, or one that names it has come."""

    @property
    def newest(self) -> Anchor | None:
        """Returns the anchor that no history may leave out; None before there is one."""
        return self.chain[-1] if self.chain else None

    @cached_property
    def digests(self) -> frozenset[bytes]:
        """Returns the digests of all anchors that need no asking for: these, the contrary one, and those they name."""
        known = [*self.chain, *([self.contrary] if self.contrary else [])]
        return frozenset(one for anchor in known for one in (anchor.digest, *anchor.follows))

    @property
    def number(self) -> int:
        """Returns the newest one's number; 0 where there is none."""
        return self.chain[-1].number if self.chain else 0

    def since(self, number: int, most: int) -> list[Anchor]:
        """Returns those with a larger number than this, the oldest first, ``most`` at a time."""
        start = len(self.chain)
        while start and self.chain[start - 1].number > number:
            start -= 1
        return list(self.chain[start : start + most])

    def offered(self, others: Iterable[Anchor]) -> Anchors:
        """Returns what to go by when the owner has signed these as well: those that lead on from the newest one are
        taken. Where none does, and one has no lower number, it contradicts."""
        chain, beyond = list(self.chain), list[Anchor]()
        for anchor in sorted(others, key=lambda anchor: anchor.number):
            if leads_on(chain[-1] if chain else None, anchor):
                chain.append(anchor)
            elif anchor.number >= self.number and (not chain or anchor.digest != chain[-1].digest):
                beyond.append(anchor)
        if len(chain) > len(self.chain):
            return Anchors(chain=tuple(chain))
        if not self.chain or not beyond:
            return self
        newest = max([*beyond, *([self.contrary] if self.contrary else [])], key=lambda anchor: anchor.number)
        return replace(self, contrary=newest)

    def next(self, run_id: str, *, step: int, head: bytes, state: bytes, owner: Identity) -> Anchor:
        """Returns the anchor that the owner signs after these. It names the one that contradicts them, too."""
        named = [anchor for anchor in (self.newest, self.contrary) if anchor is not None]
        number = max((anchor.number for anchor in named), default=0) + 1
        unsigned = Anchor(
            run_id=run_id,
            number=number,
            follows=tuple(anchor.digest for anchor in named),
            step=step,
            head=head,
            state=state,
            signature=b"",
        )
        return unsigned.signed_by(owner)


def leads_on(before: Anchor | None, anchor: Anchor) -> bool:
    """Returns whether an anchor comes after ``before``: it has a larger number, and names it. After none comes the
    first one."""
    if before is None:
        return anchor.number == 1
    return anchor.number > before.number and before.digest in anchor.follows


def anchored_steps(outer_steps: int, snapshot_every: int) -> int:
    """Returns of which number of outer steps the multiples are anchored, in a run of so many: those at which a snapshot
    is due, or every so many of them where there would be more than MAX_ANCHORS."""
    return snapshot_every * -(-outer_steps // (snapshot_every * MAX_ANCHORS))
