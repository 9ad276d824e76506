from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import LocalError, NetworkError, UsageError
from p2p_diloco.core.manifest import MAX_MANIFEST_BYTES, RunManifest
from p2p_diloco.core.records import RUNS_KEY, seal_record
from p2p_diloco.wire.channel import MANIFEST_PROTOCOL, Channel
from p2p_diloco.wire.discovery import announced_runs, find_manifest
from p2p_diloco.wire.message import CHUNK_BYTES
from p2p_diloco.wire.messages import Size
from p2p_diloco.wire.state_messages import AskManifest
from tests.support.builders import identity, record_of
from tests.support.fakes import FakeNetwork, FakeTransport, make_manifest, run_simulated

OWNER = identity(1000)
TIMEOUTS = Timeouts()


def manifest_of(value: float, **changes: Any) -> RunManifest:
    made = make_manifest(8, np.full(8, value, np.float32), OWNER)
    return made.model_copy(update=changes)


RUN, OTHER_RUN = manifest_of(0.0), manifest_of(1.0)
SIGNED, OTHER_SIGNED = RUN.signed(OWNER), OTHER_RUN.signed(OWNER)
Serve = Callable[[Channel], Awaitable[None]]


class Dht:
    """Peers that announce runs, and a newcomer that looks for one."""

    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.newcomer = FakeTransport(self.network, identity(1).peer_id, TIMEOUTS)
        self.asked: list[int] = []
        self.began_s = asyncio.get_running_loop().time()

    def add(self, i: int, serve: bytes | Serve | None, *, run: RunManifest | None = RUN, **record: Any) -> None:
        """``serve``: the manifest, or how; None for a peer that is gone. ``run`` None: it announces nothing."""
        who = identity(i)
        if serve is not None:
            transport = FakeTransport(self.network, who.peer_id, TIMEOUTS)

            async def handler(channel: Channel) -> None:
                await channel.receive(AskManifest, timeout_s=10.0)
                self.asked.append(i)
                if isinstance(serve, bytes):
                    await channel.send_blob(serve)
                else:
                    await serve(channel)

            transport.handlers[MANIFEST_PROTOCOL] = handler
        if run is not None:
            fields: dict[str, Any] = {"run_id": run.run_id, "run_name": run.spec.name, "life_s": 900.0}
            self.announce(i, seal_record(record_of(who, **fields | record), who))

    def announce(self, i: int, record: bytes) -> None:
        self.network.stored.setdefault(RUNS_KEY, {})[identity(i).peer_id] = (record, self.began_s + 900.0)

    async def find(self, run_id: str | None = None, *initial: int) -> bytes:
        return await find_manifest(
            self.newcomer,
            run_id=run_id,
            initial_peers=[(identity(i).peer_id, f"/memory/{i}") for i in initial],
            timeouts=TIMEOUTS,
            wall_s=asyncio.get_running_loop().time,
        )

    async def fails(self, kind: type[LocalError], *words: str, run_id: str | None = None, initial: int = 0) -> float:
        """Seconds until it gave up."""
        with pytest.raises(kind) as error:
            await self.find(run_id, *[initial] * bool(initial))
        for word in words:
            assert word in str(error.value)
        return asyncio.get_running_loop().time() - self.began_s


def test_the_only_run() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, SIGNED)
        dht.add(3, SIGNED)
        assert await dht.find() == SIGNED
        assert await dht.find(RUN.run_id) == SIGNED
        assert dht.asked == [2, 2]

    run_simulated(main())


def test_one_of_two_runs_has_to_be_named() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, SIGNED)
        dht.add(3, OTHER_SIGNED, run=OTHER_RUN)
        dht.add(4, OTHER_SIGNED, run=OTHER_RUN)
        took_s = await dht.fails(
            UsageError,
            "there are 2 runs at this address; choose one",
            f"--run-id {RUN.run_id} (simulated, 1 peers)",
            f"--run-id {OTHER_RUN.run_id} (simulated, 2 peers)",
        )
        assert took_s < 1
        assert dht.asked == []
        assert await dht.find(OTHER_RUN.run_id) == OTHER_SIGNED
        assert await dht.find(RUN.run_id) == SIGNED

    run_simulated(main())


