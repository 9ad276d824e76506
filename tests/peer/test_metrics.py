"""What a peer tells Prometheus, against what its event log says and what really went over its streams."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from p2p_diloco.core.addresses import MAX_CHARS, Endpoint
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Misbehaved, UsageError
from p2p_diloco.core.event import RoundEnded, TrainerStalled, of_kind, pack_event
from p2p_diloco.core.events import read_events
from p2p_diloco.core.pace import Progress
from p2p_diloco.core.records import MAX_RECORD_BYTES, Record, open_record, seal_record
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.ledger.folder import folder_bytes
from p2p_diloco.peer import metrics
from p2p_diloco.peer.metrics import PREFIX, PeerMetrics
from p2p_diloco.peer.peer import Peer
from p2p_diloco.peer.presence import MADDRS_BYTES, LastRound, Trained
from tests.peer.test_peer import STRANGER, Simulated, vectors
from tests.support.builders import identity
from tests.support.events import lines_of
from tests.support.fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest, run_simulated

NAMES = {
    "build_info": ("gauge", {"version", "python"}),
    "model_parameters": ("gauge", set()),
    "run_info": ("gauge", {"run_id", "run_name", "codec", "n_params"}),
    "peer_info": ("gauge", {"peer_id", "name", "role"}),
    "loss_nats": ("gauge", set()),
    "held_out_loss_nats": ("gauge", set()),
    "held_out_step": ("gauge", set()),
    "tokens_total": ("counter", set()),
    "tokens_per_second": ("gauge", set()),
    "inner_step": ("gauge", set()),
    "inner_steps_planned": ("gauge", set()),
    "inner_step_seconds": ("gauge", set()),
    "outer_step": ("gauge", set()),
    "anchored_step": ("gauge", set()),
    "outer_steps_goal": ("gauge", set()),
    "rounds_total": ("counter", {"result"}),
    "round_phase_seconds": ("histogram", {"phase"}),
    "stall_seconds": ("histogram", set()),
    "group_size": ("gauge", set()),
    "reduce_share": ("gauge", set()),
    "members_lost_total": ("counter", set()),
    "last_commit_timestamp_seconds": ("gauge", set()),
    "contribution_norm": ("gauge", set()),
    "update_norm": ("gauge", set()),
    "contribution_cosine": ("gauge", set()),
    "bytes_total": ("counter", {"direction", "purpose"}),
    "catch_ups_total": ("counter", set()),
    "rolled_back_steps_total": ("counter", set()),
    "digest_mismatches_total": ("counter", set()),
    "audits_total": ("counter", {"result"}),
    "findings_total": ("counter", {"kind"}),
    "equivocations_total": ("counter", {"what"}),
    "barred_peers": ("gauge", set()),
    "repairs_total": ("counter", {"what"}),
    "branches_left_total": ("counter", set()),
    "known_members": ("gauge", set()),
    "known": ("gauge", set()),
    "certificate_signatures": ("gauge", set()),
    "certificate_members": ("gauge", set()),
    "witnessed_steps_total": ("counter", set()),
    "helped_steps_total": ("counter", set()),
    "uncertified_rounds_total": ("counter", {"reason"}),
    "uncertified_seconds": ("gauge", set()),
    "witness_requests_total": ("counter", {"result"}),
    "rejected_messages_total": ("counter", {"reason"}),
    "peers_seen": ("gauge", set()),
    "connections": ("gauge", {"kind"}),
    "dht_table_size": ("gauge", set()),
    "ledger_bytes": ("gauge", set()),
    "trainer_resident_memory_bytes": ("gauge", set()),
}
"""Dashboards and alerts are built on these: name -> type and labels."""

Values = dict[str, float]
"""Name without the prefix, and the labels' values in the order of the labels' names, blanks between -> value."""


def values_of(rendered: bytes) -> Values:
    found: Values = {}
    for family in text_string_to_metric_families(rendered.decode()):
        for sample in family.samples:
            labels = [value for _, value in sorted(sample.labels.items())]
            found[" ".join((sample.name.removeprefix(PREFIX), *labels))] = sample.value
    return found


def of_label(values: Values, name: str) -> Values:
    """The only label's value -> value."""
    return {key.split()[1]: value for key, value in values.items() if key.split()[0] == name}


async def scraped(peer: Peer) -> Values:
    found = PeerMetrics(peer)
    await found.look()
    return values_of(found.render())


def lone_peer(folder: Path) -> Peer:
    """It has joined nothing yet."""
    [genesis, target] = vectors(2, 100)
    manifest = make_manifest(100, genesis, STRANGER)
    sim = SimPeer.create(FakeNetwork(), manifest, STRANGER, folder, 1, target=target, genesis=genesis)
    return sim.peer


