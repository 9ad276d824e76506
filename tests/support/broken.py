"""Protocols broken on purpose, by patching from here: the fault explorer must find each of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import numpy as np

from p2p_diloco.core.certificate import Certificate, Certified, Taken, certificate_of
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.group import Group
from p2p_diloco.core.lineage import Lineage
from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import Standing, way_of
from p2p_diloco.core.update import Part, Update, contributor_mask, in_most_parts
from p2p_diloco.peer.attempts import Attempts
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.outer_steps import OuterSteps
from p2p_diloco.peer.presence import Presence
from p2p_diloco.round import settle_ballot, settle_decide
from p2p_diloco.round.here import Here
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Settled
from p2p_diloco.round.seat import Seat
from p2p_diloco.round.settle import Settlement
from p2p_diloco.round.settle_completion import Completion
from p2p_diloco.round.settle_hearing import Hearing
from p2p_diloco.round.settle_member import Member
from p2p_diloco.round.settle_member_answers import MemberAnswers
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Commit

LOCAL_VALUES = bytes(32)
"""In place of the hash of a part that everybody fills with its own values."""


def own_part(meeting: Meeting, part: int) -> Part:
    return Part(mask=contributor_mask([meeting.me]), data=meeting.contribution(part))


@contextlib.contextmanager
def settle_skipped() -> Iterator[None]:
    """Every member applies what it holds at the end of the butterfly, and its own values where it holds nothing."""

    async def unsettled(self: Settlement) -> Settled:
        meeting = self.meeting
        meeting.over = True
        parts = tuple(part or own_part(meeting, i) for i, part in enumerate(meeting.parts))
        update = Update(header=self.group.header([part.hash for part in parts]), parts=parts)
        full = in_most_parts([part.mask for part in parts])
        taken = Taken(round_id=self.group.round_id, link=update.header.link, full=full, state=b"")
        certificate = certificate_of(self.group, taken, {meeting.me: taken.sign(meeting.identity)})
        return Settled(update=update, certificate=certificate)

    with mock.patch.object(Settlement, "settle", unsettled):
        yield


@contextlib.contextmanager
def loudest_head() -> Iterator[None]:
    """The newest claim is the swarm's head, whoever makes it, and however often it led nowhere."""

    def loudest(
        records: Iterable[Record], mine: Standing | None, before: Mapping[bytes, bytes]
    ) -> tuple[int, bytes] | None:
        claims = [(record.step, record.head) for record in records]
        return max([*claims, *([(mine.step, mine.head)] if mine else [])], default=None)

    with (
        mock.patch("p2p_diloco.peer.follower.swarm_head", loudest),
        mock.patch("p2p_diloco.round.company.swarm_head", loudest),
        mock.patch.object(Directory, "believed", Directory.live),
        mock.patch.object(Here, "voters", lambda here: (here.live(), here.seat.standing)),
    ):
        yield


@contextlib.contextmanager
def local_values_where_a_reducer_died() -> Iterator[None]:
    """As hivemind's averager does it: the survivors then differ, and do not know."""
    choose_parts, fetch_missing = settle_decide.choose_parts, Completion.fetch_missing

    def chosen(held: Mapping[int, Sequence[bytes]], n_parts: int) -> tuple[list[bytes], list[int]]:
        hashes, holders = choose_parts(held, n_parts)
        return [one or LOCAL_VALUES for one in hashes], holders

    async def fetch(self: Completion, commit: Commit, leader: int) -> None:
        for i, wanted in enumerate(commit.part_hashes):
            if wanted == LOCAL_VALUES:
                part = own_part(self.meeting, i)
                part.__dict__["hash"] = LOCAL_VALUES
                self.meeting.parts[i] = part
        await fetch_missing(self, commit, leader)

    with (
        mock.patch.object(settle_decide, "choose_parts", chosen),
        mock.patch.object(Completion, "fetch_missing", fetch),
    ):
        yield


@contextlib.contextmanager
def applied_before_written() -> Iterator[None]:
    """The state moves, and is told to others, before the update is on the disk."""
    commit = Attempts._commit

    async def commit_first(self: Attempts, settled: Settled) -> None:
        ledger, header = self.replica.ledger, settled.update.header

        def only_noted(update: Update, certificate: Certificate) -> None:
            ledger.chain.append(Certified(header=header, certificate=certificate))
            ledger.updates._headers[header.step] = header

        with mock.patch.object(ledger, "append", only_noted):
            await commit(self, settled)
        del ledger.updates._headers[header.step]
        await asyncio.to_thread(ledger.append, settled.update, settled.certificate)

    with mock.patch.object(Attempts, "_commit", commit_first):
        yield


@contextlib.contextmanager
def sent_again() -> Iterator[None]:
    """Who missed a round offers what it learned once more, also where it had arrived."""
    outer_step = OuterSteps.outer_step

    async def offer_again(self: OuterSteps, tokens: int, *, dropped: bool, pace: float) -> OuterResult:
        learned = np.subtract(self.local, self.replica.theta)
        result = await outer_step(self, tokens, dropped=dropped, pace=pace)
        if not result.adopted:
            return result
        np.add(self.replica.theta, learned, out=self.local)
        return replace(result, kept=True)

    with mock.patch.object(OuterSteps, "outer_step", offer_again):
        yield


