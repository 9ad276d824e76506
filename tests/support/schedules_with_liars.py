"""Schedules with liars among the peers: drawn from a kind of lie and a seed, and played without them for comparison."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.support.liars import (
    A_AGAIN_B,
    CONTRIBUTIONS,
    FORKED,
    GHOSTS,
    HISTORIES,
    HURRIES,
    IDLE,
    INVENTED_SNAPSHOT,
    RETURNING,
    SILENT,
    SLOW_READERS,
    TWO_ROSTERS,
)
from tests.support.schedules import MAX_PEERS, WINDOWS, Fault, PeerPlan, Schedule

LASTS_S = 120.0
FEW_HONEST = (3, 3, 4, 5)
MANY_HONEST = (4, 5, 6)
KNOWN_FROM_S = 60.0
"""Who lies from here on has contributed to some updates before."""
MISLED_S = 45.0
AWAY_S = 40.0
FORKS_FROM_S = 60.0
QUICKER = 0.4
"""The inner steps of those whose history is forked: there have to be anchors by then."""
FAULTS = ("kill", "join", "slow", "leave", "join")


def draw_with_liars(kind: str, seed: int) -> Schedule:
    """The same schedule for the same kind of ``liars.KINDS`` and the same seed, on every machine. A third of them have
    faults of honest peers as well."""
    r = random.Random(f"{kind} {seed}")
    honest = r.choice(MANY_HONEST if kind in MANY_NEEDED else FEW_HONEST)
    step_s = r.choice((0.8, 1.0, 1.5))
    plain = Schedule(
        seed=seed,
        peers=tuple(_honest(r, step_s) for _ in range(honest)),
        codec=r.choice(("fp32", "fp32", "fp32", "int8")),
        aggregate="robust",
        snapshot_every=r.choice((2, 5)),
        parts=r.choice((3, 5, 9)),
        inner_steps=r.choice((8, 12)),
        latency_s=r.choice((0.01, 0.03)),
        jitter=r.choice((0.0, 2.0, 6.0)),
        window_steps=random.Random(f"window {kind} {seed}").choice(WINDOWS),
        lasts_s=LASTS_S,
    )
    if kind == INVENTED_SNAPSHOT:
        plain = replace(plain, snapshot_every=2)
    if kind == RETURNING:
        return _returning(r, plain)
    if kind == FORKED:
        return _forked(r, plain)
    lies_from_s = r.choice((0.0, KNOWN_FROM_S)) if kind not in FROM_THE_BEGINNING else 0.0
    for _ in range(_how_many(r, kind, honest)):
        liar = replace(_honest(r, step_s), lie=kind, lies_from_s=lies_from_s)
        if kind in HISTORIES and kind != INVENTED_SNAPSHOT:
            liar = replace(liar, step_s=0.4)
        if kind == INVENTED_SNAPSHOT:
            liar = replace(liar, role="seed")
        plain = replace(plain, peers=(*plain.peers, liar))
    if kind == GHOSTS:
        return _misled(r, plain)
    if kind == A_AGAIN_B and r.random() < 0.5:
        return _with_takers_away(r, plain)
    if kind == SLOW_READERS:
        return _joined(r, plain, at_s=lies_from_s + 30.0)
    return _with_faults(r, plain) if r.random() < 1 / 3 else plain


MANY_NEEDED = frozenset((*CONTRIBUTIONS, TWO_ROSTERS, RETURNING, HURRIES))
"""Kinds whose swarms have four honest peers or more."""
FROM_THE_BEGINNING = frozenset((GHOSTS, SILENT))


def _honest(r: random.Random, step_s: float) -> PeerPlan:
    return PeerPlan(
        step_s=step_s * r.choice((0.9, 1.0, 1.1)),
        starts_s=round(r.uniform(0, 2), 2),
        thread_s=r.choice((0.003, 0.01)),
        clock_s=r.choice((0.0, 0.0, -4.0, 4.0)),
    )


def _how_many(r: random.Random, kind: str, honest: int) -> int:
    if kind == IDLE:
        return min(8, MAX_PEERS - 1 - honest)
    if kind == SILENT:
        return min(r.choice((5, 7)), MAX_PEERS - 1 - honest)
    if kind == GHOSTS:
        return r.choice((2, 3, 5))
    return honest + 1 if kind == INVENTED_SNAPSHOT else 1


def _misled(r: random.Random, plain: Schedule) -> Schedule:
    """Liars, and a newcomer who knows only their addresses, are on their own at first."""
    newcomer = len(plain.peers)
    plain = replace(plain, peers=(*plain.peers, _honest(r, 1.0)))
    side = tuple(sorted((*plain.liars, newcomer)))
    misled = Fault(kind="misled", at_s=0.0, side=side, for_s=MISLED_S, how="reset")
    return replace(plain, faults=(misled, Fault(kind="join", at_s=r.choice((5.0, 20.0)), who=newcomer)))


def _forked(r: random.Random, plain: Schedule) -> Schedule:
    """There is one liar more than there are honest peers."""
    peers = [replace(plan, step_s=QUICKER * plan.step_s) for plan in plain.peers]
    liar = replace(peers[0], lie=FORKED, lies_from_s=FORKS_FROM_S)
    liars = [replace(liar, starts_s=round(r.uniform(0, 2), 2)) for _ in range(len(peers) + 1)]
    return replace(plain, peers=(*peers, *liars), snapshot_every=2, window_steps=min(WINDOWS), inner_steps=8)


def _returning(r: random.Random, plain: Schedule) -> Schedule:
    """Most of the group are away, at the latest by a message of a round; the few go on, and so may those."""
    count = len(plain.peers)
    most = tuple(sorted(r.sample(range(count), count // 2 + 1)))
    at_s, for_s = round(r.uniform(15, 30), 2), round(AWAY_S * r.uniform(0.5, 1), 2)
    plain = replace(plain, min_group=r.choice([size for size in (1, 2) if size <= count - len(most)]))
    if r.random() < 0.5:
        faults = [Fault(kind="partition", at_s=at_s, side=most, for_s=for_s, how=r.choice(("reset", "silent")))]
        if r.random() < 0.5:
            nth = r.randint(1, count - 1)
            faults = [replace(faults[0], message=r.choice(("commit", "took", "receipt")), nth=nth)]
    else:
        how = r.choice(("kill", "stop"))
        faults = [
            Fault(kind="kill" if how == "kill" else "stop", at_s=at_s, who=who, for_s=round(for_s + r.random(), 2))
            for who in most
        ]
    return replace(plain, faults=tuple(faults))


def _with_takers_away(r: random.Random, plain: Schedule) -> Schedule:
    """Two times, the one that has taken the liar's commit stands still from then on: nobody can ask it."""
    (liar,) = plain.liars
    away = Fault(kind="stop", at_s=0.0, other=liar, message="took", nth=1, how="whole")
    faults = (replace(away, at_s=at_s, for_s=round(r.uniform(20, 40), 2)) for at_s in (5.0, 60.0))
    return replace(plain, faults=tuple(faults))


