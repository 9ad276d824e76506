"""The update of an outer step ``U_t``: what it holds, what names it, and how it lies on disk and goes over the wire.

An update is the averaged outer gradient as it went over the wire, and who contributed to each part. Its link stands for
it in ``head_{t+1} = H(head_t, U_t)``, so that 32 bytes name the whole history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgpack

from p2p_diloco.core.digest import HASH_BYTES, digest
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS

MAX_CONTRIBUTORS = 256
"""Bits of a part's contributor mask, hence the largest group."""
MAX_MASK_BYTES = MAX_CONTRIBUTORS // 8


def next_head(head: bytes, link: bytes) -> bytes:
    """Returns ``head_{t+1} = H(head_t, U_t)``, with the update's link for ``U_t``."""
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
        """Returns the header that ``data`` is. Raises ValueError when ``data`` is not exactly what ``to_bytes`` would
        give for a well-formed header."""
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
        """Returns 32 bytes that stand for ``U_t``; the part hashes stand for its values."""
        return digest(self.to_bytes())

    @cached_property
    def head(self) -> bytes:
        """Returns ``head_{t+1}``."""
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


def check_parts(parts: Sequence[Part], grid: Grid) -> None:
    """Raises ValueError unless ``parts`` are all parts of ``grid``, encoded. Decodes every part once."""
    if len(parts) != grid.n_parts:
        raise ValueError(f"{len(parts)} parts, expected {grid.n_parts}")
    for i, part in enumerate(parts):
        if len(part.data) != grid.part_bytes(i):
            raise ValueError(f"part {i} has {len(part.data)} bytes")
    for i, part in enumerate(parts):
        grid.decode(i, part.data)


def parts_with(update: Update, peer_id: str) -> set[int]:
    """Returns the parts of an update that this peer's contribution is in."""
    names = [name for name, _ in update.header.contributors]
    if peer_id not in names:
        return set()
    bit = 1 << names.index(peer_id)
    return {i for i, part in enumerate(update.parts) if int.from_bytes(part.mask, "little") & bit}


def contributors_in_full(update: Update, excused: Sequence[int]) -> list[str]:
    """Returns the peers whose contributions are in every part of an update. ``excused``: of each part, those from which
    none could come, as the bits of a number."""
    in_all = -1
    for part, bits in zip(update.parts, excused):
        in_all &= int.from_bytes(part.mask, "little") | bits
    return [name for i, (name, _) in enumerate(update.header.contributors) if in_all >> i & 1]


def in_most_parts(masks: Sequence[bytes]) -> bytes:
    """Returns the mask of the contributors that are in more than half of the parts with these masks."""
    counts: Counter[int] = Counter()
    for mask, parts in Counter(masks).items():  # nearly all parts have the same one
        for i in bits_of(mask):
            counts[i] += parts
    return contributor_mask(i for i, count in counts.items() if 2 * count > len(masks))


def bits_of(mask: bytes) -> list[int]:
    """Returns the indices of the contributors that a mask names, rising."""
    bits = int.from_bytes(mask, "little")
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def contributor_mask(indices: Iterable[int]) -> bytes:
    return sum(1 << i for i in set(indices)).to_bytes(MAX_CONTRIBUTORS // 8, "little").rstrip(b"\0")


def check_mask(mask: bytes, n_contributors: int) -> None:
    """Raises ValueError unless ``contributor_mask`` would give ``mask`` for some of the contributors, or for none of
    them."""
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
    """Returns what ``update_to_bytes`` joins, the start first; the parts' values are not copied."""
    mask_bytes = _mask_bytes(update.header)
    pieces = [update_start(update.header)]
    for part in update.parts:
        pieces += [part.mask.ljust(mask_bytes, b"\0"), part.data]
    return pieces


def update_start(header: UpdateHeader) -> bytes:
    """Returns all of an update that comes before its parts."""
    packed = header.to_bytes()
    return b"".join((UPDATE_MAGIC, len(packed).to_bytes(4, "big"), packed, header.head))


def part_places(header: UpdateHeader, grid: Grid) -> list[slice]:
    """Returns where the parts lie in the bytes of an update."""
    places, start = [], len(update_start(header))
    for part in range(grid.n_parts):
        stop = start + _mask_bytes(header) + grid.part_bytes(part)
        places.append(slice(start, stop))
        start = stop
    return places


def part_from_bytes(data: bytes | memoryview, header: UpdateHeader) -> Part:
    """Returns one part of an update. ``data``: its bytes, of any content. The header's hashes tell whether it is the
    right one."""
    mask_bytes = _mask_bytes(header)
    return Part(mask=bytes(data[:mask_bytes]).rstrip(b"\0"), data=bytes(data[mask_bytes:]))


def update_from_bytes(data: bytes, grid: Grid) -> Update:
    """Returns the update that ``data`` is; its values are not decoded. Raises ValueError unless ``update_to_bytes``
    would give ``data`` for an update of this grid."""
    header, view = open_update(data, len(data), grid), memoryview(data)
    return Update(
        header=header, parts=tuple(part_from_bytes(view[place], header) for place in part_places(header, grid))
    )


def open_update(start: bytes, size: int, grid: Grid) -> UpdateHeader:
    """Returns the header of an update of ``size`` bytes. ``start``: its first bytes, at least
    ``max_update_start_bytes(grid)`` or all. Raises ValueError when the size is not what the header makes it."""
    header_bytes = int.from_bytes(start[8:12], "big")
    if not start.startswith(UPDATE_MAGIC) or header_bytes > max_update_start_bytes(grid):
        raise ValueError("not an update")
    header = UpdateHeader.from_bytes(start[12 : 12 + header_bytes])
    offset = 12 + header_bytes + HASH_BYTES
    if start[12 + header_bytes : offset] != header.head:
        raise ValueError("the header of an update does not have the head beside it")
    if len(header.part_hashes) != grid.n_parts:
        raise ValueError(f"an update of {len(header.part_hashes)} parts, expected {grid.n_parts}")
    expected = offset + _values_bytes(grid, _mask_bytes(header))
    if size != expected:
        raise ValueError(f"an update of {size} bytes, expected {expected}")
    return header


def max_update_start_bytes(grid: Grid) -> int:
    """Returns an upper bound of all that comes before the parts."""
    # A contributor is an array of a string and an integer.
    contributor_bytes = 1 + 3 + 4 * MAX_PEER_ID_CHARS + 9  # 4: a character in UTF-8
    header_bytes = 1 + 9 + (2 + HASH_BYTES) + 5 + MAX_CONTRIBUTORS * contributor_bytes
    return 12 + header_bytes + 5 + (2 + HASH_BYTES) * grid.n_parts + HASH_BYTES


def max_update_bytes(grid: Grid) -> int:
    """Returns an upper bound of a whole update."""
    return max_update_start_bytes(grid) + _values_bytes(grid, MAX_CONTRIBUTORS // 8)


def _mask_bytes(header: UpdateHeader) -> int:
    return -(-len(header.contributors) // 8)


def _values_bytes(grid: Grid, mask_bytes: int) -> int:
    return grid.n_parts * mask_bytes + grid.vector_bytes