def test_no_run() -> None:
    async def main() -> None:
        dht = Dht()
        took_s = await dht.fails(NetworkError, "no peer of a run has announced itself there", "p2p-diloco seed")
        assert took_s == pytest.approx(TIMEOUTS.discover_s, abs=1.1)

    run_simulated(main())


def test_a_run_that_shows_up_late() -> None:
    async def main() -> None:
        dht = Dht()
        finding = asyncio.ensure_future(dht.find())
        await asyncio.sleep(TIMEOUTS.discover_s - 2)
        dht.add(2, SIGNED)
        assert await finding == SIGNED

    run_simulated(main())


def test_another_run_than_the_one_that_is_named() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, SIGNED)
        wanted = "cd" * 20
        took_s = await dht.fails(
            UsageError, f"no run {wanted} at this address; there is {RUN.run_id}; check --run-id", run_id=wanted
        )
        assert took_s >= TIMEOUTS.discover_s, "it may not have announced itself yet"
        assert dht.asked == []

    run_simulated(main())


def test_the_address_alone_is_enough_before_anybody_announced_the_run() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, SIGNED, run=None)
        assert await dht.find(None, 2) == SIGNED
        assert await dht.find(RUN.run_id, 2) == SIGNED
        await dht.fails(NetworkError, f"serves run {RUN.run_id}", run_id="cd" * 20, initial=2)

    run_simulated(main())


def test_the_run_is_the_one_that_the_initial_peer_is_in_whatever_others_announce() -> None:
    """Records with run ids that nobody has, and with another run that is there."""

    async def main() -> None:
        dht = Dht()
        dht.add(2, SIGNED)
        dht.add(3, OTHER_SIGNED, run=OTHER_RUN)
        for i in range(10, 40):
            dht.announce(i, seal_record(record_of(identity(i), run_id=f"{i:040x}", life_s=900.0), identity(i)))
        assert await dht.find(None, 2) == SIGNED
        assert await dht.find(None, 3) == OTHER_SIGNED
        assert await dht.find(RUN.run_id, 3) == SIGNED
        assert asyncio.get_running_loop().time() - dht.began_s < 1

    run_simulated(main())


def test_an_initial_peer_that_is_busy_is_asked_again_before_others_are_believed() -> None:
    async def main() -> None:
        dht, refused = Dht(), 0

        async def busy_at_first(channel: Channel) -> None:
            nonlocal refused
            refused += 1
            if refused > 2:
                await channel.send_blob(SIGNED)

        dht.add(2, busy_at_first)
        dht.add(3, OTHER_SIGNED, run=OTHER_RUN)
        assert await dht.find(None, 2) == SIGNED
        assert dht.asked == [2, 2, 2]

    run_simulated(main())


def test_an_initial_peer_that_is_in_no_run_leads_to_the_run_that_is_announced() -> None:
    async def main() -> None:
        dht = Dht()
        FakeTransport(dht.network, identity(2).peer_id, TIMEOUTS)
        dht.add(3, SIGNED)
        assert await dht.find(None, 2) == SIGNED
        assert asyncio.get_running_loop().time() - dht.began_s < 5
        dht.add(4, OTHER_SIGNED, run=OTHER_RUN)
        await dht.fails(UsageError, "there are 2 runs at this address; choose one", initial=2)
        assert await dht.find(RUN.run_id, 2) == SIGNED

    run_simulated(main())


def test_initial_peers_in_several_runs() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, SIGNED, run=None)
        dht.add(3, OTHER_SIGNED, run=None)
        dht.add(4, OTHER_SIGNED, run=None)
        with pytest.raises(UsageError) as error:
            await dht.find(None, 2, 3, 4)
        text = str(error.value)
        assert text.startswith("there are 2 runs at this address; choose one: ")
        assert f"--run-id {RUN.run_id} (simulated, 1 peers)" in text
        assert f"--run-id {OTHER_RUN.run_id} (simulated, 2 peers)" in text
        assert await dht.find(OTHER_RUN.run_id, 2, 3) == OTHER_SIGNED

    run_simulated(main())


def test_an_initial_peer_that_does_not_answer_holds_up_no_other() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, silent, run=None)
        dht.add(3, SIGNED, run=None)
        dht.add(4, b"garbage", run=None)
        assert await dht.find(None, 2, 3, 4) == SIGNED
        assert asyncio.get_running_loop().time() - dht.began_s < 2

    run_simulated(main())


