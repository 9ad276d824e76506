"""The records of a run's peers -> the swarm as a whole. Pure.

Everything here is what peers say of themselves. What a liar can reach is bounded: where the swarm stands has a majority
(``swarm_head.swarm_head``), who evaluates stands there (``swarm_head.newest_evaluation``), and what is not finite is
left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Literal, TypeVar, get_args

from p2p_diloco.core.addresses import METRICS_FLAG, Endpoint, dial_bytes, is_public, publicness
from p2p_diloco.core.admission import one_vote_each
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.invitation import open_seat
from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import newest_evaluation, swarm_head

T = TypeVar("T")
State = Literal["training", "round", "joining", "seed"]
STATES: tuple[State, ...] = get_args(State)
PHASES_OF_A_ROUND = ("gather", "reduce", "settle", "apply")
MAX_JOIN_ADDRESSES = 3
SAFE_TO_PASTE = re.compile(r"[A-Za-z0-9/.:_-]+")
"""Of an address that somebody pastes into a shell."""


@dataclass(frozen=True, kw_only=True)
class SeatRow:
    """An invitation under which peers are there now."""

    name: str
    token: str
    """Its id."""
    places: int
    """How many of its peers a round takes."""
    peers: int
    expires_s: int
    """Unix time."""


@dataclass(frozen=True, kw_only=True)
class CertificateRow:
    """The certificate of an update, in figures."""

    signatures: int
    certifying: int
    """Members that certify: most of them have to sign."""
    witnessed: bool
    """The run's owner has signed it, too."""
    helped: bool
    """The owner's seed has led its round, and averaged."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The swarm at one moment; a figure that nobody reports is None."""

    now_s: float
    """Unix time."""
    records: Sequence[Record]
    """Of the live peers."""
    step: int | None
    """Outer step of the swarm's head; None when nobody is there."""
    heads: int
    """Different heads among the peers that stand at ``step``."""
    peers: dict[State, int]
    tokens: int
    """Trained on by the live peers, each since it joined."""
    tokens_per_s: float | None
    loss: float | None
    """Nats per token: the trainers' mean, weighted by their tokens per second."""
    held_out_loss: float | None
    """Nats per token, of theta at outer step ``held_out_step``, the newest one evaluated."""
    held_out_step: int
    round_s: float | None
    """Median of the peers' last rounds."""
    known_members: int | None
    """Peers that are known at the swarm's head, as most of those there say."""
    certificate: CertificateRow | None
    """Of the update that led to the swarm's head, as most of those say that made it."""
    awaiting_witness: int
    """Trainers on the swarm's head whose last round did not commit for want of the owner's witness."""
    seats: Sequence[SeatRow]
    """Of a run by invitation, by name."""
    anchored_step: int
    """Newest outer step that the run's owner has anchored, as half of the live peers say at least; 0 where there is
    none."""
    found_wrong: int
    """Peers that have reduced parts wrongly, as half of the live peers say at least."""
    barred: int
    """Peers that are barred from the run, as half of the live peers say at least."""

    @property
    def waits_for_owner(self) -> bool:
        """Returns whether most trainers on the swarm's head wait for the owner's witness: a few who say so may lie."""
        here = [record for record in self.records if record.step == self.step and record.role == "trainer"]
        return 2 * self.awaiting_witness > len(here)


def overview_of(records: Sequence[Record], now_s: float) -> Overview:
    """Returns the swarm at one moment. ``records``: of the live peers, verified."""
    swarm = swarm_head(one_vote_each(records), None)
    step = None if swarm is None else swarm[0]
    trainers = [record for record in records if record.role == "trainer"]
    held_out_step, held_out_loss = newest_evaluation(records, swarm) or (0, None)
    states = Counter(map(state_of, records))
    rounds_s = [record.round_s for record in records if record.group_size]
    there = [record for record in one_vote_each(records) if (record.step, record.head) == swarm]
    return Overview(
        now_s=now_s,
        records=records,
        step=step,
        heads=len({record.head for record in records if record.step == step}),
        peers={state: states[state] for state in STATES},
        tokens=sum(record.tokens for record in records),
        tokens_per_s=finite(sum((record.tokens_per_s for record in trainers), 0.0)),
        loss=mean_loss(trainers),
        held_out_loss=held_out_loss,
        held_out_step=held_out_step,
        round_s=finite(median(rounds_s)) if rounds_s else None,
        known_members=most_common(record.known_members for record in there),
        certificate=most_common(certificate_of(record) for record in there if record.certifying),
        awaiting_witness=sum(record.awaits_witness for record in there if record.role == "trainer"),
        seats=seats_of(records),
        anchored_step=median_low([record.anchored_step for record in records] or [0]),
        found_wrong=median_low([record.found_wrong for record in records] or [0]),
        barred=median_low([record.barred for record in records] or [0]),
    )


