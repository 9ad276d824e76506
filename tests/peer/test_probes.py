"""Dial backs and transfers, in memory: a peer that serves them, one that measures, and some with other intentions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.buckets import Rate
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Gone, Misbehaved, Refused, Silent
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import MAX_RECORD_BYTES, seal
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.waiting import now_s
from p2p_diloco.look.network_findings import Bandwidth, Dialled
from p2p_diloco.look.network_trial import (
    Candidate,
    Listener,
    bandwidth_of,
    clock_offsets,
    dial_back,
    dial_backs,
    exchange,
    measure_bandwidth,
    would_relay,
)
from p2p_diloco.peer.probes import (
    CONSENT_CONTEXT,
    DIALS,
    MAX_EXCHANGES,
    MAX_STREAM_BYTES,
    DialConsent,
    Probes,
    seal_consent,
)
from p2p_diloco.round.here import Here
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire.channel import DIAL_BACK_PROTOCOL, Channel, Handler
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.probe_messages import (
    MAX_TRANSFER_BYTES,
    AskDialBack,
    AskTransfer,
    DialBack,
    DialedBack,
    Transferred,
)
from tests.support.builders import RUN_ID, damaged, head, identity, sealed_anyhow, values_of
from tests.support.fakes import FakeNetwork, FakeTransport, run_simulated

PROTOCOL = "run"
SERVER, ASKER, LISTENER, STRANGER = (identity(i + 1) for i in range(4))
LISTENS_AT = 4001


class Place(FakeTransport):
    """A transport at an address, with ports that are open or not."""

    def __init__(self, network: FakeNetwork, who: Identity, ip: str, ports: tuple[int, ...] = ()) -> None:
        super().__init__(network, who.peer_id, Timeouts())
        self.ip, self.ports = ip, ports
        self.dialled: list[tuple[str, list[str]]] = []

    async def serve(self, protocol: str, handler: Handler) -> None:
        async def located(channel: Channel) -> None:
            channel.remote_ip = self.network.nodes[channel.peer_id].ip  # type: ignore[attr-defined]
            await handler(channel)

        await super().serve(protocol, located)

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        self.dialled.append((peer_id, maddrs))
        there = self.network.nodes.get(peer_id)
        if isinstance(there, Place) and there.ports:
            open_at = {f"/ip4/{there.ip}/tcp/{port}/p2p/{peer_id}" for port in there.ports}
            if not open_at & set(maddrs):
                raise Gone(peer_id, "cannot be reached: connection refused")
        return await super().open(peer_id, maddrs, protocol)

    async def maddrs(self) -> list[str]:
        return [f"/ip4/{self.ip}/tcp/{port}/p2p/{self.peer_id}" for port in self.ports]


@dataclass
class Scene:
    """A peer that serves probes, who asks it, and who listens for the asker at the same address."""

    network: FakeNetwork = field(default_factory=FakeNetwork)
    ahead_s: float = 0.0
    """Of the serving peer's clock."""

    def __post_init__(self) -> None:
        self.server = Place(self.network, SERVER, "198.51.100.1")
        self.asker = Place(self.network, ASKER, "203.0.113.7")
        self.listener = Place(self.network, LISTENER, "203.0.113.7", (LISTENS_AT,))
        self.seat = Seat(standing=Standing(step=0, head=head(""), heads=()), role_trainer=True, client_mode=False)
        self.seat.phase = "inner"
        here = Here(
            transport=self.server,
            identity=SERVER,
            directory=Directory(SERVER.peer_id, RUN_ID),
            seat=self.seat,
            timeouts=self.server.timeouts,
            wall_s=lambda: now_s() + self.ahead_s,
        )
        self.probes = Probes(here=here)
        self.candidate = Candidate(peer_id=SERVER.peer_id, maddrs=(f"/ip4/198.51.100.1/tcp/1/p2p/{SERVER.peer_id}",))

    async def start(self) -> Scene:
        await self.server.serve(PROTOCOL, self.serve)
        self.heard = Listener(transport=self.listener, identity=LISTENER)
        await self.listener.serve(DIAL_BACK_PROTOCOL, self.heard.on_dial_back)
        return self

    async def serve(self, channel: Channel) -> None:
        message: Message = await channel.receive(AskDialBack, AskTransfer, timeout_s=10.0)
        if isinstance(message, AskDialBack):
            await self.probes.on_ask_dial_back(channel, message)
        elif isinstance(message, AskTransfer):
            await self.probes.on_ask_transfer(channel, message)

    async def channel(self, who: Place | None = None) -> Channel:
        return await (who or self.asker).open(SERVER.peer_id, [], PROTOCOL)

    async def ask_dial(self, sealed: bytes, who: Place | None = None) -> DialedBack:
        channel = await self.channel(who)
        try:
            return await channel.request(AskDialBack(consent=sealed), DialedBack, timeout_s=60.0)
        finally:
            channel.close()

    def dials(self) -> list[tuple[str, list[str]]]:
        return self.server.dialled


