"""Who may meet in a round: readiness that its own peers signed, who leads, and whom a leader takes into its roster.

Rules of this file:

    - Nobody can choose to lead: ranks are hashes of head and peer id, and change with every head.
    - Only peers on the same head can meet.
    - Who is known is taken first, and unknown peers are few (``known``).

What makes a roster, and what follows from it, is in ``group``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import Annotated

from pydantic import Field

from p2p_diloco.core.admission import Seated, votes
from p2p_diloco.core.aggregate import Aggregation
from p2p_diloco.core.digest import digest
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, Identity
from p2p_diloco.core.known import Known, most_unknown
from p2p_diloco.core.reach import IPV4, Over, Reachable, Ways, fit_to_average, reaches
from p2p_diloco.core.records import MAX_SEAT_BYTES, Hash, Natural, Record, Signed, seal, unseal
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.core.uplinks import MAX_UPLINKS, UPLINK_BYTES, check_uplinks

READINESS_CONTEXT = b"p2p-diloco readiness\0"


class Readiness(Signed):
    """A peer's signed word that it is ready for one round on one head."""

    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    leader: Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
    """Whom it is given to: only that peer can put it into a roster."""
    step: Natural
    head: Hash
    weight: Annotated[int, Field(gt=0, lt=2**60)]
    """Tokens that this peer trained on since it took theta."""
    client_mode: bool
    dropped: bool = False
    """It reduces for the others and takes the update, but contributes nothing this time."""
    tokens_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Its speed, as it claims: others may plan more for it, and never fewer."""
    nonce: Annotated[bytes, Field(min_length=8, max_length=8)]
    """New for every attempt, so that no two rounds have the same id."""
    seat: Annotated[bytes, Field(max_length=MAX_SEAT_BYTES)] = b""
    """As in the peer's record."""
    helps: bool = False
    """It is the seed of the run's owner, which leads and reduces, and contributes nothing: as a member it stands
    behind all others, and outside everything that is counted."""
    uplinks: Annotated[bytes, Field(max_length=MAX_UPLINKS * UPLINK_BYTES)] = b""
    """How fast others send, as it has measured (``uplinks``). Nothing of itself is heard."""
    reached_over: Over = IPV4
    """As in the peer's record."""
    reaches_over: Over = IPV4
    """As in the peer's record."""


def seal_readiness(readiness: Readiness, identity: Identity) -> bytes:
    """Returns a readiness as the bytes that its peer has signed."""
    return seal(readiness, READINESS_CONTEXT, identity)


def open_readiness(sealed: bytes) -> Readiness:
    """Returns a sealed readiness. ValueError for anything that its own peer did not sign in exactly this form."""
    readiness = unseal(sealed, Readiness, READINESS_CONTEXT)
    check_uplinks(readiness.uplinks)
    return readiness


def new_nonce() -> bytes:
    """Returns what tells one attempt at a round from the next."""
    return os.urandom(8)


def rank(head: bytes, peer_id: str) -> bytes:
    """Returns the rank of a peer on a head: the smaller one is asked first to lead."""
    return digest(head, peer_id.encode())


def precedence(head: bytes, peer_id: str, known: Known) -> tuple[bool, bytes]:
    """Returns what peers are sorted by when they lead on a head: the known ones first, and then by rank."""
    return peer_id not in known.peers, rank(head, peer_id)


def form_roster(sealed: Iterable[bytes], head: bytes, max_group: int, known: Known, least_known: int) -> list[bytes]:
    """Returns the members of a round in the order of rank, the best-ranked ones when there are too many: the known ones
    first, and then as many others as these allow. ``least_known``: fewer known ones count as none, and those of one
    token count once."""
    ready = {one: open_readiness(one) for one in sealed}
    ranked = sorted(ready, key=lambda one: rank(head, ready[one].peer_id))
    familiar = [one for one in ranked if ready[one].peer_id in known.peers][:max_group]
    if votes(ready[one] for one in familiar) < least_known:
        return ranked[:max_group]
    strangers = [one for one in ranked if ready[one].peer_id not in known.peers]
    drawn = {*familiar, *strangers[: min(most_unknown(len(familiar)), max_group - len(familiar))]}
    return [one for one in ranked if one in drawn]


def has_place(peer_id: str, members: Sequence[Seated], max_group: int, known: Known, least_known: int) -> bool:
    """Returns whether a roster of these members has a place for one more, which is this peer. A full one has none,
    whoever may rank before its members."""
    familiar = [member for member in members if member.peer_id in known.peers]
    if len(members) >= max_group:
        return False
    if peer_id in known.peers or votes(familiar) < least_known:
        return True
    return len(members) - len(familiar) < most_unknown(len(familiar))


def counted_weights(
    tokens: Sequence[int], aggregation: Aggregation, on_missed: OnMissed, absent: int
) -> tuple[tuple[int, ...], int | None]:
    """Returns ``Group.weights`` and ``Group.total_weight`` of members that claim ``tokens`` each, where ``absent`` more
    peers train on their head."""
    usual = median_low(tokens)
    largest = math.floor(aggregation.largest_weight * usual)
    weights = tuple(min(claimed, largest) for claimed in tokens)
    return weights, sum(weights) + usual * absent if on_missed == "keep" else None


def on_head(records: Iterable[Record], head: bytes) -> list[Record]:
    """Returns the records of the trainers that will come to the next round on this head."""
    return [r for r in records if r.head == head and r.role == "trainer" and r.phase not in ("joining", "left")]


def leader_order(
    records: Iterable[Record], head: bytes, me: Seated, ways: Ways, known: Known, least_known: int
) -> list[str]:
    """Returns the peers that may lead a round on ``head``, the first choice first: those that most of all that are
    there reach, and I do. ``ways``: my own; I am one of them unless in client mode. Where at least ``least_known`` of
    all that are there are known, of whom those of one token count once, unknown ones lead only if none of these can be
    dialled."""
    here = on_head(records, head)
    among: list[Reachable] = [*here, ways]
    leaders = frozenset(r.peer_id for r in fit_to_average(here, among) if reaches(ways, r))
    if fit_to_average([ways], among):
        leaders |= {me.peer_id}
    if votes(peer for peer in (me, *here) if peer.peer_id in known.peers) >= least_known:
        leaders = known.peers & leaders or leaders
    return sorted(leaders, key=lambda peer_id: precedence(head, peer_id, known))


def announces_run(records: Iterable[Record], me: str) -> bool:
    """Returns whether I announce the run to newcomers. Some eight peers do, so the list stays short in a large
    swarm."""
    return sum(record.peer_id < me for record in records) < 8
