from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import NetworkError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record, seal_record
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.look.status import certified, directory_of, screen_of, shares_told, status_of, to_json, ways_told
from p2p_diloco.peer.revocations import NewestList
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.state_messages import AskRevocations, RevocationList
from tests.support.fakes import FakeNetwork, FakeTransport, run_simulated
from tests.support.invited import revocations_of, token_of

NOW_S = 1_000_000.0
HEADS = [bytes([i]) * 32 for i in range(9)]
OWNER, *PEERS = (Identity.from_seed(bytes([i]) * 32) for i in range(6))
MANIFEST = RunManifest(
    spec=RunSpec.model_validate({"name": "tiny", "model": {"config": {"model_type": "llama"}}}),
    model_config_json='{"model_type":"llama"}',
    n_params=1000,
    layout_digest="1" * 64,
    vocab_size=256,
    data_fingerprint="",
    genesis="2" * 64,
    owner=OWNER.peer_id,
)


def sealed(peer: int, step: int, **changes: Any) -> bytes:
    fields = {
        "peer_id": PEERS[peer].peer_id,
        "run_id": MANIFEST.run_id,
        "run_name": "tiny",
        "issued_s": NOW_S,
        "life_s": 30.0,
        "role": "trainer",
        "phase": "inner",
        "step": step,
        "head": HEADS[step],
        "committed": step > 0,
        "heads": [HEADS[i] for i in range(step - 1, max(step - 5, -1), -1)],
        "snapshot_step": 0,
        "snapshot_digest": bytes(32),
        "maddrs": [],
        "client_mode": False,
        "name": f"peer {peer}",
    }
    return seal_record(Record.model_validate(fields | changes), PEERS[peer])


def look(*records: bytes) -> Any:
    return status_of(MANIFEST, directory_of(MANIFEST, records, OWNER.peer_id, NOW_S), NOW_S)


def test_the_swarm_is_where_most_of_its_peers_are_or_one_step_on() -> None:
    status = look(sealed(0, 4), sealed(1, 5), sealed(2, 4), sealed(3, 2, role="seed"))
    assert (status.step, status.head) == (5, HEADS[5])
    assert [record.name for record in status.records] == ["peer 1", "peer 0", "peer 2", "peer 3"]


def test_only_sound_records_of_live_peers_of_this_run_count() -> None:
    forged = sealed(1, 8)
    status = look(
        sealed(0, 4),
        b"garbage",
        forged[:-1] + bytes([forged[-1] ^ 1]),
        sealed(2, 8, phase="left"),
        sealed(3, 8, issued_s=NOW_S - 31),
        sealed(4, 8, run_id="0" * 40),
        sealed(0, 3, issued_s=NOW_S - 1),
    )
    assert [record.name for record in status.records] == ["peer 0"]
    assert status.step == 4


def test_a_run_that_nobody_is_in_is_said_to_be_so() -> None:
    with pytest.raises(NetworkError, match=f"run tiny {MANIFEST.run_id}: no peer of it is up now"):
        look(sealed(0, 1, phase="left"))


def test_json_is_one_object_that_names_the_swarms_head() -> None:
    status = look(sealed(0, 4, held_out_loss=2.5, held_out_step=4), sealed(1, 4), sealed(2, 3))
    read = json.loads(to_json(status))
    assert {key: value for key, value in read.items() if key != "peers"} == {
        "run_id": MANIFEST.run_id,
        "name": "tiny",
        "step": 4,
        "steps": 100,
        "head": HEADS[4].hex(),
    }
    assert [peer["on_swarm_head"] for peer in read["peers"]] == [True, True, False]
    assert read["peers"][0]["held_out_loss"] == 2.5
    assert read["peers"][0]["peer_id"] == PEERS[0].peer_id