def consent(**changes: Any) -> DialConsent:
    fields: dict[str, Any] = {
        "peer_id": LISTENER.peer_id,
        "asker": ASKER.peer_id,
        "dialler": SERVER.peer_id,
        "ports": [LISTENS_AT],
    }
    return DialConsent(**fields | changes)


def simulate(main: Callable[[Scene], Coroutine[Any, Any, None]], **scene: Any) -> None:
    async def whole() -> None:
        await main(await Scene(**scene).start())

    run_simulated(whole())


# -- dial backs --------------------------------------------------------------------------------------------------------


def test_who_can_be_reached_is_dialled_where_it_asks_from() -> None:
    async def main(scene: Scene) -> None:
        found, ports, reason = await dial_backs(scene.asker, scene.heard, [scene.candidate], PROTOCOL)
        assert found == [Dialled(by=scene.candidate.label, ip="203.0.113.7", reached=True)]
        assert (ports, reason) == ([LISTENS_AT], "")
        assert scene.dials() == [(LISTENER.peer_id, [f"/ip4/203.0.113.7/tcp/4001/p2p/{LISTENER.peer_id}"])]
        assert scene.heard.dialled_by == {SERVER.peer_id}

    simulate(main)


def test_who_cannot_be_reached_hears_why() -> None:
    async def main(scene: Scene) -> None:
        scene.listener.ports = (9999,)
        sealed = seal_consent(consent(), LISTENER)
        answer = await scene.ask_dial(sealed)
        assert answer == DialedBack(reached=False, ip="203.0.113.7", reason="cannot be reached: connection refused")
        del scene.network.nodes[LISTENER.peer_id]
        found, _, _ = await dial_backs(scene.asker, scene.heard, [scene.candidate], PROTOCOL)
        assert [(one.reached, one.ip) for one in found] == [(False, "203.0.113.7")]

    simulate(main)


def test_an_asker_on_the_private_network_is_dialled_there() -> None:
    async def main(scene: Scene) -> None:
        for place in (scene.asker, scene.listener):
            place.ip = "192.168.1.7"
        answer = await scene.ask_dial(seal_consent(consent(), LISTENER))
        assert (answer.reached, answer.ip) == (True, "192.168.1.7")

    simulate(main)


def test_ipv6_addresses_are_dialled_as_such() -> None:
    async def main(scene: Scene) -> None:
        scene.asker.ip = "2001:db8::7"
        await scene.ask_dial(seal_consent(consent(), LISTENER))
        assert scene.dials()[0][1] == [f"/ip6/2001:db8::7/tcp/4001/p2p/{LISTENER.peer_id}"]

    simulate(main)


