"""The package as the fault explorer runs it: patched from outside, and put back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any
from unittest import mock

from p2p_diloco.core import known
from p2p_diloco.core.barred import Barred
from p2p_diloco.core.certificate import Certificate, Certified
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import Record
from p2p_diloco.core.signed_part import Reduction
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.update import Part, Update
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer import follower
from p2p_diloco.round import outcome
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed
from p2p_diloco.round.settle import Settlement
from p2p_diloco.round.settle_completion import Completion
from p2p_diloco.round.settle_member_answers import MemberAnswers
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.round_messages import Commit
from p2p_diloco.wire.traffic import Traffic
from tests.support.chronicle import PART_VALUES, Chronicle, Settled, Violation
from tests.support.schedules import WAITED_FOR
from tests.support.simloop import RUNNING
from tests.support.witness import Witness
from tests.support.world import World

TRAVELLING = frozenset(message for message, _ in WAITED_FOR)
HAVE_WINDOWS = ("core.known", "core.lineage", "ledger.chain")
LINKS = 5
"""Of a history, in one message."""
FETCHING: ContextVar[bool] = ContextVar("FETCHING", default=False)
"""A member fetches parts that a commit names."""


class _SimClock:
    """In place of the module ``time``."""

    @staticmethod
    def time() -> float:
        return asyncio.get_running_loop().time()

    monotonic = time


@contextlib.contextmanager
def instrumented(world: World) -> Iterator[None]:
    """Small parts, signatures that cost nothing, events with the simulated time, and disks and replicas that tell the
    world what they do."""
    real_replace, real_commit, real_load = os.replace, Replica.commit, Replica.load
    real_roll_back, real_truncate, real_send = Replica.roll_back, Ledger.truncate, Channel.send
    real_settle, real_answer = Settlement.settle, MemberAnswers.on_ask_commit
    real_contribution, real_hold, real_fetch = Meeting.contribution, Meeting.hold, Completion._fetch
    real_reject, real_bar = Traffic.reject, Barred._bar
    real_swarm_head = vars(follower)["swarm_head"]  # which may be that of a broken protocol

    def replace_file(source: Any, target: Any) -> None:
        world.on_disk()
        real_replace(source, target)
        world.on_disk()

    def sync(descriptor: int) -> None:
        world.on_disk()

    def commit(replica: Replica, update: Update, certificate: Certificate) -> None:
        good = Certified(header=update.header, certificate=certificate)
        tell(lambda chronicle, _: chronicle.writes(update), of_liars=True)
        tell(lambda chronicle, _: chronicle.certifies(good, world.rules), of_liars=True)
        real_commit(replica, update, certificate)
        show(lambda witness, peer: witness.writes(peer, update, replica), of_liars=True)
        show(lambda witness, peer: witness.applies(peer, update, replica))
        tell(lambda chronicle, peer: chronicle.commits(peer, replica.loaded, update))

    def load(replica: Replica, at_most: int | None = None) -> bool:
        loaded, owner = real_load(replica, at_most), RUNNING.get()
        if owner is not None and owner not in world.loaded:
            world.loaded.add(owner)
            tell(lambda chronicle, peer: chronicle.starts(peer, replica.state))
        else:
            tell(lambda chronicle, peer: chronicle.moves(peer, replica.state))
        show(lambda witness, peer: witness.stands(peer, replica.loaded) if loaded else None)
        return loaded

    def roll_back(replica: Replica, step: int, entries: Sequence[Certified] = ()) -> None:
        real_roll_back(replica, step, entries)
        tell(lambda chronicle, peer: chronicle.moves(peer, replica.state))

    def truncate(ledger: Ledger, step: int, *, cut: int | None = None) -> None:
        tell(lambda chronicle, peer: chronicle.gives_up(peer))
        real_truncate(ledger, step, cut=cut)

    async def send(channel: Channel, message: Message) -> None:
        owner = RUNNING.get()
        if owner is not None and owner.name and message.tag in TRAVELLING:
            world.sends(int(owner.name), channel.peer_id, message.tag)
        await real_send(channel, message)

    async def settle(settlement: Settlement) -> outcome.Settled | Missed:
        ended = await real_settle(settlement)
        group, member = settlement.group, settlement.member
        if isinstance(ended, outcome.Settled):
            show(lambda witness, peer: witness.settled(group, peer))
        tell(
            lambda chronicle, peer: chronicle.settles(
                group.round_id,
                Settled(
                    peer=peer,
                    began_s=member.started_s,
                    settles_s=member.started_s + settlement.reduce_s,
                    head=ended.update.header.head if isinstance(ended, outcome.Settled) else None,
                    heard=knows_commit(settlement),
                    place=member.place,
                    leads=group.reducers[member.place] == settlement.meeting.me,
                    decided=settlement.leads,
                    total_weight=group.total_weight,
                ),
                world.well_since_s,
            )
        )
        return ended

    async def answer(answers: MemberAnswers, channel: Channel, asker: int) -> None:
        await real_answer(answers, channel, asker)
        pledge, group = answers.member.pledge, answers.group
        if pledge.taken is None and pledge.settled is None:
            tell(lambda chronicle, peer: chronicle.denies(group.round_id, peer, group.reducers.index(asker)))

    def swarm_head(
        records: Iterable[Record], mine: Standing | None, before: Mapping[bytes, bytes]
    ) -> tuple[int, bytes] | None:
        records = list(records)
        target: tuple[int, bytes] | None = real_swarm_head(records, mine, before)
        tell(lambda chronicle, _: chronicle.follows(records, mine, before, target))
        return target

    def tell(what: Callable[[Chronicle, int], None], *, of_liars: bool = False) -> None:
        owner = RUNNING.get()
        if owner is not None and (of_liars or int(owner.name) not in world.liars):
            try:
                what(world.chronicle, int(owner.name))
            except Violation as violation:
                world.fail(violation)

    def show(what: Callable[[Witness, int], None], *, of_liars: bool = False) -> None:
        """Only a swarm with liars needs a witness."""
        if world.liars:
            tell(lambda _, peer: what(world.witness, peer), of_liars=of_liars)

    def contribution(meeting: Meeting, part: int) -> bytes:
        encoded = real_contribution(meeting, part)
        values = meeting.grid.decode(part, encoded)
        show(lambda witness, peer: witness.contributes(meeting.group, peer, part, values))
        return encoded

    def hold(meeting: Meeting, part: int, held: Part, reduction: Reduction) -> None:
        real_hold(meeting, part, held, reduction)
        if not FETCHING.get():
            show(lambda witness, _: witness.reduced(meeting.group, held.hash))

    async def fetch(completion: Completion, commit: Commit, source: int, parts: list[int]) -> None:
        fetching = FETCHING.set(True)
        try:
            await real_fetch(completion, commit, source, parts)
        finally:
            FETCHING.reset(fetching)

    def reject(traffic: Traffic, error: RemoteError) -> None:
        real_reject(traffic, error)
        if isinstance(error, Misbehaved):
            show(lambda witness, peer: witness.blames(peer, error.peer_id, error.reason))

    def bar(barred: Barred, peer_id: str, data: bytes) -> bool:
        is_new = real_bar(barred, peer_id, data)
        tell(lambda chronicle, peer: chronicle.bars(peer, peer_id))
        return is_new

    def nonce() -> bytes:
        return world.random.randbytes(8)

    def sign(identity: Identity, message: bytes) -> bytes:
        return _signature(identity.peer_id, message)

    def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
        return signature == _signature(peer_id, message)

    patches: list[Any] = [
        mock.patch("p2p_diloco.core.grid.PART_VALUES", PART_VALUES),
        *(mock.patch(f"p2p_diloco.{module}.WINDOW_STEPS", world.schedule.window_steps) for module in HAVE_WINDOWS),
        mock.patch("p2p_diloco.core.known.LEAST_STEPS", min(known.LEAST_STEPS, world.schedule.window_steps // 2)),
        mock.patch("p2p_diloco.peer.donors.MAX_LINKS", LINKS),
        mock.patch("p2p_diloco.peer.uploads.MAX_LINKS", LINKS),
        mock.patch("p2p_diloco.core.events.time", _SimClock),
        *(
            mock.patch(f"p2p_diloco.core.{module}.verify", verify)
            for module in ("records", "group", "certificate", "signed_part", "anchor")
        ),
        mock.patch.object(Barred, "_bar", bar),
        mock.patch("p2p_diloco.round.matchmaking.new_nonce", nonce),
        mock.patch("os.fsync", sync),
        mock.patch("os.replace", replace_file),
        mock.patch.object(Identity, "sign", sign),
        mock.patch.object(Replica, "commit", commit),
        mock.patch.object(Replica, "load", load),
        mock.patch.object(Replica, "roll_back", roll_back),
        mock.patch.object(Ledger, "truncate", truncate),
        mock.patch.object(Channel, "send", send),
        mock.patch.object(Settlement, "settle", settle),
        mock.patch.object(MemberAnswers, "on_ask_commit", answer),
        mock.patch("p2p_diloco.peer.follower.swarm_head", swarm_head),
    ]
    if world.liars:
        patches += [
            mock.patch.object(Meeting, "contribution", contribution),
            mock.patch.object(Meeting, "hold", hold),
            mock.patch.object(Completion, "_fetch", fetch),
            mock.patch.object(Traffic, "reject", reject),
        ]
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(logging.disable, disabled)
        logging.disable(logging.CRITICAL)
        yield


def knows_commit(settlement: Settlement) -> bool:
    """Whether a member has signed a commit, or knows of one that others have."""
    pledge, hearing = settlement.member.pledge, settlement.leader.hearing
    return any((pledge.taken, pledge.settled, hearing.certified, hearing.before))


def _signature(peer_id: str, message: bytes) -> bytes:
    return blake2b(message, key=peer_id.encode(), digest_size=64).digest()
