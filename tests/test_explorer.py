"""A share of the fault explorer's schedules, and proof that it finds what is broken. ``make faults`` runs them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tests.explorer import (
    drawn_for,
    explain,
    explore,
    explore_at_home,
    explore_seed,
    explore_with_liars,
    told_of_lie,
    workers,
)
from tests.support.broken import VARIANTS
from tests.support.known_wanting import KNOWN_WANTING
from tests.support.liars import HURRIES, KINDS
from tests.support.schedules import Fault, PeerPlan, Schedule, Travelling, draw, shrink
from tests.support.schedules_with_liars import draw_with_liars

BATCH = 10
BATCHES = 6
BATCHES_AT_HOME = 3
"""Among these is 28: the seed dies when it has given a certificate to all and applied nothing, and comes back to homes
that it cannot dial, one of which has lost its folder."""


@pytest.mark.parametrize("batch", range(BATCHES))
def test_invariants_hold_under_random_faults(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        verdict = explore(draw(seed))
        assert verdict.ok, f"seed {seed}: {verdict.text}; python -m tests.explorer --seed {seed} --verbose tells how"
        assert verdict.outer_steps > 1


@pytest.mark.parametrize("batch", range(BATCHES_AT_HOME))
def test_invariants_hold_where_nobody_but_the_owners_seed_can_be_dialled(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        verdict = explore_at_home(seed)
        assert verdict.ok, f"seed {seed}: {verdict.text}; python -m tests.explorer --homes --seed {seed} --verbose"
        assert verdict.outer_steps > 1


ONCE_FAILED = (Path(__file__).parent / "once_failed.jsonl").read_text().splitlines()
"""Peers that a cut network had made fail each other, and that then went without each other for ever; a head that the
swarm had left; a slow peer that was one outer step behind again and again; a way that broke off after the roll-back;
a half that took itself for the larger one whenever it tried to dial a peer of the other half that cannot be dialled; a
group that came with the largest weights, and had its inner steps miscounted here, for one peer was absent; two halves
that had gone on for so long that nobody had an update from before they parted, and each saw no vote but its own."""


@pytest.mark.parametrize("number", range(len(ONCE_FAILED)))
def test_schedules_that_once_failed(number: int) -> None:
    """They are kept as they were drawn, or made smaller since, whatever a seed draws today."""
    assert explore(Schedule.from_json(ONCE_FAILED[number])).ok


NEWCOMER_LEADS = 6
"""A seed by which the newcomer is the leader of the first round that it takes part in."""
CALM = Schedule(seed=1, peers=(PeerPlan(role="seed"), PeerPlan(), PeerPlan(starts_s=1.0), PeerPlan(role="client")))


def test_a_run_is_the_same_every_time() -> None:
    """To the last event of the last peer, also after others in the same process."""
    schedule = draw(12)
    first = explore(schedule)
    explore(CALM)
    assert explore(schedule).fingerprint == first.fingerprint
    assert explore(CALM).fingerprint != first.fingerprint


def test_a_timeline_tells_what_was_done_and_what_the_peers_did(capsys: pytest.CaptureFixture[str]) -> None:
    kill = Fault(kind="kill", at_s=10.0, who=2, for_s=5.0, phase="reduce", after_s=0.05)
    verdict = explain(Schedule(seed=1, peers=CALM.peers, faults=(kill,)))
    assert verdict.ok
    told = capsys.readouterr().out
    assert "peer 2 is killed" in told
    assert told.index("peer 2 is killed") < told.rindex("peer 2 starts") < told.index("all stand on one head")
    assert "[1] round" in told
    assert "kill 2 at_s=10.0 for_s=5.0 phase=reduce after_s=0.05" in told


def told_of(*faults: Fault, peers: int = 4) -> list[str]:
    """What happened under these faults to peers that all train: lines without their times."""
    schedule = Schedule(
        seed=1, peers=tuple(PeerPlan(starts_s=0.1 * i) for i in range(peers)), faults=faults, jitter=3.0
    )
    verdict = explore(schedule, keep_timeline=True)
    assert verdict.ok, verdict.text
    return list(verdict.timeline)


def test_a_leader_dies_between_two_commit_messages() -> None:
    told = told_of(Fault(kind="kill", at_s=10.0, message="commit", nth=2, for_s=5.0))
    sent = next(line for line in told if "sends commit 2 of the round to" in line)
    leader = sent.split()[2]
    struck = told[told.index(sent) + 1]
    assert struck.split(maxsplit=1) == [sent.split()[0], f"peer {leader} is killed"]
    rounds = [line for line in told if float(line[:8]) > float(sent[:8]) and " round " in line]
    assert "committed=True" in rounds[0]  # one member has the commit, and the others hear of it
    assert len({line.split("head=")[1].split()[0] for line in rounds[:3]}) == 1
    assert not any(line.split()[1] == f"[{leader}]" for line in rounds[:3])


def test_a_member_dies_after_it_has_taken_a_commit_and_before_it_applies_it() -> None:
    told = told_of(Fault(kind="kill", at_s=10.0, message="took", nth=1, after_s=0.005, for_s=5.0))
    sent = next(line for line in told if "sends took 1 of the round to" in line)
    member, at_s = sent.split()[2], float(sent[:8])
    killed = next(line for line in told if f"peer {member} is killed" in line)
    assert float(killed[:8]) == pytest.approx(at_s + 0.005, abs=0.0011)
    last = [line for line in told if line.split()[1] == f"[{member}]" and float(line[:8]) <= float(killed[:8])][-1]
    assert "phase" in last
    assert "phase=apply" in last or "phase=settle" in last


@pytest.mark.parametrize("message", ["contribute", "receipt"])
def test_a_stream_that_closes_at_once_in_the_first_round_of_a_newcomer_costs_nobody_a_time_out(
    message: Travelling,
) -> None:
    """It leads that round. Everybody is there all the time."""
    joins_s = 10.0
    faults = [Fault(kind="reset", at_s=joins_s, message=message, nth=nth) for nth in (2, 3)]
    peers = tuple(PeerPlan(starts_s=0.1 * i) for i in range(5))
    joins = Fault(kind="join", at_s=joins_s, who=4)
    schedule = Schedule(seed=NEWCOMER_LEADS, peers=peers, jitter=0.0, faults=(joins, *faults))
    verdict = explore(schedule, keep_timeline=True)
    assert verdict.ok, verdict.text
    told = verdict.timeline
    reset = [line for line in told if "is reset" in line]
    assert len(reset) == len(faults)
    rounds = [line for line in told if " round " in line and float(line[:8]) > float(reset[0][:8])][:5]
    assert {line.split()[1] for line in rounds} == {f"[{i}]" for i in range(5)}
    for line in rounds:
        said = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        assert said["committed"] == "True"
        assert said["group"].startswith("[4,")
        assert said["lost"] == "[]"
        assert float(said["reduce_s"]) + float(said["settle_s"]) < 1.0


ADDRESS_S = 60.0
"""When the home gets it: five calm rounds are over, and more."""
DETECTION_S = 3.0


@pytest.mark.parametrize(
    ("phase", "after_s", "step_s"),
    [("inner", 2.0, 1.0), ("inner", 2.0, 1.6), ("gather", 0.03, 1.0), ("reduce", 0.05, 1.0), ("settle", 0.1, 1.0)],
)
def test_a_homes_new_address_costs_the_others_one_detection(phase: str, after_s: float, step_s: float) -> None:
    """Nobody is told that its connections are dead. It is a client, and sees it when it sends over one of them."""
    home = PeerPlan(role="client", starts_s=0.5, step_s=step_s)
    peers = (PeerPlan(role="seed"), *(PeerPlan(starts_s=0.1 * i) for i in range(1, 4)), home)
    faults = (Fault(kind="address", at_s=ADDRESS_S, who=4, phase=phase, after_s=after_s),)
    verdict = explore(Schedule(seed=3, peers=peers, jitter=0.0, faults=faults, lasts_s=95.0), keep_timeline=True)
    assert verdict.ok, verdict.text
    moved_s = next(float(line[:8]) for line in verdict.timeline if " address 4" in line)
    assert moved_s >= ADDRESS_S
    rounds = [line for line in verdict.timeline if "[1] round " in line and float(line[:8]) > moved_s]
    took_s, groups = [], []
    for line in rounds:
        said = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        assert said["committed"] == "True"
        took_s.append(sum(float(said[stage]) for stage in ("gather_s", "reduce_s", "settle_s")))
        groups.append(said["group"])
    assert max(took_s) < DETECTION_S
    assert sum(seconds > DETECTION_S / 2 for seconds in took_s) <= 2, "its detection, and to wait until it is back"
    if phase != "reduce":  # there it waits for the means of all others, who may wait for another one
        assert all("4" in group for group in groups[2:])


def test_what_an_ambush_waits_for_may_not_come() -> None:
    told = told_of(Fault(kind="kill", at_s=10.0, message="again", nth=1, for_s=5.0))
    assert any("message=again nth=1: no such message was sent" in line for line in told)
    assert not any("is killed" in line for line in told)


def test_the_halves_of_a_group_that_is_split_in_the_middle_of_a_round_do_not_both_go_on_with_it() -> None:
    split = Fault(kind="partition", at_s=10.0, side=(0, 1), message="contribute", nth=5, how="reset", for_s=15.0)
    told = told_of(split)
    at_s = next(float(line[:8]) for line in told if "sends contribute 5 of the round" in line)
    failed = [line for line in told if " round " in line and at_s < float(line[:8]) < at_s + 15.0][:4]
    assert all("committed=False reason=failed" in line for line in failed)


FOUND_BY: dict[str, tuple[tuple[int, ...], str]] = {
    "settle skipped": ((0, 1, 2), "certified"),
    "loudest head": ((1,), "progress"),
    "local values where a reducer died": ((12, 24), "same-bytes"),
    "applied before written": ((28,), "durable"),
    "sent again": ((63,), "counted-once"),
    "kept although it arrived": ((7,), "counted-once"),
    "endless patience": ((4,), "agreement"),
    "half settles": ((3, 7, 8), "certified"),
    "half of the voters": ((289,), "head-choice"),
    "denied at once": ((26,), "one-outcome"),
    "certificate not checked": ((0, 1), "no-invention"),
    "known by claims": ((2, 5), "certified"),
    "anchor ignored": ((0,), "no-invention"),
}
"""Broken protocol -> up to three of the first seeds whose schedules find it, and the invariant that is violated. Which
seeds do shifts with every message that the protocol sends: one of them is enough."""


def found_by(name: str) -> int:
    """The first of these seeds whose schedule finds a broken protocol today."""
    seeds, invariant = FOUND_BY[name]
    with VARIANTS[name]():
        found = (seed for seed in seeds if explore(drawn_for(name, seed)).invariant == invariant)
        first = next(found, None)
    assert first is not None, f"{name}: no {invariant} by {seeds}; python -m tests.explorer --broken finds other seeds"
    return first


@pytest.mark.parametrize("name", VARIANTS)
def test_a_protocol_that_is_broken_on_purpose_is_found(name: str) -> None:
    assert explore(drawn_for(name, found_by(name))).ok


HELD = 2
"""So many schedules are played of a kind of lie that the protocol stands."""


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_protocol_makes_of_a_lie(kind: str) -> None:
    """Where it is known to be wanting, it is so in exactly this way: a protocol that is mended changes the table."""
    if kind in KNOWN_WANTING:
        seed, invariant = KNOWN_WANTING[kind]
        verdict = explore_with_liars(draw_with_liars(kind, seed))
        assert verdict.invariant == invariant, f"{kind}, seed {seed}: {verdict.text or 'mended?'}"
        return
    for seed in range(HELD):
        verdict = explore_with_liars(draw_with_liars(kind, seed))
        assert verdict.ok, (
            f'{verdict.text}; python -m tests.explorer --liars "{kind}" --seed {seed} --verbose tells how'
        )


def test_a_reducer_that_sends_two_means_is_barred_by_everybody() -> None:
    """Whoever gets the other one from a member has two versions that it has signed. Without proofs of that, the leader
    of seed 14 made four updates go against the others, for nobody had happened to audit that part."""
    verdict = explore_with_liars(draw_with_liars("two commits", 14), keep_timeline=True)
    assert verdict.ok, verdict.text
    barred = [line for line in verdict.timeline if " barred " in line]
    assert {line.split()[1] for line in barred} == {"[0]", "[1]", "[2]"}
    assert all("why=parts" in line for line in barred)


def test_one_that_hurries_would_leave_nobody_time_to_learn_if_one_called_the_others() -> None:
    with mock.patch("p2p_diloco.core.call.CALLERS", 1):
        verdict = explore_with_liars(draw_with_liars(HURRIES, 0))
    assert verdict.invariant == "work", verdict.text


def test_liars_are_compared_with_a_swarm_without_them() -> None:
    """One liar here does what all do, but four times as slowly."""
    honest = [PeerPlan(starts_s=0.1 * i) for i in range(3)]
    slow = PeerPlan(lie="stale", lies_from_s=1e6, step_s=4.0)
    schedule = Schedule(seed=1, peers=(*honest, slow), lasts_s=60.0)
    verdict = explore_with_liars(schedule)
    assert verdict.ok, verdict.text
    assert verdict.honest_steps > 3
    assert verdict.inner_steps > 3


def test_what_is_told_of_a_lie() -> None:
    verdict = explore(CALM)
    failed = [replace(verdict, schedule=replace(CALM, seed=seed), invariant=name) for seed, name in FAILURES]
    assert told_of_lie("x", failed, 9) == "x: 3 of 9 schedules fail: pace 2 (first 3), bounded 1 (first 5)"
    assert told_of_lie("x", [], 9) == "x: 0 of 9 schedules fail"


FAILURES = ((7, "pace"), (5, "bounded"), (3, "pace"))


def test_workers_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of schedules that are still being played."""
    monkeypatch.setattr("tests.explorer.SHARED_MEMORY", tmp_path)
    with workers(1) as pool:
        assert next(pool.imap(explore_seed, range(3))).ok
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_fails_is_made_smaller() -> None:
    name = "applied before written"
    seed, (_, invariant) = found_by(name), FOUND_BY[name]
    with VARIANTS[name]():
        small = shrink(draw(seed), lambda schedule: explore(schedule).invariant == invariant, tries=25)
        assert explore(small).invariant == invariant
    assert len(small.faults) == 1
    assert len(small.peers) < len(draw(seed).peers) or len(draw(seed).faults) > 1
