"""What Prometheus and the page get: read back with a parser that is not ours."""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from p2p_diloco import __version__
from p2p_diloco.core.records import Record
from p2p_diloco.look.exposition import METRICS_TYPE, PREFIX, Sight
from p2p_diloco.look.history import History
from p2p_diloco.look.overview import overview_of
from tests.support.builders import NOW_S, identity, record_of
from tests.support.fakes import make_manifest
from tests.support.invited import EXPIRES_S, token_of

Labels = frozenset[tuple[str, str]]
INITIAL = f"/ip4/127.0.0.1/tcp/4001/p2p/{identity(9).peer_id}"
MANIFEST = make_manifest(1000, np.zeros(1000, np.float32), identity(9), codec="int8")
SWARM_METRICS = {
    *("run_info", "build_info", "model_parameters", "up", "outer_step", "outer_steps_goal", "peers"),
    *("anchored_step", "peers_found_wrong", "peers_barred"),
    *("tokens", "tokens_per_second"),
    *("loss_nats", "held_out_loss_nats", "held_out_step", "heads", "last_step_timestamp_seconds", "round_seconds"),
    *("known_members", "peers_awaiting_witness", "records_rejected_total"),
}
CERTIFICATE_METRICS = {f"certificate_{name}" for name in ("signatures", "members", "witnessed", "helped")}
"""There where somebody says that it was in the last round."""
PEER_METRICS = {
    *("peer_info", "peer_outer_step", "peer_inner_step", "peer_inner_steps_planned", "peer_loss_nats", "peer_tokens"),
    *("peer_tokens_per_second", "peer_group_size", "peer_round_seconds", "peer_round_bytes", "peer_record_age_seconds"),
    *("peer_known", "peer_reduce_share"),
}


def sight_of(*records: Record, history: History | None = None, rejected: dict[Any, int] | None = None) -> Sight:
    history = history or History(run_id=MANIFEST.run_id)
    overview = overview_of(records, NOW_S)
    history.learn(overview)
    return Sight(
        manifest=MANIFEST,
        overview=overview,
        history=history,
        rejected=rejected or {},
        initial_peers=(INITIAL,),
        private_targets=False,
    )


def trainer(index: int, **changes: Any) -> Record:
    known = {"loss": 2.5, "held_out_loss": 2.0, "held_out_step": 1, "tokens": 7, "tokens_per_s": 3.0, "group_size": 2}
    known |= {"anchored_step": 1, "found_wrong": 2, "barred": 1}
    return record_of(identity(index), "a", **known | changes)


