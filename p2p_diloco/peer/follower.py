"""When a peer sets out for the swarm's head: a newcomer, a seed, and a trainer that missed an update. How it gets there
is in ``catchup``.

    run        look whenever records have come: a state that nobody trains on follows the swarm by itself; a trainer is
               told to come, and what it will need is fetched ahead, unless whoever claims to be one outer step ahead
               shows no sound certificate of it
    catch_up   go to the swarm's head, and on while it moves
    ask_ways   ask peers whose records do not show how they came to where they are

What others claim is a reason to look, and no more: a peer that claims a head to which nobody can show the way has no
vote for a while.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from p2p_diloco.core.admission import one_vote_each
from p2p_diloco.core.asked import Asked
from p2p_diloco.core.event import PeerCaughtUp
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.swarm_head import Standing, from_nowhere, must_catch_up, swarm_head, way_of
from p2p_diloco.core.trust_event import BranchLeft
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.catchup import Catchup, CaughtUp
from p2p_diloco.peer.presence import Presence
from p2p_diloco.peer.upkeep import Upkeep
from p2p_diloco.peer.witness import Witness
from p2p_diloco.round.here import Here

log = logging.getLogger(__name__)

PATIENCE = 3
"""Catch-ups in a row that lead nowhere before whoever claims that head has no vote for a while."""
WAYS_ASKED = 8
"""At a time."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """My branch of the run's history when I set out for another one, and how the votes stood."""

    standing: Standing
    votes: int
    """For where I set out for."""
    votes_left: int
    """For where I was."""