def test_every_metric_has_its_name_type_help_and_labels(tmp_path: Path) -> None:
    async def main() -> bytes:
        peer = lone_peer(tmp_path)
        trained, peer.seat.progress = peer.presence.trained, Progress(inner_step=3, planned=10, step_s=0.5)
        trained.loss, trained.held_out_loss, trained.tokens, trained.tokens_per_s = 2.5, 2.75, 4000, 80.0
        peer.events.write(TrainerStalled(step=1, seconds=0.3))
        peer.events.close()
        return PeerMetrics(peer).render()

    rendered = run_simulated(main())
    described: dict[str, dict[str, str]] = {}
    for line in rendered.decode().splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            _, kind, name, text = line.split(" ", 3)
            assert text
            described.setdefault(name, {})[kind] = text
    ours = {name: about for name, about in described.items() if not name.startswith("process_")}
    assert {name: about["TYPE"] for name, about in ours.items()} == {
        PREFIX + name: kind for name, (kind, _) in NAMES.items()
    }
    assert all(about.keys() == {"HELP", "TYPE"} for about in described.values())
    assert "process_resident_memory_bytes" in described
    for family in text_string_to_metric_families(rendered.decode()):
        for sample in family.samples:
            name = family.name.removeprefix(PREFIX)
            if family.name.startswith(PREFIX):
                _, labels = NAMES[name if name in NAMES else f"{name}_total"]
                assert sample.labels.keys() - {"le"} == labels
    values = values_of(rendered)
    figures = ("loss_nats", "held_out_loss_nats", "tokens_total", "tokens_per_second", "inner_step")
    assert [values[name] for name in figures] == [2.5, 2.75, 4000, 80, 3]
    assert (values["inner_steps_planned"], values["inner_step_seconds"], values["outer_steps_goal"]) == (10, 0.5, 50)
    assert (values["stall_seconds_count"], values["stall_seconds_sum"]) == (1, 0.3)
    assert (values["stall_seconds_bucket 0.25"], values["stall_seconds_bucket 0.5"]) == (0, 1)


def check_against_the_log(values: Values, events: list[dict[str, Any]]) -> None:
    rounds = [event for event in events if event["event"] == "round"]
    results = Counter("committed" if event["committed"] else event["reason"] for event in rounds)
    assert +Counter(of_label(values, "rounds_total")) == results
    assert values["members_lost_total"] == sum(len(event["lost"]) for event in rounds)
    met, committed = [event for event in rounds if event["group"]], [event for event in rounds if event["committed"]]
    for phase, ran in (("gather", rounds), ("reduce", met), ("settle", met), ("apply", committed)):
        assert values[f"round_phase_seconds_count {phase}"] == len(ran)
        assert values[f"round_phase_seconds_sum {phase}"] == pytest.approx(sum(event[f"{phase}_s"] for event in ran))
    assert values["witnessed_steps_total"] == sum(event["witnessed"] for event in committed)
    assert values["helped_steps_total"] == sum("helper" in event for event in committed)
    catch_ups = [event for event in events if event["event"] == "caught_up"]
    assert values["catch_ups_total"] == len(catch_ups)
    assert values["rolled_back_steps_total"] == sum(event["rolled_back"] for event in catch_ups)
    if committed:
        last = committed[-1]
        assert values["last_commit_timestamp_seconds"] == last["wall_s"]
        assert values["certificate_signatures"] == last["signatures"] > 0
        assert values["certificate_members"] == last["certifying"] >= last["signatures"]
        for name, field in (("contribution_norm",) * 2, ("update_norm",) * 2, ("contribution_cosine", "cosine")):
            assert values[name] == last[field]


