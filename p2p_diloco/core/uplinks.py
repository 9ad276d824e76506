"""What peers say of each other's uplinks, and what a group makes of it. Pure.

Nobody is asked how fast its own line is. A peer that reduces sees how fast the contributions of the others come
(``round.measured``), and says so in its readiness: for each of them a tag, which names it on this head alone, and a
byte on a scale of powers of two, so that all take few bytes.

    a member's uplink   the lower median of what the others that certify say of it, each as at most LARGEST_UPLINK; the
                        group's median where nobody says anything
    the group's median  the lower one of those of its reducers of which somebody says anything
    what counts         within a factor of LARGEST_UPLINK_OVER_MEDIAN of the group's median; as the median itself where
                        it is NEARLY_MEDIAN

Only those are heard that certify: names cost nothing, and with most of those who certify a liar decides all else, too.
Where liars are most of those that have measured somebody, or half of them and call it slow, they have their way, within
these factors: a round then takes longer, by no more than ``shares.LARGEST_SHARE_OVER_EQUAL`` times. Whom they call fast
reduces more, and it is audited like everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from statistics import median_low

from p2p_diloco.core.digest import digest

TAG_BYTES = 4
UPLINK_BYTES = TAG_BYTES + 1
"""A tag, and a byte on the scale."""
MAX_UPLINKS = 32
"""In one readiness."""
LARGEST_UPLINK = 2**25
"""Bytes per second. Beyond it a round waits for processors, not for lines."""
LARGEST_UPLINK_OVER_MEDIAN = 4
NEARLY_MEDIAN = 0.75
"""Of the larger one: so near to the median an uplink is taken for equal to it, for that is how well it is measured."""


def tag_of(head: bytes, peer_id: str) -> bytes:
    """Returns what stands for a peer on a head: the beginning of its rank there, so that nobody can look in time for a
    key with another peer's tag."""
    return digest(head, peer_id.encode())[:TAG_BYTES]


def mark_of(uplink: int) -> int:
    """Returns the last mark on the scale that is not above an uplink, in bytes/s. Marks lie 7 to 13 % apart."""
    uplink = max(min(uplink, LARGEST_UPLINK), 8)
    octave = uplink.bit_length() - 4
    return 8 * octave + (uplink >> octave) - 8


def uplink_at(mark: int) -> int:
    """Returns the uplink at a mark, in bytes/s, at most LARGEST_UPLINK."""
    return min((8 + mark % 8) << (mark // 8), LARGEST_UPLINK)


def pack_uplinks(head: bytes, uplinks: Mapping[str, int]) -> bytes:
    """Returns what a readiness on ``head`` says of these peers: of the slowest ones, where there are more than
    MAX_UPLINKS, for it is these that the others wait for."""
    slowest = sorted(uplinks, key=lambda peer_id: (uplinks[peer_id], peer_id))[:MAX_UPLINKS]
    marks: dict[bytes, int] = {}
    for peer_id in reversed(slowest):
        marks[tag_of(head, peer_id)] = mark_of(uplinks[peer_id])
    return b"".join(tag + bytes([marks[tag]]) for tag in sorted(marks))


def check_uplinks(packed: bytes) -> None:
    """Raises ValueError unless this is a row of tags, rising, each with its mark."""
    if len(packed) % UPLINK_BYTES or len(packed) > MAX_UPLINKS * UPLINK_BYTES:
        raise ValueError(f"uplinks of {len(packed)} bytes")
    tags = [packed[start : start + TAG_BYTES] for start in range(0, len(packed), UPLINK_BYTES)]
    if any(earlier >= later for earlier, later in pairwise(tags)):
        raise ValueError("uplinks whose tags do not rise")


def unpack_uplinks(packed: bytes) -> dict[bytes, int]:
    """Returns tag -> uplink in bytes/s, of what ``check_uplinks`` has found sound."""
    ends = range(TAG_BYTES, len(packed), UPLINK_BYTES)
    return {packed[end - TAG_BYTES : end]: uplink_at(packed[end]) for end in ends}


def counted_uplinks(
    head: bytes, members: Sequence[str], said: Mapping[int, bytes], reducing: Collection[int]
) -> tuple[int, ...]:
    """Returns what the uplink of each member counts as. ``members``: their peer ids. ``said``: index of a member that
    certifies -> what its readiness says. ``reducing``: the members whose median is the group's."""
    heard = {teller: unpack_uplinks(packed) for teller, packed in said.items()}
    measured: dict[int, int] = {}
    for i, peer_id in enumerate(members):
        tag = tag_of(head, peer_id)
        if claims := [uplinks[tag] for teller, uplinks in heard.items() if teller != i and tag in uplinks]:
            measured[i] = median_low(claims)
    usual = median_low([measured[i] for i in reducing if i in measured] or [LARGEST_UPLINK])
    return tuple(_counts_as(measured.get(i, usual), usual) for i in range(len(members)))


def _counts_as(uplink: int, usual: int) -> int:
    if min(uplink, usual) >= NEARLY_MEDIAN * max(uplink, usual):
        return usual
    # No mark is below 8, and all from 32 on are multiples of 4: nothing is rounded that counts.
    return min(max(uplink, usual // LARGEST_UPLINK_OVER_MEDIAN), usual * LARGEST_UPLINK_OVER_MEDIAN)
