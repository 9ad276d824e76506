"""Which donor is asked for which item of a download. No I/O; the clock is an argument.

A donor has every item, unless it has shown which ones it has: then it is a *partner*, which downloads the same. What no
partner has is asked from donors first, so that few bytes come from those twice; and of that the own share, which no
partner begins with either, as long as they all know of each other. What a partner shows is a claim: it changes who is
asked for what, and no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from random import Random
from statistics import median

COPIES = 2
"""So many donors may be sending the same item."""
LATE = 3.0
LEAST_LATE_S = 1.0
RECENT = 16
"""Items whose times count."""
RARE = 3
"""Items that more partners have are all alike."""


class Handout:
    """Decides which donor is asked for which item: each from one donor unless it is late.

    An item is late when it has not come in ``late_s`` after it was asked for; once some items have come, in LATE times
    the median of what the last ones took, which is kept in ``took_s``. Then it is asked from a second donor, too.
    ``draw``: draws among items that are alike; without it the lowest comes first."""

    def __init__(
        self, items: Iterable[int], *, limit: int, late_s: float, took_s: deque[float], draw: Random | None = None
    ) -> None:
        self.missing = set(items)
        self.limit = limit
        """Items from here on are not asked for yet."""
        self._late_s = late_s
        self._draw = draw
        self._took_s = took_s
        self._first, self._end = min(self.missing, default=0), max(self.missing, default=0) + 1
        self._unasked = self._set(self.missing)
        """Sets of items are numbers here: bit 0 stands for the first one that is missing at the start."""
        self._shown: dict[str, int] = {}
        """Partner -> the items that it has."""
        self._common = [0] * RARE
        """The items that at least 1, 2, ... partners have."""
        self._share = 0
        """The items that I begin with."""
        self._asked: dict[int, dict[str, float]] = {}
        """Item -> who is asked for it, and since when; the item that was asked for first comes first."""

    def show(self, partner: str, items: int) -> None:
        """Notes which items a partner has: bit ``item`` is set for each."""
        self._shown[partner] = items >> self._first
        self._count()

    def share(self, me: str, partners: Collection[str]) -> None:
        """Notes who downloads the same. Everybody begins with another part of what there is, in the order of their
        ids."""
        everybody = sorted({me, *partners})
        place = everybody.index(me)
        start, stop = (self.limit * (place + more) // len(everybody) for more in (0, 1))
        self._share = ((1 << stop) - (1 << start)) >> self._first

    def is_of_use(self, partner: str) -> bool:
        """Returns whether a partner has anything that is missing."""
        return bool(self._shown.get(partner, 0) & (self._unasked | self._set(self._asked)))

    def take(self, donor: str, now_s: float) -> int | None:
        """Returns what ``donor`` shall be asked for now; None for nothing, for the time being."""
        item = self._choose(donor)
        if item is not None:
            self._unasked ^= 1 << (item - self._first)
        else:
            item = next((item for item, due_s in self._due_s(donor).items() if due_s <= now_s), None)
        if item is not None:
            self._asked.setdefault(item, {})[donor] = now_s
        return item

    def arrived(self, item: int, donor: str, now_s: float) -> bool:
        """Notes that an item has come. Returns whether it is the first time."""
        if item not in self.missing:
            return False
        self.missing.remove(item)
        self._took_s.append(now_s - self._asked.pop(item)[donor])
        return True

    def give_back(self, donor: str) -> None:
        """Has what ``donor`` still owes asked from others: it will send nothing more. A partner is none any more."""
        for item in [item for item, asked in self._asked.items() if donor in asked]:
            del self._asked[item][donor]
            if not self._asked[item]:
                del self._asked[item]
                self._unasked |= 1 << (item - self._first)
        if self._shown.pop(donor, None) is not None:
            self._count()

    def wait_s(self, donor: str, now_s: float) -> float:
        """Returns how long to wait before ``take`` may have something for ``donor``, unless an item comes, a donor is
        dropped or a partner shows more before."""
        return max(min(self._due_s(donor).values(), default=now_s + self._late_s) - now_s, 0.0)

    def _set(self, items: Iterable[int]) -> int:
        bits = bytearray((self._end - self._first + 7) // 8)
        for place in (item - self._first for item in items):
            bits[place // 8] |= 1 << place % 8
        return int.from_bytes(bits, "little")

    def _choose(self, donor: str) -> int | None:
        """Returns an item that nobody is asked for, and this donor has: one that few partners have, of those one of my
        share, and of those one that is drawn."""
        choice = self._unasked & ((1 << max(self.limit - self._first, 0)) - 1)
        if donor in self._shown:
            choice &= self._shown[donor]
        choice = next((rare for common in self._common if (rare := choice & ~common)), choice)
        choice = choice & self._share or choice
        if not choice:
            return None
        start = self._draw.randrange(self._end - self._first) if self._draw is not None else 0
        from_there = choice >> start << start or choice
        return self._first + (from_there & -from_there).bit_length() - 1

    def _has(self, donor: str, item: int) -> bool:
        return donor not in self._shown or bool(self._shown[donor] >> (item - self._first) & 1)

    def _count(self) -> None:
        """Counts anew how many partners have an item."""
        self._common = [0] * RARE
        for items in self._shown.values():
            for more in reversed(range(1, RARE)):
                self._common[more] |= self._common[more - 1] & items
            self._common[0] |= items

    def _due_s(self, donor: str) -> dict[int, float]:
        """Returns item -> when it is late, for those that may be asked from ``donor``, too."""
        late_s = max(LATE * median(self._took_s), LEAST_LATE_S) if self._took_s else self._late_s
        return {
            item: max(asked.values()) + late_s
            for item, asked in self._asked.items()
            if len(asked) < COPIES and donor not in asked and self._has(donor, item)
        }