def test_a_swarm_with_a_death_and_a_catch_up_agrees_with_its_event_logs(tmp_path: Path) -> None:
    """One dies in the middle of a round, one comes later, one diverges."""

    async def main() -> list[tuple[SimPeer, Values]]:
        swarm = Simulated(tmp_path, 5, n=20_000, outer_steps=9)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(4)]
        await swarm.until(sims, 2)
        victim, *survivors = sims
        while victim.peer.seat.phase != "reduce":
            await victim.peer.seat.changed.event.wait()
        swarm.network.kill(victim.peer.identity.peer_id)
        await swarm.until(survivors, 4)
        survivors.append(swarm.add(5))
        await swarm.until(survivors, 6)
        assert survivors[0].peer.local is not None
        survivors[0].peer.local[7] = float("nan")
        await swarm.until(survivors, 9)
        await asyncio.sleep(5)
        return [(sim, await scraped(sim.peer)) for sim in (*survivors, swarm.peers[0])]

    found = run_simulated(main())
    logs = {sim: lines_of(sim.peer.events.path) for sim, _ in found}
    for sim, values in found:
        check_against_the_log(values, logs[sim])
        written = sim.peer.events.path.read_bytes()
        assert b"".join(map(pack_event, read_events(sim.peer.events.path))) == written, "a reader misses something"
        assert values["outer_step"] == 9
        assert values["peers_seen"] == len(found) - 1
        assert values["connections direct"] == len(found) - 1
        assert values["ledger_bytes"] == folder_bytes(sim.peer.replica.ledger.folder) > 0
        role = "seed" if sim is found[-1][0] else "trainer"
        assert values[f"peer_info  {sim.peer.identity.peer_id} {role}"] == 1
    trainers = [values for _, values in found[:-1]]
    assert sum(values["members_lost_total"] for values in trainers) > 0, "nobody has noticed the death"
    assert sum(values["rejected_messages_total gone"] for values in trainers) > 0, "nobody has dialled the dead"
    for values in trainers:
        assert sum(of_label(values, "rejected_messages_total").values()) >= values["members_lost_total"]
    assert trainers[0]["rounds_total diverged"] == 1
    assert trainers[3]["catch_ups_total"] >= 1, "the newcomer has not caught up"
    assert trainers[1]["group_size"] == 4
    assert all(-1 <= values["contribution_cosine"] <= 1 for values in trainers)
    seed = found[-1][1]
    assert seed["catch_ups_total"] >= 8
    assert "contribution_norm" not in seed


def test_bytes_are_counted_at_both_ends_and_by_what_they_were_for(tmp_path: Path) -> None:
    """Nobody dies: what all have sent, all have received, but for a few words to who has gone on meanwhile."""

    async def main() -> list[Values]:
        swarm = Simulated(tmp_path, 3, n=20_000, codec="int8", outer_steps=4)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(3)]
        await swarm.until([*sims, *swarm.peers], 4)
        await asyncio.sleep(5)
        return [await scraped(sim.peer) for sim in swarm.peers]

    found = run_simulated(main())

    def in_all(name: str) -> float:
        return sum(values[name] for values in found)

    for purpose in ("reduce", "catchup"):
        assert in_all(f"bytes_total sent {purpose}") == in_all(f"bytes_total received {purpose}") > 0
    sent, received = (in_all(f"bytes_total {direction} other") for direction in ("sent", "received"))
    assert abs(sent - received) < 4 * MAX_RECORD_BYTES < received
    for index, values in enumerate(found):
        rounds = of_kind(read_events(tmp_path / str(index) / "events.jsonl"), RoundEnded)
        assert values["bytes_total sent reduce"] >= sum(event.bytes_sent for event in rounds)
        assert bool(rounds) == (index > 0)
        assert values["bytes_total sent reduce"] > 0, "the seed witnesses"
    assert found[0]["bytes_total sent catchup"] > found[0]["bytes_total received catchup"]


def test_who_is_rejected_is_counted_by_reason(tmp_path: Path) -> None:
    async def main() -> Values:
        swarm = Simulated(tmp_path, 2, outer_steps=3)
        seed = swarm.add(0, seed=True)
        await asyncio.sleep(1)
        stranger = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts())
        for frame in (b"garbage", b"\xc1"):
            channel = await stranger.open(seed.peer.identity.peer_id, [], seed.peer.here.protocol)
            await channel.send_frame(frame)
        await stranger.open(seed.peer.identity.peer_id, [], seed.peer.here.protocol)
        await asyncio.sleep(60)
        return await scraped(seed.peer)

    values = run_simulated(main())
    assert of_label(values, "rejected_messages_total") == {"misbehaved": 2, "silent": 1, "gone": 0, "refused": 0}


def test_strangers_make_no_series(tmp_path: Path) -> None:
    """However many peers there are, and whatever they say."""

    async def main() -> tuple[Values, Values]:
        peer = lone_peer(tmp_path)
        before, transport = await scraped(peer), peer.here.transport
        assert isinstance(transport, FakeTransport)
        for i in range(50):
            peer.events.totals.rounds[f"reason {i}"] += 1
            peer.events.totals.repairs[f"what {i}"] += 1
            transport.traffic.rejected[f"reason {i}"] += 1
            transport.traffic.reject(Misbehaved(identity(i).peer_id, "lies"))
            FakeTransport(transport.network, identity(i + 2).peer_id, transport.timeouts)
        peer.events.close()
        return before, await scraped(peer)

    before, after = run_simulated(main())
    assert before.keys() == after.keys()
    assert after["rejected_messages_total misbehaved"] == 50
    assert after["dht_table_size"] == 50


def test_names_are_escaped(tmp_path: Path) -> None:
    async def main() -> bytes:
        peer = lone_peer(tmp_path)
        peer.presence.name = 'a"b\\c\nd'
        peer.events.close()
        return PeerMetrics(peer).render()

    rendered = run_simulated(main())
    assert f'peer_info a"b\\c\nd {identity(1).peer_id} trainer' in values_of(rendered)


