"""Exact order statistics of streams that lie on an accelerator: histograms of the bits of magnitudes, level by level.

The bits of a magnitude, read as a whole number, are ordered as magnitudes are. A first pass counts their leading 16
bits, which says in which of 65,536 intervals every wanted rank lies; further ones, of that interval alone, count the
next bits. fp32 takes two passes, fp64 four, however many ranks are wanted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from byom.functional.stream import Part, Stream

CHUNK = 1 << 26  # elements looked at together
LEVELS = {torch.float32: (16, 15), torch.float64: (16, 16, 16, 15)}  # bits of a magnitude, from the leading ones on
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Place(NamedTuple):
    """The last survivor of a stream."""

    threshold: float  # its magnitude
    last: int  # its flat index


def far(parts: Sequence[Part]) -> bool:
    """Say whether some part of a stream is known to lie on an accelerator."""
    return any(part.device is not None and part.device.type != "cpu" for part in parts if part.numel)


def places(streams: Sequence[Sequence[Part]], counts: Sequence[int]) -> list[dict[int, Place]]:
    """Find the entry of each rank in magnitude, in several streams side by side.

    Args:
        streams: The parts of each stream, wherever each lies; all streams have parts of the same sizes.
        counts: Ranks, from 1 to the length of a stream; ties rank by position.

    Returns:
        For each stream rank to place.

    Raises:
        CheckpointError: If a stream holds NaN, infinities or values that are not floating-point.
    """
    searches = [_Search.of(parts, counts) for parts in streams]
    for level in range(max(len(search.levels) for search in searches)):
        going = [search for search in searches if level < len(search.levels) and (not level or counts)]
        for index in range(max((len(search.parts) for search in going), default=0)):
            for search in going:  # what streams have in common is read once
                search.look(index, level)
        for search in going:
            search.narrow(level)
    return [{count: search.place(count) for count in counts} for search in searches]


@dataclass
class _Wanted:
    """What is known of one rank: the leading bits of its magnitude, and its rank among those that share them."""

    rank: int
    prefix: int = 0


@dataclass
class _Search:
    parts: list[Part]
    dtype: torch.dtype
    wanted: dict[int, _Wanted]
    sums: dict[int, Tensor] = field(default_factory=dict)  # prefix to how many have each value of the next bits
    held: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # the last bits and how many, by part

    @staticmethod
    def of(parts: Sequence[Part], counts: Sequence[int]) -> _Search:
        stream = Stream.of(parts)
        return _Search(stream.parts, stream.buffer.dtype, {count: _Wanted(count) for count in counts})

    @property
    def levels(self) -> tuple[int, ...]:
        return LEVELS[self.dtype]

    def look(self, index: int, level: int) -> None:
        """Count the bits of one level in one part, among the magnitudes that share the bits above with a wanted one."""
        below, width = sum(self.levels[level + 1 :]), self.levels[level]
        for bits in self._bits(index):
            for prefix in {each.prefix for each in self.wanted.values()} or {0}:
                chosen = bits[bits >> (below + width) == prefix] if level else bits
                digits = (chosen >> below) & ((1 << width) - 1)
                if level == len(self.levels) - 1:
                    self._hold(prefix, index, digits)
                else:
                    counted = digits.bincount(minlength=1 << width).cpu()
                    self.sums[prefix] = self.sums[prefix] + counted if prefix in self.sums else counted

    def _hold(self, prefix: int, index: int, digits: Tensor) -> None:
        values, numbers = (each.cpu() for each in digits.unique(return_counts=True))
        held = self.held.setdefault(prefix, [(values[:0], numbers[:0])] * len(self.parts))
        held[index] = torch.cat([held[index][0], values]), torch.cat([held[index][1], numbers])

    def narrow(self, level: int) -> None:
        """Add the bits of one level to what is known of every rank."""
        width = self.levels[level]
        if not level:
            self._require_finite()
        for each in self.wanted.values():
            numbers = self._numbers(each.prefix, width)
            above = numbers.flip(0).cumsum(0)  # how many are at least as large, from the largest on
            place = int(torch.searchsorted(above, each.rank))
            each.rank -= int(above[place] - numbers.flip(0)[place])
            each.prefix = each.prefix << width | (len(numbers) - 1 - place)
        self.sums = {}

    def place(self, count: int) -> Place:
        """Return the place of a rank, reading one part again to find the last tie."""
        wanted, width = self.wanted[count], self.levels[-1]
        last = wanted.prefix & ((1 << width) - 1)
        ties = [int(numbers[values == last].sum()) for values, numbers in self.held[wanted.prefix >> width]]
        reached = [*accumulate(ties)]
        index = bisect_left(reached, wanted.rank)
        left, start = wanted.rank - reached[index] + ties[index], sum(part.numel for part in self.parts[:index])
        threshold = torch.tensor(wanted.prefix, dtype=BITS[self.dtype]).view(self.dtype).item()
        for bits in self._bits(index):
            same = (bits == wanted.prefix).nonzero().reshape(-1)
            if left <= len(same):
                return Place(threshold, start + int(same[left - 1]))
            left, start = left - len(same), start + len(bits)
        raise AssertionError("a part gave other values than before")

    def _numbers(self, prefix: int, width: int) -> Tensor:
        if prefix in self.sums:
            return self.sums[prefix]
        numbers = torch.zeros(1 << width, dtype=torch.int64)
        for values, counted in self.held[prefix]:
            numbers.index_add_(0, values.long(), counted)
        return numbers

    def _bits(self, index: int) -> Iterator[Tensor]:
        part = self.parts[index]
        for start in range(0, part.numel, CHUNK):
            yield part.read(slice(start, start + CHUNK)).to(self.dtype).abs().view(BITS[self.dtype])

    def _require_finite(self) -> None:
        """Refuse NaN and infinity, whose leading bits are those of infinity or above."""
        infinite = int(torch.tensor(torch.inf, dtype=self.dtype).view(BITS[self.dtype]))
        if 0 in self.sums and self.sums[0][infinite >> sum(self.levels[1:]) :].any():
            Stream.of(self.parts).refuse()
