"""What a missed round costs: half of all contributions dropped, and the three things that can become of them.

Four replicas on a quadratic of 64 values, each with a minimum of its own and noisy gradients; rosters, divisors, means,
updates and outer steps are the real ones. ``pytest tests/test_on_missed.py -s`` prints the figures.
"""

from __future__ import annotations

import random
from statistics import mean
from typing import Literal

import numpy as np

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import decode, encode
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import Group, open_roster, seal_roster
from p2p_diloco.core.outer import apply, genesis_state
from p2p_diloco.core.roster import form_roster, seal_readiness
from p2p_diloco.core.update import Update, parts_with
from tests.support.builders import known, ranked, readiness_of, rules_of

Policy = Literal["no drops", "keep", "adopt", "keep, by those that arrived"]
POLICIES: tuple[Policy, ...] = ("no drops", "keep", "adopt", "keep, by those that arrived")
K = 4
N = 64
INNER_STEPS = 10
OUTER_STEPS = 30
TOKENS = 100
"""An inner step's."""
SEEDS = range(8)
NOISE = np.float32(0.5)
"""Of a gradient, standard deviation per value; a minimum of one's own is 0.3 away from the common one."""


def group_of(head: bytes, step: int, tokens: dict[str, int], dropped: set[str], policy: Policy) -> Group:
    who = ranked(head, K)
    leader, everybody = who[0], known(*who)
    sealed = [
        seal_readiness(
            readiness_of(
                one,
                leader=leader.peer_id,
                head=head,
                step=step,
                weight=tokens[one.peer_id],
                dropped=one.peer_id in dropped,
            ),
            one,
        )
        for one in who
    ]
    members = form_roster(sealed, head, K, everybody, least_known=2)
    rules = rules_of(min_group=2, max_group=K, on_missed="keep" if policy == "keep" else "adopt")
    return open_roster(seal_roster(members, [], leader), rules, everybody)


def update_of(group: Group, theta: Vector, local: dict[str, Vector]) -> Update:
    """As ``butterfly`` makes it, with fp32."""
    came = {
        i: decode(encode(theta - local[member.peer_id], "fp32"), N, "fp32")
        for i, member in enumerate(group.members)
        if not member.dropped
    }
    grid = Grid(n=N, codec="fp32")
    part = AGGREGATIONS["mean"].reduce(came, group.weights, 0, grid, group.total_weight)
    return Update(header=group.header([part.hash]), parts=(part,))


def final_loss(policy: Policy, seed: int) -> float:
    """Of theta, meaned over the last eight outer steps; the smallest is 0."""
    noise, drops = np.random.default_rng(seed), random.Random(seed)
    curvature = np.geomspace(0.05, 1, N).astype(np.float32)
    ids = sorted(who.peer_id for who in ranked(bytes(32), K))
    minima = dict(zip(ids, 0.3 * noise.standard_normal((K, N)).astype(np.float32)))
    best = np.mean(list(minima.values()), axis=0)
    state = genesis_state((best + 3 * noise.standard_normal(N)).astype(np.float32))
    local = {peer_id: state.theta.copy() for peer_id in ids}
    tokens = dict.fromkeys(ids, 0)
    losses = []
    for step in range(OUTER_STEPS):
        for peer_id in ids:
            for _ in range(INNER_STEPS):
                gradient = curvature * (local[peer_id] - minima[peer_id])
                gradient += NOISE * noise.standard_normal(N).astype(np.float32)
                local[peer_id] -= np.float32(0.1) * gradient
            tokens[peer_id] += INNER_STEPS * TOKENS
        dropped = {peer_id for peer_id in ids if drops.random() < 0.5 and policy != "no drops"}
        update = update_of(group_of(state.head, step, tokens, dropped, policy), state.theta, local)
        apply(state, update, Grid(n=len(state.theta), codec="fp32"), lr=0.7, momentum=0.5)
        for peer_id in ids:
            if not policy.startswith("keep") or parts_with(update, peer_id):
                local[peer_id], tokens[peer_id] = state.theta.copy(), 0
        losses.append(0.5 * float(np.sum(curvature * (state.theta - best) ** 2)))
    return mean(losses[-8:])


def test_keep_is_better_than_adopt_if_the_mean_is_over_all_who_train() -> None:
    """And worse if it is over those that arrived: who missed a round then counts for both, at full length. With
    gradients of little noise ``adopt`` is as good as ``keep``, or better (at NOISE 0.3 and below)."""
    losses = {policy: [final_loss(policy, seed) for seed in SEEDS] for policy in POLICIES}
    for policy, of_seeds in losses.items():
        print(f"{policy:28s} {mean(of_seeds):.3f}  ", *(f"{loss:.3f}" for loss in of_seeds))
    means = [mean(losses[policy]) for policy in POLICIES]
    assert means == sorted(means), means
    for best, kept, arrived in zip(losses["no drops"], losses["keep"], losses["keep, by those that arrived"]):
        assert best < kept < arrived, "with every seed"
    assert mean(losses["keep, by those that arrived"]) > 1.2 * mean(losses["adopt"])
