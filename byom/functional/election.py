"""Trimming, electing a sign and merging in one pass over memory: `byom.functional.deltas` for kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byom.functional.compiled import operand, plain, spread
from byom.functional.selection import Cut

Array = NDArray[Any]

MOST = torch.finfo(torch.float32).max  # a weight or scale beyond it is torch's to judge
PIECE = 1 << 15  # elements of every task that are looked at together, so that trimmed ones stay in the caches
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # what takes values of any type along, by bytes


@dataclass(frozen=True)
class Election:
    """One parameter of all models, flat, and where each task vector is cut.

    Args:
        kernels: `byom.functional.kernels`.
        base: ``[n]`` theta_0.
        experts: ``[n]`` each.
        cuts: Of each task.
        offset: Flat index of the first element in the streams that were cut.
        weights: One per task, of either sign; empty weighs each 1.
    """

    kernels: Any
    base: Tensor
    experts: Sequence[Tensor]
    cuts: Sequence[Cut]
    offset: int
    weights: Sequence[float]

    @staticmethod
    def of(
        kernels: Any, base: Tensor, experts: Sequence[Tensor], located: Sequence[tuple[Any, int]], weights: Sequence
    ) -> Election | None:
        """Return the election where it fits kernels: plain tensors, and thresholds of fp32 for whole streams."""
        narrow = all(abs(weight) <= MOST for weight in weights)
        exact = all(isinstance(cut, Cut) and float(np.float32(cut.threshold)) == cut.threshold for cut, _ in located)
        if not (kernels and base.numel() and narrow and exact and plain(base, *experts)):
            return None
        flat = [expert.reshape(-1) for expert in experts]
        return Election(kernels, base.reshape(-1), flat, [cut for cut, _ in located], located[0][1], weights)

    def votes(self) -> int:
        """Return how many coordinates elect a plus, less those that elect a minus."""

        def counted(start: int, stop: int) -> int:
            return sum(self.kernels.votes(rows) for _, _, rows in self._trimmed(start, stop))

        return sum(spread(counted, len(self.base), PIECE))

    def merge(self, majority: float, scale: float, mean: bool, dtype: torch.dtype | None) -> Tensor:
        """Return the merged values.

        Args:
            majority: Sign of coordinates whose trimmed sum is 0.
            scale: lambda.
            mean: Whether to divide by the weights of what agrees.
            dtype: What the result is rounded to; None keeps fp32.

        Returns:
            ``[n]``.
        """
        merged = torch.empty(len(self.base), dtype=dtype or torch.float32)
        parts = np.abs(np.array(self.weights or [1.0] * len(self.experts), dtype=np.float32))
        numbers = np.float32(majority), parts, mean, np.float32(scale)

        def write(start: int, stop: int) -> None:
            room = np.empty(PIECE, dtype=np.float32)
            for first, base, rows in self._trimmed(start, stop):
                piece = merged[first : first + len(base)]
                out = piece.numpy() if piece.dtype == torch.float32 else room[: len(base)]
                self.kernels.elect(rows, base, *numbers, out)
                if piece.dtype != torch.float32:
                    piece.copy_(torch.from_numpy(out))

        spread(write, len(self.base), PIECE)
        return merged

    def survivors(self) -> tuple[Tensor, Tensor]:
        """Return where the first task vector survives its cut, and the expert's values there.

        Returns:
            Flat positions, int64 [k], ascending, and values ``[k]`` in the expert's dtype.
        """
        cut, expert = self.cuts[0], self.experts[0]
        bits = expert.detach().view(_BITS[expert.dtype.itemsize]).numpy()

        def found(start: int, stop: int) -> list[tuple[Array, Array]]:
            places, pieces = np.empty(PIECE, dtype=np.int64), []
            spare, other = np.empty(PIECE, dtype=np.float32), np.empty(PIECE, dtype=np.float32)
            for first in range(start, stop, PIECE):
                last = min(first + PIECE, stop)
                left = operand(self.kernels, expert[first:last], spare)
                right = operand(self.kernels, self.base[first:last], other)
                ties = self._ties(cut, first, last)
                count = self.kernels.survivors(left, right, np.float32(cut.threshold), ties, first, places)
                values = np.empty(count, dtype=bits.dtype)  # taken here, where they still lie in a cache
                self.kernels.gather(bits[first:last], places[:count], first, values)
                pieces.append((places[:count].copy(), values))
            return pieces

        every = [piece for pieces in spread(found, len(self.base), PIECE) for piece in pieces]
        places, values = (torch.from_numpy(np.concatenate(each)) for each in zip(*every, strict=True))
        return places, values.view(expert.dtype)

    def _ties(self, cut: Cut, first: int, last: int) -> int:
        """Return how many entries of a piece survive where they equal the threshold."""
        return min(max(cut.last + 1 - self.offset - first, 0), last - first)

    def _trimmed(self, start: int, stop: int) -> Iterator[tuple[int, Array, Array]]:
        """Yield the offset of each piece, theta_0 ``[n]`` and the trimmed task vectors ``[T, n]`` there."""
        size = min(PIECE, stop - start)
        rows = np.empty((len(self.experts), size), dtype=np.float32)
        spare, other = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.float32)
        weights = [np.float32(weight) for weight in self.weights or [1.0] * len(self.experts)]
        for first in range(start, stop, PIECE):
            last = min(first + PIECE, stop)
            base = operand(self.kernels, self.base[first:last], spare)
            piece = rows if last - first == size else np.empty((len(rows), last - first), dtype=np.float32)
            for row, expert, cut, weight in zip(piece, self.experts, self.cuts, weights, strict=True):
                ties = self._ties(cut, first, last)
                left = operand(self.kernels, expert[first:last], other)
                self.kernels.trim(left, base, np.float32(cut.threshold), ties, weight, row)
            yield first, base, piece
