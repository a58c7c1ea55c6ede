"""Whole numbers as ranges: which ids of a table have been counted, and which are left."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# What PostgreSQL's bigint holds. The greatest is nobody's id: it would have no next one.
LEAST, GREATEST = -(2**63), 2**63 - 1


@dataclass(slots=True)
class Ranges:
    """Disjoint, ascending, with a gap between two: of each the first and the last number."""

    spans: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.spans)

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self.spans, (number, GREATEST)) - 1
        return place >= 0 and self.spans[place][0] <= number <= self.spans[place][1]

    def last(self, otherwise: int) -> int:
        return self.spans[-1][1] if self.spans else otherwise

    def with_numbers(self, numbers: Iterable[int]) -> "Ranges":
        """Also these, whatever their order."""
        return Ranges(list(_joined(sorted([*self.spans, *((number, number) for number in numbers)]))))

    def above(self, floor: int) -> "Ranges":
        """What of it is greater."""
        start = max(0, bisect_right(self.spans, (floor, GREATEST)) - 1)
        return Ranges([(max(first, floor + 1), last) for first, last in self.spans[start:] if last > floor])

    def gaps(self, after: int) -> list[tuple[int, int]]:
        """What is missing above a number, as pairs of numbers that are not in it themselves; the last one is open."""
        found, before = [], after
        for first, last in self.above(after).spans:
            if first > before + 1:
                found.append((before, first))
            before = last
        return [*found, (before, GREATEST)]


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    first, last = None, 0
    for begin, end in spans:
        if first is not None and begin <= last + 1:
            last = max(last, end)
            continue
        if first is not None:
            yield first, last
        first, last = begin, end
    if first is not None:
        yield first, last
