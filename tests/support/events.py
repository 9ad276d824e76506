"""One event of each kind, for tests to change with ``dataclasses.replace``; and a log's lines as JSON has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from p2p_diloco.core.event import (
    DaemonRestarted,
    DamageRepaired,
    Event,
    EventsLost,
    InnerStepEnded,
    OuterGradientOffered,
    PeerCaughtUp,
    PeerJoined,
    PeerLeft,
    PeerStarted,
    PhaseBegan,
    RoundEnded,
    ThetaEvaluated,
    TrainerStalled,
)
from p2p_diloco.core.trust_event import (
    AnchorContradicted,
    AnchorTaken,
    BranchLeft,
    PartAudited,
    PeerBarred,
    ReducerFound,
    StateDisputed,
    WitnessAsked,
)

STARTED = PeerStarted(
    peer_id="12D3a",
    pid=77,
    run_id="ab01",
    run_name="tiny",
    role="trainer",
    version="1.0",
    maddrs=("/ip4/127.0.0.1/tcp/1/p2p/12D3a",),
    wall_s=1.7e9,
    mono_s=0.0,
)
JOINED = PeerJoined(step=3, head="0a", from_step=None, snapshot=True, seconds=0.5, wall_s=1.7e9, mono_s=0.0)
PHASE = PhaseBegan(phase="gather", step=3, wall_s=1.7e9, mono_s=0.0)
INNER = InnerStepEnded(
    step=3, inner_step=7, planned=10, loss=None, tokens=640, tokens_per_s=128.5, wall_s=1.7e9, mono_s=0.0
)
OFFERED = OuterGradientOffered(step=3, tokens=640, wall_s=1.7e9, mono_s=0.0)
MISSED = RoundEnded(
    step=3,
    head="0a",
    committed=False,
    reason="alone",
    detail="nobody to meet",
    group=(),
    dropped=(),
    lost=(),
    gather_s=1.5,
    apply_s=0.0,
    reduce_s=0.0,
    settle_s=0.0,
    bytes_sent=0,
    bytes_received=0,
    known=0,
    signatures=0,
    certifying=0,
    witnessed=False,
    uncertified="",
    wall_s=1.7e9,
    mono_s=0.0,
)
COMMITTED = RoundEnded(
    step=4,
    head="0b",
    committed=True,
    reason="",
    detail="",
    group=("12D3a", "12D3b"),
    dropped=("12D3b",),
    lost=("12D3b",),
    gather_s=0.5,
    apply_s=0.0625,
    reduce_s=0.25,
    settle_s=0.125,
    bytes_sent=1000,
    bytes_received=2000,
    known=3,
    signatures=2,
    certifying=2,
    witnessed=True,
    uncertified="",
    contribution_norm=3.0,
    update_norm=2.0,
    cosine=-0.5,
    wall_s=1.7e9,
    mono_s=0.0,
)
AUDITED = PartAudited(step=3, reducer="12D3b", part=7, result="wrong", seconds=0.25, wall_s=1.7e9, mono_s=0.0)
FOUND = ReducerFound(step=4, reducer="12D3b", kind="wrong", accuser="12D3c", wall_s=1.7e9, mono_s=0.0)
STALL = TrainerStalled(step=4, seconds=1.25, wall_s=1.7e9, mono_s=0.0)
CAUGHT_UP = PeerCaughtUp(
    seconds=2.5,
    from_step=None,
    to_step=9,
    rolled_back=1,
    snapshot=True,
    bytes_received=4096,
    donors=2,
    wall_s=1.7e9,
    mono_s=0.0,
)
BRANCH = BranchLeft(
    fork_step=6,
    left_step=8,
    left_head="0d",
    step=9,
    head="0e",
    votes=3,
    votes_left=1,
    wall_s=1.7e9,
    mono_s=0.0,
)
WITNESS = WitnessAsked(step=8, signed=False, reason="too few", wall_s=1.7e9, mono_s=0.0)
REPAIRED = DamageRepaired(what="update", step=8, how="fetched", wall_s=1.7e9, mono_s=0.0)
DISPUTED = StateDisputed(step=8, others=("12D3b", "12D3c"), wall_s=1.7e9, mono_s=0.0)
ANCHORED = AnchorTaken(step=6, head="0d", number=3, made=False, wall_s=1.7e9, mono_s=0.0)
DIFFER = AnchorContradicted(step=6, number=3, other_step=5, wall_s=1.7e9, mono_s=0.0)
BARRED = PeerBarred(step=8, peer="12D3b", why="rosters", wall_s=1.7e9, mono_s=0.0)
RESTARTED = DaemonRestarted(maddrs=("/ip4/127.0.0.1/tcp/2/p2p/12D3a",), wall_s=1.7e9, mono_s=0.0)
EVALUATED = ThetaEvaluated(step=9, held_out_loss=None, tokens=1024, seconds=0.75, wall_s=1.7e9, mono_s=0.0)
LOST = EventsLost(lines=1, wall_s=1.7e9, mono_s=0.0)
LEFT = PeerLeft(step=9, head="0c", reason="done \N{DNA DOUBLE HELIX}", wall_s=1.7e9, mono_s=0.0)

EVENTS: tuple[Event, ...] = (
    *(STARTED, JOINED, PHASE, INNER, OFFERED, MISSED, COMMITTED, AUDITED, FOUND, STALL, CAUGHT_UP, BRANCH, WITNESS),
    *(REPAIRED, DISPUTED, ANCHORED, DIFFER, BARRED, RESTARTED, EVALUATED, LOST, LEFT),
)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What stands in a log, whole lines of JSON, read without the code that is tested."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
