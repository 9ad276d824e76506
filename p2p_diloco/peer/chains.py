"""The chain from a donor: headers and certificates of the way to a head, verified before anything is taken along it.

A head is believed when the chain to it is sound, from the genesis on or from an entry that my own chain has: every
header follows from the one before, and every certificate is signed by most of those that the certificates before make
known. Whoever serves another chain misbehaves. Whoever serves one without the newest anchor of the run's owner may not
have heard of it, but has no vote for a while: by the next few outer steps that it makes, its records would show no more
where it left the run.

    Chains.follow       all that is missing of the way to a target
    Chains.entry_after  the one entry that leads on from here
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2p_diloco.core.anchor import Anchor
from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.equivocation import between
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.lineage import Lineage
from p2p_diloco.core.records import Record, unpack_plain
from p2p_diloco.ledger.chain import ITEM_BYTES, max_entry_bytes
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.download import Tally, drop
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.state_messages import MAX_CHAIN_BYTES, AskChain

log = logging.getLogger(__name__)

FIRST_STRIDE = 16
"""Outer steps that a search for a fork goes back at first; then STRIDES times as many each time."""
STRIDES = 4


@dataclass(frozen=True, kw_only=True)
class Way:
    """A verified way to a target: what leads there from my own chain."""

    step: int
    """The outer step up to which my chain has it."""
    entries: tuple[Certified, ...] = ()
    """From there on. They contradict what I stand on, and are in memory until I leave that."""

    def state_at(self, step: int, replica: Replica) -> bytes:
        """Returns the digest of the state at an outer step of the way, as the manifest or a certificate names it;
        empty where none does. Reads the disk."""
        if step < self.step or step == 0:
            return replica.history.certified_digest(step)
        there = self.entries[step - self.step : step - self.step + 1]
        return there[0].certificate.state if there else b""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Holds what a donor has sent of its chain at a time."""

    entries: tuple[Certified, ...]
    size_bytes: int
    is_last: bool
    """Another entry would have found room."""