@pytest.mark.parametrize(
    "sealed",
    [
        pytest.param(seal_consent(consent(), STRANGER), id="somebody else, who has not signed"),
        pytest.param(seal_consent(consent(asker=STRANGER.peer_id), LISTENER), id="given to another asker"),
        pytest.param(seal_consent(consent(dialler=STRANGER.peer_id), LISTENER), id="given to another dialler"),
        pytest.param(seal(consent(), b"p2p-diloco record\0", LISTENER), id="signed as something else"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x91" * 900, id="nested"),
    ],
)
def test_nobody_is_dialled_who_has_not_consented(sealed: bytes) -> None:
    async def main(scene: Scene) -> None:
        with pytest.raises(Gone):
            await scene.ask_dial(sealed)
        assert [type(complaint) for complaint in scene.server.complaints] == [Misbehaved]
        assert scene.server.complaints[0].peer_id == ASKER.peer_id
        assert scene.dials() == []

    simulate(main)


def test_no_address_but_the_askers_own_can_be_named() -> None:
    """A consent has ports and no addresses: neither a third party nor the dialler's own network can be meant."""
    assert set(DialConsent.model_fields) == {"peer_id", "asker", "dialler", "ports"}

    async def main(scene: Scene) -> None:
        # An accomplice of the asker's listens in the serving peer's network, and consents.
        scene.listener.ip = "192.168.1.1"
        answer = await scene.ask_dial(seal_consent(consent(), LISTENER))
        assert not answer.reached
        assert {maddr.split("/")[2] for _, maddrs in scene.dials() for maddr in maddrs} == {"203.0.113.7"}

    simulate(main)


def test_through_a_relay_nobody_is_dialled() -> None:
    async def main(scene: Scene) -> None:
        scene.asker.ip = ""
        with pytest.raises(Refused, match="you come through a relay"):
            await scene.ask_dial(seal_consent(consent(), LISTENER))
        assert scene.dials() == []

    simulate(main)


def test_one_peer_may_ask_now_and_then() -> None:
    async def main(scene: Scene) -> None:
        sealed = seal_consent(consent(), LISTENER)
        for _ in range(3):
            assert (await scene.ask_dial(sealed)).reached
        for _ in range(5):
            with pytest.raises(Refused, match="asked too often"):
                await scene.ask_dial(sealed)
        assert len(scene.dials()) == 3
        await asyncio.sleep(31)
        assert (await scene.ask_dial(sealed)).reached

    simulate(main)


def test_many_peers_together_may_ask_not_much_more_often() -> None:
    async def main(scene: Scene) -> None:
        refused = 0
        for i in range(50):
            who = Place(scene.network, identity(100 + i), "203.0.113.7")
            try:
                await scene.ask_dial(seal_consent(consent(asker=who.peer_id), LISTENER), who)
            except Refused:
                refused += 1
        assert refused >= 35
        assert len(scene.dials()) == 50 - refused

    simulate(main)


def test_so_many_dials_at_a_time() -> None:
    async def main(scene: Scene) -> None:
        under_way: list[str] = []

        async def never(peer_id: str, maddrs: list[str], protocol: str) -> Channel:
            under_way.append(peer_id)
            await asyncio.sleep(8.0)
            raise Silent(peer_id, "cannot be reached within 8 s")

        scene.server.open = never  # type: ignore[method-assign]
        askers = [Place(scene.network, identity(100 + i), "203.0.113.7") for i in range(DIALS + 2)]
        answers = await asyncio.gather(
            *(scene.ask_dial(seal_consent(consent(asker=who.peer_id), LISTENER), who) for who in askers),
            return_exceptions=True,
        )
        assert len(under_way) == DIALS
        assert sum(isinstance(answer, DialedBack) and not answer.reached for answer in answers) == DIALS
        assert [str(answer)[-16:] for answer in answers if isinstance(answer, Refused)] == ["busy with others"] * 2

    simulate(main)


def test_a_listener_believes_its_own_eyes() -> None:
    """Not the peer that says it has dialled."""

    async def main(scene: Scene) -> None:
        async def lie(channel: Channel) -> None:
            await channel.receive(AskDialBack, timeout_s=1.0)
            await channel.send(DialedBack(reached=True, ip="8.8.8.8"))

        await scene.server.serve(PROTOCOL, lie)
        with pytest.raises(Refused, match="says that it has dialled, but has not"):
            await dial_back(scene.asker, scene.heard, scene.candidate, PROTOCOL, [LISTENS_AT])
        found, _, reason = await dial_backs(scene.asker, scene.heard, [scene.candidate], PROTOCOL)
        assert found == []
        assert reason.endswith("says that it has dialled, but has not")

    simulate(main)


def test_the_next_peer_is_asked_when_one_does_not_reach_us() -> None:
    async def main(scene: Scene) -> None:
        async def fail(channel: Channel) -> None:
            await channel.receive(AskDialBack, timeout_s=1.0)
            await channel.send(DialedBack(reached=False, ip="203.0.113.7", reason="cannot be reached: no answer"))

        walled = Place(scene.network, STRANGER, "198.51.100.9")
        await walled.serve(PROTOCOL, fail)
        first = Candidate(peer_id=STRANGER.peer_id, maddrs=(f"/ip4/198.51.100.9/tcp/1/p2p/{STRANGER.peer_id}",))
        found, _, _ = await dial_backs(scene.asker, scene.heard, [first, scene.candidate], PROTOCOL)
        assert [(one.by, one.reached, one.reason) for one in found] == [
            (first.label, False, "no answer"),
            (scene.candidate.label, True, ""),
        ]

    simulate(main)


@given(sealed=damaged(seal_consent(consent(), LISTENER)) | st.binary(max_size=MAX_RECORD_BYTES))
def test_damaged_consents_lead_to_no_dial(sealed: bytes) -> None:
    async def main(scene: Scene) -> None:
        with pytest.raises(Gone):
            await scene.ask_dial(sealed)
        assert isinstance(scene.server.complaints[0], Misbehaved)
        assert scene.dials() == []

    simulate(main)


@pytest.mark.parametrize("ports", [[], [0], [65536], [1, 2, 3, 4, 5], ["22"], [-1]])
def test_consents_with_unsound_ports(ports: list[Any]) -> None:
    async def main(scene: Scene) -> None:
        sealed = sealed_anyhow(values_of(consent(), ports=ports), CONSENT_CONTEXT, LISTENER)
        with pytest.raises(Gone):
            await scene.ask_dial(sealed)
        assert scene.dials() == []

    simulate(main)


# -- transfers and clocks ----------------------------------------------------------------------------------------------


def test_bandwidth_is_measured_with_who_is_willing() -> None:
    async def main(scene: Scene) -> None:
        bandwidth, reason = await measure_bandwidth(scene.asker, [scene.candidate], PROTOCOL)
        assert isinstance(bandwidth, Bandwidth)
        assert (bandwidth.peer, reason) == (scene.candidate.label, "")
        assert bandwidth.round_trip_s == pytest.approx(2 * scene.network.latency_s)
        assert min(bandwidth.up_bytes_per_s, bandwidth.down_bytes_per_s) > 1e6

    simulate(main)


def test_a_transfer_is_bounded_in_bytes_on_both_sides() -> None:
    async def main(scene: Scene) -> None:
        channel = await scene.channel()
        await bandwidth_of(channel, "x")
        assert 3e6 < channel.meter.sent < 1.01 * MAX_STREAM_BYTES / 2
        assert 3e6 < channel.meter.received < 1.01 * MAX_STREAM_BYTES / 2

    simulate(main)


def test_a_slow_connection_is_measured_with_few_bytes() -> None:
    """64 kB a second: nothing is begun that takes longer than the time that is left."""

    async def main(scene: Scene) -> None:
        channel = await scene.channel()

        async def slowly(size: int) -> None:
            await asyncio.sleep(size / 64_000)

        send_frame, receive_frame = channel.send_frame, channel.receive_frame

        async def send(*pieces: bytes | memoryview) -> None:
            await slowly(sum(map(len, pieces)))
            await send_frame(*pieces)

        async def receive(max_bytes: int, timeout_s: float) -> bytes:
            data = await receive_frame(max_bytes, timeout_s)
            await slowly(len(data))
            return data

        channel.send_frame, channel.receive_frame = send, receive  # type: ignore[method-assign]
        began_s = now_s()
        bandwidth = await bandwidth_of(channel, "x")
        assert bandwidth.up_bytes_per_s == pytest.approx(64_000, rel=0.1)
        assert bandwidth.down_bytes_per_s == pytest.approx(64_000, rel=0.1)
        assert now_s() - began_s < 8
        assert channel.meter.sent < 300_000

    simulate(main)


@pytest.mark.parametrize("where", ["in_round", "closing", "gather", "reduce", "settle", "apply"])
def test_in_a_round_a_peer_transfers_nothing_but_tells_its_time(where: str) -> None:
    async def main(scene: Scene) -> None:
        scene.seat.in_round = where == "in_round"
        scene.seat.closes_s = now_s() + 5 if where == "closing" else None
        scene.seat.phase = where if where in ("gather", "reduce", "settle", "apply") else "inner"  # type: ignore[assignment]
        channel = await scene.channel()
        await exchange(channel)
        with pytest.raises(Refused, match="in a round"):
            await exchange(channel, 1000)
        assert await clock_offsets(scene.asker, [scene.candidate], PROTOCOL, now_s) == [0.0]
        bandwidth, reason = await measure_bandwidth(scene.asker, [scene.candidate], PROTOCOL)
        assert bandwidth is None
        assert reason.startswith(scene.candidate.label)

    simulate(main)


def test_a_peer_in_a_round_is_asked_again() -> None:
    async def main(scene: Scene) -> None:
        scene.seat.in_round = True
        asyncio.get_running_loop().call_later(4.0, setattr, scene.seat, "in_round", False)
        began_s = now_s()
        bandwidth, _ = await measure_bandwidth(scene.asker, [scene.candidate], PROTOCOL)
        assert bandwidth is not None
        assert now_s() - began_s > 4

    simulate(main)


@pytest.mark.parametrize("ahead_s", [0.0, 4.2, -4.2, 3600.0])
def test_clocks_are_compared_to_less_than_the_way_there_and_back(ahead_s: float) -> None:
    async def main(scene: Scene) -> None:
        (behind_s,) = await clock_offsets(scene.asker, [scene.candidate], PROTOCOL, now_s)
        assert behind_s == pytest.approx(ahead_s, abs=2 * scene.network.latency_s)
        assert abs(behind_s) <= abs(ahead_s), "never more than is certain"

    simulate(main, ahead_s=ahead_s)


async def endlessly(channel: Channel, up_bytes: int, every_s: float) -> None:
    while True:
        await exchange(channel, up_bytes)
        await asyncio.sleep(every_s)


def test_an_endless_transfer_is_cut_off() -> None:
    async def main(scene: Scene) -> None:
        channel = await scene.channel()
        with pytest.raises(Gone):
            await endlessly(channel, MAX_TRANSFER_BYTES, 0.0)
        assert channel.meter.sent < 1.01 * MAX_STREAM_BYTES + MAX_TRANSFER_BYTES
        assert isinstance(scene.server.complaints[0], Misbehaved)

    simulate(main)


def test_exchanges_of_nothing_are_numbered() -> None:
    async def main(scene: Scene) -> None:
        channel = await scene.channel()
        for _ in range(MAX_EXCHANGES):
            await exchange(channel)
        with pytest.raises(Gone):
            await exchange(channel)
        assert isinstance(scene.server.complaints[0], Misbehaved)

    simulate(main)


def test_who_sends_other_bytes_than_announced_is_blamed() -> None:
    async def main(scene: Scene) -> None:
        for wrong in (b"x" * 99, b"x" * 101):
            channel = await scene.channel()
            await channel.send(AskTransfer(up_bytes=100, down_bytes=0))
            await channel.send_frame(wrong)
            with pytest.raises(Gone):
                await channel.receive(Transferred, timeout_s=30.0)
        assert [type(complaint) for complaint in scene.server.complaints] == [Misbehaved, Misbehaved]

    simulate(main)


@pytest.mark.parametrize("trickle", [False, True])
def test_who_measures_for_ever_is_cut_off(trickle: bool) -> None:
    """Neither silence nor an exchange now and then keeps the one place taken."""

    async def main(scene: Scene) -> None:
        channel = await scene.channel()
        began_s = now_s()
        with pytest.raises(Gone):
            await endlessly(channel, 1, 4.0 if trickle else 100.0)
        assert isinstance(scene.server.complaints[0], Silent)
        assert now_s() - began_s < 110
        assert not scene.probes._transfers.locked()

    simulate(main)


def test_a_peer_that_limits_its_uploads_keeps_the_limit() -> None:
    async def main(scene: Scene) -> None:
        scene.probes.rate = Rate(bytes_per_s=100_000.0)
        bandwidth, _ = await measure_bandwidth(scene.asker, [scene.candidate], PROTOCOL)
        assert bandwidth is not None
        assert bandwidth.down_bytes_per_s < 200_000
        assert bandwidth.up_bytes_per_s > 1e6

    simulate(main)


def test_one_transfer_at_a_time() -> None:
    async def main(scene: Scene) -> None:
        first = await scene.channel()
        await exchange(first)
        with pytest.raises(Refused, match="busy with others"):
            await exchange(await scene.channel(Place(scene.network, STRANGER, "203.0.113.9")))
        first.close()
        await asyncio.sleep(1)
        await exchange(await scene.channel())
        assert scene.server.complaints == []

    simulate(main)


def test_transfers_are_rated_for_one_peer_and_for_all() -> None:
    async def main(scene: Scene) -> None:
        async def tries(who: Place) -> str:
            channel = await scene.channel(who)
            try:
                await exchange(channel)
            except Refused as error:
                return error.reason
            finally:
                channel.close()
                await asyncio.sleep(0.1)
            return ""

        assert [await tries(scene.asker) for _ in range(4)] == ["", "", "", "asked too often"]
        others = [Place(scene.network, identity(100 + i), "203.0.113.9") for i in range(5)]
        assert [await tries(who) for who in others] == ["", "", "", "busy with others", "busy with others"]
        await asyncio.sleep(35)
        assert await tries(scene.asker) == ""

    simulate(main)


@pytest.mark.parametrize("kind", ["silent", "no", "garbage", "too much", "gone"])
def test_peers_that_do_not_measure_properly(kind: str) -> None:
    """The asking side ends in time, with a reason."""

    async def main(scene: Scene) -> None:
        async def serve(channel: Channel) -> None:
            await channel.receive(AskTransfer, AskDialBack, timeout_s=10.0)
            if kind == "silent":
                await asyncio.sleep(1000)
            elif kind == "no":
                await channel.send(No(reason="\x1b[31mno\n"))
            elif kind == "garbage":
                await channel.send_frame(b"\xc1" * 100)
            elif kind == "too much":
                await channel.send(Transferred(wall_s=1.0))
                await channel.send_frame(bytes(3_000_000))

        await scene.server.serve(PROTOCOL, serve)
        began_s = now_s()
        bandwidth, reason = await measure_bandwidth(scene.asker, [scene.candidate], PROTOCOL)
        assert bandwidth is None
        assert reason.startswith(scene.candidate.label)
        assert await clock_offsets(scene.asker, [scene.candidate], PROTOCOL, now_s) == []
        found, _, _ = await dial_backs(scene.asker, scene.heard, [scene.candidate], PROTOCOL)
        assert found == []
        assert now_s() - began_s < 100

    simulate(main)


def test_nobody_to_ask() -> None:
    async def main(scene: Scene) -> None:
        assert await measure_bandwidth(scene.asker, [], PROTOCOL) == (None, "there is nobody to ask")
        assert await dial_backs(scene.asker, scene.heard, [], PROTOCOL) == ([], [LISTENS_AT], "")
        assert not await would_relay(scene.asker, [scene.candidate])

    simulate(main)


def test_a_listener_counts_only_who_says_that_it_has_dialled() -> None:
    async def main(scene: Scene) -> None:
        maddrs = await scene.listener.maddrs()
        silent = await scene.server.open(LISTENER.peer_id, maddrs, DIAL_BACK_PROTOCOL)
        await silent.send(No(reason="hello"))
        await asyncio.sleep(1)
        assert scene.heard.dialled_by == set()
        polite = await scene.server.open(LISTENER.peer_id, maddrs, DIAL_BACK_PROTOCOL)
        await polite.send(DialBack())
        await asyncio.sleep(1)
        assert scene.heard.dialled_by == {SERVER.peer_id}

    simulate(main)
