"""The rounds that a peer leads while they are formed: it calls the others, waits for them, and gives all that came the
same answer.

A gathering begins when the leader's own trainer is ready, or when the first peer that is ready asks it to lead. It
opens when enough are ready to call the others (``core.call``), usually with the second one (``Gathering.opened_s``).
Then it calls every live trainer on this head that is not ready yet with ``closing``. Until then each that is ready
waits, as long as its own inner steps have taken, at least ``gather_s`` + MAX_GATHER_EXTENSION_S (``Matchmaker``): two
that wait so long meet, however long their inner phases are. A leader that has to wait says by the same message that it
gathers, so that two of them hear of each other; it calls nobody by that.

**Which peers are waited for.** A live trainer on this head is expected when it is proven: it has answered the leader,
or has come to it by itself, since it last failed it (``core.proven``). Each one that is expected when the gathering
opens has a deadline of its own (``Gathering.deadlines_s``):

    before it has answered the call     opened_s + gather_s + CLOSING_MARGIN_S
    it says that it needs ``eta_s``     when it said so + eta_s + CLOSING_MARGIN_S, at most opened_s + gather_s +
                                        what credit it has left, of MAX_GATHER_EXTENSION_S; at least CLOSING_MARGIN_S
    it is busy with another round       the same, its credit for rounds counted as well; at most opened_s + gather_s +
    on this head                        MAX_GATHER_EXTENSION_S + the longest time of a round (``Company.longest_s``),
                                        if half of both is left, and it is one of enough that are known here: no other
                                        round can be certified without these, or the owner, who witnesses one update
    the leader's own trainer            as a peer that says what it needs and has all its credit

``gather_s`` is the manifest's ``round.gather_s``. A trainer asks for no more than that, unless one inner step alone
takes longer. What was waited for a peer in vain, or beyond ``gather_s`` + CLOSING_MARGIN_S, is taken from its credit
(``Company.waits``), and so is what it cost as a leader that only promised; a peer that is in debt, there or for rounds,
is called, and not waited for. A peer is not waited for any more as soon as it refuses, stands on another head, cannot
be dialled, does not answer the call within ``calls.answer_s``, or closes its stream after it was ready. When a busy
peer waits for the roster of another leader on this head, that one is called as well.

A peer that is not proven is called, too, but has no deadline before it answers. While fewer than ``round.min_group``
are ready, the round waits for such an answer until opened_s + gather_s + CLOSING_MARGIN_S: there is nothing to lose.

**When the round closes.** It closes when everybody that is expected is ready or past its deadline. So it closes at once
when all are ready, usually ``gather_s`` + CLOSING_MARGIN_S after it opened at the latest, and never later than the
deadline of a busy peer. A deadline beyond MAX_GATHER_EXTENSION_S holds only while at least ``round.min_group`` peers on
this head are not known to be free for this round: fewer cannot be in another one. Then everybody that is ready hears
the same: the roster, which the leader signs, of the known ones among them and a few others (``roster.form_roster``);
that fewer than ``round.min_group`` came; or that too few of them are known, and the run's owner, who would have to
witness the update, is not there. Whoever was lost in a round a moment ago, or is in debt for such rounds
(``Company.is_idle``), is left out of the roster, unless there are fewer than ``round.min_group`` without it: it is
treated as if it came too late. Whoever the leader has found to reduce wrongly, to leave others out, or to show nothing
when it was audited is a member and has no share (``findings``). The gathering ends early when a leader that precedes
this one (``roster.precedence``) gathers on this head (all are sent there), or when this head is left behind. A leader
that is in debt for rounds, or was found to reduce wrongly, is believed that it gathers only when somebody else says
that it waits there.
"""

from __future__ import annotations

import asyncio
import math

from p2p_diloco.core.group import MAX_ABSENT, idle_among, seal_roster
from p2p_diloco.core.records import open_record
from p2p_diloco.core.roster import form_roster, on_head, open_readiness, seal_readiness
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.round import callers
from p2p_diloco.round.company import CLOSING_MARGIN_S, Company
from p2p_diloco.round.gathering import Answer, Gathering
from p2p_diloco.round.notices import Notices
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.round_messages import Behind, Eta, NoWitness, Roster, TooFew