@contextlib.contextmanager
def kept_although_it_arrived() -> Iterator[None]:
    """In a run that keeps missed rounds: also those parts are kept that are in the state already."""

    def keep(self: OuterSteps, before: Standing, local: Vector) -> bool:
        return self.here.seat.standing.head != before.head

    with mock.patch.object(OuterSteps, "_keep", keep):
        yield


@contextlib.contextmanager
def endless_patience() -> Iterator[None]:
    """A leader waits for every receipt, however long."""

    async def collect(self: Hearing, expected: Set[int], number: int) -> None:
        self.member.ends_s = math.inf
        while not self.knows():
            changed = self.meeting.changed.event
            came = {i for i, receipt in self.receipts.items() if receipt.number >= number}
            if not expected - came - self.meeting.lost:
                break
            await changed.wait()

    begin = Member.__init__

    def unlimited(self: Member, meeting: Meeting) -> None:
        begin(self, meeting)
        self.ends_s = math.inf

    with mock.patch.object(Hearing, "collect", collect), mock.patch.object(Member, "__init__", unlimited):
        yield


@contextlib.contextmanager
def half_settles() -> Iterator[None]:
    """Half of the members that certify make a commit, and a certificate."""

    def is_half(self: Group, members: Collection[int]) -> bool:
        return 2 * len(self.voting.intersection(members)) >= len(self.voting)

    with mock.patch.object(Group, "is_most", is_half):
        yield


@contextlib.contextmanager
def half_of_the_voters() -> Iterator[None]:
    """A head on or beyond which half of the voters stand counts as one that most agree on."""

    def head_of_half(
        records: Iterable[Record], mine: Standing | None, before: Mapping[bytes, bytes]
    ) -> tuple[int, bytes] | None:
        everybody: list[Record | Standing] = [*records, *([mine] if mine is not None else [])]
        voters = [voter for voter in everybody if voter.beyond_genesis] or everybody
        paths = [[(voter.step - back, head) for back, head in enumerate(way_of(voter, before))] for voter in voters]
        support = Counter(candidate for path in paths for candidate in path)

        def order(candidate: tuple[int, bytes]) -> tuple[int, int, bytes]:
            return (-support[candidate], -candidate[0], candidate[1])

        agreed = [candidate for candidate, count in support.items() if 2 * count >= len(voters)]
        if not agreed:
            return min(support, key=order, default=None)
        base = max(agreed)
        return min({path[0] for path in paths if base in path[1:]}, key=order, default=base)

    with (
        mock.patch("p2p_diloco.peer.follower.swarm_head", head_of_half),
        mock.patch("p2p_diloco.round.company.swarm_head", head_of_half),
    ):
        yield


@contextlib.contextmanager
def denied_at_once() -> Iterator[None]:
    """Who has not taken a commit yet says so, although it may still take one from a leader before the one that asks."""

    async def deny(self: MemberAnswers, channel: Channel, asker: int) -> None:
        pledge = self.member.pledge
        if pledge.settled is None:
            await channel.send(pledge.taken or No(reason="no commit has come"))
        else:
            await answer(self, channel, asker)

    answer = MemberAnswers.on_ask_commit
    with mock.patch.object(MemberAnswers, "on_ask_commit", deny):
        yield


@contextlib.contextmanager
def certificate_not_checked() -> Iterator[None]:
    """A member applies what it is told is certified, and who catches up follows any chain."""

    def believe(certificate: Certificate, group: Group, link: bytes, owner: str) -> None:
        pass

    def follow(self: Lineage, certified: Certified) -> None:
        self._last.append(certified.in_most_parts())
        self.step, self.head = certified.header.step + 1, certified.header.head

    with mock.patch.object(settle_ballot, "check_signatures", believe), mock.patch.object(Lineage, "follow", follow):
        yield


@contextlib.contextmanager
def known_by_claims() -> Iterator[None]:
    """Who says that it has ever committed is known, wherever anybody is."""
    take_standing = Presence.take_standing

    def take(self: Presence) -> None:
        take_standing(self)
        if self.here.seat.known.peers:
            claim = {record.peer_id for record in self.here.live() if record.beyond_genesis} | {self.here.peer_id}
            self.here.seat.known = replace(self.here.seat.known, peers=frozenset(claim))

    with mock.patch.object(Presence, "take_standing", take):
        yield


@contextlib.contextmanager
def anchor_ignored() -> Iterator[None]:
    """Votes and certificates alone decide which history is followed."""
    nothing = property(lambda seat: None, lambda seat, anchor: None)
    with mock.patch.object(Seat, "anchor", nothing):
        yield


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "settle skipped": settle_skipped,
    "loudest head": loudest_head,
    "local values where a reducer died": local_values_where_a_reducer_died,
    "applied before written": applied_before_written,
    "sent again": sent_again,
    "kept although it arrived": kept_although_it_arrived,
    "endless patience": endless_patience,
    "half settles": half_settles,
    "half of the voters": half_of_the_voters,
    "denied at once": denied_at_once,
    "certificate not checked": certificate_not_checked,
    "known by claims": known_by_claims,
    "anchor ignored": anchor_ignored,
}
SEEN_WITH_LIARS = {"certificate not checked": "extends alone", "anchor ignored": "forked history"}
"""Broken protocol -> the lie that it is found by: nobody else would use it."""
