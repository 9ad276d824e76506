"""The figures of ``benchmarks homes``: what is made of a swarm's logs, ledgers and metrics; and their bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as commands
from benchmarks import homes
from benchmarks.contributions import (
    Connections,
    Evidence,
    Figures,
    contributions_of,
    figures_of,
    first_commit,
    in_a_row,
    in_vain,
    losses,
    made_since,
    missed_bounds,
    path_of,
    share_of,
    stall_with_a_hub_s,
    stalls_since,
)
from benchmarks.homes import Played, row_of, table_of
from benchmarks.loopback import Log
from benchmarks.situations import HUB, PEERS, REFERENCE, SITUATIONS, Situation
from p2p_diloco.core.event import PeerStarted, RoundEnded, TrainerStalled
from p2p_diloco.core.update import Part, Update, UpdateHeader, contributor_mask
from tests.support.events import COMMITTED, JOINED, MISSED, OFFERED, STALL, STARTED


def started(peer_id: str, mono_s: float = 0.5, maddrs: tuple[str, ...] = ("/ip4/5.9.1.2/tcp/1",)) -> PeerStarted:
    return replace(STARTED, peer_id=peer_id, mono_s=mono_s, maddrs=maddrs)


def joins(peer_id: str, mono_s: float) -> Log:
    return [started(peer_id), replace(JOINED, mono_s=mono_s)]


def made(mono_s: float, step: int) -> RoundEnded:
    return replace(COMMITTED, mono_s=mono_s, step=step)


def missed(mono_s: float) -> RoundEnded:
    return replace(MISSED, mono_s=mono_s)


def stalled(end_s: float, seconds: float) -> TrainerStalled:
    return replace(STALL, mono_s=end_s, seconds=seconds)


# -- shares ------------------------------------------------------------------------------------------------------------


def test_of_an_update_everybody_has_a_share_of_its_parts() -> None:
    masks = [contributor_mask(indices) for indices in ((0, 1), (0,))]
    parts = tuple(Part(mask=mask, data=b"x") for mask in masks)
    header = UpdateHeader(
        step=7,
        parent=bytes(32),
        contributors=(("a", 1), ("b", 1), ("c", 1)),
        part_hashes=tuple(part.hash for part in parts),
    )
    assert contributions_of(Update(header=header, parts=parts)) == {"a": 1.0, "b": 0.5, "c": 0.0}


def test_a_share_is_the_mean_over_updates() -> None:
    updates = [{"a": 1.0, "b": 0.5}, {"a": 1.0}]
    assert share_of(joins("a", 1.0), updates) == 1.0
    assert share_of(joins("b", 1.0), updates) == 0.25
    assert share_of(joins("c", 1.0), updates) == 0.0
    assert share_of([], updates) == 0.0, "it did not even start"
    assert share_of(joins("a", 1.0), []) == 0.0, "nothing was committed"


def evidence_of(logs: Mapping[str, Log], updates: Mapping[int, Mapping[str, float]]) -> Evidence:
    return Evidence(
        logs=logs,
        started_s=dict.fromkeys(logs, 0.0),
        ended_s=30.0,
        updates=updates,
        connections=dict.fromkeys(logs, Connections(direct=2, relayed=0)),
        happened_s=None,
        vector_bytes=1000,
    )


def test_updates_count_that_all_could_contribute_to_from_their_first_inner_step_on() -> None:
    """Two had committed an outer step when the third joined, and were at the next one."""
    a: Log = [*joins("a", 2.0), made(5.0, 1), made(9.0, 2), made(13.0, 3)]
    c: Log = [*joins("c", 6.0), made(13.0, 3)]
    alone, all_three = {"a": 1.0}, {"a": 1.0, "c": 1.0}
    evidence = evidence_of({"peer-1": a, "peer-3": c}, {0: alone, 1: alone, 2: all_three, 3: {"a": 1.0, "c": 0.5}})
    assert evidence.together_s == 6.0
    assert list(evidence.counted) == [2, 3]
    assert made_since([a, c], 6.0) == len([2])  # the last one is not in a log yet
    assert made_since([a, c], 13.0) == made_since([], 0.0) == 0
    figures = figures_of(evidence)
    assert figures.updates == 2
    assert figures.shares == {"peer-1": 1.0, "peer-3": 0.75}
    assert figures.joined_s == {"peer-1": 2.0, "peer-3": 6.0}
    assert figures.paths == {"peer-1": "direct", "peer-3": "direct"}


def test_who_never_joins_keeps_nobody_waiting_and_contributes_nothing() -> None:
    evidence = evidence_of({"peer-1": joins("a", 2.0), "peer-4": [started("d")]}, {0: {"a": 1.0}, 1: {"a": 1.0}})
    figures = figures_of(evidence)
    assert evidence.together_s == 2.0
    assert evidence_of({"peer-4": [started("d")]}, {}).together_s == 0.0
    assert figures.shares == {"peer-1": 1.0, "peer-4": 0.0}
    assert figures.joined_s["peer-4"] is None
    assert figures.paths["peer-4"] == "none"


# -- stalls ------------------------------------------------------------------------------------------------------------


def test_stalls_count_from_when_all_have_joined() -> None:
    log: Log = [stalled(5.0, 2.0), stalled(9.0, 2.0), stalled(14.0, 1.0)]
    assert stalls_since(log, 4.0, 20.0) == [(9.0, 2.0), (14.0, 1.0)]


def test_a_stall_that_is_not_over_lasts_until_the_end() -> None:
    log: Log = [replace(OFFERED, mono_s=3.0), stalled(5.0, 2.0), replace(OFFERED, mono_s=8.0)]
    assert stalls_since(log, 1.0, 20.0) == [(5.0, 2.0), (20.0, 12.0)]
    assert stalls_since(log[:2], 1.0, 20.0) == [(5.0, 2.0)]
    assert stalls_since(log[:1], 1.0, 20.0) == [(20.0, 17.0)]


def test_in_which_outer_step_the_first_commit_is() -> None:
    a: Log = [missed(1.0), missed(5.0), made(9.0, 1), missed(12.0)]
    b: Log = [missed(4.0), missed(5.0), missed(7.0), made(9.5, 1)]
    assert first_commit([a], 2.0) == 2
    assert first_commit([a, b], 2.0) == 4
    assert first_commit([a, b], 8.0) == 1
    assert first_commit([a[:2], b[:2]], 0.0) is None


def test_how_many_outer_steps_were_in_vain() -> None:
    a: Log = [*joins("a", 0.0), missed(1.0), missed(5.0), missed(7.0)]
    b: Log = [*joins("b", 0.0), missed(4.0), missed(5.0)]
    assert in_vain([a, b], 2.0) == 2
    assert in_vain([a, b, [started("c")]], 4.5) == 1
    assert in_vain([a, [*b, made(9.0, 1)]], 2.0) == 0
    assert in_vain([[started("c")]], 0.0) == in_vain([], 0.0) == 0


def test_a_loss_is_what_a_stall_takes_longer_than_before() -> None:
    stalls = [(5.0, 1.0), (9.0, 2.0), (13.0, 1.5), (20.0, 5.0), (24.0, 2.0), (30.0, 2.6)]
    assert losses(stalls, 15.0) == [3.5, pytest.approx(1.1)]
    assert losses(stalls, None) == []
    assert losses(stalls, 2.0) == [], "nothing to compare with"


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "connections", "path"),
    [
        (joins("a", 1.0), Connections(direct=4, relayed=0), "direct"),
        (joins("a", 1.0), Connections(direct=3, relayed=0), "direct to 3 of 4"),
        (joins("a", 1.0), Connections(direct=1, relayed=3), "relay"),
        (joins("a", 1.0), Connections(direct=0, relayed=0), "none"),
        (joins("a", 1.0), None, "none"),
        ([started("a")], Connections(direct=4, relayed=0), "none"),
        ([started("a", maddrs=()), JOINED], Connections(direct=2, relayed=0), "client"),
    ],
)
def test_how_a_trainer_is_connected(log: Log, connections: Connections | None, path: str) -> None:
    assert path_of(log, connections, others=4) == path


def test_the_same_words_in_a_row_are_said_once() -> None:
    assert in_a_row(["direct", "client", "client", "none", "client"]) == "direct, 2 client, none, client"


# -- bounds ------------------------------------------------------------------------------------------------------------


def figures(**changes: object) -> Figures:
    well = Figures(
        joined_s=dict.fromkeys(PEERS, 3.0),
        updates=6,
        shares=dict.fromkeys(PEERS, 1.0),
        stalls=dict.fromkeys(PEERS, (0.5, 0.7)),
        first_commit=1,
        losses=dict.fromkeys(PEERS, ()),
        paths=dict.fromkeys(PEERS, "direct"),
        vector_bytes=4_000_000,
    )
    return replace(well, **changes)  # type: ignore[arg-type]


def named(name: str) -> Situation:
    return next(situation for situation in SITUATIONS if situation.name == name)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_a_swarm_that_is_well_misses_nothing(situation: Situation) -> None:
    assert missed_bounds(situation, figures()) == []


def shares(**of: float) -> dict[str, float]:
    return dict.fromkeys(PEERS, 1.0) | {name.replace("_", "-"): share for name, share in of.items()}


SEED_ALONE = "only the seed is public"


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("double NAT", {"shares": shares(peer_4=0.0)}, []),
        ("double NAT", {"shares": shares(peer_2=0.94)}, ["double NAT: others' share: peer-2 94%, less than 95%"]),
        ("double NAT", {"shares": shares(peer_2=0.95)}, []),
        ("one IPv6 only", {"shares": shares(peer_4=0.0)}, ["one IPv6 only: contributes: peer-4 does not"]),
        ("one IPv6 only", {"shares": shares(peer_4=0.1)}, []),
        (SEED_ALONE, {"first_commit": 2}, []),
        (SEED_ALONE, {"first_commit": 3}, [f"{SEED_ALONE}: first commit: in outer step 3, not within 2"]),
        (SEED_ALONE, {"first_commit": None}, [f"{SEED_ALONE}: first commit: never"]),
        (SEED_ALONE, {"shares": shares(peer_3=0.99)}, [f"{SEED_ALONE}: all contribute: the least 99%, not 100%"]),
        (SEED_ALONE, {"stalls": {"peer-1": [4.1]}}, []),
        (SEED_ALONE, {"stalls": {"peer-1": [4.2]}}, [f"{SEED_ALONE}: stall: median 4.2 s, more than 4.2 s"]),
        (SEED_ALONE, {"stalls": {}}, [f"{SEED_ALONE}: stall: none to be seen, more than 4.2 s"]),
        ("a router's new address", {"losses": {"peer-1": [2.9], "peer-4": [9.0, 9.0]}}, []),
        (
            "a router's new address",
            {"losses": {"peer-1": [3.0], "peer-2": [1.2, 1.3]}},
            [
                "a router's new address: others' loss: peer-1 3.0 s, not once less than 3 s",
                "a router's new address: others' loss: peer-2 1.2, 1.3 s, not once less than 3 s",
            ],
        ),
        ("no NAT", {"losses": {"peer-1": [9.0]}}, []),
    ],
)
def test_a_bound_that_is_missed_is_named(name: str, changes: dict[str, object], told: Sequence[str]) -> None:
    assert missed_bounds(named(name), figures(**changes)) == told


def test_with_a_hub_all_contributions_go_over_its_line() -> None:
    """4 of 4 MB over 40 Mbit/s are 3.2 s; eight round trips of 40 ms."""
    assert stall_with_a_hub_s(replace(named(SEED_ALONE), hub=HUB), figures()) == pytest.approx(1.2 * 3.2 + 0.32)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_row_compares_with_the_swarm_without_nat() -> None:
    played = Played(
        situation=named("one IPv6 only"),
        figures=figures(
            joined_s={"peer-1": 2.0, "peer-2": 3.0, "peer-3": 7.0, "peer-4": None},
            shares=shares(peer_4=0.0),
            stalls={"peer-1": [1.2], "peer-2": [0.6, 1.8]},
            paths={"peer-1": "direct", "peer-2": "direct", "peer-3": "direct", "peer-4": "none"},
        ),
    )
    told = ("one IPv6 only", 3.0, "never", 6, "100% 100% 100% 0%", 1.2, 1.8)
    assert row_of(played, figures(stalls={"peer-1": [0.5]})) == (*told, 2.4, "3 direct, none")
    assert row_of(played, None) == (*told, "", "3 direct, none")


def test_a_swarm_that_does_nothing_has_a_row() -> None:
    nothing = figures(
        joined_s=dict.fromkeys(PEERS), updates=0, shares=dict.fromkeys(PEERS, 0.0), stalls={}, first_commit=None
    )
    row = row_of(Played(situation=REFERENCE, figures=nothing), nothing)
    assert row == ("no NAT", "never", "never", 0, "0% 0% 0% 0%", "", "", "", "4 direct")


def test_the_situations_within_the_limit_and_what_they_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swarm without NAT comes first, and each has its share of the time that is left."""
    limits: list[float] = []

    def play(situation: Situation, seed: Path, limit_s: float, *, updates: int) -> Figures:
        assert (seed, updates) == (Path("seed"), homes.UPDATES)
        limits.append(limit_s)
        now.append(now[-1] + 10.0)
        return figures(shares=shares(peer_1=0.5))

    now = [0.0]
    monkeypatch.setattr(homes, "run_made", lambda: nullcontext(Path("seed")))
    monkeypatch.setattr(homes, "play", play)
    monkeypatch.setattr("benchmarks.homes.time.monotonic", lambda: now[-1])
    monkeypatch.setattr(homes, "why_no_internet", lambda: None)
    table = homes.main("NAT")
    assert [row[0] for row in table.rows] == ["no NAT", "double NAT"]
    assert limits == [homes.LIMIT_S / 2, homes.LIMIT_S - 10.0]
    assert [bound.split(":")[0] for bound in table.missed] == ["no NAT", "double NAT"]


def test_without_an_internet_the_case_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(homes, "why_no_internet", lambda: "only root may")
    assert commands.main(["homes"], None, lambda table: table.title) == 1
    assert capsys.readouterr().out.endswith("failed: no internet on this machine: only root may\n")


def test_the_reference_is_first_and_all_have_names_of_their_own() -> None:
    assert SITUATIONS[0] is REFERENCE
    assert len({situation.name for situation in SITUATIONS}) == len(SITUATIONS)
    assert all(situation.troubled | situation.contribute <= set(PEERS) for situation in SITUATIONS)


def test_bounds_are_told_below_the_table() -> None:
    assert any("95%" in note for note in table_of([]).notes)
