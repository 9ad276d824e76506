"""The network side of one peer, on any transport: it is made of its parts here, and lives.

    join        take the newest state of the own ledger, then whatever leads to the swarm's head, and follow that
    begin       the trainer takes theta: from now on the state moves at outer steps only (``outer_steps``)
    leave       withdraw the record

Everything runs in one event loop. Some tasks live as long as the peer (``run``): publish my record, read the others',
hear who is barred, follow the swarm, and keep sound what I hold. What other peers do wrong ends in a log line and a
value; what goes wrong here (disk, daemon) raises LocalError out of ``run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from p2p_diloco.core.addresses import Endpoint
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import NetworkError
from p2p_diloco.core.event import PeerJoined, PeerLeft
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.pace import Phase
from p2p_diloco.core.records import Role
from p2p_diloco.core.roster import on_head, rank
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.waiting import deadline, now_s, run_beside
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.anchoring import Anchoring
from p2p_diloco.peer.attempts import Attempts
from p2p_diloco.peer.audits import Audits
from p2p_diloco.peer.catchup import Catchup
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.follower import Follower
from p2p_diloco.peer.helping import Helping
from p2p_diloco.peer.outer_steps import OuterSteps
from p2p_diloco.peer.presence import Presence
from p2p_diloco.peer.probes import Probes
from p2p_diloco.peer.proofs import Proofs
from p2p_diloco.peer.reception import Reception
from p2p_diloco.peer.revocations import Revoked
from p2p_diloco.peer.upkeep import Upkeep
from p2p_diloco.peer.uploads import Uploads
from p2p_diloco.peer.witness import Witness
from p2p_diloco.round.here import Here
from p2p_diloco.round.matchmaking import Matchmaker
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire.channel import MANIFEST_PROTOCOL, Transport

HAND_OVER_POLL_S = 0.2


NOWHERE = Standing(step=0, head=bytes(32), heads=())
"""Before there is any state."""


def here_of(
    transport: Transport,
    identity: Identity,
    manifest: RunManifest,
    seat: Seat,
    *,
    sealed_seat: bytes,
    wall_s: Callable[[], float],
) -> Here:
    """Returns what all parts of a peer of this run share, with nobody in its directory."""
    directory = Directory(
        identity.peer_id,
        manifest.run_id,
        transport.timeouts,
        favoured=transport.favoured,
        admission=manifest.admission(),
    )
    return Here(
        transport=transport,
        identity=identity,
        directory=directory,
        seat=seat,
        timeouts=transport.timeouts,
        wall_s=wall_s,
        sealed_seat=sealed_seat,
    )


class Peer:
    """One peer's network side: its parts, and its life from ``join`` to ``leave``.

    ``local``: float32 [n], the trainer's parameters; unchanged while ``outer_step`` runs. A seed has none. ``seat``:
    under which this peer takes part in a run by invitation."""

    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        replica: Replica,
        signed_manifest: bytes,
        local: Vector | None,
        events: EventLog,
        name: str = "",
        max_upload_bytes_per_s: float | None = None,
        metrics: Endpoint | None = None,
        wall_s: Callable[[], float] = time.time,
        seat: bytes = b"",
    ) -> None:
        self.identity = identity
        self.replica = replica
        self.manifest = replica.manifest
        self.local = local
        self.events = events
        self.role: Role = "seed" if local is None else "trainer"
        self.seat = Seat(
            standing=NOWHERE,
            history=replica.history,
            role_trainer=local is not None,
            client_mode=not transport.dialable,
            ways=transport.ways,
        )
        self.here = here = here_of(transport, identity, self.manifest, self.seat, sealed_seat=seat, wall_s=wall_s)
        self.directory = here.directory
        catchup = Catchup(here=here, replica=replica, events=events)
        self.matchmaker = Matchmaker(here, self.manifest)
        self.uploads = self._uploads(max_upload_bytes_per_s)
        self.upkeep = Upkeep(here=here, replica=replica, catchup=catchup, events=events)
        self.presence = self._presence(name, metrics)
        witness = Witness(here=here, replica=replica, events=events)
        self.revoked = Revoked(here=here, replica=replica, presence=self.presence)
        self.anchoring = Anchoring(here=here, replica=replica, presence=self.presence, events=events)
        self.proofs = Proofs(here=here, replica=replica, presence=self.presence, events=events)
        self.follower = Follower(
            here=here,
            replica=replica,
            catchup=catchup,
            upkeep=self.upkeep,
            presence=self.presence,
            witness=witness,
            events=events,
        )
        self.audits = Audits(here=here, replica=replica, company=self.matchmaker.company, events=events)
        self.reception = self._reception(signed_manifest, witness)
        self.attempts = self._attempts(witness)
        self.outer_steps = None if local is None else self._outer_steps(local)
        helps = local is None and identity.peer_id == self.manifest.owner
        self.helping = Helping(attempts=self.attempts, follower=self.follower) if helps else None

    def _presence(self, name: str, metrics: Endpoint | None) -> Presence:
        return Presence(
            here=self.here,
            replica=self.replica,
            company=self.matchmaker.company,
            events=self.events,
            role=self.role,
            name=name,
            metrics=metrics,
        )

    def _uploads(self, max_bytes_per_s: float | None) -> Uploads:
        return Uploads(
            ledger=self.replica.ledger,
            n=self.manifest.n_params,
            events=self.events,
            timeouts=self.here.timeouts,
            max_bytes_per_s=max_bytes_per_s,
        )

    def _reception(self, signed_manifest: bytes, witness: Witness) -> Reception:
        return Reception(
            here=self.here,
            signed_manifest=signed_manifest,
            replica=self.replica,
            matchmaker=self.matchmaker,
            presence=self.presence,
            uploads=self.uploads,
            probes=Probes(here=self.here, rate=self.uploads.rate),
            revoked=self.revoked,
            anchoring=self.anchoring,
            proofs=self.proofs,
            witness=witness,
            audits=self.audits,
        )

    def _attempts(self, witness: Witness) -> Attempts:
        return Attempts(
            here=self.here,
            replica=self.replica,
            local=self.local,
            witness=witness,
            matchmaker=self.matchmaker,
            upkeep=self.upkeep,
            presence=self.presence,
            reception=self.reception,
            events=self.events,
            phase=Phase(inner_steps=self.manifest.spec.inner.steps),
        )

    def _outer_steps(self, local: Vector) -> OuterSteps:
        return OuterSteps(
            here=self.here,
            replica=self.replica,
            local=local,
            attempts=self.attempts,
            follower=self.follower,
            upkeep=self.upkeep,
            presence=self.presence,
            events=self.events,
            phase=self.attempts.phase,
        )

    async def join(self) -> None:
        """Serves others, looks around, and returns when this peer stands at the swarm's head, as far as others can help
        it there. Raises NetworkError when it has no state, and nobody gives it one within ``discover_s``."""
        started_s = now_s()
        await asyncio.to_thread(self.replica.load)
        self.revoked.read()
        await self.anchoring.read()
        self.audits.read()
        self.proofs.read()
        from_step = self.replica.state.step if self.replica.state else None
        if self.replica.state is not None:
            self.presence.take_standing()
        self.presence.enter("joining")
        await self.here.transport.serve(MANIFEST_PROTOCOL, self.reception.give_manifest)
        await self.here.transport.serve(self.here.protocol, self.reception.receive)
        await self.presence.refresh()
        await self.revoked.hear()
        await self.anchoring.hear()
        catching_up = self.follower.catch_up(patience_s=self.here.timeouts.discover_s)
        snapshot = await run_beside(catching_up, self.presence.show_download())
        if self.replica.state is None:
            raise NetworkError(
                "no peer of the run could give us its state; try again when a seed or another peer is up"
            )
        self.presence.take_standing()
        joined = PeerJoined(
            step=self.seat.standing.step,
            head=self.seat.standing.head.hex(),
            from_step=from_step,
            snapshot=snapshot,
            seconds=now_s() - started_s,
        )
        self.events.write(joined)
        if self.role == "seed":
            self.presence.enter("inner")
        await self.presence.publish()
        await self.presence.refresh()  # who joined meanwhile: of two that do so at once, the later one sees the other
        await self.presence.pushes.to_all()

    async def begin(self) -> None:
        """Returns when the trainer may take theta and train. Up to now the state has followed the swarm; from now on it
        moves at outer steps only."""
        async with self.follower.moving:
            await self.presence.pushes.to_all()
            await self.follower.catch_up(patience_s=0.0)
            self.follower.by_itself = False
        self.presence.enter("inner")
        await self.presence.publish()
        await self.presence.pushes.to_all()
        if self.outer_steps is not None:
            self.outer_steps.begin()

    async def run(self) -> None:
        """Keeps my record in the DHT, the others' here, and what I hold sound, until it is cancelled."""
        helping = [] if self.helping is None else [self.helping.run()]
        await asyncio.gather(
            *helping,
            self.presence.publish_loop(),
            self.presence.refresh_loop(),
            self.revoked.run(),
            self.anchoring.run(),
            self.proofs.run(),
            self.follower.run(),
            self.upkeep.run(),
        )

    async def outer_step(self, tokens: int, *, dropped: bool = False, pace: float = 0.0) -> OuterResult:
        """Makes one outer step, as ``OuterSteps.outer_step`` has it. A seed makes none."""
        if self.outer_steps is None:
            raise RuntimeError("a seed makes no outer steps")
        return await self.outer_steps.outer_step(tokens, dropped=dropped, pace=pace)

    async def leave(self, reason: str) -> None:
        """Sees that what I hold is not lost, and then withdraws the record, so that nobody waits for us."""
        if self.replica.state is None:
            return
        self.presence.take_standing()  # an outer step that was broken off may have kept its update
        await self.matchmaker.gatherings.close()
        self.seat.in_round = False
        with contextlib.suppress(asyncio.TimeoutError):
            async with deadline(self.here.timeouts.leave_s / 4):
                await self._hand_over()
        self.presence.enter("left")
        await self.attempts.close()
        await self.audits.close()
        self.events.write(PeerLeft(step=self.step, head=self.seat.standing.head.hex(), reason=reason))
        await asyncio.gather(self.presence.publish(), self.presence.pushes.to_all())
        await self.presence.pushes.close()
        await self.upkeep.settled()

    async def _hand_over(self) -> None:
        """Returns when a seed has my outer step, or none is there: after the last one nobody else stays."""
        self.presence.enter("inner")
        while True:
            seeds = [record for record in self.here.live() if record.role == "seed"]
            if not seeds or any(self.seat.standing.head in (record.head, *record.heads) for record in seeds):
                return
            await self.presence.pushes.to(seeds)
            await asyncio.sleep(HAND_OVER_POLL_S)

    def evaluates_genesis(self) -> bool:
        """Tells whether I am the one, of those who are here, to evaluate theta before the first outer step."""
        standing = self.seat.standing
        around = on_head(self.here.live(), standing.head)
        mine = rank(standing.head, self.identity.peer_id)
        return standing.step == 0 and all(mine < rank(standing.head, record.peer_id) for record in around)

    @property
    def step(self) -> int:
        """Returns the outer step at which this peer stands."""
        return self.seat.standing.step