def _joined(r: random.Random, plain: Schedule, at_s: float) -> Schedule:
    newcomer = len(plain.peers)
    join = Fault(kind="join", at_s=round(at_s + r.random(), 2), who=newcomer)
    return replace(plain, peers=(*plain.peers, _honest(r, 1.0)), faults=(*plain.faults, join))


def _with_faults(r: random.Random, plain: Schedule) -> Schedule:
    """Two faults at most, of honest peers, after which enough of them are there again."""
    honest = [i for i in range(len(plain.peers)) if i not in plain.liars]
    for at_s in sorted(round(r.uniform(10, 70), 2) for _ in range(r.choice((1, 2)))):
        kind, who = r.choice(FAULTS), r.choice(honest)
        other = r.choice([i for i in honest if i != who])
        if kind == "join":
            plain = _joined(r, plain, at_s) if len(plain.peers) < MAX_PEERS else plain
            continue
        fault = Fault(kind="kill", at_s=at_s, who=who, for_s=round(r.uniform(3, 20), 2))
        if kind == "leave":
            fault = replace(fault, kind="leave")
        elif kind == "slow":
            fault = replace(fault, kind="slow", other=other, amount=r.choice((0.2, 1.0)))
        plain = replace(plain, faults=(*plain.faults, fault))
    return plain


def without_liars(schedule: Schedule) -> Schedule:
    """The same swarm without its liars, and without what they alone do."""
    kept = [i for i, plan in enumerate(schedule.peers) if not plan.lie]
    now_at = {before: after for after, before in enumerate(kept)}
    faults = [
        replace(fault, who=now_at[fault.who], other=now_at.get(fault.other, 0))
        for fault in schedule.faults
        if fault.kind != "misled" and fault.who in now_at
    ]
    return replace(schedule, peers=tuple(schedule.peers[i] for i in kept), faults=tuple(faults))
