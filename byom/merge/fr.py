"""FR-Merging: task vectors without a part of their frequencies, added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.errors import at_least
from byom.functional.deltas import total
from byom.merge.base import Group, TensorwiseMethod
from byom.merge.base.matrices import by_matrix, patterns

RING = 10  # bins at this part of the shorter side are in both of the authors' bands, which they add


@dataclass(frozen=True)
class FrequencyMerging(TensorwiseMethod):
    """Take the low frequencies out of each task vector, a matrix being read as an image, and add what is left.

    ``theta = theta_0 + scale * sum_t F^{-1}(mask * F(tau_t))`` with the two-dimensional Fourier transform F of a matrix
    ``[m, n]``. Kept are the bins whose index lies within ``radius * min(m, n)`` of the middle of the grid as the
    transform returns it, where the lowest frequencies are in the corners. What is not a matrix is added whole. The
    filter is linear, so it is applied to the sum, once.

    Args:
        radius: Of the bins that are kept, in shares of the shorter side; at least 0. ``sqrt(2) / 2`` keeps all of a
            square matrix.
        scale: Scaling coefficient, any real number.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        FREE-Merging: Fourier Transform for Efficient Model Merging, FR-Merging. https://arxiv.org/abs/2411.16815

    Differences:
        This is the authors' code, whose mask the paper describes otherwise. Bins at a distance of exactly a tenth of
        the shorter side, rounded down, are in two of its bands and count twice: a few dozen of a large matrix; those
        within it are kept at any radius. At their radius of 0.7 it drops 113 of the 589,824 bins of a 768 x 768 matrix,
        but 58 % of a fused 2304 x 768 one and 68 % of 3072 x 768, since a disc of the shorter side does not reach far
        along the longer one. They filter the weights whose names hold ``attn`` or ``mlp``; the RoBERTa script takes the
        longer side. The experts of FREE-Merging are ``byom=post_pruning byom.rescale=free``.
    """

    radius: float = 0.7
    scale: float = 0.5
    exclude: tuple[str, ...] = ("*embed*", "*text_projection*", "*visual.proj")

    elementwise = False
    title = "FR-Merging"
    grid: ClassVar = {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}

    def __post_init__(self) -> None:
        at_least("merge.radius", self.radius, 0, "0.7")
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled sum, filtered if it is a matrix."""
        deltas = group.deltas
        change = by_matrix(group.name, deltas, lambda stack: filtered(total(stack), self.radius), self.exclude)
        return group.pretrained + self.scale * (total(deltas) if change is None else change)


def filtered(matrix: Tensor, radius: float) -> Tensor:
    """Keep the frequencies whose bins lie around the middle of the transform's grid; see `FrequencyMerging`.

    Args:
        matrix: ``[m, n]``.
        radius: In shares of the shorter side.

    Returns:
        ``[m, n]`` in the dtype given, the real part.
    """
    rows, columns = (torch.arange(size, device=matrix.device) - size // 2 for size in matrix.shape)
    distance, side = rows[:, None].square() + columns.square(), min(matrix.shape)
    ring = (side // RING) ** 2
    bands = distance <= ring, (distance >= ring) & (distance <= (radius * side) ** 2)
    return torch.fft.ifft2(torch.fft.fft2(matrix) * sum(band.to(matrix.dtype) for band in bands)).real
