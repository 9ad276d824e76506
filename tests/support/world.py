"""A swarm in memory under a schedule of faults: it starts the peers, does to them what is planned, and looks on."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import LedgerError, NetworkError
from p2p_diloco.core.event import PeerCaughtUp, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.records import HEADS_SHOWN, open_record, peers_key, seal_record
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.waiting import heard
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.outer_steps import ATTEMPTS
from p2p_diloco.peer.reception import REQUESTS
from p2p_diloco.round.company import MAX_GATHER_EXTENSION_S
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.state_messages import Push
from tests.support.builders import identity, record_of
from tests.support.chronicle import MAX_PEERS, PART_VALUES, TOKENS, Chronicle, Violation
from tests.support.fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest
from tests.support.liars import A_AGAIN_B, CORRUPT, GHOSTS, SILENT
from tests.support.lying import Liar
from tests.support.schedules import AMBUSHES, Fault, PeerPlan, Schedule
from tests.support.simloop import NOBODY, RUNNING, START_S, Cut, Incarnation
from tests.support.witness import Witness

LIAR = identity(1001)
LR = {"adopt": 1e-2, "keep": 1e-7}
"""A contribution that is kept is from another theta than the one it is compared with: they must be nearly the same for
its inner steps to be counted."""
AGREE_STEPS = 3
AGREE_S = 60.0
"""Steps are short here, against the time-outs: so long it may take, however many steps that are."""
QUIET_S = 90.0
"""After the trainers have stopped, all that they began is over within this time."""
IDLE_TASKS = 9
"""Of a peer that does nothing: its life, and the loops that publish and look."""
AIM_S = 20.0
"""A fault waits so long for the phase that it is aimed at."""
AMBUSH_S = 30.0
"""So long for the message that it waits for."""
STEPWISE = frozenset(("reset", *(kind for kind, _ in AMBUSHES)))
"""Kinds of faults that can strike while a message is being sent."""
POLL_S = 0.5
WATCH_S = 2.0
RESTART_S = 5.0
"""A peer that nobody could give a state is started again, as its owner would."""
LONGEST_TAIL_S = 400.0
DISK_S = 5.0
"""So soon a peer whose disk has failed ends."""
LIAR_EVERY_S = 4.0
DISAGREEMENT = np.float32(0.2)
"""Where there are liars, the others want nearly the same."""


@dataclass(eq=False)
class Disk:
    """Of one peer."""

    folder: Path
    dying: bool = False
    """Every write fails from now on."""
    failed_s: float | None = None
    """When the first write did."""
    operations_left: int = -1
    """Until the peer is killed in the middle of its work; -1: it is not."""


@dataclass(eq=False)
class Ambush:
    """A fault that waits for a message."""

    fault: Fault
    sprung: asyncio.Event = field(default_factory=asyncio.Event)
    steps: Iterator[float] = field(default_factory=lambda: iter(()))
    """What is left of it, as soon as it is sprung."""


class CountedPeer(SimPeer):
    """A trainer whose contributions can be told apart."""

    def bind(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.offers_since_s: float | None = None
        self.stopped_s = 0.0
        """Since the last offer began."""

    def learn(self, local: Vector) -> None:
        self.world.chronicle.trains(self.index, local, self.target)

    async def offer(self, tokens: int) -> OuterResult:
        now = asyncio.get_running_loop().time
        self.offers_since_s, self.stopped_s = now(), 0.0
        result = await super().offer(tokens)
        self.world.offered(self, now() - self.offers_since_s - self.stopped_s)
        self.offers_since_s = None
        return result

    @property
    def alive(self) -> bool:
        return self.transport.incarnation.alive

    @property
    def runs(self) -> bool:
        return self.transport.incarnation.runs

    @property
    def head(self) -> bytes | None:
        """Where it stands, if it is there already."""
        peer = self.peer
        there = peer.replica.state is not None and peer.seat.phase != "joining"
        return peer.seat.standing.head if there else None


class World:
    """One swarm under one schedule."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self.schedule = schedule
        self.folder = folder
        self.random = random.Random(schedule.seed)
        self.network = FakeNetwork(
            latency_s=schedule.latency_s,
            jitter=schedule.jitter,
            buffer_bytes=schedule.buffer_bytes,
            random=random.Random(schedule.seed + 1),
        )
        self.n = schedule.parts * PART_VALUES - 5
        values = np.random.default_rng(schedule.seed).standard_normal((MAX_PEERS + 1, self.n)).astype(np.float32)
        self.genesis, self.targets = values[0], values[1:]
        if schedule.liars:
            self.targets = values[1] + DISAGREEMENT * self.targets
        self.chronicle = Chronicle(
            names={identity(i).peer_id: i for i in range(MAX_PEERS)},
            on_missed=schedule.on_missed,
            largest_weight=4 * schedule.inner_steps * TOKENS,
            counts=schedule.aggregate == "mean",
        )
        self.liars = schedule.liars
        self.chronicle.liars = self.liars
        self.witness = Witness(names=self.chronicle.names, genesis=genesis_state(self.genesis.copy()), liars=self.liars)
        self.strict = any(plan.lie == A_AGAIN_B for plan in schedule.peers)
        """No honest peer may have taken what most of its group have not, although it stood still since."""
        self.sims: dict[int, CountedPeer] = {}
        """Index -> the newest life of that peer."""
        self.disks = {i: Disk(folder / str(i)) for i in range(MAX_PEERS)}
        self.loaded: set[Incarnation] = set()
        """Those that have looked at their disk."""
        self.timeline: list[str] = []
        self.violation: Violation | None = None
        self.failed = asyncio.Event()
        self.healed = False
        self.over = False
        self.over_for_liars = False
        self.lies: asyncio.Task[None] | None = None
        self.silent: list[asyncio.Task[None]] = []
        """Each signs the records of a peer that answers nothing."""
        self.ambushes: list[Ambush] = []
        self.sent: Counter[tuple[bytes, str]] = Counter()
        """Round and kind of message -> how many of them were sent."""
        self.last_change_s = START_S
        self.slowest_step_s = self.longest_stall_s = self.agreed_s = 0.0
        self.honest_steps = 0
        """Outer steps of honest peers when all that is planned was over."""
        self.stock_s = 0.0
        """When that was."""
        self.inner_steps = 0.0
        """Of one honest peer in one of those."""

    @cached_property
    def manifest(self) -> RunManifest:
        """Made only where the package is instrumented: the digest of S_0 depends on the size of parts."""
        schedule = self.schedule
        return make_manifest(
            self.n,
            self.genesis,
            self.owner,
            codec=schedule.codec,
            aggregate=schedule.aggregate,
            outer_steps=100_000,
            inner_steps=schedule.inner_steps,
            min_group=schedule.min_group,
            max_group=schedule.max_group,
            snapshot_every=schedule.snapshot_every,
            on_missed=schedule.on_missed,
            lr=LR[schedule.on_missed],
        )

    @property
    def owner(self) -> Identity:
        """The run's owner is a peer of the swarm: without it nobody makes the first outer steps."""
        return identity(self.schedule.owner)

    @cached_property
    def rules(self) -> RosterRules:
        return RosterRules.of(self.manifest)

    # -- what happens ------------------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return asyncio.get_running_loop().time() - START_S

    def note(self, text: str) -> None:
        self.timeline.append(f"{self.now_s:8.3f}  {text}")

    def change(self, text: str) -> None:
        """Who can reach whom is another now."""
        self.note(text)
        self.last_change_s = asyncio.get_running_loop().time()

    def fail(self, violation: Violation) -> None:
        if self.violation is None:
            self.violation = violation
            self.note(f"VIOLATION {violation}")
            self.failed.set()

    def offered(self, sim: CountedPeer, took_s: float) -> None:
        if sim.index in self.liars:
            return
        self.slowest_step_s = max(self.slowest_step_s, took_s)
        if took_s > self.offer_limit_s:
            self.fail(Violation("waits-end", f"an outer step of peer {sim.index} took {took_s:.0f} s"))

    def living(self) -> list[CountedPeer]:
        """All honest peers that live."""
        return [sim for sim in self.sims.values() if sim.alive and sim.index not in self.liars]

    # -- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        schedule, timeouts = self.schedule, Timeouts()
        gather_s = self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S + timeouts.request_s
        attempt_s = gather_s + timeouts.round_limit_s(8 * self.n)
        inner_s = schedule.inner_steps * max(plan.step_s for plan in schedule.peers if not plan.lie)
        self.stall_limit_s = inner_s + attempt_s
        self.offer_limit_s = ATTEMPTS * attempt_s
        self.failed = asyncio.Event()
        watch = asyncio.ensure_future(self._watch())
        joining = {fault.who for fault in schedule.faults if fault.kind == "join"}
        starts = [self._start_later(i, plan.starts_s) for i, plan in enumerate(schedule.peers) if i not in joining]
        waits = [asyncio.sleep(schedule.lasts_s)] if schedule.lasts_s else []
        faults = asyncio.gather(*starts, *(self._fault(fault) for fault in schedule.faults), *waits)
        failed = asyncio.ensure_future(self.failed.wait())
        story = asyncio.ensure_future(self._story(faults))
        await asyncio.wait((story, failed), return_when=asyncio.FIRST_COMPLETED)
        self.over = True
        for task in (watch, story, failed, faults, self.lies, *self.silent):
            if task is not None:
                task.cancel()
        if self.violation is None:
            story.result()

    async def _story(self, faults: asyncio.Future[list[None]]) -> None:
        await faults
        self._take_stock()
        self.change("all is well again")
        self.healed = True
        healed_s = self.now_s
        before = max((sim.peer.step for sim in self.living()), default=0)
        while True:
            steps = max((sim.peer.step for sim in self.living()), default=0) - before
            if steps > 0 and self._agreed():
                break
            since_s = self.now_s - healed_s
            if steps > AGREE_STEPS and since_s > AGREE_S:
                stands = {sim.index: (sim.peer.step, (sim.head or b"").hex()[:8]) for sim in self.living()}
                raise Violation("agreement", f"{steps} outer steps after the last fault: {stands}")
            if since_s > LONGEST_TAIL_S:
                raise Violation("progress", f"nothing happens for {LONGEST_TAIL_S:.0f} s after the last fault")
            await asyncio.sleep(POLL_S)
        self.agreed_s = self.now_s - healed_s
        self.note("all stand on one head")
        self._end_liars()
        last = max(sim.peer.step for sim in self.living()) + self.schedule.outer_steps
        await self._until(last)
        await self._quiet()
        self._check_history()

    def _end_liars(self) -> None:
        """The last outer steps are honest peers' alone: none of them is led elsewhere at the last moment."""
        for index in [i for i in sorted(self.liars & self.sims.keys()) if self.sims[i].alive]:
            self.network.kill(self.sims[index].transport.peer_id)
        for task in self.silent:
            task.cancel()
        self.over_for_liars = True

    def _take_stock(self) -> None:
        """What honest peers have made until now: outer steps of their own rounds, and inner steps of each of them."""
        self.stock_s = self.now_s
        head = max((sim.peer.seat.standing for sim in self.living()), key=lambda standing: standing.step).head
        updates = [self.chronicle.updates[past] for past in self.chronicle.history(head)[:-1]]
        self.honest_steps = sum(not self.liars or self.witness.is_made(update) for update in updates)
        trained = [self.chronicle.trained.get(sim.index, 0) for sim in self.living()]
        self.inner_steps = sum(trained) / len(trained) / max(self.honest_steps, 1)

    async def _until(self, step: int) -> None:
        end_s = self.now_s + LONGEST_TAIL_S
        while (least := min(sim.peer.step for sim in self.living())) < step:
            if self.now_s > end_s:
                raise Violation("progress", f"a peer is still at outer step {least}, {LONGEST_TAIL_S:.0f} s later")
            await asyncio.sleep(POLL_S)

    def _agreed(self) -> bool:
        return len({sim.head for sim in self.living()}) == 1 and None not in {sim.head for sim in self.living()}

    async def _quiet(self) -> None:
        """The trainers stop; what they began must end."""
        self.note("the trainers stop")
        self.over = True
        for sim in self.living():
            sim.training = False
        end_s = self.now_s + QUIET_S
        while left := [text for sim in self.living() for text in self._left_behind(sim)]:
            if self.now_s > end_s:
                raise Violation("waits-end", f"left behind: {'; '.join(left)}")
            await asyncio.sleep(POLL_S)

    def _left_behind(self, sim: CountedPeer) -> Iterator[str]:
        peer = sim.peer
        if sim.trainer is not None and not sim.trainer.done():
            yield f"{sim.index} trains"
        if peer.matchmaker.gatherings.by_head:
            yield f"{sim.index} gathers"
        if peer.seat.in_round:
            yield f"{sim.index} is in a round"
        tasks = sim.transport.tasks
        if len(tasks) > IDLE_TASKS:
            yield f"{sim.index} has {len(tasks)} tasks, {Counter(task.get_coro().__qualname__ for task in tasks)}"  # type: ignore[union-attr]
        mine = [pipe for pipe in self.network.pipes if pipe.source == sim.transport.peer_id and not pipe.closed]
        if mine:
            yield f"{sim.index} has {len(mine)} open streams"

    def _check_history(self) -> None:
        chronicle, living = self.chronicle, self.living()
        final = max(living, key=lambda sim: sim.peer.step)
        head = final.peer.seat.standing.head
        history = set(chronicle.history(head))
        for sim in living:
            if sim.peer.seat.standing.head not in history:
                raise Violation("agreement", f"peer {sim.index} ends elsewhere than {final.index}")
        if (self.schedule.codec, self.schedule.aggregate) == ("fp32", "mean"):
            chronicle.check_once(head, self.n)
        gave_up = {sim.index for sim in living if self._says_it_gave_up(sim.index)}
        for peer, heads in chronicle.committed.items():
            for given_up in set(heads) - history - chronicle.lost:
                step = chronicle.updates[given_up].header.step + 1
                name = f"outer step {step}, head {given_up.hex()[:8]}, of peer {peer}"
                if self.schedule.orderly or self.strict:
                    raise Violation("never-lost", f"{name} is not in the history, although one that held it lived")
                if not chronicle.was_replaced(given_up, head):
                    raise Violation("never-lost", f"{name} was given up for nothing")
                if peer not in gave_up and self.sims[peer].alive:
                    raise Violation("never-lost", f"{name} was given up, and the log does not say so")

    def _says_it_gave_up(self, index: int) -> bool:
        caught_up = of_kind(read_events(self.disks[index].folder / EVENTS_FILE), PeerCaughtUp)
        # Who went on by a snapshot from beyond all that it had cannot know what it shared before.
        return any(event.rolled_back > 0 or (event.snapshot and event.from_step) for event in caught_up)

    async def _watch(self) -> None:
        """Where enough trainers reach each other, outer steps must follow each other."""
        best: dict[frozenset[int], tuple[int, float]] = {}
        now = asyncio.get_running_loop().time
        while not self.over:
            await asyncio.sleep(WATCH_S)
            for sim in self.living():
                if sim.runs and sim.offers_since_s is not None:
                    took_s = now() - sim.offers_since_s - sim.stopped_s
                    if took_s > self.offer_limit_s:
                        self.fail(Violation("waits-end", f"an outer step of peer {sim.index} takes {took_s:.0f} s"))
            circles = self._circles()
            best = {circle: best.get(circle, (-1, 0.0)) for circle in circles}
            for circle, (step, since_s) in best.items():
                reached = max(self.sims[i].peer.step for i in circle)
                since_s = max(since_s, self.last_change_s)
                if step < 0 or reached > step:
                    best[circle] = reached, now()
                    continue
                self.longest_stall_s = max(self.longest_stall_s, now() - since_s)
                if now() - since_s > self.stall_limit_s:
                    self.fail(
                        Violation("progress", f"{sorted(circle)} are at outer step {step} for {now() - since_s:.0f} s")
                    )

    def _circles(self) -> list[frozenset[int]]:
        """Trainers that all reach each other, and are enough for a round."""
        trainers = [sim for sim in self.living() if sim.runs and sim.trainer is not None]
        islands: dict[int, list[CountedPeer]] = {}
        for sim in trainers:
            islands.setdefault(self.network.island(sim.transport.peer_id), []).append(sim)
        circles = []
        for island in islands.values():
            ids = [sim.transport.peer_id for sim in island]
            whole = all(self.network.connected(a, b) for a in ids for b in ids if a != b)
            dialable = any(not sim.peer.seat.client_mode for sim in island)
            if whole and dialable and len(island) >= self.schedule.min_group and self._can_certify(island):
                circles.append(frozenset(sim.index for sim in island))
        return circles

    def _can_certify(self, island: list[CountedPeer]) -> bool:
        """Whether enough of those who reach each other are known, or all of them reach the run's owner."""
        ids = [sim.transport.peer_id for sim in island]
        newest = max((sim.peer.seat for sim in island), key=lambda seat: seat.standing.step)
        if len(newest.known.peers.intersection(ids)) >= self.rules.least_known:
            return True
        owner, who = self.sims.get(self.schedule.owner), self.owner.peer_id
        return owner is not None and owner.runs and all(self.network.connected(who, one) for one in ids if one != who)

    def well_since_s(self, a: int, b: int) -> float:
        """As ``FakeNetwork``'s, of peers by index."""
        return self.network.well_since_s(self.sims[a].transport.peer_id, self.sims[b].transport.peer_id)

    # -- peers -------------------------------------------------------------------------------------------------------

    async def _start_later(self, index: int, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        self._start(index)

    def _start(self, index: int) -> None:
        if (index in self.sims and self.sims[index].alive) or (index in self.liars and self.over_for_liars):
            return
        plan = self.schedule.peers[index]
        if plan.lie == SILENT:
            self.network.mute.add(identity(index).peer_id)
            self.silent.append(asyncio.ensure_future(self._sign_records(index)))
            return
        disk = self.disks[index]
        disk.dying, disk.failed_s = False, None
        disk.operations_left = -1
        if (frozen := disk.folder.with_suffix(".frozen")).exists():
            shutil.rmtree(disk.folder)
            frozen.rename(disk.folder)
        sim = CountedPeer.create(
            self.network,
            self.manifest,
            self.owner,
            self.folder,
            index,
            target=None if plan.role == "seed" else self.targets[index],
            genesis=self.genesis if index == self.schedule.owner or plan.lie == GHOSTS else None,
            client_mode=plan.role == "client",
            step_s=plan.step_s,
            clock_s=plan.clock_s,
        )
        sim.transport.incarnation.thread_s = plan.thread_s
        sim.bind(self, index)
        if plan.lie:
            self._corrupt(sim, plan)
        self.sims[index] = sim
        sim.start()
        sim.life.add_done_callback(lambda life: self._ended(sim, life), context=NOBODY)
        self.change(f"peer {index} starts")

    def _corrupt(self, sim: CountedPeer, plan: PeerPlan) -> None:
        tell_it = [i for i, other in enumerate(self.schedule.peers) if other.lie == plan.lie]
        liar = Liar(
            peer=sim.peer,
            lying=lambda: self.now_s >= plan.lies_from_s,
            accomplices=tuple(identity(i).peer_id for i in tell_it),
        )
        CORRUPT[plan.lie](liar)

    async def _sign_records(self, index: int) -> None:
        """Records of a peer that stands where most do, and answers nothing."""
        while True:
            standings = [sim.peer.seat.standing for sim in self.living() if sim.head is not None]
            if standings:
                newest = max(standings, key=lambda standing: standing.step)
                record = record_of(
                    identity(index),
                    run_id=self.manifest.run_id,
                    issued_s=asyncio.get_running_loop().time(),
                    step=newest.step,
                    head=newest.head,
                    committed=newest.beyond_genesis,
                    heads=list(newest.heads[:HEADS_SHOWN]),
                )
                sealed = seal_record(record, identity(index))
                self.network.store(peers_key(self.manifest.run_id), record.peer_id, (sealed, record.expires_s))
            await asyncio.sleep(LIAR_EVERY_S)

    def _ended(self, sim: CountedPeer, life: asyncio.Task[None]) -> None:
        """Nobody killed it: it ended by itself."""
        if life.cancelled() or self.violation is not None or (sim.index in self.liars and self.over_for_liars):
            return
        self._count_the_living()
        why = str(sim.ended_by).replace(str(self.folder), "")
        if life.exception() is not None:
            self.fail(Violation("waits-end", f"peer {sim.index} fails: {life.exception()!r}"))
        elif isinstance(sim.ended_by, LedgerError) and (
            self.disks[sim.index].failed_s is not None or sim.index in self.liars
        ):
            self.change(f"peer {sim.index} ends: {why}")
        elif isinstance(sim.ended_by, NetworkError) and not self.over:
            self.change(f"peer {sim.index} ends: {why}")
            asyncio.get_running_loop().call_later(RESTART_S, self._start, sim.index, context=NOBODY)
        elif sim.ended_by is not None:
            self.fail(Violation("waits-end", f"peer {sim.index} ends: {sim.ended_by}"))

    def kill(self, index: int, *, silent: bool = False) -> None:
        self.change(f"peer {index} is killed")
        self.network.kill(self.sims[index].transport.peer_id, silent=silent)
        self._count_the_living()

    def _count_the_living(self) -> None:
        heads = [sim.peer.replica.state.head for sim in self.living() if sim.peer.replica.state is not None]
        self.chronicle.dies(heads)

    # -- faults ------------------------------------------------------------------------------------------------------

    async def _fault(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        if fault.phase:
            await self._aim(fault)
        if fault.kind in STEPWISE and fault.how != "disk":
            for wait_s in await self._ambush(fault) if fault.message else self._strike(fault):
                await asyncio.sleep(wait_s)
        else:
            act: Callable[[Fault], Any] = getattr(self, "_kill_at_disk" if fault.how == "disk" else f"_{fault.kind}")
            await act(fault)

    async def _ambush(self, fault: Fault) -> Iterator[float]:
        """What is left to do of a fault that has struck when its message was sent."""
        ambush = Ambush(fault)
        self.ambushes.append(ambush)
        await heard(ambush.sprung, max(AMBUSH_S, self.schedule.lasts_s - self.now_s))
        if not ambush.sprung.is_set():
            self.ambushes.remove(ambush)
            self.note(f"{fault}: no such message was sent")
        return ambush.steps

    def sends(self, index: int, target: str, tag: str) -> None:
        """A peer is about to send a message. Who waits for it strikes before anybody does anything else."""
        rounds, other = self.sims[index].peer.reception.rounds, self.chronicle.names.get(target)
        if not rounds or other is None:
            return
        which = rounds[-1].group.round_id, tag
        self.sent[which] += 1
        for ambush in [one for one in self.ambushes if (one.fault.message, one.fault.nth) == (tag, self.sent[which])]:
            if ambush.fault.other in self.liars - {other}:
                continue
            self.ambushes.remove(ambush)
            self.note(f"peer {index} sends {tag} {ambush.fault.nth} of the round to {other}")
            steps, after_s = self._strike(replace(ambush.fault, who=index, other=other)), ambush.fault.after_s
            ambush.steps = chain([after_s if after_s else next(steps, 0.0)], steps)
            ambush.sprung.set()

    def _strike(self, fault: Fault) -> Iterator[float]:
        """The steps of a fault; between them the seconds to wait."""
        act: Callable[[Fault], Iterator[float]] = getattr(self, f"_{fault.kind}")
        return act(fault)

    async def _aim(self, fault: Fault) -> None:
        """Wait until the peer is where the fault shall find it."""
        end_s = self.now_s + AIM_S
        while self.now_s < end_s:
            sim = self.sims.get(fault.who)
            if sim is None or not sim.runs:
                return
            changed = sim.peer.seat.changed.event
            if sim.peer.seat.phase == fault.phase:
                break
            await heard(changed, end_s - self.now_s)
        await asyncio.sleep(fault.after_s)

    def _victim(self, fault: Fault) -> CountedPeer | None:
        sim = self.sims.get(fault.who)
        if sim is None or not sim.alive:
            self.note(f"{fault}: it is not there")
            return None
        return sim

    def _kill(self, fault: Fault) -> Iterator[float]:
        if self._victim(fault) is None:
            return
        self.kill(fault.who, silent=fault.how == "silent")
        if fault.how == "wiped":
            shutil.rmtree(self.disks[fault.who].folder / "snapshots")
            shutil.rmtree(self.disks[fault.who].folder / "updates")
            (self.disks[fault.who].folder / "chain").unlink(missing_ok=True)
            self.chronicle.gives_up(fault.who)
        if fault.for_s:
            yield fault.for_s
            self._start(fault.who)

    async def _kill_at_disk(self, fault: Fault) -> None:
        sim, disk = self._victim(fault), self.disks[fault.who]
        if sim is None:
            return
        disk.operations_left = fault.nth
        await heard(sim.transport.incarnation.death, 2 * AIM_S)
        disk.operations_left = -1
        if sim.alive:
            self.kill(fault.who)
        if fault.for_s:
            await self._start_later(fault.who, fault.for_s)

    async def _blackout(self, fault: Fault) -> None:
        victims = [sim.index for sim in self.living()]
        for index in victims:
            self.kill(index)
        await asyncio.sleep(fault.for_s)
        await asyncio.gather(*(self._start_later(index, self.random.uniform(0, 2)) for index in victims))

    async def _leave(self, fault: Fault) -> None:
        sim = self._victim(fault)
        if sim is None or not sim.runs:
            return
        self.change(f"peer {fault.who} leaves")
        leaving = sim.transport._spawn(sim.leave())
        await sim.transport.incarnation.end_of(leaving)
        if leaving.done() and leaving.exception() is not None:
            self.fail(Violation("waits-end", f"peer {fault.who} cannot leave: {leaving.exception()!r}"))
        self._count_the_living()
        if fault.for_s:
            await self._start_later(fault.who, fault.for_s)

    async def _join(self, fault: Fault) -> None:
        self._start(fault.who)

    def _stop(self, fault: Fault) -> Iterator[float]:
        sim = self._victim(fault)
        if sim is None or not sim.runs:
            return
        self.change(f"{fault}")
        peer_id, began_s = sim.transport.peer_id, self.now_s
        self.network.stop(peer_id, whole=fault.how == "whole")
        yield fault.for_s
        sim.stopped_s += self.now_s - began_s
        if sim.alive:
            self.change(f"peer {fault.who} goes on")
            self.network.resume(peer_id)

    def _cut(self, fault: Fault) -> Iterator[float]:
        return self._cut_all([(fault.who, fault.other)], fault)

    def _reset(self, fault: Fault) -> Iterator[float]:
        """The stream over which the message goes is the newest one between the two."""
        self.note(f"a stream of peer {fault.who} to {fault.other} is reset")
        self.network.reset(identity(fault.who).peer_id, identity(fault.other).peer_id)
        yield 0.0

    async def _address(self, fault: Fault) -> None:
        self.change(f"{fault}")
        self.network.move(identity(fault.who).peer_id)

    def _partition(self, fault: Fault) -> Iterator[float]:
        count = len(self.schedule.peers)
        return self._cut_all([(a, b) for a in fault.side for b in range(count) if b not in fault.side], fault)

    def _cut_all(self, links: list[tuple[int, int]], fault: Fault) -> Iterator[float]:
        self.change(f"{fault}")
        ends = [(identity(a).peer_id, identity(b).peer_id) for a, b in links]
        for a, b in ends:
            self.network.cut(a, b, "silent" if fault.how == "silent" else "reset")
        yield fault.for_s
        self.change(f"{fault.kind} is over")
        for a, b in ends:
            self.network.restore(a, b)

    async def _misled(self, fault: Fault) -> None:
        for wait_s in self._partition(fault):
            await asyncio.sleep(wait_s)

    def _slow(self, fault: Fault) -> Iterator[float]:
        self.change(f"{fault}")
        others = range(len(self.schedule.peers)) if fault.how == "uplink" else (fault.other,)
        ends = [(identity(fault.who).peer_id, identity(i).peer_id) for i in others if i != fault.who]
        for source, target in ends:
            self.network.slow(source, target, fault.amount)
        yield fault.for_s
        self.change("slow is over")
        for source, target in ends:
            self.network.slow(source, target, 0.0)

    async def _disk(self, fault: Fault) -> None:
        sim = self._victim(fault)
        if sim is None:
            return
        self.change(f"{fault}")
        disk = self.disks[fault.who]
        disk.dying = True
        await heard(sim.transport.incarnation.death, 2 * AIM_S)
        disk.dying = False
        if sim.alive and disk.failed_s is not None and self.now_s > disk.failed_s + DISK_S:
            self.fail(Violation("waits-end", f"peer {fault.who} goes on with a disk that fails"))
        await self._start_later(fault.who, fault.for_s)

    async def _echo(self, fault: Fault) -> None:
        self.change(f"{fault}")
        self.network.echo = fault.amount
        await asyncio.sleep(fault.for_s)
        self.change("echo is over")
        self.network.echo = 0.0

    async def _dht(self, fault: Fault) -> None:
        self.change(f"{fault}")
        self.network.dht_trouble = fault.amount
        await asyncio.sleep(fault.for_s)
        self.change("dht is over")
        self.network.dht_trouble = 0.0

    async def _liar(self, fault: Fault) -> None:
        """A stranger that claims a history which nobody has, from now on for ever. It answers, and serves nothing."""
        self.change(f"{fault}")
        liar = FakeTransport(self.network, LIAR.peer_id, Timeouts())
        self.lies = liar._spawn(self._lie(liar))

    async def _lie(self, liar: FakeTransport) -> None:
        async def answer(channel: Channel) -> None:
            message = await channel.receive(*REQUESTS, timeout_s=LIAR_EVERY_S)
            await channel.send(Push(record=self._claim()) if isinstance(message, Push) else No(reason="not now"))

        await liar.serve(run_protocol(self.manifest.run_id), answer)
        while True:
            sealed = self._claim()
            self.network.store(peers_key(self.manifest.run_id), LIAR.peer_id, (sealed, open_record(sealed).expires_s))
            await asyncio.sleep(LIAR_EVERY_S)

    def _claim(self) -> bytes:
        claim = record_of(
            LIAR,
            run_id=self.manifest.run_id,
            issued_s=asyncio.get_running_loop().time(),
            step=50_000,
            head=bytes([7]) * 32,
            committed=True,
            heads=[bytes([6]) * 32],
        )
        return seal_record(claim, LIAR)

    # -- disks -------------------------------------------------------------------------------------------------------

    def on_disk(self) -> None:
        """A peer is about to change something on its disk, or just has."""
        owner = RUNNING.get()
        if owner is None:
            return
        index = int(owner.name)
        disk = self.disks[index]
        if disk.dying:
            disk.failed_s = self.now_s if disk.failed_s is None else disk.failed_s
            raise OSError(28, "No space left on device")
        if disk.operations_left > 0 and owner.in_thread:
            disk.operations_left -= 1
            if disk.operations_left == 0:
                # What the dead leave unfinished stays: no ``finally`` of theirs tidies it up.
                shutil.copytree(disk.folder, disk.folder.with_suffix(".frozen"))
                self.kill(index)
                raise Cut
