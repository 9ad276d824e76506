"""One round at one member, while it lasts: which peers meet, what I hold of the update so far, and which members I have
lost."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from p2p_diloco.core.aggregate import norm_of
from p2p_diloco.core.certificate import Taken
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.equivocation import TwoParts
from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.core.event import Uncertified
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import Group
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.recent import Recent
from p2p_diloco.core.signed_part import REDUCTION_BYTES, Contribution, Inputs, Place, Reduction, Version
from p2p_diloco.core.update import MAX_MASK_BYTES, Part, check_mask
from p2p_diloco.core.waiting import Bell
from p2p_diloco.round.kept import Kept
from p2p_diloco.round.signatures import Signatures
from p2p_diloco.wire.channel import Channel, Meter, Transport
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Witnessed

log = logging.getLogger(__name__)

LAPSED_SHARE = 0.25
"""Of ``Timeouts.part_s``: so long a reducer waits for a sender that was lost in an earlier round."""


class OwnWitness(Protocol):
    """Witnesses updates at the run's owner itself, where its seed helps."""

    def sign(self, group: Group, taken: Taken) -> Witnessed | No:
        """Returns the owner's signature over what a group has taken, or why it does not witness it."""
        ...


@dataclass(kw_only=True, eq=False)
class Meeting:
    """One round at one member. Theta and local are float32 [n] and do not change while it lasts: a contribution can be
    made again at any time, part by part as theta - local, and no buffer of outer gradients exists."""

    group: Group
    identity: Identity
    owner: str
    """The peer id of the run's owner."""
    transport: Transport
    protocol: str
    directory: Directory
    timeouts: Timeouts
    grid: Grid
    theta: Vector
    local: Vector
    min_group: int
    state: bytes = b""
    """The digest of my outer state, at an outer step at which a snapshot is due; empty elsewhere."""
    last_norms: Sequence[float] | None = None
    """The norm of each part of the update that led to theta; None where I do not have it."""
    lapsed: frozenset[str] = frozenset()
    """Peers that I lost in an earlier round, and that have not contributed in full since."""
    recent: Recent = field(default_factory=Recent)
    """How long others have kept me waiting in recent rounds."""
    uplinks: Mapping[str, int] = field(default_factory=dict)
    """Peer -> its uplink in bytes/s, as I have measured it; not of all."""
    credits_s: Mapping[str, float] = field(default_factory=dict)
    """Peer -> the seconds that it may still cost as a leader, when the round begins; those that are not here have cost
    nothing."""
    around: tuple[str, ...] = ()
    """Peers on this head that are no members, and may be in another round."""
    known: frozenset[str] = frozenset()
    """Peers that are known on this head, members or not."""
    own_witness: OwnWitness | None = None
    """At the seed of the run's owner."""
    signatures: Signatures = field(init=False)
    """Which commits the members have signed."""
    parts: list[Part | None] = field(init=False)
    """What I hold of the update; None for a part that I do not hold."""
    reductions: list[Reduction | None] = field(init=False)
    """What the reducer of each part that I hold has signed."""
    reduced: list[bytes] = field(init=False)
    """The hash of each part as its reducer has sent it to me, or I have reduced it; empty for the others."""
    norms: list[float] = field(init=False)
    """Of the parts that I have reduced or received; 0 for the others."""
    refused: set[bytes] = field(default_factory=set)
    """Hashes of parts that members hold, and that I do not take: see ``objection`` and ``takes``."""
    too_long: dict[int, tuple[Part, Reduction]] = field(default_factory=dict)
    """The parts among those that are longer than I expect, as their reducers have signed them: an audit shows whether
    they are wrong."""
    lonely: set[int] = field(default_factory=set)
    """Members that have reduced a part to which most of those that count have not come."""
    delivered: set[tuple[int, int]] = field(default_factory=set)
    """(number of the butterfly, part) of each contribution of mine that I have handed over in time."""
    kept: Kept | None = None
    """The contributions to the parts that I reduce; None in a run without audits."""
    audit_parts: int = 0
    """So many parts each member may ask me about."""
    lost: set[int] = field(default_factory=set)
    """Members that failed me in this round."""
    silent: set[int] = field(default_factory=set)
    """Those of them that were silent, which takes time; the others were gone, or broke the protocol."""
    elsewhere: set[int] = field(default_factory=set)
    """Those of them that have refused what is asked in a round: they may be in another one."""
    meter: Meter = field(default_factory=Meter)
    """The bytes of all streams of this round. The streams are not kept: a member may open any number of them."""
    changed: Bell = field(default_factory=Bell)
    """Rings when anything of this round has changed at this member."""
    uncertified: Uncertified = ""
    """What the last commit that I saw lacked for a certificate, as its leader says."""
    _versions: dict[tuple[int, int, int], Version] = field(default_factory=dict)
    """(reducer, number of the butterfly, part) -> the first version that has come, whoever sent it."""
    over: bool = False
    """Nothing more will be reduced or committed; what there is can still be served."""

    def __post_init__(self) -> None:
        self.me = self.group.index_of(self.identity.peer_id)
        self.within_call = self.group.reached_by(self.me) | {self.me}
        """The members that I reach, and I."""
        self.signatures = Signatures(group=self.group, owner=self.owner, barred=self.directory.barred)
        self.parts = [None] * self.grid.n_parts
        self.reductions = [None] * self.grid.n_parts
        self.reduced = [b""] * self.grid.n_parts
        self.norms = [0.0] * self.grid.n_parts

    def contribution(self, part: int) -> bytes:
        """Returns a part of my outer gradient, encoded. ValueError when training has made it infinite or NaN."""
        where = self.grid.slices[part]
        return self.grid.encode(np.subtract(self.theta[where], self.local[where]))

    def place(self, number: int, part: int) -> Place:
        """Returns what names a part, as butterfly ``number`` reduces it, in what is signed."""
        return Place(round_id=self.group.round_id, number=number, part=part)

    def signed_contribution(self, place: Place) -> Contribution:
        """Returns the same as I send it to the reducer of that part."""
        return Contribution.of(place, self.contribution(place.part), self.identity)

    def hashes(self) -> list[bytes]:
        """Returns the hashes of the parts that I hold, an empty one for each that I do not hold, or refuse."""
        return [part.hash if part and part.hash not in self.refused else b"" for part in self.parts]

    def hold_own(self, place: Place, held: Part, inputs: Inputs) -> None:
        """Signs and keeps a part of the update that I have reduced. ``inputs``: what stands for its contributions."""
        reduction = Reduction.of(place, held, inputs, self.me, self.identity)
        self.takes(place.part, held, reduction)  # others hear what I have, whether I take it or not
        self.hold_reduced(place.part, held, reduction)

    def hold_reduced(self, part: int, held: Part, reduction: Reduction) -> None:
        """Keeps a part of the update that I have reduced, or that its reducer has sent me."""
        self.reduced[part] = held.hash
        self.hold(part, held, reduction)

    def hold(self, part: int, held: Part, reduction: Reduction) -> None:
        """Keeps a part of the update, and what its reducer has signed."""
        self.parts[part], self.reductions[part] = held, reduction
        self.changed.ring()

    def forget(self, part: int) -> None:
        """Holds a part no more: it is reduced once more."""
        self.parts[part], self.reductions[part], self.reduced[part] = None, None, b""

    def index_of(self, peer_id: str) -> int:
        """Returns the index of a member in the roster. Misbehaved for any other peer."""
        try:
            return self.group.index_of(peer_id)
        except ValueError:
            raise Misbehaved(peer_id, "meddles with a round that it is no member of") from None

    async def open(self, member: int) -> Channel:
        """Opens a stream to a member."""
        peer_id = self.group.members[member].peer_id
        channel = await self.transport.open(peer_id, self.directory.maddrs(peer_id), self.protocol)
        self.count(channel)
        return channel

    def patience_s(self, sender: int) -> float:
        """Returns how long a reducer waits for a sender in all, beyond what its bytes take, in seconds."""
        lapsed = self.group.members[sender].peer_id in self.lapsed
        return self.timeouts.part_s * LAPSED_SHARE if lapsed else self.timeouts.part_s

    def limit_s(self, sender: int, sent_bytes: int) -> float:
        """Returns how long a reducer waits for a sender at a time, in seconds, which sends so many bytes from one of
        its contributions to the next. Where its uplink is not measured, it may be as slow as a sender may be at all."""
        uplink = self.uplinks.get(self.group.members[sender].peer_id, 0)
        need_s = sent_bytes / (uplink or self.timeouts.slow_rate_bytes_per_s)
        return min(self.recent.contribution_s(self.timeouts, need_s), self.patience_s(sender))

    def credit_s(self, member: int) -> float:
        """Returns the seconds that a member may still cost as a leader, below zero for a debt."""
        return self.credits_s.get(self.group.members[member].peer_id, self.timeouts.record_life_s)

    def count(self, channel: Channel) -> None:
        """Counts all bytes of a stream as this round's."""
        self.meter.sent += channel.meter.sent
        self.meter.received += channel.meter.received
        channel.meter = self.meter

    async def send_part(self, channel: Channel, part: Part, reduction: Reduction) -> None:
        """Sends a part of the update as one frame: a byte with the mask's length, the mask, the encoded mean, and what
        its reducer has signed."""
        await channel.send_frame(bytes([len(part.mask)]), part.mask, part.data, reduction.to_bytes())

    async def receive_part(self, channel: Channel, part: int, timeout_s: float) -> tuple[Part, Reduction]:
        """Returns a part of the update that a member sends, and what its reducer has signed. Misbehaved unless it is a
        sound part of this round that some member has reduced; Refused for a No in its place."""
        size = self.grid.part_bytes(part)
        data = await channel.receive_frame(1 + MAX_MASK_BYTES + size + REDUCTION_BYTES, timeout_s)
        if not data or len(data) != 1 + data[0] + size + REDUCTION_BYTES or data[0] > MAX_MASK_BYTES:
            raise channel.refusal(data) or Misbehaved(channel.peer_id, f"sends part {part} with a wrong length")
        received = Part(mask=data[1 : 1 + data[0]], data=data[1 + data[0] : -REDUCTION_BYTES])
        reduction = Reduction.from_bytes(data[-REDUCTION_BYTES:])
        try:
            check_mask(received.mask, len(self.group.weights))
            check_mask(reduction.inputs.senders, len(self.group.weights))
            values = self.grid.decode(part, received.data)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"sends part {part} that does not decode: {error}") from error
        if not self.is_signed(part, received, reduction):
            raise Misbehaved(channel.peer_id, f"sends part {part} that its reducer did not sign")
        if not self.group.may_have_made(received.mask, reduction.inputs.senders):
            raise Misbehaved(channel.peer_id, f"sends part {part} that no rule makes of what came to its reducer")
        self._compare_version(part, received, reduction)
        self.norms[part] = norm_of(values)
        return received, reduction

    def _compare_version(self, index: int, part: Part, reduction: Reduction) -> None:
        """Compares a part with the first that I have got of its reducer in that butterfly: who has signed two versions
        of it is barred. The round goes on, for each of them may have been taken in good faith."""
        version, reducer = Version.of(part, reduction), self.group.members[reduction.reducer].peer_id
        first = self._versions.setdefault((reduction.reducer, reduction.number, index), version)
        if not first.is_like(version) and reducer not in (self.owner, self.directory.barred.me):
            place = self.place(reduction.number, index)
            self.directory.barred.add(TwoParts(peer_id=reducer, place=place, versions=(first, version)))

    def is_signed(self, index: int, part: Part, reduction: Reduction) -> bool:
        """Returns whether the member that a reduction names has signed it for this part."""
        members = self.group.members
        return reduction.reducer < len(members) and reduction.is_signed(
            self.group.round_id, index, part, members[reduction.reducer].peer_id
        )

    def takes(self, index: int, part: Part, reduction: Reduction) -> bool:
        """Returns whether I take a part that is sound: the contributions of most of those who count came to its
        reducer. It may have been cut off from them, so it is not blamed, but another one does that part."""
        if not self.group.lacks_most(reduction.inputs.senders):
            return True
        log.warning("outer step %d: refused: part %d lacks most of the group", self.group.step, index)
        self.refused.add(part.hash)
        self.lonely.add(reduction.reducer)
        return False

    def objection(self, index: int, part: Part, reduction: Reduction) -> str:
        """Returns what is wrong with the part that was just received: it is longer than what honest members would make
        of their contributions. Empty where it is not. It is the word of the reducer that made it, and of nobody who
        has taken it: a slower member, whose own contribution is shorter, refuses more or less than others do."""
        norm, largest = self.norms[index], self._largest_norm(index)
        if norm <= largest:
            return ""
        self.too_long[index] = (part, reduction)
        return f"part {index} with a norm of {norm:.2g}, more than {largest:.2g}"

    def _largest_norm(self, part: int) -> float:
        """Returns the norm above which a part is refused. A seed that helps has no contribution to compare with, and
        refuses none."""
        where, group = self.grid.slices[part], self.group
        if group.members[self.me].helps:
            return math.inf
        mine = norm_of(np.subtract(self.theta[where], self.local[where]))
        last = None if self.last_norms is None else self.last_norms[part]
        return group.aggregation.largest_norm(mine, group.weights, self.me, last)

    def lose(self, member: int, error: RemoteError | None) -> None:
        """Gives a member up for the rest of this round, and counts on it no more until it signs a newer record.
        ``error``: what it did; None when it was silent."""
        if member in self.lost:
            return
        self.lost.add(member)
        if error is None or isinstance(error, Silent):
            self.silent.add(member)
        if isinstance(error, Refused):
            self.elsewhere.add(member)
        self.changed.ring()
        peer_id = self.group.members[member].peer_id
        self.transport.traffic.reject(error or Silent(peer_id, "silent"))
        self.directory.suspect(peer_id)
        log.info("outer step %d: without %s: %s", self.group.step, peer_id[-8:], error.reason if error else "silent")