class Chains:
    """Asks donors for their chains, and verifies them from where they leave the own one."""

    def __init__(self, *, here: Here, replica: Replica) -> None:
        self.here = here
        self.replica = replica
        self.chain = replica.ledger.chain
        self._max_entry_bytes = max_entry_bytes(replica.ledger.grid)

    async def follow(
        self, guide: Record, path: Mapping[int, bytes], target: tuple[int, bytes], tally: Tally
    ) -> Way | None:
        """Returns the way to ``target``, verified; None when the guide's chain ends before. ``path``: the last heads of
        that way, as the guide has shown them. What contradicts nothing that I stand on is in my chain then. None as
        well where the way leaves out the newest anchor that I have seen, whoever may have signed it; the guide has no
        vote for a while then. Raises RemoteError."""
        anchor = self.here.seat.anchor
        if anchor is not None and target[0] < anchor.step:
            return None
        if target[0] == 0 or self.chain.head_at(target[0]) == target[1]:
            if anchor is not None and self.chain.head_at(anchor.step) != anchor.head:
                return None
            return Way(step=target[0])  # no chain leads to the genesis: the manifest names its digest
        channel = await self.here.open(guide.peer_id)
        try:
            page = await self._first_page(channel, path)
            while all(self.chain.has(certified.header) for certified in page.entries):
                page = await self._ask(channel, page.entries[-1].header.step + 1)
            fork = next(certified.header.step for certified in page.entries if not self.chain.has(certified.header))
            lineage, state, kept = self._lineage(fork), self.replica.state, list[Certified]()
            stored = state is None or state.step <= fork
            while True:
                new = await self._verified(channel, lineage, page, target[0])
                tally.bytes_received += page.size_bytes
                if anchor is not None and self._is_left_out(anchor, fork, new):
                    log.info("%s follows a history without the newest anchor of the run's owner", guide.label)
                    self._disbelieve(guide.peer_id)
                    return None
                if stored:
                    await asyncio.to_thread(self.replica.extend, new)
                else:
                    kept += new
                if lineage.step >= target[0]:
                    break
                if page.is_last:
                    return None
                page = await self._ask(channel, lineage.step)
        finally:
            channel.close()
        if lineage.head != target[1]:
            raise Misbehaved(guide.peer_id, f"serves a chain to another head of outer step {target[0]} than it shows")
        if kept:
            self._compare(await asyncio.to_thread(self.chain.entry, fork), kept[0])
        return Way(step=lineage.step if stored else fork, entries=tuple(kept))

    def _compare(self, mine: Certified | None, theirs: Certified) -> None:
        """Bars those whose signatures under two updates that lead on from one head, both of them sound, prove that they
        lie."""
        barred = self.here.directory.barred
        for proof in () if mine is None else between(mine, theirs, run_id=barred.run_id, owner=barred.owner):
            barred.add(proof)

    async def entry_after(self, step: int, head: bytes, donors: Sequence[Record]) -> Certified | None:
        """Returns the verified entry that leads from outer step ``step``, which my chain leads to, to ``head``; None
        when none of the donors gives it, or it leads on from elsewhere."""
        lineage = self._lineage(step)
        for donor in donors:
            try:
                channel = await self.here.open(donor.peer_id)
                try:
                    page = await self._ask(channel, step)
                    header = page.entries[0].header
                    if header.head != head or header.parent != (self.chain.head_at(step) or header.parent):
                        continue
                    await self._verified(channel, lineage, page, step + 1)
                    return page.entries[0]
                finally:
                    channel.close()
            except RemoteError as error:
                drop(error, self.here)
        return None

    async def _first_page(self, channel: Channel, path: Mapping[int, bytes]) -> Page:
        """Returns a page that begins where the guide's chain and mine are one, or at the genesis."""
        shared = max((step for step, head in path.items() if self.chain.head_at(step) == head), default=None)
        if shared is not None:
            return await self._ask(channel, shared)
        since, stride = max(min(self.chain.end, min(path) - 1), 0), FIRST_STRIDE
        while True:
            page = await self._ask(channel, since)
            if since == 0 or page.entries[0].header.parent == self.chain.head_at(since):
                return page
            since, stride = max(since - stride, 0), stride * STRIDES

    async def _ask(self, channel: Channel, since: int) -> Page:
        """Returns the entries from outer step ``since`` on that a donor sends, one at least, with nothing verified but
        that they are of consecutive outer steps."""
        most = max(MAX_CHAIN_BYTES, self._max_entry_bytes + 2 * ITEM_BYTES)
        await channel.send(AskChain(since=since))
        data = await channel.receive_blob(most, self.here.timeouts.reduced_part_s)
        try:
            entries = await asyncio.to_thread(unpack_entries, data, since)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"serves no chain: {error}") from error
        is_last = len(data) + self._max_entry_bytes + ITEM_BYTES <= MAX_CHAIN_BYTES
        return Page(entries=entries, size_bytes=len(data), is_last=is_last)

    def _is_left_out(self, anchor: Anchor, fork: int, entries: Sequence[Certified]) -> bool:
        """Returns whether a way leaves out an anchor that leaves my chain at outer step ``fork`` and leads on by
        ``entries``."""
        if anchor.step <= fork:
            return self.chain.head_at(anchor.step) != anchor.head
        return any(one.header.step + 1 == anchor.step and one.header.head != anchor.head for one in entries)

    def _lineage(self, step: int) -> Lineage:
        """Returns my chain, followed to an outer step. At the genesis, any may be that of another chain: who witnesses
        its first updates decides."""
        head = self.chain.head_at(step) if step else None
        return Lineage(self.replica.rules, step=step, head=head or b"", last=self.chain.last_contributors(step))

    async def _verified(self, channel: Channel, lineage: Lineage, page: Page, until: int) -> list[Certified]:
        """Returns the entries of a page that lead on from where ``lineage`` is, up to outer step ``until``; it is led
        on by them."""
        new = [certified for certified in page.entries if lineage.step <= certified.header.step < until]
        try:
            for certified in new:
                await asyncio.to_thread(lineage.follow, certified)
        except ValueError as error:
            self._disbelieve(channel.peer_id)
            raise Misbehaved(channel.peer_id, f"serves a chain that is not sound: {error}") from error
        return new

    def _disbelieve(self, peer_id: str) -> None:
        """Takes the vote of a peer for a while: the history that it has shown is none to follow."""
        self.here.directory.disbelieve(peer_id, self.here.wall_s(), self.here.timeouts.record_life_s)


def unpack_entries(data: bytes, since: int) -> tuple[Certified, ...]:
    """Returns the headers and certificates in a donor's answer, one at least. Raises ValueError unless they are of the
    outer steps from ``since`` on, one after the other."""
    pieces = unpack_plain(data)
    if not isinstance(pieces, list) or not pieces or not all(type(piece) is bytes for piece in pieces):
        raise ValueError("not a list of entries")
    entries = tuple(Certified.from_bytes(piece) for piece in pieces)
    if [certified.header.step for certified in entries] != list(range(since, since + len(entries))):
        raise ValueError("entries of other outer steps than were asked for")
    return entries