def most_common(values: Iterable[T]) -> T | None:
    """Returns the value that is there most often, the first of those that are there equally often; None where there is
    none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def certificate_of(record: Record) -> CertificateRow:
    """Returns what a record says of the certificate of the update that led to its peer's head."""
    return CertificateRow(
        signatures=record.signatures,
        certifying=record.certifying,
        witnessed=record.witnessed,
        helped=record.helped,
    )


def seats_of(records: Iterable[Record]) -> list[SeatRow]:
    """Returns a row for each invitation under which one of these peers takes part, by name."""
    peers = Counter(open_seat(record.seat, record.peer_id) for record in records if record.seat)
    rows = (
        SeatRow(name=one.name, token=one.token, places=one.places, peers=count, expires_s=one.expires_s)
        for one, count in peers.items()
    )
    return sorted(rows, key=lambda row: (row.name, row.token))


def state_of(record: Record) -> State:
    """Returns what a peer is doing, in fewer words than its phase."""
    if record.role == "seed":
        return "seed"
    if record.phase == "joining":
        return "joining"
    return "round" if record.phase in PHASES_OF_A_ROUND else "training"


def mean_loss(trainers: Iterable[Record]) -> float | None:
    """Returns the trainers' mean loss, weighted by their speed; where none of those that have a loss tells its speed,
    all of them count alike."""
    known = [(record.loss, record.tokens_per_s) for record in trainers if record.loss is not None]
    if not known:
        return None
    fastest = max(speed for _, speed in known)
    weights = [speed / fastest if fastest else 1.0 for _, speed in known]
    return finite(sum(loss * weight for (loss, _), weight in zip(known, weights)) / sum(weights))


def finite(number: float) -> float | None:
    """Returns the number; None where it is not finite."""
    return number if math.isfinite(number) else None


# -- addresses ---------------------------------------------------------------------------------------------------------


def addresses_to_join(records: Iterable[Record], initial_peers: Sequence[str]) -> list[str]:
    """Returns addresses of live peers for a line that others paste, one a peer. ``initial_peers``, those that whoever
    runs the monitor has named, come first; then seeds, then trainers, the most public ones first; none that is less
    public than the initial peers."""
    live = [record for record in records if not record.client_mode]
    ids, least = {record.peer_id for record in live}, least_public(initial_peers)
    chosen: dict[str, str] = {}
    for maddr in initial_peers:
        peer_id = maddr.rpartition("/p2p/")[2]
        if peer_id in ids:
            chosen.setdefault(peer_id, maddr)
    offered = [
        (record.role != "seed", publicness(maddr), maddr, record.peer_id)
        for record in live
        for maddr in record.maddrs
        if publicness(maddr) <= least
    ]
    for _, _, maddr, peer_id in sorted(offered):
        if len(chosen) >= MAX_JOIN_ADDRESSES:
            break
        if peer_id not in chosen and SAFE_TO_PASTE.fullmatch(maddr) and dial_bytes(peer_id, maddr) is not None:
            chosen[peer_id] = maddr
    return list(chosen.values())[:MAX_JOIN_ADDRESSES]


def scrape_targets(records: Iterable[Record], *, private: bool) -> dict[str, Record]:
    """Returns HOST:PORT -> the peer that announces its metrics there. Whoever follows it connects to where strangers
    point, so: public IP addresses only, and no names, which may stand for any address; ``private``: all of them. Of two
    peers that announce the same one, the first has it."""
    targets: dict[str, Record] = {}
    for record in records:
        try:
            endpoint = Endpoint.parse(record.metrics_addr, METRICS_FLAG)
        except UsageError:
            continue
        if private or (endpoint.ip is not None and is_public(endpoint.ip)):
            targets.setdefault(str(endpoint), record)
    return targets


def least_public(maddrs: Iterable[str]) -> int:
    """Returns the ``publicness`` of the least public address. A name counts as public."""
    return max(map(publicness, maddrs), default=0)
