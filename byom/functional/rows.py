"""The largest entries of every row of a matrix, exactly: as a mask, and as thresholds that give it piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from byom.functional.stream import Part

PIECE = 1 << 18  # elements looked at together


def leading(values: Tensor, count: int, dim: int = -1) -> Tensor:
    """Say which `count` entries of each vector along an axis are the largest in magnitude.

    Args:
        values: ``[*shape]``, floating-point and finite, not 0-dim.
        count: How many survive of each vector, at most its length.
        dim: The axis.

    Returns:
        Bool ``[*shape]``; ties go to the lowest position.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    sizes = values.abs()
    threshold = sizes.topk(count, dim, sorted=False).values.amin(dim, keepdim=True)
    above, ties = sizes > threshold, sizes == threshold
    return above | ties & (ties.cumsum(dim) <= count - above.sum(dim, keepdim=True))


@dataclass(frozen=True, eq=False)
class RowCut:
    """The places where the rows of a matrix are cut so that the same number of entries survives in each.

    Attributes:
        thresholds: ``[rows]`` magnitudes of each row's smallest survivor; infinite if none survives.
        last: int64 ``[rows]``, position in the row of the last survivor that equals the threshold.
        width: Length of a row.
    """

    thresholds: Tensor
    last: Tensor
    width: int

    def mask(self, values: Tensor, offset: int = 0) -> Tensor:
        """Say which entries survive; see `Cut.mask`.

        Args:
            values: A contiguous stretch of the matrix, any shape.
            offset: Flat index in the matrix of the first element of `values`.

        Returns:
            Bool, of the shape of `values`.
        """
        sizes = values.detach().reshape(-1).abs()
        survives = torch.empty(sizes.shape, dtype=torch.bool, device=sizes.device)
        for start in range(0, len(sizes), PIECE):
            piece = sizes[start : start + PIECE]
            places = torch.arange(offset + start, offset + start + len(piece))
            rows = places // self.width
            thresholds = self.thresholds[rows].to(piece.device)
            early = (places % self.width <= self.last[rows]).to(piece.device)
            survives[start : start + PIECE] = (piece > thresholds) | (piece == thresholds) & early
        return survives.reshape(values.shape)


def row_cuts(part: Part, width: int, counts: Sequence[int]) -> list[RowCut]:
    """Find where every row of a matrix is cut, for several numbers of survivors in one pass.

    Args:
        part: The matrix, flat.
        width: Length of a row.
        counts: Numbers of survivors per row, at most its length.

    Returns:
        One cut per count, in the order given.
    """
    rows = max(PIECE // max(width, 1), 1) * width
    thresholds: list[list[Tensor]] = [[torch.empty(0)] for _ in counts]
    last: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64)] for _ in counts]
    for start in range(0, part.numel, rows or 1):
        matrix = part.read(slice(start, start + rows)).reshape(-1, width)
        sizes, places = matrix.abs(), torch.arange(width, device=matrix.device)
        for count, edges, ties in zip(counts, thresholds, last, strict=True):
            survives = leading(matrix, count)
            edge = sizes.masked_fill(~survives, inf).amin(-1)
            edges.append(edge.cpu())
            ties.append((survives & (sizes == edge[:, None])).mul(places).amax(-1).cpu())
    return [RowCut(torch.cat(edges), torch.cat(ties), width) for edges, ties in zip(thresholds, last, strict=True)]