def test_a_manifest_that_trickles_is_not_waited_for() -> None:
    async def trickles(channel: Channel) -> None:
        await channel.send(Size(size_bytes=MAX_MANIFEST_BYTES))
        while True:
            await channel.send_frame(bytes(CHUNK_BYTES))
            await asyncio.sleep(9)

    async def main() -> None:
        dht = Dht()
        dht.add(2, trickles, run=None)
        took_s = await dht.fails(NetworkError, "takes too long to send its manifest", initial=2)
        assert took_s < TIMEOUTS.discover_s + 2

    run_simulated(main())


async def silent(channel: Channel) -> None:
    await asyncio.sleep(100)


async def closes(channel: Channel) -> None:
    pass


async def endless(channel: Channel) -> None:
    await channel.send(Size(size_bytes=MAX_MANIFEST_BYTES + 1))
    for _ in range(5):
        await channel.send_frame(bytes(1000))


async def nonsense(channel: Channel) -> None:
    await channel.send(AskManifest())


REMOTE: dict[str, bytes | Serve | None] = {
    "gone": None,
    "silent": silent,
    "closes": closes,
    "endless": endless,
    "nonsense": nonsense,
    "another run": OTHER_SIGNED,
}
BAD_SIGNATURE = SIGNED.replace(b'"name":"simulated"', b'"name":"simulates"')
UNSOUND: dict[str, tuple[bytes, str]] = {
    "signature": (BAD_SIGNATURE, "the manifest's signature is not its owner's"),
    "version": (manifest_of(0.0, protocol=2).signed(OWNER), "the run speaks protocol 2"),
    "garbage": (b"garbage", "not a signed manifest"),
    "nothing": (b"", "not a signed manifest"),
    "signed by another": (RUN.signed(identity(7)), "the manifest's signature is not its owner's"),
}


@pytest.mark.parametrize("serve", [*REMOTE.values(), *(data for data, _ in UNSOUND.values())], ids=[*REMOTE, *UNSOUND])
def test_the_next_announcer_is_asked(serve: bytes | Serve | None) -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, serve)
        dht.add(3, SIGNED)
        assert await dht.find() == SIGNED
        assert dht.asked == [2, 3] if serve is not None else [3]

    run_simulated(main())


@pytest.mark.parametrize("serve", REMOTE.values(), ids=REMOTE)
def test_who_does_not_answer_well_is_asked_again(serve: bytes | Serve | None) -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, serve)
        took_s = await dht.fails(NetworkError, "found no run within 30 s", identity(2).peer_id[-8:])
        assert TIMEOUTS.discover_s <= took_s < TIMEOUTS.discover_s + TIMEOUTS.request_s + 2
        assert len(dht.asked) > 1 or serve is None

    run_simulated(main())


@pytest.mark.parametrize(("data", "why"), UNSOUND.values(), ids=UNSOUND)
@pytest.mark.parametrize("announced", [True, False])
def test_a_manifest_that_is_not_sound_is_the_end(data: bytes, why: str, announced: bool) -> None:
    """Of another version of p2p-diloco, above all: no waiting helps. Its records may not even parse."""

    async def main() -> None:
        dht = Dht()
        dht.add(2, data, run=RUN if announced else None)
        took_s = await dht.fails(UsageError, why, identity(2).peer_id[-8:], initial=2)
        assert took_s < 1

    run_simulated(main())


def test_who_announces_a_run() -> None:
    async def main() -> None:
        dht = Dht()
        dht.add(2, None)
        dht.add(3, None, run=OTHER_RUN)
        dht.add(4, None, phase="left")
        dht.add(5, None, issued_s=dht.began_s - 1000.0)
        dht.add(1, None)  # the newcomer's own, from before
        dht.announce(6, seal_record(record_of(identity(6)), identity(7)))
        dht.announce(8, b"\x91" * 500)
        runs = await announced_runs(dht.newcomer, dht.began_s)
        found = {run_id: [record.peer_id for record in records] for run_id, records in runs.items()}
        assert found == {RUN.run_id: [identity(2).peer_id], OTHER_RUN.run_id: [identity(3).peer_id]}

    run_simulated(main())