def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")

    async def main() -> bytes:
        swarm = Simulated(tmp_path, 2, outer_steps=2)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(1), swarm.add(2)]
        await swarm.until(sims, 2)
        trained = sims[0].peer.presence.trained
        trained.loss = trained.held_out_loss = 2.0
        found = PeerMetrics(sims[0].peer, trainer_pid=1)
        await found.look()
        return found.render()

    done = subprocess.run(["promtool", "check", "metrics"], input=run_simulated(main()), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -- the endpoint ------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Endpoint:
    """Free, a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    return Endpoint(host="127.0.0.1", port=port)


async def get(endpoint: Endpoint, path: str) -> tuple[str, bytes]:
    """(first line, body) of the answer."""
    while True:
        try:
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head.decode().splitlines()[0], body


def test_it_is_served_over_http_until_the_peer_leaves(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "RENDER_EVERY_S", 0.0)

    async def main() -> None:
        peer = lone_peer(tmp_path)
        serving = asyncio.create_task(PeerMetrics(peer).serve(endpoint))
        status, body = await get(endpoint, "/metrics")
        assert status == "HTTP/1.1 200 OK"
        assert values_of(body)["outer_steps_goal"] == 50
        assert values_of(body)["ledger_bytes"] > 0
        peer.seat.progress = Progress(inner_step=7)
        assert values_of((await get(endpoint, "/metrics?x=1"))[1])["inner_step"] == 7
        assert (await get(endpoint, "/"))[0] == "HTTP/1.1 404 Not Found"
        with pytest.raises(UsageError, match=f"^--metrics-addr {endpoint}: port {endpoint.port} is in use"):
            await PeerMetrics(peer).serve(endpoint)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        endpoint.check_free("--metrics-addr")
        peer.events.close()

    asyncio.run(main())


def test_whoever_asks_often_gets_the_same_answer_for_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        peer = lone_peer(tmp_path)
        found = PeerMetrics(peer)
        first = found.page("/metrics")
        peer.seat.progress = Progress(inner_step=7)
        assert found.page("/metrics") is first
        await asyncio.sleep(metrics.RENDER_EVERY_S)
        later = found.page("/metrics")
        assert first is not None
        assert later is not None
        assert (values_of(first.body)["inner_step"], values_of(later.body)["inner_step"]) == (0, 7)
        peer.events.close()

    run_simulated(main())


# -- the record --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "announced"), [(None, ""), ("127.0.0.1", ""), ("0.0.0.0", ""), ("203.0.113.7", "203.0.113.7:9100")]
)
def test_a_record_says_where_others_can_scrape(tmp_path: Path, host: str | None, announced: str) -> None:
    async def main() -> str:
        peer = lone_peer(tmp_path)
        peer.presence.metrics = None if host is None else Endpoint(host=host, port=9100)
        peer.events.close()
        await asyncio.to_thread(peer.replica.load)
        peer.presence.seal()
        return open_record(peer.seat.sealed_record).metrics_addr

    assert run_simulated(main()) == announced


def test_the_longest_record_with_a_metrics_address_fits(tmp_path: Path) -> None:
    """At the cost of an address, and as long as the name is ASCII: every other field may have its longest form."""
    host = ".".join(["a" * 28, "b" * 29])
    maddrs = [f"/dns4/{'c' * 25}.example.org/tcp/4001/p2p/{identity(i).peer_id}" for i in range(1, 6)]
    assert MADDRS_BYTES - MAX_CHARS < sum(map(len, maddrs)) <= MADDRS_BYTES

    async def main() -> Record:
        peer = lone_peer(tmp_path)
        peer.events.close()
        await asyncio.to_thread(peer.replica.load)
        presence, most = peer.presence, 2**60 - 1
        presence.metrics, presence.name, presence._maddrs = Endpoint(host=host, port=65535), "n" * 32, maddrs
        presence.trained = Trained(loss=1e300, tokens=most, tokens_per_s=1e300, held_out_loss=1.5, held_out_step=most)
        presence.last_round = LastRound(group=most, seconds=1e300, bytes=most)
        peer.seat.standing = Standing(step=most, head=bytes(32), heads=(bytes(32),) * 4)
        peer.seat.progress = Progress(inner_step=most, planned=most)
        record = presence.record()
        longest = record.model_copy(update={"run_name": "r" * 64, "version": "v" * 16, "snapshot_step": most})
        return open_record(seal_record(longest, peer.identity))

    record = run_simulated(main())
    assert record.metrics_addr == f"{host}:65535"
    assert len(record.metrics_addr) == MAX_CHARS
    assert record.maddrs == maddrs[:4]