def test_json_is_written_in_this_order() -> None:
    """Byte for byte: programs read it, and some of them with a text tool."""
    written = to_json(look(sealed(0, 4, held_out_loss=2.5, held_out_step=4, maddrs=["/ip4/1.2.3.4/tcp/5"])))
    peer = (
        f'{{"peer_id": "{PEERS[0].peer_id}", "issued_s": 1000000.0, "life_s": 30.0, "role": "trainer", '
        f'"phase": "inner", "step": 4, "head": "{HEADS[4].hex()}", "committed": true, "snapshot_step": 0, '
        '"maddrs": ["/ip4/1.2.3.4/tcp/5"], "client_mode": false, "name": "peer 0", "version": "", "inner_step": 0, '
        '"inner_steps_planned": 0, "loss": null, "held_out_loss": 2.5, "held_out_step": 4, "tokens": 0, '
        '"tokens_per_s": 0.0, "group_size": 0, "round_s": 0.0, "round_bytes": 0, "metrics_addr": "", '
        '"invitation": "", "known": false, "known_members": 0, "signatures": 0, "certifying": 0, "witnessed": false, '
        '"awaits_witness": false, "barred": 0, "found_wrong": 0, "helped": false, "share_percent": 100, '
        '"reached": "direct", '
        '"on_swarm_head": true}'
    )
    assert written == (
        f'{{"run_id": "{MANIFEST.run_id}", "name": "tiny", "step": 4, "steps": 100, "head": "{HEADS[4].hex()}", '
        f'"peers": [{peer}]}}'
    )


def test_how_many_can_be_dialled_is_told_where_not_all_can() -> None:
    relayed = f"/ip4/1.1.1.1/tcp/4001/p2p/{PEERS[0].peer_id}/p2p-circuit/p2p/{PEERS[1].peer_id}"
    direct, through = sealed(0, 4, maddrs=[relayed]), sealed(1, 4, client_mode=True, maddrs=[relayed])
    assert ways_told(look(direct).records) == ""
    told = look(direct, through, sealed(2, 4, client_mode=True))
    assert ways_told(told.records) == "1 of 3 can be dialled · 1 through a relay only, for small messages"
    assert ways_told(look(direct, sealed(2, 4, client_mode=True)).records) == "1 of 2 can be dialled"
    console = Console(file=io.StringIO(), width=120)
    console.print(screen_of(told, 120))
    assert isinstance(console.file, io.StringIO)
    assert "1 of 3 can be dialled · 1 through a relay only" in console.file.getvalue()
    assert [peer["reached"] for peer in json.loads(to_json(told))["peers"]] == ["direct", "relay", "no"]


def test_who_averages_less_than_an_equal_share_is_told_by_name() -> None:
    equal, faster = sealed(0, 4), sealed(1, 4, share_percent=150)
    assert shares_told(look(equal, faster).records) == ""
    told = look(equal, faster, sealed(2, 4, share_percent=40), sealed(3, 4, share_percent=0))
    words = "averaging less than an equal share, for their uplinks are slow: peer 2 40 %, peer 3 0 %"
    assert shares_told(told.records) == words
    console = Console(file=io.StringIO(), width=120)
    console.print(screen_of(told, 120))
    assert isinstance(console.file, io.StringIO)
    assert words in console.file.getvalue()


def test_the_certificate_of_the_last_outer_step_is_told_and_what_the_next_one_waits_for() -> None:
    certificate = {"signatures": 3, "certifying": 4, "known_members": 5, "helped": True}
    told = look(*(sealed(i, 4, **certificate, witnessed=i < 3, awaits_witness=i > 0) for i in range(4)))
    assert certified(told.overview) == (
        "3 of 4 signed it · witnessed by the owner · averaged by the owner's seed · 5 known · "
        "waiting for the owner's seed, which has to witness the next one"
    )
    console = Console(file=io.StringIO(), width=160)
    console.print(screen_of(told, 160))
    assert isinstance(console.file, io.StringIO)
    assert certified(told.overview) in console.file.getvalue()
    assert certified(look(sealed(0, 4), sealed(1, 4)).overview) == ""
    told = look(*(sealed(i, 4, found_wrong=2, barred=1) for i in range(4)))
    assert certified(told.overview) == "2 found to have averaged wrongly · 1 barred"


