"""Donors: the peers from which another one takes heads, updates and snapshots. Which of them have what, and the way
that one of them shows.

What a record says that its peer has is a reason to ask, and no more: everything that comes is verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2p_diloco.core.electors import History
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster import rank
from p2p_diloco.core.update import next_head
from p2p_diloco.round.here import Here
from p2p_diloco.wire.state_messages import MAX_LINKS, AskHeads, Heads


@dataclass(frozen=True, kw_only=True, eq=False)
class Donors:
    """The live peers that serve others, as their records describe them."""

    here: Here

    def serving(self) -> list[Record]:
        """Returns the records of all live peers that serve. Everybody gets another order, so the load is spread; those
        that are not proven come last."""
        return self._ordered(record for record in self.here.live() if record.phase != "joining")

    def of_head(self, head: bytes) -> list[Record]:
        """Returns those whose record has ``head`` in it: they have the update that leads there."""
        return [record for record in self.serving() if head in (record.head, *record.heads)]

    def of_update(self, step: int) -> list[Record]:
        """Returns all that serve, in the order in which the update of outer step ``step`` is asked from them. Records
        take seconds to get here: who has just made that step has the update, too, and is asked last."""
        return sorted(self.serving(), key=lambda record: record.step <= step)

    def of_snapshot(self, step: int, digest: bytes) -> list[Record]:
        """Returns those whose record names this snapshot, and then those that name a newer one and may have kept this
        one, too."""
        serving = self.serving()
        naming = [r for r in serving if (r.snapshot_step, r.snapshot_digest) == (step, digest)]
        return naming + [r for r in serving if r.snapshot_step > step]

    def downloading(self, step: int, digest: bytes) -> list[Record]:
        """Returns those that download this snapshot themselves, as their records say, and can be dialled, in the same
        order as ``serving``."""
        joining = [r for r in self.here.live() if r.phase == "joining" and not r.client_mode]
        return self._ordered(r for r in joining if (r.snapshot_step, r.snapshot_digest) == (step, digest))

    def _ordered(self, records: Iterable[Record]) -> list[Record]:
        me, proven = self.here.peer_id.encode(), self.here.directory.proven
        return sorted(records, key=lambda record: (record.peer_id not in proven, rank(me, record.peer_id)))

    async def ask_path(self, guide: Record, target: tuple[int, bytes], answer_s: float) -> dict[int, bytes] | None:
        """Asks one donor which heads lead to the target. Returns outer step -> head, without a gap and up to the
        target; None when the donor's ledger leads elsewhere. Silent when it does not begin to answer in ``answer_s``.

        The guide can leave older heads out, but invent none: every head follows from the one before and the update's
        hash, so the path is true if the target is."""
        path: dict[int, bytes] = {}
        channel = await self.here.open_within(guide.peer_id, answer_s)
        try:
            while True:
                since = max(path, default=0)
                timeout_s = self.here.timeouts.request_s if path else answer_s
                answer: Heads = await channel.request(AskHeads(since=since), Heads, timeout_s=timeout_s)
                step, head = answer.first, answer.head
                if path and (step, head) != (since, path[since]):
                    raise Misbehaved(guide.peer_id, f"names other heads from outer step {since} on than before")
                path[step] = head
                for link in answer.links:
                    step, head = step + 1, next_head(head, link)
                    path[step] = head
                if step >= target[0] or len(answer.links) < MAX_LINKS:
                    break
        finally:
            channel.close()
        if path.get(target[0]) != target[1]:
            return None
        return {step: head for step, head in path.items() if step <= target[0]}

    async def ask_way(self, record: Record, history: History) -> list[bytes]:
        """Asks a peer how it came to where its record says that it stands. Returns the heads that led there, newest
        first, back to one that is in ``history`` if there is any: that may be longer ago than anybody has updates of.
        They are true if the record's head is; nothing where the peer has left it, or does not say."""
        heads, step = [record.head], record.step
        channel = await self.here.open(record.peer_id)
        try:
            while step > 0 and history.step_of(heads[-1]) is None:
                since = max(step - MAX_LINKS, 0)
                answer: Heads = await channel.request(AskHeads(since=since, pruned=True), Heads)
                page = [answer.head]
                for link in answer.links:
                    page.append(next_head(page[-1], link))
                older = page[: step - answer.first] if since == answer.first else []
                if not older or page[len(older) : len(older) + 1] != [heads[-1]]:
                    return []
                heads += reversed(older)
                step = since
        finally:
            channel.close()
        return heads