@dataclass(kw_only=True, eq=False)
class Follower:
    """Decides when one peer has to catch up, and has it done."""

    here: Here
    replica: Replica
    catchup: Catchup
    upkeep: Upkeep
    presence: Presence
    witness: Witness
    events: EventLog
    by_itself: bool = True
    """The state goes where the swarm goes: at a seed, and at a trainer until it begins. From then on it moves at outer
    steps."""
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the state moves other than by a round."""
    behind: bool = False
    """The swarm went on without me, or my state was wrong: the trainer shall come for an outer step now."""
    _ways_asked: Asked = field(default_factory=Asked)
    """Who was asked how it came where it is."""
    _in_vain: int = 0
    """Catch-ups in a row that led nowhere."""

    def target(self) -> tuple[int, bytes] | None:
        """Returns outer step and head of the swarm, as far as others are believed; None where there is nobody, and I
        have no state. The owner goes where its witness has led, whatever others claim: rounds wait for it."""
        directory, anchor = self.here.directory, self.here.seat.anchor
        if self.replica.state is None:
            believed = directory.believed(self.here.wall_s())
            somewhere = (record for record in believed if any(record.head))  # other newcomers have no state either
            beyond = [record for record in somewhere if anchor is None or record.step >= anchor.step]
            return swarm_head(one_vote_each(beyond), None, directory.before)
        standing = self.here.seat.standing
        if (witnessed := self.witness.leads_to(standing.head)) is not None:
            return standing.step + 1, witnessed
        voters, mine = self.here.voters()
        swarm = swarm_head(voters, mine, directory.before)
        if anchor is not None and swarm is None:
            return anchor.step, anchor.head  # I am not there, and nobody is seen who is
        return swarm

    def must_move(self) -> bool:
        """Tells whether nobody waits for me here any more, or what I hold is wrong."""
        return not self.replica.sound or must_catch_up(self.here.seat.standing, self.target())

    async def run(self) -> None:
        """Follows the swarm until it is cancelled: it looks whenever records have come. They go on coming meanwhile:
        what is downloaded may take longer than they last."""
        while True:
            news = self.presence.heard.event
            await self._follow()
            await news.wait()

    async def _follow(self) -> None:
        await self.ask_ways()
        async with self.moving:
            if self.behind or not self.must_move():
                return
            if self.by_itself:
                await self.catch_up(patience_s=0.0)
                self.presence.publish_now.ring()
                return
            target = self.target()
            entry = None if target is None else await self.catchup.check_ahead(target)
            if self.must_move() and self.here.seat.phase in ("inner", "evaluate"):
                self.behind = True
                self.here.seat.changed.ring()
                if entry is not None:
                    await self.catchup.fetch_ahead(entry)

    async def ask_ways(self, *, failed: bool = True) -> None:
        """Asks peers whose records do not show that we share a history how they came there: a group that went on while
        most stood still is ahead of them, and not elsewhere, however far that is. Each is asked once in a record's
        life. ``failed``: also those that did not answer when they were last asked for anything."""
        if self.replica.state is None:
            return
        asked_s = now_s()
        directory = self.here.directory
        voters = directory.believed(self.here.wall_s())
        claims = from_nowhere(voters, self.here.seat.standing, directory.before)
        unasked = {
            record.head: record
            for record in self._ways_asked.unasked(claims, asked_s)
            if failed or not directory.proven.has_failed(record.peer_id)
        }
        chosen = list(unasked.values())[:WAYS_ASKED]
        self._ways_asked.note((r.peer_id for r in chosen), asked_s + self.here.timeouts.record_life_s)
        await asyncio.gather(*(self.catchup.learn_way(record) for record in chosen))

    async def catch_up(self, patience_s: float) -> bool:
        """Goes to the swarm's head, and on while it moves. Returns whether a snapshot had to be downloaded.

        It returns when the swarm's head is reached, or when nobody helps. A newcomer, which has no state, waits up to
        ``patience_s`` for somebody that gives it one; after a download that broke off, until all donors that failed it,
        perhaps because it was cut off itself, must have signed newer records, and ``patience_s`` more."""
        deadline_s, snapshot = now_s() + patience_s, False
        if not self.replica.sound:
            await self.upkeep.mend()
        while True:
            target, caught_up = self.target(), None
            if target is not None and (self.replica.state is None or must_catch_up(self.here.seat.standing, target)):
                started_s, before = now_s(), self._branch(target)
                await self.upkeep.settled()
                caught_up = await self.catchup.to(target)
                if caught_up is None:
                    self.led_nowhere(target)
            if caught_up is None:
                if self.replica.state is not None:
                    self.presence.take_standing()  # a download that broke off may have moved it part of the way
                if self.catchup.promising:
                    self.catchup.promising = False  # one try is one reason to wait
                    deadline_s = now_s() + self.here.timeouts.record_life_s + patience_s
                if self.replica.state is not None or now_s() >= deadline_s:
                    return snapshot
                await asyncio.sleep(self.here.timeouts.refresh_s)
                await self.presence.refresh()
                continue
            self._in_vain = 0
            snapshot = snapshot or caught_up.snapshot
            self.presence.take_standing()
            self.upkeep.moved()
            self._log(caught_up, now_s() - started_s)
            if caught_up.rolled_back and before is not None:
                self._log_branch(caught_up, before)
            await self.presence.pushes.to_all()  # the answers say how far the swarm is by now

    def _log(self, caught_up: CaughtUp, seconds: float) -> None:
        event = PeerCaughtUp(
            seconds=seconds,
            from_step=caught_up.from_step,
            to_step=caught_up.to_step,
            rolled_back=caught_up.rolled_back,
            snapshot=caught_up.snapshot,
            bytes_received=caught_up.bytes_received,
            donors=caught_up.donors,
        )
        self.events.write(event)

    def _branch(self, target: tuple[int, bytes]) -> Branch | None:
        """Returns how the votes stand between where I am and where I set out for; None where I have no state."""
        if self.replica.state is None:
            return None
        directory, standing = self.here.directory, self.here.seat.standing
        voters, mine = self.here.voters()
        ways = [way_of(one, directory.before) for one in (*voters, *([mine] if mine else ()))]
        there, here = (sum(head in way for way in ways) for head in (target[1], standing.head))
        return Branch(standing=standing, votes=there, votes_left=here)

    def _log_branch(self, caught_up: CaughtUp, before: Branch) -> None:
        standing, fork_step = self.here.seat.standing, before.standing.step - caught_up.rolled_back
        log.warning(
            "gave up %d outer steps that the swarm did not share: of those who have a vote, %d stood on the other "
            "branch and %d on mine",
            *(caught_up.rolled_back, before.votes, before.votes_left),
        )
        event = BranchLeft(
            fork_step=fork_step,
            left_step=before.standing.step,
            left_head=before.standing.head.hex(),
            step=standing.step,
            head=standing.head.hex(),
            votes=before.votes,
            votes_left=before.votes_left,
        )
        self.events.write(event)

    def led_nowhere(self, target: tuple[int, bytes]) -> None:
        """Notes that ``target`` was claimed, and looking for it was in vain. After PATIENCE times in a row, those that
        claim it have no vote for a while."""
        self._in_vain += 1
        if self._in_vain >= PATIENCE:
            self._in_vain = 0
            count = self.here.directory.doubt(target[1], self.here.wall_s(), self.here.timeouts.record_life_s)
            log.warning("%d peers claim outer step %d, and none has shown the way there", count, target[0])
