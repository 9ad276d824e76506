"""What became of a swarm of homes, from its event logs and the seed's ledger; and the bounds of that. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TypeAlias

from benchmarks.histories import rounds, swarm_step
from benchmarks.loopback import Log
from benchmarks.situations import Situation
from p2p_diloco.core.event import OuterGradientOffered, PeerJoined, PeerStarted, RoundEnded, TrainerStalled, of_kind
from p2p_diloco.core.update import Update, parts_with

OTHERS_SHARE = 0.95
"""Of a trainer's contributions, where the situation is hard for others alone."""
FIRST_COMMIT_WITHIN = 2
"""Outer steps, where the seed alone can be dialled."""
HUB_STALL = 1.2
"""Times what all contributions take over the seed's line."""
HUB_ROUND_TRIPS = 8
"""Beyond that."""
ADDRESS_LOSS_S = 3.0
"""That others lose, once, by a router's new address."""
NOISE_S = 1.0
"""A stall that is longer than usual by less is no loss: this machine does other things, too."""

Contributions: TypeAlias = Mapping[str, float]
"""Of one update: peer id -> share of the parts that its contribution is in."""


@dataclass(frozen=True)
class Connections:
    """Those of one peer, to peers."""

    direct: int
    relayed: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a swarm has left. Times are those of the logs."""

    logs: Mapping[str, Log]
    """Of the trainers, by name."""
    started_s: Mapping[str, float]
    ended_s: float
    updates: Mapping[int, Contributions]
    """Outer step that it ends -> who contributed, in the history of the seed."""
    connections: Mapping[str, Connections | None]
    """At the end; None where nobody answers."""
    happened_s: float | None
    vector_bytes: int

    @property
    def together_s(self) -> float:
        """When all had joined that joined at all."""
        return together_s(list(self.logs.values()))

    @property
    def counted(self) -> dict[int, Contributions]:
        """The updates that everybody could contribute to from its first inner step on."""
        under_way = swarm_step(list(self.logs.values()), self.together_s)
        return {step: contributions for step, contributions in self.updates.items() if step > under_way}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A trainer's are by its name."""

    joined_s: Mapping[str, float | None]
    """From its start."""
    updates: int
    shares: Mapping[str, float]
    """Of the parts of these updates."""
    stalls: Mapping[str, Sequence[float]]
    first_commit: int | None
    """The outer step of a trainer, counted from when all had joined, that ended with the swarm's first commit."""
    losses: Mapping[str, Sequence[float]]
    """What stalls took longer than usual after something happened."""
    paths: Mapping[str, str]
    vector_bytes: int

    @property
    def stall_s(self) -> float | None:
        """The median over all."""
        return median(all_of_them) if (all_of_them := [s for stalls in self.stalls.values() for s in stalls]) else None


def together_s(logs: Sequence[Log]) -> float:
    """When the last of those had joined that joined at all; 0 where none did."""
    return max((event.mono_s for log in logs for event in of_kind(log, PeerJoined)[:1]), default=0.0)


def made_since(logs: Sequence[Log], since_s: float) -> int:
    """How many updates ``Evidence.counted`` would have, all being together since then."""
    return max(swarm_step(logs, float("inf")) - swarm_step(logs, since_s) - 1, 0)


def contributions_of(update: Update) -> Contributions:
    """Everybody's that contributed."""
    names = (name for name, _ in update.header.contributors)
    return {name: len(parts_with(update, name)) / len(update.parts) for name in names}


def figures_of(evidence: Evidence) -> Figures:
    counted = evidence.counted.values()
    stalls = {name: stalls_since(log, evidence.together_s, evidence.ended_s) for name, log in evidence.logs.items()}
    joined = {name: of_kind(log, PeerJoined)[:1] for name, log in evidence.logs.items()}
    return Figures(
        joined_s={
            name: events[0].mono_s - evidence.started_s[name] if events else None for name, events in joined.items()
        },
        updates=len(counted),
        shares={name: share_of(log, list(counted)) for name, log in evidence.logs.items()},
        stalls={name: [seconds for _, seconds in one] for name, one in stalls.items()},
        first_commit=first_commit(list(evidence.logs.values()), evidence.together_s),
        losses={name: losses(one, evidence.happened_s) for name, one in stalls.items()},
        paths={
            name: path_of(log, evidence.connections.get(name), others=len(evidence.logs))
            for name, log in evidence.logs.items()
        },
        vector_bytes=evidence.vector_bytes,
    )


def share_of(log: Log, updates: Sequence[Contributions]) -> float:
    """The mean share of a peer's contributions that is in these updates; 0 where there are none."""
    started = of_kind(log, PeerStarted)
    if not started or not updates:
        return 0.0
    return sum(update.get(started[-1].peer_id, 0.0) for update in updates) / len(updates)


def stalls_since(log: Log, since_s: float, ended_s: float) -> list[tuple[float, float]]:
    """(end, seconds) of the stalls that have begun since then. One that is not over at the end counts as long as it
    lasts."""
    stalls = [(event.mono_s, event.seconds) for event in of_kind(log, TrainerStalled)]
    offers = [event.mono_s for event in of_kind(log, OuterGradientOffered)]
    if offers and offers[-1] > (stalls[-1][0] if stalls else 0.0):
        stalls.append((ended_s, ended_s - offers[-1]))
    return [(end_s, seconds) for end_s, seconds in stalls if end_s - seconds > since_s]