class Gatherings:
    """The gatherings that one peer leads: one, or two while it moves on to another head."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self.here = company.here
        self.directory = company.here.directory
        self.seat = company.here.seat
        self.limits = company.manifest.spec.round
        self.by_head: dict[bytes, Gathering] = {}
        self.opened_s = 0.0
        """Loop time at which the last one opened."""
        self.formed: Roster | None = None
        """The roster of the last round that I have formed as a seed that helps, until it is taken."""
        self.notices = Notices(company)
        self.forms = Bell()
        """Rings when there is another one."""

    async def lead(self, sealed: bytes, alone_s: float) -> Answer:
        """Gathers on my head, with my own readiness, and returns what comes of it when the round closes. ``alone_s``:
        so long I wait until enough are ready."""
        gathering = self._at(self.seat.standing.head)
        gathering.ready[self.company.me] = sealed
        gathering.changed.ring()
        until_s = now_s() + alone_s
        while gathering.is_uncalled and (left_s := until_s - now_s()) > 0:
            await heard(gathering.changed.event, left_s)
        if gathering.is_uncalled:
            gathering.ready.pop(self.company.me, None)
            gathering.changed.ring()
            return TooFew(ready=1)
        while gathering.answer is None or self.by_head.get(gathering.head) is gathering:
            await gathering.changed.event.wait()  # until it has ended: I would else come back to it, and hear the same
        return gathering.answer

    def _at(self, head: bytes) -> Gathering:
        """Returns the gathering on a head, which opens now if there is none."""
        gathering = self.by_head.get(head)
        if gathering is None:
            gathering = self.by_head[head] = Gathering(head=head)
            gathering.task = asyncio.create_task(self._gather(gathering))
        return gathering

    async def _gather(self, gathering: Gathering) -> None:
        """Waits until enough are ready, calls everybody else, waits until the round closes, and gives all that are
        ready one answer."""
        await self._wait_for_callers(gathering)
        if gathering.answer is None and gathering.ready:
            await self._wait_for_others(gathering)
        for notice in gathering.notices.values():
            notice.cancel()
        del self.by_head[gathering.head]
        if gathering.answer is None:
            self._charge_absent(gathering)
            gathering.answer = self._decide(gathering)
            if isinstance(gathering.answer, Roster) and not self.seat.role_trainer:
                self.formed = gathering.answer
                self.forms.ring()
        gathering.changed.ring()

    async def _wait_for_callers(self, gathering: Gathering) -> None:
        """Returns when enough are ready to call the others, when nobody is any more, or when there is an answer
        already. All hear that this gathering is there, for they may lead one themselves: at once where somebody ranks
        before me, else when nobody else has come for a moment."""
        hails_s = now_s() + (0.0 if self._ranks_behind(gathering) else CLOSING_MARGIN_S)
        while gathering.answer is None and gathering.ready and not callers.calls(self.company, gathering.head):
            changed = gathering.changed.event
            if (beyond := self.company.beyond(gathering.head)) is not None:
                gathering.answer = Behind(record=beyond)
                break
            if now_s() >= hails_s:
                self.notices.hail(gathering)
                hails_s = math.inf
            every_s = self.here.timeouts.heartbeat_s  # who is ready elsewhere says so in its record
            await heard(changed, min(every_s, hails_s - now_s()))

    def _ranks_behind(self, gathering: Gathering) -> bool:
        """Returns whether one that is expected and not here precedes me: I would not lead if I trusted it."""
        head, me = gathering.head, self.company.me
        return any(self.company.precedes(head, peer_id, me) for peer_id in self.notices.not_ready(gathering))

    async def _wait_for_others(self, gathering: Gathering) -> None:
        """Calls everybody that is expected, and returns when the round closes, or has ended early with an answer."""
        company, limits, me = self.company, self.limits, self.company.me
        gathering.opened_s = self.opened_s = now_s()
        gathering.changed.ring()
        closes_s = gathering.opened_s + limits.gather_s + CLOSING_MARGIN_S
        for record in on_head(self.directory.expected(self.here.wall_s()), gathering.head):
            if company.is_waited_for(record.peer_id):
                gathering.deadlines_s[record.peer_id] = closes_s
        self.notices.call(gathering)
        if self.seat.role_trainer and self.seat.phase in ("inner", "evaluate"):
            called_s = now_s()
            own_s = called_s + self.seat.call_trainer(called_s, limits.gather_s) + CLOSING_MARGIN_S
            gathering.deadlines_s[me] = min(own_s, gathering.opened_s + company.longest_s(busy=False))
        while gathering.answer is None:
            if (beyond := self.company.beyond(gathering.head)) is not None:
                gathering.answer = Behind(record=beyond)
                break
            changed = gathering.changed.event
            gathering.closes_s = self._closes_s(gathering)
            left_s = gathering.closes_s - now_s()
            if left_s <= 0:
                break
            await heard(changed, left_s)

    def _decide(self, gathering: Gathering) -> Roster | TooFew | NoWitness:
        """Returns what everybody hears that is ready now that the round closes, but those that are declined."""
        ready, limits = gathering.ready, self.limits
        placed = self.company.with_places(gathering.head, ready.values())
        if len(placed) < limits.min_group:
            return TooFew(ready=len(placed))
        useless = {peer_id for peer_id in placed if self.company.is_idle(peer_id)}
        if len(placed) - len(useless) < limits.min_group:
            useless = set()
        gathering.declined = (ready.keys() - placed) | useless
        taken = [sealed for peer_id, sealed in ready.items() if peer_id not in gathering.declined]
        known, least_known = self.seat.known, self.company.rules.least_known
        members = form_roster(taken, gathering.head, limits.max_group, known, least_known)
        if len(members) < limits.min_group:
            return TooFew(ready=len(members))
        opened = [open_readiness(one) for one in members]
        if self.company.lacks_witness(opened):
            return NoWitness()
        idle = idle_among(opened, known, least_known, self.company.findings.unfit(self.seat.standing.step))
        absent = self._absent(gathering, members)
        if not self.seat.role_trainer:
            members = [*members, seal_readiness(self.company.helper.readiness_beside(opened[0]), self.here.identity)]
        return Roster.of(seal_roster(members, absent, self.here.identity, idle))

    def _charge_absent(self, gathering: Gathering) -> None:
        """Takes what the round has waited for those that did not come from their credit."""
        for peer_id, until_s in gathering.deadlines_s.items():
            if peer_id not in gathering.ready and peer_id != self.company.me:
                self.company.waits.charge(peer_id, min(until_s, now_s()) - gathering.opened_s, now_s())

    def _closes_s(self, gathering: Gathering) -> float:
        """Returns the loop time at which the round closes: the latest deadline of those that are not ready, or a time
        that is past when all are. A peer that is busy is waited for as long as its round may take, but not by its word
        alone: fewer than the run's smallest group cannot be in a round. Those that I cannot ask may be in it."""
        missing_s = [until_s for p, until_s in gathering.deadlines_s.items() if p not in gathering.ready]
        if len(gathering.ready) < self.limits.min_group and any(not one.done() for one in gathering.notices.values()):
            missing_s.append(gathering.opened_s + self.limits.gather_s + CLOSING_MARGIN_S)
        closes_s, latest_s = max(missing_s, default=0.0), gathering.opened_s + self.company.longest_s(busy=False)
        if closes_s <= latest_s:
            return closes_s
        around = {record.peer_id for record in on_head(self.directory.current(self.here.wall_s()), gathering.head)}
        elsewhere = (around | gathering.deadlines_s.keys()) - gathering.idle - gathering.ready.keys()
        enough = len(elsewhere - {self.company.me}) >= self.limits.min_group
        return closes_s if enough else latest_s

    def _absent(self, gathering: Gathering, members: list[bytes]) -> list[bytes]:
        """Returns the sealed records of the trainers on this head that do not come, in a run that keeps missed rounds:
        there they count in the weights' sum."""
        if self.limits.on_missed != "keep":
            return []
        present = {open_readiness(one).peer_id for one in members}
        around = on_head(self.here.live(), gathering.head)
        if self.seat.role_trainer:
            around.append(open_record(self.seat.sealed_record))
        away = self.company.with_places(gathering.head, members, around) - present
        sealed = [self.directory.sealed(record.peer_id) for record in around if record.peer_id in away]
        if self.company.me in away:
            sealed.append(self.seat.sealed_record)
        return [one for one in sealed if one is not None][:MAX_ABSENT]

    async def join(self, channel: Channel, head: bytes, sealed: bytes) -> bool:
        """Takes in a peer that is ready, and tells it when the round closes, whenever that changes and every
        ``Timeouts.heartbeat_s``; then gives it the answer. It takes no part any more when it closes its stream. Returns
        False when it has got no answer, for it is left out of the roster."""
        gathering = self._at(head)
        gathering.ready[channel.peer_id] = sealed
        late_s = now_s() - gathering.opened_s - self.limits.gather_s - CLOSING_MARGIN_S
        if late_s > 0 and channel.peer_id in gathering.deadlines_s:
            self.company.waits.charge(channel.peer_id, late_s, now_s())
        gathering.changed.ring()
        closed = asyncio.create_task(channel.reader.read(1))  # A member says nothing more: this ends when it leaves.
        try:
            while gathering.answer is None:
                changed, uncalled = gathering.changed.event, gathering.is_uncalled
                busy = gathering.closes_s > gathering.opened_s + self.company.longest_s(busy=False)
                await channel.send(Eta(eta_s=max(gathering.closes_s - now_s(), 0.0), busy=busy, uncalled=uncalled))
                change = asyncio.create_task(changed.wait())
                every_s = self.here.timeouts.heartbeat_s
                await asyncio.wait((closed, change), timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                if closed.done() and gathering.answer is None:
                    if gathering.ready.get(channel.peer_id) == sealed:
                        gathering.ready.pop(channel.peer_id)
                        gathering.deadlines_s.pop(channel.peer_id, None)
                        gathering.changed.ring()
                    return True
            if channel.peer_id not in gathering.declined:
                await channel.send(gathering.answer)
            return channel.peer_id not in gathering.declined
        finally:
            closed.cancel()

    async def close(self) -> None:
        """Ends all gatherings without an answer."""
        tasks = [gathering.task for gathering in self.by_head.values() if gathering.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.notices.close()
