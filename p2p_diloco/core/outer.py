"""What is computed: the replicated outer state, the update of an outer step, and how one follows from the other.

The outer state ``S_t = (theta_t, momentum_t, head_t)`` is the same bits on every peer. An update ``U_t`` is the
averaged outer gradient as it went over the wire. Then ``S_{t+1} = apply(S_t, U_t)`` and
``head_{t+1} = H(head_t, U_t)``, so that 32 bytes name the whole history.

Rules of this file: numpy float32 only, every multiply and every add a ufunc of its own (a fused multiply-add rounds
once instead of twice, and not every processor has it), no BLAS, no reductions in ``apply``, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import blake3
import msgpack
import numpy as np

from p2p_diloco.core.codec import Codec, Vector, decode, encode, encoded_bytes
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS

PART_VALUES = 256 * 1024
HASH_BYTES = 32
MAX_CONTRIBUTORS = 256
"""Bits of a part's contributor mask, hence the largest group."""


def digest(*pieces: bytes) -> bytes:
    """blake2b, 32 bytes, over the lengths and the pieces, so that no two lists of pieces collide."""
    h = blake2b(digest_size=HASH_BYTES)
    for piece in pieces:
        h.update(len(piece).to_bytes(8, "big"))
        h.update(piece)
    return h.digest()


def part_slices(n: int) -> list[slice]:
    """The grid: ``n`` values cut into parts of 256 Ki. It depends on the model alone, never on the group."""
    return [slice(start, min(start + PART_VALUES, n)) for start in range(0, n, PART_VALUES)]


def next_head(head: bytes, link: bytes) -> bytes:
    """``head_{t+1} = H(head_t, U_t)``, with the update's link for ``U_t``."""
    return digest(head, link)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an update: the bytes its reducer sent to everybody, and whose contributions are in them."""

    mask: bytes
    """Little-endian bit set over the update's contributors: bit i is contributor i."""
    data: bytes
    """The encoded weighted mean of the outer gradients."""

    @cached_property
    def hash(self) -> bytes:
        return digest(self.mask, self.data)


@dataclass(frozen=True, kw_only=True)
class UpdateHeader:
    """All of an update but its values: what the members of a group agree on when they settle."""

    step: int
    """The outer step ``t`` that this update ends; it leads from ``S_t`` to ``S_{t+1}``."""
    parent: bytes
    """``head_t``."""
    contributors: tuple[tuple[str, int], ...]
    """(peer id, weight in tokens), in the order of the roster."""
    part_hashes: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        contributors = [[peer_id, weight] for peer_id, weight in self.contributors]
        packed: bytes = msgpack.packb([self.step, self.parent, contributors, list(self.part_hashes)])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> UpdateHeader:
        """ValueError when ``data`` is not exactly what ``to_bytes`` would give for a well-formed header."""
        try:
            step, parent, contributors, part_hashes = msgpack.unpackb(data, strict_map_key=True)
            header = cls(
                step=step,
                parent=parent,
                contributors=tuple((peer_id, weight) for peer_id, weight in contributors),
                part_hashes=tuple(part_hashes),
            )
            sound = (
                type(step) is int
                and 0 <= step < 2**40
                and type(parent) is bytes
                and len(parent) == HASH_BYTES
                and 0 < len(header.contributors) <= MAX_CONTRIBUTORS
                and all(type(p) is str and 0 < len(p) <= MAX_PEER_ID_CHARS for p, _ in header.contributors)
                and all(type(w) is int and 0 < w < 2**60 for _, w in header.contributors)
                and len({p for p, _ in header.contributors}) == len(header.contributors)
                and all(type(h) is bytes and len(h) == HASH_BYTES for h in header.part_hashes)
            )
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"not an update header: {type(error).__name__}") from error
        if not sound or header.to_bytes() != data:
            raise ValueError("not an update header: a field is out of its bounds")
        return header

    @cached_property
    def link(self) -> bytes:
        """32 bytes for ``U_t``; the part hashes stand for the values."""
        return digest(self.to_bytes())

    @cached_property
    def head(self) -> bytes:
        """``head_{t+1}``."""
        return next_head(self.parent, self.link)


@dataclass(frozen=True, kw_only=True)
class Update:
    """``U_t``. Complete by construction: ``parts[i].hash == header.part_hashes[i]``, and masks name contributors."""

    header: UpdateHeader
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if tuple(part.hash for part in self.parts) != self.header.part_hashes:
            raise ValueError(f"the parts of update {self.header.step} do not have the hashes that its header names")
        for part in self.parts:
            check_mask(part.mask, len(self.header.contributors))


@dataclass(kw_only=True)
class OuterState:
    """``S_t``. ``theta`` and ``momentum`` are float32 [n], written in place by ``apply`` and nothing else."""

    step: int
    head: bytes
    theta: Vector
    momentum: Vector

    def chunk_hashes(self) -> tuple[bytes, ...]:
        """blake3 of every part of theta, then of every part of momentum: 1 MiB each, the last one of either less."""
        slices = part_slices(len(self.theta))
        return tuple(
            blake3.blake3(vector[where].data.cast("B")).digest()
            for vector in (self.theta, self.momentum)
            for where in slices
        )

    def parts(self) -> list[tuple[Vector, Vector]]:
        """(theta, momentum) of every part: views of the state."""
        return [(self.theta[where], self.momentum[where]) for where in part_slices(len(self.theta))]

    def digest(self) -> bytes:
        """Of all bits of the state, 32 bytes: equal digests, equal replicas."""
        return state_digest(self.step, self.head, self.chunk_hashes())