def first_commit(logs: Sequence[Log], since_s: float) -> int | None:
    """1 where the first outer step of everybody, once all have joined, ends with a commit; None where none does."""
    commits = [event.mono_s for log in logs for event in rounds(log) if event.mono_s > since_s]
    if not commits:
        return None
    until_s = min(commits)
    missed = (
        sum(since_s < event.mono_s < until_s and not event.committed for event in of_kind(log, RoundEnded))
        for log in logs
    )
    return 1 + max(missed)


def in_vain(logs: Sequence[Log], since_s: float) -> int:
    """Outer steps that each of those that joined has ended since then, while nobody has committed any; 0 once one is
    committed."""
    if first_commit(logs, since_s) is not None:
        return 0
    joined = [log for log in logs if of_kind(log, PeerJoined)]
    return min((sum(event.mono_s > since_s for event in of_kind(log, RoundEnded)) for log in joined), default=0)


def losses(stalls: Sequence[tuple[float, float]], happened_s: float | None) -> list[float]:
    """What each stall after something happened took longer than the median of those before it, where that is more than
    noise."""
    before = [seconds for end_s, seconds in stalls if happened_s is None or end_s <= happened_s]
    if happened_s is None or not before:
        return []
    longer = (seconds - median(before) for end_s, seconds in stalls if end_s > happened_s)
    return [seconds for seconds in longer if seconds > NOISE_S]


def path_of(log: Log, connections: Connections | None, others: int) -> str:
    """How a trainer and the ``others``, the seed among them, are connected."""
    if connections is None or not of_kind(log, PeerJoined):
        return "none"
    if not of_kind(log, PeerStarted)[-1].maddrs:
        return "client"
    if connections.relayed:
        return "relay"
    if connections.direct >= others:
        return "direct"
    return f"direct to {connections.direct} of {others}" if connections.direct else "none"


def in_a_row(words: Sequence[str]) -> str:
    """All words, those that follow each other once, with their number."""
    groups = ((word, len(list(group))) for word, group in groupby(words))
    return ", ".join(f"{count} {word}" if count > 1 else word for word, count in groups)


# -- bounds ------------------------------------------------------------------------------------------------------------


def bounds_told() -> tuple[str, ...]:
    """What the bounds are."""
    return (
        f"bounds: others' share {OTHERS_SHARE:.0%} where a situation is hard for some. Where only the seed is public,",
        f"the first commit within {FIRST_COMMIT_WITHIN} outer steps, shares 100%, stall {HUB_STALL:g} times what all",
        f"contributions take over the seed's line, and {HUB_ROUND_TRIPS} round trips. IPv6 only: contributes. A new",
        f"address: others lose less than {ADDRESS_LOSS_S:g} s, once.",
    )


def missed_bounds(situation: Situation, figures: Figures) -> list[str]:
    """The bounds that a situation misses, each in words that begin with its name."""
    missed = [
        f"others' share: {name} {figures.shares[name]:.0%}, less than {OTHERS_SHARE:.0%}"
        for name in sorted(figures.shares.keys() - situation.troubled)
        if figures.shares[name] < OTHERS_SHARE
    ]
    missed += [
        f"contributes: {name} does not" for name in sorted(situation.contribute) if not figures.shares[name] > 0.0
    ]
    if situation.hub is not None:
        missed += missed_with_a_hub(figures, stall_with_a_hub_s(situation, figures))
    if situation.happens is not None:
        missed += missed_after_a_loss(
            {name: figures.losses[name] for name in figures.losses.keys() - situation.troubled}
        )
    return [f"{situation.name}: {bound}" for bound in missed]


def stall_with_a_hub_s(situation: Situation, figures: Figures) -> float:
    """The longest that the median stall may be where all that is contributed goes over the seed's line."""
    line = situation.hub
    assert line is not None
    assert line.up_mbit is not None
    wire_s = len(figures.shares) * figures.vector_bytes * 8 / (line.up_mbit * 1e6)
    return HUB_STALL * wire_s + HUB_ROUND_TRIPS * 2 * line.delay_s


def missed_with_a_hub(figures: Figures, most_s: float) -> list[str]:
    missed = []
    if figures.first_commit is None:
        missed.append("first commit: never")
    elif figures.first_commit > FIRST_COMMIT_WITHIN:
        missed.append(f"first commit: in outer step {figures.first_commit}, not within {FIRST_COMMIT_WITHIN}")
    least = min(figures.shares.values())
    if least < 1.0:
        missed.append(f"all contribute: the least {least:.0%}, not 100%")
    if figures.stall_s is None or figures.stall_s > most_s:
        told = "none to be seen" if figures.stall_s is None else f"median {figures.stall_s:.1f} s"
        missed.append(f"stall: {told}, more than {most_s:.1f} s")
    return missed


def missed_after_a_loss(losses: Mapping[str, Sequence[float]]) -> list[str]:
    return [
        f"others' loss: {name} {', '.join(f'{seconds:.1f}' for seconds in one)} s, not once less than "
        f"{ADDRESS_LOSS_S:g} s"
        for name, one in sorted(losses.items())
        if len(one) > 1 or max(one, default=0.0) >= ADDRESS_LOSS_S
    ]