def test_a_run_by_invitation_names_who_was_invited() -> None:
    """A peer without a seat is not there, and peers of one invitation are no majority."""
    spec = RunSpec.model_validate({**MANIFEST.spec.model_dump(), "membership": "invite"})
    manifest = MANIFEST.model_copy(update={"spec": spec})
    run_id = manifest.run_id
    two, one, none = (
        token_of(name, places=2, key=2000 + i, run_id=run_id, owner=OWNER)
        for i, name in enumerate(("two", "one", "none"))
    )
    claims = [(0, two, 5), (1, two, 5), (2, one, 4), (3, None, 4)]
    records = [
        sealed(peer, step, run_id=run_id, heads=[], seat=b"" if token is None else token.seat(PEERS[peer].peer_id))
        for peer, token, step in claims
    ]
    status = status_of(manifest, directory_of(manifest, records, none.key.peer_id, NOW_S), NOW_S)
    assert {record.peer_id for record in status.records} == {PEERS[i].peer_id for i in (0, 1, 2)}
    assert [peer["invitation"] for peer in json.loads(to_json(status))["peers"]] == ["two", "two", "one"]
    console = Console(file=io.StringIO(), width=80)
    console.print(screen_of(status, 80))
    assert isinstance(console.file, io.StringIO)
    assert "by invitation: one (1 of 2), two (2 of 2)" in console.file.getvalue()


def test_whom_the_owner_has_revoked_is_not_there() -> None:
    """Who looks on asks the peers for the owner's list, and it holds from its outer step on."""

    async def main() -> None:
        spec = RunSpec.model_validate({**MANIFEST.spec.model_dump(), "membership": "invite"})
        manifest = MANIFEST.model_copy(update={"spec": spec})
        run_id, timeouts, network = manifest.run_id, Timeouts(), FakeNetwork()
        tokens = [token_of(f"seat-{i}", key=2000 + i, run_id=run_id, owner=OWNER) for i in range(3)]
        steps = {tokens[0].invitation.token: 4, tokens[1].invitation.token: 5}
        records = [
            sealed(i, 4, run_id=run_id, heads=[], seat=token.seat(PEERS[i].peer_id), revocations=2 * (i == 2))
            for i, token in enumerate(tokens)
        ]

        async def handler(channel: Channel) -> None:
            await channel.receive(AskRevocations, timeout_s=10.0)
            listed = revocations_of(steps, number=2, run_id=run_id, owner=OWNER)
            await channel.send(RevocationList(sealed=listed))

        FakeTransport(network, PEERS[2].peer_id, timeouts).handlers[run_protocol(run_id)] = handler
        directory = directory_of(manifest, records, "", NOW_S)
        assert len(status_of(manifest, directory, NOW_S).records) == 3
        onlooker = FakeTransport(network, OWNER.peer_id, timeouts)
        newest = NewestList(transport=onlooker, directory=directory, owner=OWNER.peer_id)
        assert await newest.hear(directory.live(NOW_S))
        there = {record.peer_id for record in status_of(manifest, directory, NOW_S).records}
        assert there == {PEERS[1].peer_id, PEERS[2].peer_id}

    run_simulated(main())


def test_the_table_names_everybody_and_marks_who_is_elsewhere() -> None:
    status = look(sealed(0, 4, tokens_per_s=1e308), sealed(1, 4, tokens_per_s=1e308), sealed(2, 3), sealed(3, 4))
    console = Console(file=io.StringIO(), width=80)
    console.print(screen_of(status, 80))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "outer step 4 of 100" in text
    assert "4 training" in text
    marks = [line[0] for line in text.splitlines() if "peer " in line and "trainer" in line]
    assert marks == [" ", " ", " ", "≠"]
