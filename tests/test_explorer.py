"""A share of the fault explorer's schedules, and proof that it finds what is broken. ``make faults`` runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken import VARIANTS
from explorer import explain, explore, explore_seed, workers
from schedules import Fault, PeerPlan, Schedule, draw, shrink

BATCH = 10
BATCHES = 6


@pytest.mark.parametrize("batch", range(BATCHES))
def test_invariants_hold_under_random_faults(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        verdict = explore(draw(seed))
        assert verdict.ok, f"seed {seed}: {verdict.text}; python tests/explorer.py --seed {seed} --verbose tells how"
        assert verdict.outer_steps > 1


@pytest.mark.parametrize("seed", [1768, 3413, 3983, 4440])
def test_schedules_that_once_failed(seed: int) -> None:
    """Peers that a cut network had made fail each other, and that then went without each other for ever; a head that
    the swarm had left; a slow peer that was one outer step behind again and again; a way that broke off
    after the roll-back."""
    assert explore(draw(seed)).ok


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


FOUND_BY: dict[str, tuple[int, str]] = {
    "settle skipped": (12, "counted-once"),
    "loudest head": (1, "progress"),
    "local values where a reducer died": (11, "same-bytes"),
    "applied before written": (0, "durable"),
    "sent again": (62, "counted-once"),
    "kept although it arrived": (7, "counted-once"),
    "endless patience": (20, "progress"),
}
"""Broken protocol -> the first seed from 0 on whose schedule finds it, and the invariant that is violated."""


@pytest.mark.parametrize("name", VARIANTS)
def test_a_protocol_that_is_broken_on_purpose_is_found(name: str) -> None:
    seed, invariant = FOUND_BY[name]
    with VARIANTS[name]():
        assert explore(draw(seed)).invariant == invariant
    assert explore(draw(seed)).ok


def test_workers_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of schedules that are still being played."""
    monkeypatch.setattr("explorer.SHARED_MEMORY", tmp_path)
    with workers(1) as pool:
        assert next(pool.imap(explore_seed, range(3))).ok
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_fails_is_made_smaller() -> None:
    name = "applied before written"
    seed, invariant = FOUND_BY[name]
    with VARIANTS[name]():
        small = shrink(draw(seed), lambda schedule: explore(schedule).invariant == invariant, tries=25)
        assert explore(small).invariant == invariant
    assert len(small.faults) == 1
    assert len(small.peers) < len(draw(seed).peers) or len(draw(seed).faults) > 1
