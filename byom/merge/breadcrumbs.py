"""Model Breadcrumbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from byom.errors import OptionError, fraction, one_of
from byom.functional.deltas import total, weighted
from byom.functional.rows import leading
from byom.functional.selection import Part, kept, locate
from byom.merge.base import Group, TensorwiseMethod, rowwise
from byom.merge.base.checks import signed_weights

Granularity = Literal["per_row", "per_tensor"]


@dataclass(frozen=True)
class ModelBreadcrumbs(TensorwiseMethod):
    """Drop each task's largest and smallest changes of every row, and add what is left.

    With the entries of a row ranked by magnitude, those of ranks ``(removed, removed + kept]`` survive, where
    ``removed = floor(remove_top * n)`` and ``kept = floor(keep * n)``, ties going to the lowest position;
    ``theta = theta_0 + scale * sum_t m_t tau_t``. Short rows therefore keep nothing where ``keep * n < 1``, and lose no
    outlier where ``remove_top * n < 1``. A 0-dim parameter is kept whole. With task weights the sum is
    ``sum_t w_t m_t tau_t``.

    Args:
        keep: Fraction of a row's entries that survive, in [0, 1]; ``gamma - beta`` of the paper.
        remove_top: Fraction of largest entries removed first, in [0, 1]; ``1 - gamma`` of the paper. The two
            fractions together are at most 1.
        scale: Scaling coefficient (alpha), any real number.
        granularity: ``per_row`` ranks along the last axis, a vector being one row (the authors' code);
            ``per_tensor`` ranks a whole parameter (the paper's layer).
        weights: Task weights (w) of either sign, in the order of the tasks; they are not divided by their sum. Empty
            weighs every task 1, and 0 leaves a task out.

    Raises:
        OptionError: If a hyperparameter is out of range, or the weights are not one finite number per task.

    References:
        Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks.
        https://arxiv.org/abs/2312.06795

    Differences:
        The paper's beta and gamma are positions of the cuts, those of the authors' code are the fractions kept and
        removed. Their rows of a convolution run along its last spatial axis, as here. They draw all three values at
        random when tuning; `grid` has the scale alone. mergekit ranks whole tensors, and lets a density of 1
        or more bypass the removal.
    """

    keep: float = 0.15
    remove_top: float = 0.006
    scale: float = 0.3
    granularity: Granularity = "per_row"
    weights: tuple[float, ...] = ()

    elementwise: ClassVar[bool] = False
    title = "Model Breadcrumbs"
    grid: ClassVar = {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}

    def __post_init__(self) -> None:
        fraction("merge.keep", self.keep)
        fraction("merge.remove_top", self.remove_top)
        if self.keep + self.remove_top > 1 + 1e-9:
            raise OptionError(
                f"merge.keep={self.keep} and merge.remove_top={self.remove_top} are more than all entries together; "
                "lower one of them"
            )
        one_of("merge.granularity", self.granularity, get_args(Granularity))
        object.__setattr__(self, "weights", signed_weights(self.weights))

    @property
    def scales_sum(self) -> bool:
        """See `MergeMethod.scales_sum`."""
        return True

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled sum of what is neither large nor small."""
        if self.granularity == "per_row" and group.pretrained.dim():
            return rowwise(group, self._whole_rows)
        return self._whole_rows(group)

    def _whole_rows(self, group: Group) -> Tensor:
        deltas = group.deltas
        for delta in deltas:
            delta.mul_(middle(delta, self.keep, self.remove_top, self.granularity))
        return group.pretrained + self.scale * total(weighted(deltas, self.weights))


def middle(delta: Tensor, keep: float, remove_top: float, granularity: Granularity = "per_row") -> Tensor:
    """Say which entries are neither among the largest nor among the smallest.

    Args:
        delta: ``[*shape]`` one task vector.
        keep: Fraction kept.
        remove_top: Fraction of largest entries removed.
        granularity: What is ranked together; see `ModelBreadcrumbs`.

    Returns:
        Bool ``[*shape]``.
    """
    if delta.dim() == 0:
        return torch.ones_like(delta, dtype=torch.bool)
    if granularity == "per_tensor":
        large, survivors = locate([Part.of(delta)], _ranks(delta.numel(), keep, remove_top))
        return survivors.mask(delta) & ~large.mask(delta)
    first, last = _ranks(delta.shape[-1], keep, remove_top)
    return leading(delta, last) & ~leading(delta, first)


def _ranks(n: int, keep: float, remove_top: float) -> tuple[int, int]:
    removed = kept(remove_top, n)
    return removed, min(n, removed + kept(keep, n))
