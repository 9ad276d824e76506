"""How a peer comes to the roster of a round: which peer it asks to lead, and what it answers a peer that asks it.

A peer that is ready asks the best-ranked live peer on its head to lead, of the known ones where there are some. That
peer tells the others that the round is closing, waits until all of them are ready or out of time (``gatherings`` says
exactly until when), and sends everybody the same roster: the readiness of every member, signed for this leader, and its
own signature over the whole. Nobody is believed about anybody else.

The leader need not be ready itself: its network process leads while its trainer finishes, and if the trainer does not
make it in time, the roster goes out without it.

Two leaders may gather on one head, when one of them has just come there. They hear of each other from the peers that
they call, and the one that precedes the other (``roster.precedence``) takes over what that has gathered. A peer that is
called while it waits for another leader, or is in a round, is waited for: two groups on one head would make two
histories.

A member waits for a roster as long as its leader answers within ``calls.answer_s``, and then says something every
``Timeouts.request_s``, but not longer than ``Company.patience_s``. A leader that stops without closing its streams
(SIGSTOP) thus costs the members ``request_s``: while it runs, it says every ``Timeouts.heartbeat_s`` that it is still
there. Then the next one in rank is asked, up to MAX_LEADERS_ASKED in all. A peer that has failed as a leader, on
whatever head, is asked after the others for a while, and so is one that is not proven, or that rounds have waited for
in vain (``Company.is_trusted``). Peers differ in that. So whoever asks a leader hears from it where others are, and
goes there.

What others say ends no gathering by itself. That the swarm is past a head has to follow from records, by the rule that
catches up; a peer that names another leader must come after it in precedence; and a peer that has failed twice as a
leader on a head, or lied, leads nobody there for ``Timeouts.record_life_s``. Not for ever: two sides of a network that
was cut have failed each other.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.core.group import Group
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import open_record
from p2p_diloco.core.roster import Readiness, new_nonce, on_head, seal_readiness
from p2p_diloco.core.uplinks import pack_uplinks
from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.round import callers
from p2p_diloco.round.calls import ask, reach
from p2p_diloco.round.company import Company
from p2p_diloco.round.gathering import Answer
from p2p_diloco.round.gatherings import Gatherings
from p2p_diloco.round.here import Here
from p2p_diloco.round.outcome import Missed
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Behind, Closing, Eta, NoWitness, Ready, Redirect, Roster, TooFew

log = logging.getLogger(__name__)

MAX_LEADERS_ASKED = 16
NO_WITNESS = (
    "fewer than two known members are here, and neither is the run's owner, whose seed has to witness the update"
)
NOBODY_LEADS = "others are here ({others}), but none that can be dialled leads, nor does the owner's seed"


@dataclass(kw_only=True)
class Search:
    """Holds what a peer has heard so far while it looks for a leader on one head."""

    head: bytes
    alone_s: float
    """So long I wait at one leader until enough are ready."""
    useless: set[str] = field(default_factory=set)
    """Peers that do not lead."""
    claims: set[str] = field(default_factory=set)
    """Peers to which I have left the lead, because they said that they gather."""
    named: dict[str, str] = field(default_factory=dict)
    """Peer -> who has named it as the leader."""
    began_s: float = 0.0
    """Loop time from which on the leader that I have asked keeps me waiting: while others still train, it does not."""

    def waited_s(self) -> float:
        """Returns how long that one has kept me waiting."""
        return now_s() - self.began_s


class Matchmaker:
    """One peer's part in forming rounds: it finds a group for its own trainer, and answers the peers that ask it."""

    def __init__(self, here: Here, manifest: RunManifest) -> None:
        self.identity = here.identity
        self.manifest = manifest
        self.seat = here.seat
        self.timeouts = here.timeouts
        self.company = Company(here=here, manifest=manifest)
        self.gatherings = Gatherings(self.company)
        self.waiting_at: tuple[bytes, str] | None = None
        """(head, peer id of the leader) while I wait for a roster."""
        self.called_s = 0.0
        """Loop time at which the round was called whose group I have found last, as far as I can know."""

    async def find_group(
        self, weight: int, *, dropped: bool = False, tokens_per_s: float = 0.0, trained_s: float = 0.0
    ) -> Group | Missed:
        """Finds the group of the next round on my head, and returns it, or why there is none.

        Leaders are asked one after another in the order of rank, myself among them, until one has a roster, or says
        that there are too few of us or that the swarm is past this head. ``weight``: tokens that I have trained on.
        ``dropped``: I contribute nothing. ``trained_s``: how long my inner steps have taken; so long I wait until
        enough are ready to call the others, if that is longer than a gathering may last.
        """
        company = self.company
        head = self.seat.standing.head
        company.forget_failures()
        search = Search(head=head, alone_s=max(trained_s, company.longest_s(busy=False)))
        for _ in range(MAX_LEADERS_ASKED):
            if company.beyond(self.seat.standing.head) is not None:
                return Missed(reason="behind", detail="the swarm went on meanwhile")
            order = company.leaders(head, search.named)
            leader = next((peer_id for peer_id in order if peer_id not in search.useless), None)
            if leader is None:
                break
            search.began_s = now_s()
            expected = company.expected_on(head)
            mine = self._readiness(weight, dropped, tokens_per_s, leader)
            sealed = seal_readiness(mine, self.identity)
            try:
                if leader == company.me:
                    answer = await self.gatherings.lead(sealed, search.alone_s)
                    search.began_s = max(search.began_s, self.gatherings.opened_s)
                else:
                    answer = await self._ask(leader, sealed, search)
                if isinstance(answer, Redirect):
                    self._redirected(leader, answer, head, search)
                    continue
                group = self._outcome(leader, answer, mine, sealed)
                self.called_s = search.began_s
                if isinstance(group, Group) and leader != company.me:
                    company.judge_gathering(group, expected, search.waited_s())
                return group
            except Refused as error:
                log.debug("%s does not lead: %s", leader[-8:], error.reason)
                company.here.directory.proven.answered(leader)
                search.useless.add(leader)
                if leader in search.claims:
                    company.failed(head, leader, cost_s=search.waited_s())
            except RemoteError as error:
                log.info("cannot meet at %s: %s", leader[-8:], error.reason)
                company.here.transport.traffic.reject(error)
                company.here.directory.suspect(leader)
                cost_s = search.waited_s()
                company.failed(head, leader, cost_s=cost_s, lied=isinstance(error, Misbehaved))
                search.useless.add(leader)
                if search.named.get(leader, company.me) != company.me:
                    company.rounds.charge(search.named[leader], cost_s, now_s())
        others = len(on_head(company.here.directory.expected(company.here.wall_s()), head))
        if not others:
            return Missed(reason="alone", detail="nobody to meet")
        detail = NOBODY_LEADS.format(others=others)
        log.warning("no outer step: %s", detail)
        return Missed(reason="alone", detail=detail)

    def _redirected(self, leader: str, answer: Redirect, head: bytes, search: Search) -> None:
        """Takes in that a leader, or somebody that I have called as the leader, names a better one. Misbehaved when
        that one does not rank before it; but the seed that helps knows best whether it is needed."""
        self.company.learn(leader, answer.record)
        better = open_record(answer.record).peer_id
        if leader == self.company.me:
            search.useless.discard(better)
            search.claims.add(better)
        elif leader not in self.company.leading_helper(head) and not self.company.precedes(head, better, leader):
            raise Misbehaved(leader, "names a leader that does not rank before it")
        else:
            search.useless.add(leader)
        search.named[better] = leader

    def _readiness(self, weight: int, dropped: bool, tokens_per_s: float, leader: str) -> Readiness:
        """Returns what I shall sign: that I am ready for one round on the head where I stand, with this leader."""
        return Readiness(
            run_id=self.manifest.run_id,
            leader=leader,
            step=self.seat.standing.step,
            head=self.seat.standing.head,
            peer_id=self.identity.peer_id,
            weight=min(weight, self.manifest.spec.max_weight_tokens),
            client_mode=self.seat.client_mode,
            reached_over=self.seat.ways.reached_over,
            reaches_over=self.seat.ways.reaches_over,
            dropped=dropped,
            tokens_per_s=tokens_per_s,
            nonce=new_nonce(),
            seat=self.company.here.sealed_seat,
            uplinks=pack_uplinks(self.seat.standing.head, self.company.measured.at(self.seat.standing.step)),
        )

    def _outcome(
        self, leader: str, answer: Roster | TooFew | NoWitness | Behind, mine: Readiness, sealed: bytes
    ) -> Group | Missed:
        """Returns what a leader's answer makes of my search. Refused when another leader has to be asked, Misbehaved
        when the answer is a lie."""
        company, limits = self.company, self.manifest.spec.round
        if isinstance(answer, TooFew):
            return Missed(reason="alone", detail=f"{answer.ready} ready, {limits.min_group} needed")
        if isinstance(answer, NoWitness):
            log.warning("no outer step: %s", NO_WITNESS)
            return Missed(reason="alone", detail=NO_WITNESS, uncertified="witness")
        if isinstance(answer, Behind):
            company.learn(leader, answer.record)
            if company.beyond(mine.head) is None:
                raise Refused(leader, "it says that the swarm is past this head, which no record shows")
            return Missed(reason="behind", detail=f"peer {leader[-8:]} is past this head")
        if sealed not in answer.members and (leader == company.me or len(answer.members) >= limits.max_group):
            raise Refused(leader, "its round has no place for me")
        group = company.group_of(leader, answer)
        if sealed not in answer.members and not group.needs_witness and company.me not in self.seat.known.peers:
            raise Refused(leader, "its group has as many newcomers as it may have")
        if mine not in group.members or (group.step, group.head) != (mine.step, mine.head):
            raise Misbehaved(leader, "sends a roster without me")
        return group

    async def _ask(self, leader: str, sealed: bytes, search: Search) -> Answer:
        """Tells a leader that I am ready, and returns what comes of its gathering. Silent when it keeps me waiting for
        longer than the rules above let it."""
        company, channel = self.company, await reach(self.company, leader)
        self.waiting_at = self.seat.standing.head, leader
        try:
            ready, asked_s = Ready(readiness=sealed, record=self.seat.sealed_record), now_s()
            answer: Eta | Answer = await ask(company, channel, ready, Eta, Roster, TooFew, NoWitness, Redirect, Behind)
            nobody_calls = False
            while True:
                company.here.directory.proven.answered(leader)
                if not isinstance(answer, Eta):
                    return answer
                if nobody_calls:
                    search.began_s = now_s()
                nobody_calls = answer.uncalled and not callers.calls(company, search.head)
                if nobody_calls and now_s() >= asked_s + search.alone_s:
                    return TooFew(ready=1)
                if (waited_s := search.waited_s()) >= company.patience_s(leader, busy=answer.busy):
                    company.waits.charge(leader, waited_s, now_s())  # or it would be waited for as a member next
                    raise Silent(leader, f"gathers for more than {waited_s:.0f} s")
                answer = await channel.receive(
                    Eta, Roster, TooFew, NoWitness, Redirect, Behind, timeout_s=self.timeouts.request_s
                )
        finally:
            self.waiting_at = None
            self.seat.changed.ring()
            channel.close()

    async def on_ready(self, channel: Channel, message: Ready) -> None:
        """Answers a peer that asks me to lead.

        It is told which leader I wait for, if I do; then it waits until I am in no round on its head. After that it
        joins my gathering, unless I stand elsewhere, cannot lead, or find a live peer that precedes me.
        """
        readiness = self.company.readiness_of(channel.peer_id, message)
        awaited = self._awaited(channel.peer_id)
        if awaited is not None and readiness.head == self.seat.standing.head and not self.seat.in_round:
            await channel.send(Redirect(record=awaited))
            return
        while not await self._take_in(channel, readiness, message.readiness):
            await channel.send(Eta(eta_s=self.timeouts.request_s, busy=True))
            await heard(self.seat.changed.event, self.timeouts.heartbeat_s)

    async def _take_in(self, channel: Channel, readiness: Readiness, sealed: bytes) -> bool:
        """Answers a peer that is ready once I am in no round on its head. Returns False when it is left out of the
        round that I lead: it has to wait until that is over."""
        await self._round_over(channel, readiness.head)
        standing = self.seat.standing
        if readiness.head != standing.head:
            await channel.send(self._elsewhere(readiness.head))
            return True
        if readiness.step != standing.step:
            raise Misbehaved(channel.peer_id, f"says that this head is outer step {readiness.step}")
        if readiness.head not in self.gatherings.by_head:
            looking = asyncio.create_task(self._better_leader(readiness.head))
            try:
                while not looking.done():
                    await channel.send(Eta(eta_s=0.0))
                    await asyncio.wait((looking,), timeout=self.timeouts.heartbeat_s)
                better = looking.result()
            finally:
                looking.cancel()
            if better is not None:
                await channel.send(Redirect(record=better))
                return True
            if self.seat.standing.head != readiness.head or self.company.me not in self.company.leaders(readiness.head):
                await channel.send(No(reason="cannot lead"))
                return True
        return await self.gatherings.join(channel, readiness.head, sealed)

    async def _better_leader(self, head: bytes) -> bytes | None:
        """Returns the sealed record of a peer that precedes me on ``head`` and answers a dial, or None."""
        for _ in range(MAX_LEADERS_ASKED):
            leader = next(iter(self.company.leaders(head)), None)
            if leader in (None, self.company.me):
                return None
            try:
                channel = await self.company.here.open(leader)
                channel.close()
                return self.company.here.directory.sealed(leader)
            except RemoteError:
                self.company.here.directory.suspect(leader)
        return None

    async def on_closing(self, channel: Channel, message: Closing) -> None:
        """Answers a leader that tells me that the round on a head closes, and asks how long I need.

        It waits until I am in no round there. Then my trainer is called to the round, and the leader is told how many
        seconds that takes; unless I stand elsewhere, do not train, or rank before it and gather there already. Where
        too few are ready, as far as is shown, it is told how long my trainer takes for all its steps.
        """
        leader = self.company.learn_own(channel.peer_id, message.record)
        shown = callers.shown_by(self.company, channel.peer_id, (message.record, *message.callers), message.head)
        await self._round_over(channel, message.head)
        gathering = self.gatherings.by_head.get(message.head)
        if gathering is not None:
            gathering.changed.ring()  # enough may be ready now
        if message.head != self.seat.standing.head:
            await channel.send(self._elsewhere(message.head))
        elif not self.seat.role_trainer or self.seat.phase == "joining":
            await channel.send(No(reason="not training"))
        elif gathering is not None and self.company.precedes(message.head, self.company.me, channel.peer_id):
            await channel.send(Redirect(record=self.seat.sealed_record))
        else:
            comes = leader is not None and self.company.may_lead(leader, message.head)
            if gathering is not None and comes:
                self.gatherings.notices.claim(gathering, channel.peer_id, Redirect(record=message.record))
            called, now = callers.calls(self.company, message.head, shown), now_s()
            gather_s = self.manifest.spec.round.gather_s
            eta_s = self.seat.call_trainer(now, gather_s) if called else self.seat.all_steps_s(now)
            await channel.send(Eta(eta_s=eta_s, uncalled=not called))

    def _awaited(self, asker: str) -> bytes | None:
        """Returns the sealed record of the leader whose roster I wait for, unless that is the peer that asks."""
        if self.waiting_at is None or self.waiting_at[1] == asker:
            return None
        return self.company.here.directory.sealed(self.waiting_at[1])

    def _elsewhere(self, head: bytes) -> Behind | No:
        """Returns what a peer on a head is told where I do not stand: my record, when I have been there."""
        if head in self.seat.standing.heads:
            return Behind(record=self.seat.sealed_record)
        return No(reason="on another head")

    async def _round_over(self, channel: Channel, head: bytes) -> None:
        """Returns when I am in no round on ``head`` and wait for no other leader's roster, at the latest after
        ``Company.longest_s(busy=True)``. The peer that asks is told every ``Timeouts.heartbeat_s`` to wait: it would
        else take me for dead, and meet others on a head that is about to be history."""
        seat = self.seat
        deadline_s = now_s() + self.company.longest_s(busy=True)
        while seat.standing.head == head and now_s() < deadline_s:
            changed, awaited = seat.changed.event, self._awaited(channel.peer_id)
            if not seat.in_round and awaited is None:
                return
            await channel.send(Eta(eta_s=self.timeouts.request_s, busy=True, leader=awaited or b""))
            await heard(changed, self.timeouts.heartbeat_s)
