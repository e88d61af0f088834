"""Which lengths share a row."""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most `room` tokens, as lists of indices of `lengths`; no length is above `room`.

    Best fit decreasing: the longest first, each into the open row with the least room that is enough for it, of several the oldest, or
    into a new row. The rooms of open rows are kept sorted, so N lengths take O(N log N) steps. Ding et al. 2024, Fewer Truncations
    Improve Language Modeling, algorithm 1 and appendix A.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # of open rows, each once, ascending
    waiting: defaultdict[int, deque[list[int]]] = defaultdict(deque)  # room -> the rows that have it, the oldest first
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        place = bisect.bisect_left(rooms, lengths[index])
        if place < len(rooms):
            left = rooms[place]
            row = waiting[left].popleft()
            if not waiting[left]:
                del rooms[place]
        else:
            left, row = room, []
            rows.append(row)
        row.append(index)
        if left := left - lengths[index]:
            if not waiting[left]:
                bisect.insort(rooms, left)
            waiting[left].append(row)
    return rows


def powers(length: int, most: int) -> list[int]:
    """A length as a sum of powers of two, the largest first and none above `most`, itself a power of two."""
    rest = length % most
    return [most] * (length // most) + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