def samples(sight: Sight) -> dict[str, dict[Labels, float]]:
    """Name without the prefix -> labels -> value."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(sight.metrics.body.decode()):
        assert family.documentation
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            series = found.setdefault(sample.name.removeprefix(PREFIX), {})
            assert frozenset(sample.labels.items()) not in series, "the same series twice"
            series[frozenset(sample.labels.items())] = sample.value
    return found


def status(sight: Sight) -> Any:
    return json.loads(sight.status.body)


def labels(**named: str) -> Labels:
    return frozenset(named.items())


def test_every_metric_is_there_under_its_name() -> None:
    sight = sight_of(trainer(1), trainer(2), rejected={"signature": 3})
    assert sight.metrics.content_type == METRICS_TYPE
    found = samples(sight)
    assert set(found) == SWARM_METRICS | PEER_METRICS
    assert found["up"] == {labels(): 1}
    assert found["tokens_per_second"] == {labels(): 6.0}
    assert found["peers"] == {
        labels(state=state): number for state, number in (("training", 2), ("round", 0), ("joining", 0), ("seed", 0))
    }
    assert found["run_info"] == {
        labels(run_id=MANIFEST.run_id, run_name="simulated", n_params=str(MANIFEST.n_params), codec="int8"): 1
    }
    assert found["build_info"] == {labels(version=__version__): 1}
    assert found["model_parameters"] == {labels(): MANIFEST.n_params}
    assert found["outer_steps_goal"] == {labels(): MANIFEST.spec.outer.steps}
    assert found["last_step_timestamp_seconds"] == {labels(): NOW_S}
    rejected = {reason: number for series, number in found["records_rejected_total"].items() for _, reason in series}
    assert rejected == {"size": 0, "form": 0, "version": 0, "field": 0, "signature": 3, "seat": 0, "other": 0}


def test_a_peers_series_are_its_records_and_end_with_it() -> None:
    one, other = identity(1).peer_id, identity(2).peer_id
    both = samples(sight_of(trainer(1, issued_s=NOW_S - 4, name="one"), trainer(2, loss=None)))
    assert both["peer_loss_nats"] == {labels(peer=one): 2.5}
    assert both["peer_record_age_seconds"] == {labels(peer=one): 4.0, labels(peer=other): 0.0}
    assert labels(
        peer=one, name="one", role="trainer", version="", state="training", client_mode="false", invitation=""
    ) in both["peer_info"]  # fmt: skip
    for name in PEER_METRICS - {"peer_info", "peer_loss_nats"}:
        assert set(both[name]) == {labels(peer=one), labels(peer=other)}
    alone = samples(sight_of(trainer(2, loss=None)))
    assert not [name for name in PEER_METRICS if any(("peer", one) in series for series in alone.get(name, {}))]
    assert set(alone["peer_tokens"]) == {labels(peer=other)}
    assert alone["tokens"] == {labels(): 7.0}


def test_certificate_and_witness_are_what_most_on_the_swarms_head_say() -> None:
    said: dict[str, Any] = {"signatures": 3, "certifying": 4, "known_members": 5, "known": True}
    lies: dict[str, Any] = {"signatures": 9, "certifying": 9, "known_members": 900, "witnessed": True, "helped": True}
    records = [trainer(i, **said, awaits_witness=i == 1) for i in (1, 2, 3)]
    sight = sight_of(*records, trainer(4, **lies, awaits_witness=True))
    found, page = samples(sight), json.loads(sight.status.body)
    figures = {"signatures": 3, "members": 4, "witnessed": 0, "helped": 0}
    assert {name: found[f"certificate_{name}"][labels()] for name in figures} == figures
    assert (found["known_members"][labels()], found["peers_awaiting_witness"][labels()]) == (5, 2)
    assert found["peer_known"] == {labels(peer=identity(i).peer_id): float(i < 4) for i in (1, 2, 3, 4)}
    assert page["certificate"] == {"signatures": 3, "certifying": 4, "witnessed": False, "helped": False}
    assert (page["known_members"], page["waits_for_owner"]) == (5, False)
    assert {row["known"] for row in page["rows"]} == {True, False}
    waiting = json.loads(sight_of(*(trainer(i, awaits_witness=i < 3) for i in (1, 2, 3))).status.body)
    assert (waiting["waits_for_owner"], waiting["certificate"]) == (True, None)


def test_a_monitor_that_sees_nobody_says_so_and_keeps_the_step() -> None:
    history = History(run_id=MANIFEST.run_id)
    sight_of(trainer(1), history=history)
    blind = sight_of(history=history)
    found = samples(blind)
    assert (found["up"], found["outer_step"]) == ({labels(): 0}, {labels(): 1})
    assert not set(found) & (PEER_METRICS | {"loss_nats", "held_out_loss_nats", "held_out_step", "round_seconds"})
    assert set(found["peers"].values()) == {0}
    page = status(blind)
    assert (page["up"], page["step"], page["rows"], page["join_line"]) == (False, 1, [], "")
    assert page["curve"] == {"step": [1], "held_out_loss": [2.0], "loss": [2.5]}


def test_the_page_has_run_figures_curve_and_peers() -> None:
    seed = record_of(identity(9), "a", role="seed", name="seed", maddrs=[INITIAL])
    page = status(sight_of(seed, trainer(1, name="small", tokens=5), trainer(2, name="large", tokens=50)))
    assert page["run"] == {
        "name": "simulated",
        "id": MANIFEST.run_id,
        "steps": MANIFEST.spec.outer.steps,
        "n_params": MANIFEST.n_params,
        "byte_level": True,
    }
    assert [row["name"] for row in page["rows"]] == ["large", "small", "seed"]
    assert page["join_line"] == f"p2p-diloco peer --initial-peers {INITIAL} --run-id {MANIFEST.run_id}"
    assert page["curve"] == {"step": [1], "held_out_loss": [2.0], "loss": [2.5]}
    assert page["pace"] == {"at_s": [NOW_S], "tokens_per_s": [6.0], "peers": [3]}


def test_targets_name_their_peer() -> None:
    sight = sight_of(trainer(1, metrics_addr="1.1.1.1:9100", name="one"), trainer(2))
    assert json.loads(sight.targets.body) == [
        {"targets": ["1.1.1.1:9100"], "labels": {"peer": identity(1).peer_id, "name": "one"}}
    ]


def test_in_a_run_by_invitation_seats_are_shown() -> None:
    """Each invitation with how many of its peers are here, and each peer with its invitation; the owner needs none."""
    by_invitation = make_manifest(1000, np.zeros(1000, np.float32), identity(9), membership="invite")
    two, one = token_of("two", places=2), token_of("one", key=2001)
    seats = {i: token.seat(identity(i).peer_id) for i, token in ((1, two), (2, two), (3, one))}
    records = [trainer(i, seat=seat) for i, seat in seats.items()]
    seed = record_of(identity(9), "a", role="seed", maddrs=[INITIAL])
    sight = replace(sight_of(seed, *records), manifest=by_invitation)
    ids = {
        token.invitation.name: {"invitation": token.invitation.name, "token": token.key.peer_id} for token in (one, two)
    }
    found = samples(sight)
    assert found["seat_peers"] == {labels(**ids["one"]): 1, labels(**ids["two"]): 2}
    assert found["seat_places"] == {labels(**ids["one"]): 1, labels(**ids["two"]): 2}
    assert set(found["seat_expires_timestamp_seconds"].values()) == {EXPIRES_S}
    invited = {dict(series)["peer"]: dict(series)["invitation"] for series in found["peer_info"]}
    assert invited == {identity(1).peer_id: "two", identity(2).peer_id: "two", identity(3).peer_id: "one"} | {
        identity(9).peer_id: ""
    }
    page = status(sight)
    assert page["by_invitation"] is True
    assert [(seat["name"], seat["peers"], seat["places"]) for seat in page["seats"]] == [("one", 1, 1), ("two", 2, 2)]
    assert {row["peer"]: row["invitation"] for row in page["rows"]} == invited
    assert (
        page["join_line"] == f"p2p-diloco peer --initial-peers {INITIAL} --run-id {by_invitation.run_id} --invite FILE"
    )
    assert not any(seat.hex() in sight.status.body.decode() for seat in seats.values())


def test_json_is_written_in_this_order() -> None:
    """Byte for byte: what others have built on it reads on."""
    sight = sight_of(trainer(1, metrics_addr="1.1.1.1:9100", name="one"))
    peer_id = identity(1).peer_id
    assert sight.targets.body.decode() == (
        f'[{{"targets":["1.1.1.1:9100"],"labels":{{"peer":"{peer_id}","name":"one"}}}}]'
    )
    assert sight.status.body.decode() == (
        f'{{"run":{{"name":"simulated","id":"{MANIFEST.run_id}","steps":{MANIFEST.spec.outer.steps},'
        f'"n_params":1000,"byte_level":true}},"now_s":{NOW_S},"up":true,"step":1,"step_since_s":{NOW_S},"heads":1,'
        '"peers":{"training":1,"round":0,"joining":0,"seed":0},"tokens":7,"tokens_per_s":3.0,"loss":2.5,'
        '"held_out_loss":2.0,"held_out_step":1,"join_line":"","join_note":"",'
        f'"rows":[{{"peer":"{peer_id}","name":"one","role":"trainer","state":"training","step":1,"inner_step":0,'
        '"planned":0,"loss":2.5,"tokens":7,"tokens_per_s":3.0,"version":"","invitation":"","known":false,'
        '"reached":"direct","share_percent":100}],'
        '"curve":{"step":[1],"held_out_loss":[2.0],"loss":[2.5]},'
        f'"pace":{{"at_s":[{NOW_S}],"tokens_per_s":[3.0],"peers":[1]}},"known_members":0,"certificate":null,'
        '"waits_for_owner":false,"by_invitation":false,"seats":[],"anchored_step":1,"found_wrong":2,"barred":1}'
    )


hostile = st.text(max_size=32) | st.sampled_from(["<script>", "\u202eevil", 'a"b\\c\nd', "\x00\x1b[2J", "a}b{c=d"])
numbers = st.floats(allow_nan=False, allow_infinity=False).map(abs)


@given(st.lists(st.tuples(hostile, st.text(max_size=16), numbers, st.integers(0, 2**60 - 1)), min_size=1, max_size=4))
def test_whatever_peers_call_themselves_and_claim(claims: list[tuple[str, str, float, int]]) -> None:
    records = [
        trainer(i, name=name, version=version, loss=-number, tokens_per_s=number, round_s=number, tokens=count)
        for i, (name, version, number, count) in enumerate(claims, 1)
    ]
    sight = sight_of(*records)
    series = samples(sight)
    rows = status(sight)["rows"]
    assert len(series["peer_info"]) == len(rows) == len(records)
    shown = {row["peer"]: row for row in rows}
    for info in map(dict, series["peer_info"]):
        row = shown[info["peer"]]
        assert (info["name"], info["version"]) == (row["name"], row["version"])
        assert 0 < len(row["name"]) <= 32
        assert not [c for c in row["name"] + row["version"] if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
    assert all(math.isfinite(value) for values in series.values() for value in values.values())


def test_the_page_is_not_made_by_mistakes_of_json() -> None:
    """A browser's JSON has no NaN, and no number that peers send is one."""
    assert b"NaN" not in sight_of(trainer(1, tokens_per_s=1e308), trainer(2, tokens_per_s=1e308)).status.body