def state_digest(step: int, head: bytes, chunk_hashes: Iterable[bytes]) -> bytes:
    """``OuterState.digest``. Who trusts it can check a list of chunk hashes against it, and then every chunk alone,
    whoever sends them."""
    return digest(b"state", step.to_bytes(8, "big"), head, *chunk_hashes)


def genesis_state(theta: Vector) -> OuterState:
    """``S_0``; its head names theta, so runs that start from other values never share a head."""
    momentum = np.zeros_like(theta)
    head = digest(b"genesis", blake3.blake3(theta.data.cast("B")).digest())
    return OuterState(step=0, head=head, theta=theta, momentum=momentum)


def apply(state: OuterState, update: Update, *, codec: Codec, lr: float, momentum: float) -> None:
    """One Nesterov step in place, as torch.optim.SGD(nesterov=True) does it (DiLoCo, arXiv 2311.08105, algorithm 1):

    ``m = mu * m + g``; ``theta = theta - lr * (g + mu * m)`` with ``g`` the decoded update.

    Everything is checked before the first value changes; ValueError when the update does not follow from ``state``,
    has the wrong number of parts, or a part does not decode.
    """
    check_update(state, update, codec)
    apply_checked(state, update, codec=codec, lr=lr, momentum=momentum)


def check_update(state: OuterState, update: Update, codec: Codec) -> None:
    """ValueError unless ``update`` can be applied to ``state``. Decodes every part once."""
    header = update.header
    if (header.step, header.parent) != (state.step, state.head):
        raise ValueError(f"update {header.step} does not follow from the state at outer step {state.step}")
    check_parts(update.parts, len(state.theta), codec)


def apply_checked(state: OuterState, update: Update, *, codec: Codec, lr: float, momentum: float) -> None:
    """The arithmetic of ``apply``, for an update that ``check_update`` has passed."""
    header = update.header
    for part, (theta, m) in zip(update.parts, state.parts()):
        apply_part(theta, m, decode(part.data, len(theta), codec), lr=lr, momentum=momentum)
    state.step, state.head = header.step + 1, header.head


def apply_part(theta: Vector, m: Vector, g: Vector, *, lr: float, momentum: float) -> None:
    """The arithmetic of ``apply`` on one part: theta and its momentum ``m`` in place; ``g`` is the decoded update."""
    lr32, mu32 = np.float32(lr), np.float32(momentum)
    np.multiply(m, mu32, out=m)
    np.add(m, g, out=m)
    nesterov = np.multiply(m, mu32)
    np.add(g, nesterov, out=nesterov)
    np.multiply(nesterov, lr32, out=nesterov)
    np.subtract(theta, nesterov, out=theta)


def check_parts(parts: Sequence[Part], n: int, codec: Codec) -> None:
    """ValueError unless ``parts`` are the encoded parts of a vector of ``n`` values. Decodes every part once."""
    slices = part_slices(n)
    if len(parts) != len(slices):
        raise ValueError(f"{len(parts)} parts, expected {len(slices)}")
    for i, (part, where) in enumerate(zip(parts, slices)):
        if len(part.data) != encoded_bytes(where.stop - where.start, codec):
            raise ValueError(f"part {i} has {len(part.data)} bytes")
    for part, where in zip(parts, slices):
        decode(part.data, where.stop - where.start, codec)


def weighted_mean(contributions: Sequence[tuple[int, Vector]], total: int | None = None) -> Vector:
    """float32 [n], the mean of the outer gradients weighted by tokens: ``sum_i float32(w_i / W) * g_i``, where W is
    ``total`` or, without it, the sum of the weights.

    The order is the roster's, so that a simulation without a network gets the same bits.
    """
    if total is None:
        total = sum(weight for weight, _ in contributions)
    mean = np.zeros_like(contributions[0][1])
    for weight, values in contributions:
        np.add(mean, np.multiply(values, np.float32(weight / total)), out=mean)
    return mean


def reduce_part(
    came: Mapping[int, Vector], weights: Sequence[int], n: int, codec: Codec, total: int | None = None
) -> Part:
    """What the reducer of a part of ``n`` values makes of the contributions that ``came``: index in the roster ->
    decoded values. ``weights``: of the whole roster; ``total`` as in ``weighted_mean``. Zeros where nothing came."""
    contributions = [(weights[i], values) for i, values in sorted(came.items())]
    mean = weighted_mean(contributions, total) if came else np.zeros(n, np.float32)
    return Part(mask=contributor_mask(came), data=encode(mean, codec))


