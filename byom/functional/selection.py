"""Exact global order statistics over a stream of tensors that need not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import floor, inf, sqrt

import numpy as np
import torch
from torch import Tensor

from byom.errors import OptionError, fraction
from byom.functional.compiled import kernels
from byom.functional.cut import Cut
from byom.functional.histogram import far, places
from byom.functional.rows import leading
from byom.functional.stream import Array, Part, Stream

__all__ = ["Cut", "Part", "kept", "locate", "locate_each", "top_mask"]

SAMPLE = 1 << 18  # sampled elements: brackets hold 2 * MARGIN * sqrt(p (1 - p) / SAMPLE) < 1 % of the stream
MARGIN = 5.0  # standard deviations on each side of a bracket: a miss costs one more pass, never an error
TOGETHER = 8  # brackets in one pass, which bounds the memory of the candidates
STRIDE = 16  # blocks of each stream that are read before the next stream's


def kept(density: float, n: int) -> int:
    """Number of survivors among `n` at a density: ``floor(density * n + 1e-9)``.

    The small term protects products such as 0.29 * 100 = 28.999999999999996.

    Args:
        density: Fraction kept, in [0, 1] (m).
        n: Number of elements.

    Returns:
        An integer in [0, n].

    Raises:
        OptionError: If the density lies outside [0, 1].
    """
    return min(n, floor(fraction("density", density) * n + 1e-9))


def top_mask(values: Tensor, density: float, dim: int | None = None) -> Tensor:
    """Say which entries are the largest in magnitude: exactly `kept` of them, ties going to the lowest position.

    Args:
        values: ``[*shape]``, floating-point and finite.
        density: Fraction kept, in [0, 1] (m).
        dim: None ranks the whole tensor; an axis ranks each of the vectors along it, and a 0-dim tensor is one entry.

    Returns:
        Bool ``[*shape]``.

    Raises:
        OptionError: If the density lies outside [0, 1].
    """
    if dim is None:
        return locate([Part.of(values)], [kept(density, values.numel())])[0].mask(values)
    vectors = torch.atleast_1d(values)
    return leading(vectors, kept(density, vectors.shape[dim]), dim).reshape(values.shape)


@torch.no_grad()
def locate(parts: Sequence[Part], counts: Sequence[int]) -> list[Cut]:
    """Find where to cut a stream so that exactly `count` entries survive, for every count at once.

    Survivors have the largest magnitudes; ties go to the lowest flat index, as a stable descending sort would
    have it. Magnitudes compare in fp32, in fp64 if any part is fp64. A seeded sample brackets every wanted
    rank; one blocked pass counts what lies above each bracket and collects the few values inside. A bracket
    that misses is moved and the pass repeated, so the sample decides the speed and never the result. The
    result does not depend on how the stream is split in parts.

    Args:
        parts: The tensors of the stream, in order; those on an accelerator are counted there (`histogram`).
        counts: Wanted numbers of survivors, in [0, n] with n the stream's length; up to 8 share a pass.

    Returns:
        One `Cut` per count, in the order given.

    Raises:
        OptionError: If a count lies outside [0, n].
        CheckpointError: If the stream holds NaN, infinities or values that are not floating-point.
    """
    return locate_each([parts], counts)[0]


@torch.no_grad()
def locate_each(streams: Sequence[Sequence[Part]], counts: Sequence[int]) -> list[list[Cut]]:
    """Find where to cut each of several streams; see `locate`.

    All are read side by side, so that what their parts have in common is read once, and by as many threads as torch
    has.

    Args:
        streams: The parts of each stream.
        counts: Wanted numbers of survivors, in [0, n] with n the length of every stream.

    Returns:
        For each stream one `Cut` per count, in the order given.
    """
    if any(map(far, streams)):
        return _there(streams, counts)
    kernels(sum(part.numel for parts in streams for part in parts))  # loaded here, or not at all
    with ThreadPoolExecutor(max(1, min(len(streams), torch.get_num_threads()))) as pool:
        searches = list(pool.map(_Search.of, streams, [counts] * len(streams)))
        while unfinished := [search for search in searches if search.next()]:
            blocks = max(search.stream.blocks for search in unfinished)
            for start in range(0, blocks, STRIDE):
                stride = range(start, start + STRIDE)
                if len(unfinished) == 1:
                    unfinished[0].scan(stride)
                else:
                    list(pool.map(_Search.scan, unfinished, [stride] * len(unfinished)))
    return [[search.cuts[count] for count in counts] for search in searches]


def _there(streams: Sequence[Sequence[Part]], counts: Sequence[int]) -> list[list[Cut]]:
    """Find the cuts of streams on an accelerator, where they lie."""
    n = sum(part.numel for part in streams[0])
    ends = _ends(n, counts)
    found = places(streams, sorted(set(counts) - set(ends)))
    every = [ends | {count: Cut(*place, count) for count, place in each.items()} for each in found]
    return [[cuts[count] for count in counts] for cuts in every]


def _ends(n: int, counts: Sequence[int]) -> dict[int, Cut]:
    """Return the cuts that keep all of a stream and nothing, having checked that all counts lie between."""
    for count in counts:
        if not 0 <= count <= n:
            raise OptionError(f"count={count} is not in [0, {n}]; compute it with kept(density, n)")
    return {n: Cut(0.0, n - 1, n), 0: Cut(inf, -1, 0)}


@dataclass
class _Search:
    """The search for the cuts of one stream: those that are found, and the brackets that are still to be looked at."""

    stream: Stream
    cuts: dict[int, Cut]
    pending: list[_Bracket]
    batch: list[_Bracket] | None = None  # what the pass that runs looks at; None before the first

    @staticmethod
    @torch.no_grad()  # what holds in the caller's thread does not in those of a pool
    def of(parts: Sequence[Part], counts: Sequence[int]) -> _Search:
        stream = Stream.of(parts)
        cuts = _ends(stream.numel, counts)
        return _Search(stream, cuts, _brackets(stream, sorted(set(counts) - set(cuts))))

    def next(self) -> bool:
        """Take stock of a pass, and say whether there is another; the first one looks for NaN even without brackets."""
        first, batch = self.batch is None, self.batch or []
        self.cuts |= {each.count: each.cut(self.stream) for each in batch if each.side() == 0}
        self.pending += [each.moved() for each in batch if each.side() != 0]
        self.batch, self.pending = self.pending[:TOGETHER], self.pending[TOGETHER:]
        return first or bool(self.batch)

    @torch.no_grad()
    def scan(self, blocks: range) -> None:
        for index in range(blocks.start, min(blocks.stop, self.stream.blocks)):
            block = self.stream.block(index)
            if not np.isfinite(block.max()):
                self.stream.refuse()
            for bracket in self.batch or ():
                bracket.add(block)


@dataclass
class _Bracket:
    """A magnitude interval that should hold the `count`-th largest, and what one pass found around it.

    The edges are counted apart from the inside, a number per block: a value shared by many entries is sampled
    often, so it becomes an edge and costs no memory.
    """

    count: int
    sample: Array  # ascending magnitudes
    margin: int  # in sample ranks
    low: float
    high: float
    above: int = 0
    at_high: list[int] = field(default_factory=list)
    inside: list[Array] = field(default_factory=list)
    at_low: list[int] = field(default_factory=list)

    def add(self, block: Array) -> None:
        if found := kernels(0) if block.dtype == np.float32 else None:
            room = np.empty(len(block) + 1, dtype=np.float32)
            above, high, low, between = found.tally(block, np.float32(self.low), np.float32(self.high), room)
            self.above += above
            self.at_high.append(high)
            self.at_low.append(low)
            self.inside.append(room[:between].copy())
            return
        chosen = block >= self.low
        reaching = int(np.count_nonzero(chosen))
        if self.low == self.high:
            self.at_high.append(reaching - int(np.count_nonzero(block > self.high)))
            self.above += reaching - self.at_high[-1]
            return
        chosen &= block <= self.high
        near = block[chosen]
        high, low = near == self.high, near == self.low
        self.above += reaching - len(near)
        self.at_high.append(int(high.sum()))
        self.at_low.append(int(low.sum()))
        self.inside.append(near[~(high | low)])

    def side(self) -> int:
        """Return the side of the bracket that the rank is on: 1 above it, 0 in it, -1 below."""
        if self.count <= self.above:
            return 1
        held = sum(self.at_high) + sum(map(len, self.inside)) + sum(self.at_low)
        return 0 if self.count <= self.above + held else -1

    def moved(self) -> _Bracket:
        """The neighbouring bracket on the side of the wanted rank, four times as wide."""
        margin = 4 * self.margin + 8
        low, high = self.low, self.high
        if self.side() > 0:
            low, high = high, _edge(self.sample, int(np.searchsorted(self.sample, high, "right")) + margin)
        else:
            low, high = _edge(self.sample, int(np.searchsorted(self.sample, low)) - margin), low
        return _Bracket(self.count, self.sample, margin, low, high)

    def cut(self, stream: Stream) -> Cut:
        """Turn the tallies into the cut; reads one block again to find the last tie's index."""
        rank = self.count - self.above
        if rank <= sum(self.at_high):
            return self._cut(stream, self.high, np.array(self.at_high), rank)
        rank -= sum(self.at_high)
        inside = np.concatenate(self.inside)
        if rank > len(inside):
            return self._cut(stream, self.low, np.array(self.at_low), rank - len(inside))
        inside.partition(len(inside) - rank)
        threshold = inside[-rank]
        ties = np.array([np.count_nonzero(piece == threshold) for piece in self.inside])
        return self._cut(stream, float(threshold), ties, rank - int(np.count_nonzero(inside > threshold)))

    def _cut(self, stream: Stream, threshold: float, ties: Array, rank: int) -> Cut:
        reached = np.cumsum(ties)
        index = int(np.searchsorted(reached, rank))
        among = rank - reached[index] + ties[index]
        local = np.flatnonzero(stream.block(index) == threshold)[among - 1]
        return Cut(threshold, index * len(stream.buffer) + int(local), self.count)


def _brackets(stream: Stream, counts: list[int]) -> list[_Bracket]:
    sample = np.sort(stream.at(_positions(stream.numel))) if counts else np.empty(0)
    return [_bracket(stream.numel, sample, count) for count in counts]


def _bracket(n: int, sample: Array, count: int) -> _Bracket:
    share, size = count / n, len(sample)
    margin, middle = int(MARGIN * sqrt(size * share * (1 - share)) + MARGIN), size - round(share * size)
    return _Bracket(count, sample, margin, _edge(sample, middle - margin), _edge(sample, middle + margin))


def _edge(sample: Array, rank: int) -> float:
    """A sampled magnitude, or beyond every magnitude where the sample ends."""
    if rank < 0:
        return -1.0
    return float(sample[rank]) if rank < len(sample) else inf


def _positions(n: int) -> Array:
    """One random flat position in each of `SAMPLE` equal stretches: ascending, and the same at every call."""
    size = min(SAMPLE, n, max(n // 16, 4096))  # sorting a sample must not cost more than the pass it saves
    spots = (np.arange(size) + np.random.default_rng(0).random(size)) * (n / size)
    return np.minimum(spots.astype(np.int64), n - 1)
