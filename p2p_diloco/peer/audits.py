"""How a peer looks at what others have reduced, after each outer step, and what comes of it.

    begin        a round is over: some parts that others have reduced are audited beside training
    on_accuses   another peer says that it can prove a part wrong: it has to

Of each reducer that has sent a part which is longer than this peer expects, that part is audited, whatever came of the
round: it is refused, so no update has it, and its reducer would make everybody settle without it in each round anew.
Nothing waits for an audit, and the next round ends one that is not over. Whom this peer has found wrong it names to
the members of its rounds, each of which asks for the evidence once, checks it, and passes it on: so all learn within
two outer steps, and nobody has to be believed. A finding counts from the outer step of the round that the evidence is
about, whenever it is brought: else each newcomer that is told would make it count anew for everybody. Evidence that
proves nothing costs whoever brings it that nobody listens to it again. Only peers that are known, or have met this one
in a round, are listened to.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from p2p_diloco.core.audit import (
    Evidence,
    drawn_parts,
    is_what_was_reduced,
    is_wrong,
    max_contributions_bytes,
    max_evidence_bytes,
    parse_contributions,
)
from p2p_diloco.core.errors import LedgerError, Misbehaved, RemoteError
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.findings import LASTS_STEPS, AuditResult, FindingKind
from p2p_diloco.core.signed_part import Contribution, Reduction
from p2p_diloco.core.trust_event import PartAudited, ReducerFound
from p2p_diloco.core.update import Part, Update, bits_of
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.found import keep_findings, read_findings
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.round.company import Company
from p2p_diloco.round.here import Here
from p2p_diloco.round.kept import Kept
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.wire.audit_messages import Accuses, AskContributions, AskEvidence
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No

log = logging.getLogger(__name__)

MAX_EVIDENCE = 4
"""Peers about whom evidence is held here, to be passed on; the newest ones."""
MAX_DISBELIEVED = 256
TOLD_AT_ONCE = 4


@dataclass(kw_only=True, eq=False)
class Audits:
    """Audits the reducers of this peer's rounds, and hears what others have found of theirs."""

    here: Here
    replica: Replica
    company: Company
    events: EventLog
    _auditing: asyncio.Task[None] | None = None
    """The audit of my last round, until it is ended."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """That one, and those before it whose end has not come."""
    _evidence: dict[str, bytes] = field(default_factory=dict)
    """Accused -> evidence."""
    _told: dict[str, set[str]] = field(default_factory=dict)
    """Accused -> the peers that have heard of it from me."""
    _heard: set[tuple[str, str]] = field(default_factory=set)
    """(accuser, accused) of what I have asked evidence for."""
    _disbelieved: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_DISBELIEVED))
    """Peers that have accused others, and proved nothing."""
    _met: set[str] = field(default_factory=set)
    """The members of my last round."""
    _judging: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.count = self.replica.manifest.spec.round.audit_parts

    def read(self) -> None:
        """Takes up what this peer had found before it was started again."""
        findings = read_findings(self.replica.ledger.folder)
        if findings is not None:
            self.company.findings = findings

    def kept(self) -> Kept | None:
        """Returns what keeps the contributions of a new round; None in a run without audits."""
        return Kept(self.replica.ledger.folder) if self.count else None

    def begin(self, meeting: Meeting, update: Update | None) -> None:
        """Audits parts of a round that is over, in a task of its own. ``update``: the one that was just applied; None
        where the round has failed."""
        self.cancel()
        if self.count:
            self._auditing = asyncio.create_task(self._look(meeting, update))
            self._tasks.add(self._auditing)
            self._auditing.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Begins to end an audit that is not over."""
        if self._auditing is not None:
            self._auditing.cancel()
            self._auditing = None  # to cancel it twice would break off its end

    async def close(self) -> None:
        """Audits nothing any more, and returns when no audit is left."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what others have reduced ------------------------------------------------------------------------------------

    async def _look(self, meeting: Meeting, update: Update | None) -> None:
        """Audits what I had refused and what is drawn, and tells the others what I have found."""
        step, me = meeting.group.step, self.here.peer_id
        self._met = {member.peer_id for member in meeting.group.members} - {me}
        self.company.findings.forget(step)
        refused = refused_of(meeting)
        for index, part, reduction in refused.values():
            await self._audit(meeting, index, part, reduction)
        if update is not None:
            await self._look_at(meeting, update, asked=refused.keys())
        await self._tell()

    async def _look_at(self, meeting: Meeting, update: Update, asked: Collection[str]) -> None:
        """Audits what is drawn of an update. ``asked``: reducers that have been asked in this round, and are asked no
        more: an honest one answers as often as the run lets it be audited."""
        for reducer in sorted(set(left_out_by(meeting, update))):
            await self._note(reducer, "left out", meeting.group.step)
        reducer_of = {part: one for part, one in reducers_of(meeting, update).items() if one not in asked}
        for index in drawn_parts(update.header.head, self.here.peer_id, reducer_of, self.count):
            part, reduction = meeting.parts[index], meeting.reductions[index]
            if part is not None and reduction is not None:
                await self._audit(meeting, index, part, reduction)

    async def _audit(self, meeting: Meeting, index: int, part: Part, reduction: Reduction) -> None:
        """Takes the mean of one part again, and remembers what comes of it."""
        group, began_s = meeting.group, now_s()
        reducer = group.members[reduction.reducer].peer_id
        try:
            came = await self._fetch(meeting, index, reduction)
        except RemoteError as error:
            log.info("outer step %d: no audit of %s: %s", group.step, reducer[-8:], error.reason)
            self.here.transport.traffic.reject(error)
            await self._found(reducer, index, "not answered", group.step, began_s)
            return
        wrong = await asyncio.to_thread(is_wrong, group, meeting.grid, index, part, reduction, came)
        await self._found(reducer, index, "wrong" if wrong else "sound", group.step, began_s)
        if wrong:
            evidence = Evidence(roster=group.sealed, index=index, part=part, reduction=reduction, came=came)
            self._hold(reducer, await asyncio.to_thread(evidence.to_bytes))

    async def _fetch(self, meeting: Meeting, index: int, reduction: Reduction) -> dict[int, Contribution]:
        """Returns the contributions to a part, as its reducer has signed for them. RemoteError where it does not show
        them."""
        reducer, members = meeting.group.members[reduction.reducer].peer_id, len(meeting.group.members)
        most_bytes = max_contributions_bytes(meeting.grid, index, members)
        channel = await self.here.open(reducer)
        try:
            ask = AskContributions(round_id=meeting.group.round_id, number=reduction.number, part=index)
            await channel.send(ask)
            data = await channel.receive_blob(most_bytes, self.here.timeouts.reduced_part_s)
        finally:
            channel.close()
        try:
            came = parse_contributions(data, members)
        except ValueError as error:
            raise Misbehaved(reducer, f"shows {error}") from error
        if not is_what_was_reduced(came, reduction):
            raise Misbehaved(reducer, f"shows other contributions to part {index} than it has signed for")
        return came

    async def _found(self, reducer: str, index: int, result: AuditResult, step: int, began_s: float) -> None:
        """Writes down what came of an audit, and remembers it where it is not that the part is sound."""
        audited = PartAudited(step=step, reducer=reducer, part=index, result=result, seconds=now_s() - began_s)
        self.events.write(audited)
        if result == "wrong":
            log.warning(
                "peer %s: part %d of outer step %d is not the mean of what was contributed", reducer[-8:], index, step
            )
        if result != "sound":
            await self._note(reducer, result, step)

    async def _note(self, peer_id: str, kind: FindingKind, step: int, accuser: str = "") -> None:
        """Remembers what was found of a peer, also when this process ends."""
        findings = self.company.findings
        findings.note(peer_id, kind, step)
        self.events.write(ReducerFound(step=step, reducer=peer_id, kind=kind, accuser=accuser))
        try:
            await asyncio.to_thread(keep_findings, self.replica.ledger.folder, findings.to_bytes())
        except LedgerError as error:
            log.warning("what was found of %s is forgotten when this peer ends: %s", peer_id[-8:], error)

    # -- what is passed on -------------------------------------------------------------------------------------------

    def _hold(self, accused: str, evidence: bytes) -> None:
        """Keeps evidence, to be passed on."""
        self._evidence[accused] = evidence
        self._told.setdefault(accused, set())
        for oldest in list(self._evidence)[:-MAX_EVIDENCE]:
            del self._evidence[oldest], self._told[oldest]

    async def _tell(self) -> None:
        """Names those of whom I hold evidence that still counts to the members of my last round that have not heard it
        from me."""
        for lapsed in [one for one in self._evidence if not self.company.is_wrong(one)]:
            del self._evidence[lapsed], self._told[lapsed]
        for accused in tuple(self._evidence):
            others = sorted(self._met - self._told[accused] - {accused})
            for at in range(0, len(others), TOLD_AT_ONCE):
                await asyncio.gather(*(self._accuse(accused, peer_id) for peer_id in others[at : at + TOLD_AT_ONCE]))

    async def _accuse(self, accused: str, peer_id: str) -> None:
        """Names one peer to another one, and proves it where that one asks."""
        try:
            channel = await self.here.open(peer_id)
            try:
                answer: AskEvidence | No = await channel.request(Accuses(peer_id=accused), AskEvidence, No)
                if isinstance(answer, AskEvidence) and accused in self._evidence:
                    await channel.send_blob(self._evidence[accused])
            finally:
                channel.close()
        except RemoteError as error:
            log.debug("%s has not heard of %s: %s", peer_id[-8:], accused[-8:], error.reason)
            self.here.transport.traffic.reject(error)
            return
        if accused in self._told:
            self._told[accused].add(peer_id)

    async def on_accuses(self, channel: Channel, message: Accuses) -> None:
        """Asks a peer that accuses another one for its evidence, and goes by it. Misbehaved when it proves nothing."""
        accuser, accused = channel.peer_id, message.peer_id
        async with self._judging:
            if not self._listens(accuser, accused):
                await channel.send(No(reason="nothing is news here"))
                return
            self._heard.add((accuser, accused))
            await channel.send(AskEvidence())
            most_bytes = max_evidence_bytes(self.replica.ledger.grid, self.replica.rules.max_group)
            try:
                data = await channel.receive_blob(most_bytes, self.here.timeouts.reduced_part_s)
                step = await asyncio.to_thread(self._check, data, accuser, accused)
            except RemoteError:
                self._disbelieved.append(accuser)
                raise
        step = min(step, self.here.seat.standing.step)  # a liar may sign for a round that nobody has come to
        if self.here.seat.standing.step >= step + LASTS_STEPS["wrong"]:
            log.debug("%s shows what counts no more of %s", accuser[-8:], accused[-8:])
            return
        self._hold(accused, data)
        self._told[accused].add(accuser)
        own = "this peer, whose memory may be faulty" if accused == self.here.peer_id else f"peer {accused[-8:]}"
        log.warning("%s: a part of outer step %d is not the mean, as %s has shown", own, step, accuser[-8:])
        await self._note(accused, "wrong", step, accuser)

    def _listens(self, accuser: str, accused: str) -> bool:
        """Returns whether evidence is asked for: it is news, and its bringer neither a stranger nor disbelieved."""
        trusted = accuser in self._met or accuser in self.here.seat.known.peers
        news = not self.company.findings.is_wrong(accused, self.here.seat.standing.step)
        return news and trusted and accuser not in self._disbelieved and (accuser, accused) not in self._heard

    def _check(self, data: bytes, accuser: str, accused: str) -> int:
        """Returns the outer step whose update has the part that evidence proves wrong. Misbehaved of ``accuser`` when
        it does not prove that ``accused`` has reduced it."""
        try:
            evidence = Evidence.from_bytes(data)
            proved, step = evidence.accused(self.replica.rules, self.replica.ledger.grid)
        except ValueError as error:
            raise Misbehaved(accuser, f"brings {error}") from error
        if proved != accused:
            raise Misbehaved(accuser, "brings evidence about another peer")
        return step


def refused_of(meeting: Meeting) -> dict[str, tuple[int, Part, Reduction]]:
    """Returns each other peer that I reach and that has reduced a part which was too long for me -> the first such
    part: its index, and what the reducer has signed."""
    first: dict[str, tuple[int, Part, Reduction]] = {}
    for index in sorted(meeting.too_long):
        part, reduction = meeting.too_long[index]
        if reduction.reducer in meeting.group.reached_by(meeting.me):
            first.setdefault(meeting.group.members[reduction.reducer].peer_id, (index, part, reduction))
    return first


def reducers_of(meeting: Meeting, update: Update) -> dict[int, str]:
    """Returns the peer that has reduced each part of an update, for the parts that can be audited: those that are here
    as a reducer has signed them that I reach."""
    held = zip(meeting.parts, meeting.reductions, update.header.part_hashes)
    return {
        index: meeting.group.members[reduction.reducer].peer_id
        for index, (part, reduction, wanted) in enumerate(held)
        if part is not None
        and reduction is not None
        and part.hash == wanted
        and reduction.reducer in meeting.within_call
    }


def left_out_by(meeting: Meeting, update: Update) -> Iterator[str]:
    """Yields the peers that have reduced a part of an update and say that my contribution, which I had delivered, did
    not come. Whether one that came was left out rightly the audits tell."""
    for index, reducer in reducers_of(meeting, update).items():
        reduction = meeting.reductions[index]
        if reduction is None or (reduction.number, index) not in meeting.delivered:
            continue
        if meeting.me not in bits_of(reduction.inputs.senders) and reducer != meeting.identity.peer_id:
            yield reducer