def parts_with(update: Update, peer_id: str) -> set[int]:
    """The parts of an update that this peer's contribution is in."""
    names = [name for name, _ in update.header.contributors]
    if peer_id not in names:
        return set()
    bit = 1 << names.index(peer_id)
    return {i for i, part in enumerate(update.parts) if int.from_bytes(part.mask, "little") & bit}


def contributor_mask(indices: Iterable[int]) -> bytes:
    return sum(1 << i for i in set(indices)).to_bytes(MAX_CONTRIBUTORS // 8, "little").rstrip(b"\0")


def check_mask(mask: bytes, n_contributors: int) -> None:
    """ValueError unless ``contributor_mask`` would give ``mask`` for some of the contributors, or for none of them."""
    if mask.endswith(b"\0") or int.from_bytes(mask, "little") >> n_contributors:
        raise ValueError(f"a mask names others than the {n_contributors} contributors")


# An update as bytes, on disk and on the wire:
#
#     magic and version     8 bytes
#     header's length       4 bytes, big-endian
#     header                msgpack
#     head                  32 bytes: the header is as checkable as the parts, whose hashes it holds
#     for each part         mask, padded to one bit per contributor; encoded values
#
# The header tells the length of everything behind it, so a wrong length is known from the first kilobytes.

UPDATE_MAGIC = b"DiLoCoU\x01"


def update_to_bytes(update: Update) -> bytes:
    return b"".join(update_pieces(update))


def update_pieces(update: Update) -> list[bytes]:
    """What ``update_to_bytes`` joins, the start first; the parts' values are not copied."""
    mask_bytes = _mask_bytes(update.header)
    pieces = [update_start(update.header)]
    for part in update.parts:
        pieces += [part.mask.ljust(mask_bytes, b"\0"), part.data]
    return pieces


def update_start(header: UpdateHeader) -> bytes:
    """All of an update that comes before its parts."""
    packed = header.to_bytes()
    return b"".join((UPDATE_MAGIC, len(packed).to_bytes(4, "big"), packed, header.head))


def part_places(header: UpdateHeader, n: int, codec: Codec) -> list[slice]:
    """Where the parts lie in the bytes of an update of ``n`` values."""
    places, start = [], len(update_start(header))
    for where in part_slices(n):
        stop = start + _mask_bytes(header) + encoded_bytes(where.stop - where.start, codec)
        places.append(slice(start, stop))
        start = stop
    return places


def part_from_bytes(data: bytes | memoryview, header: UpdateHeader) -> Part:
    """``data``: one part of an update, of any content. The header's hashes tell whether it is the right one."""
    mask_bytes = _mask_bytes(header)
    return Part(mask=bytes(data[:mask_bytes]).rstrip(b"\0"), data=bytes(data[mask_bytes:]))


def update_from_bytes(data: bytes, *, n: int, codec: Codec) -> Update:
    """ValueError unless ``update_to_bytes`` would give ``data`` for an update of ``n`` values; they are not decoded."""
    header, view = open_update(data, len(data), n=n, codec=codec), memoryview(data)
    return Update(
        header=header, parts=tuple(part_from_bytes(view[place], header) for place in part_places(header, n, codec))
    )


def open_update(start: bytes, size: int, *, n: int, codec: Codec) -> UpdateHeader:
    """The header of an update of ``size`` bytes. ``start``: its first bytes, at least ``max_update_start_bytes(n)`` or
    all. ValueError when the size is not what the header makes it."""
    header_bytes = int.from_bytes(start[8:12], "big")
    if not start.startswith(UPDATE_MAGIC) or header_bytes > max_update_start_bytes(n):
        raise ValueError("not an update")
    header = UpdateHeader.from_bytes(start[12 : 12 + header_bytes])
    offset = 12 + header_bytes + HASH_BYTES
    if start[12 + header_bytes : offset] != header.head:
        raise ValueError("the header of an update does not have the head beside it")
    if len(header.part_hashes) != len(part_slices(n)):
        raise ValueError(f"an update of {len(header.part_hashes)} parts, expected {len(part_slices(n))}")
    expected = offset + _values_bytes(n, codec, _mask_bytes(header))
    if size != expected:
        raise ValueError(f"an update of {size} bytes, expected {expected}")
    return header


def max_update_start_bytes(n: int) -> int:
    """Upper bound of all that comes before the parts: a contributor is an array of a string and an integer."""
    contributor_bytes = 1 + 3 + 4 * MAX_PEER_ID_CHARS + 9  # 4: a character in UTF-8
    header_bytes = 1 + 9 + (2 + HASH_BYTES) + 5 + MAX_CONTRIBUTORS * contributor_bytes
    return 12 + header_bytes + 5 + (2 + HASH_BYTES) * len(part_slices(n)) + HASH_BYTES


def max_update_bytes(n: int, codec: Codec) -> int:
    return max_update_start_bytes(n) + _values_bytes(n, codec, MAX_CONTRIBUTORS // 8)


def _mask_bytes(header: UpdateHeader) -> int:
    return -(-len(header.contributors) // 8)


def _values_bytes(n: int, codec: Codec, mask_bytes: int) -> int:
    return sum(mask_bytes + encoded_bytes(where.stop - where.start, codec) for where in part_slices(n))
