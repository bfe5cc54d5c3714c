"""Isotropic merging in the common subspace (Iso-C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from byom.errors import one_of
from byom.functional.deltas import total
from byom.functional.linalg import VANISHING, polar_and_values
from byom.merge.base import Group, TensorwiseMethod
from byom.merge.base.matrices import by_matrix, patterns

Rank = Literal["numerical", "full"]


@dataclass(frozen=True)
class IsotropicMergingCommon(TensorwiseMethod):
    """Sum the task vectors, then give every singular direction of a matrix the mean singular value.

    With ``sum_t tau_t = U diag(s) Vt``: ``theta = theta_0 + scale * mean(s) * U Vt``. What is not a matrix moves by
    ``scale`` times the mean of the task vectors. One task is changed as well. Nothing depends on T but the sum,
    and one decomposition per matrix is the cost.

    Args:
        scale: Scaling coefficient (alpha), any real number; the paper selects 1.3 for eight tasks on ViT-B/32, 1.0
            for 14 and 0.9 for 20.
        rank: Which directions count: ``numerical`` those whose singular value exceeds 1e-6 of the largest, for
            the mean as well as for the result; ``full`` all ``min(m, n)`` as in the paper, including the
            directions a sum of lower rank does not have (unused rows, low-rank updates), which LAPACK fills
            with arbitrary ones. The two are the same for a sum of full rank, and low-rank updates that were
            rounded into fp32 weights are of full rank.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If `rank` is unknown or `exclude` is not a list of patterns.

    References:
        No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Iso-C.
        https://arxiv.org/abs/2502.04959

    Differences:
        The authors search the scale in 0.1, 0.2, ..., 3.0 on validation data; `grid` is coarser. Paper and code
        use the full rank; here the numerical one is the default, because the rest is not defined by the
        matrix. Decompositions are in fp64, theirs in fp32. fusion-bench excludes no tensor by default.
    """

    scale: float = 1.3
    rank: Rank = "numerical"
    exclude: tuple[str, ...] = ("*text_projection*",)

    elementwise = False
    title = "Iso-C"
    grid: ClassVar = {"scale": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    def __post_init__(self) -> None:
        one_of("merge.rank", self.rank, get_args(Rank))
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled isotropic sum, or the scaled mean for what is not a matrix."""
        levelled = by_matrix(group.name, group.deltas, lambda deltas: isotropic(total(deltas), self.rank), self.exclude)
        mean = total(group.deltas) / len(group.experts) if levelled is None else levelled
        return group.pretrained + self.scale * mean


def isotropic(matrix: Tensor, rank: Rank = "numerical") -> Tensor:
    """Replace every singular value by their mean; the nuclear norm stays.

    Args:
        matrix: ``[m, n]``.
        rank: Whether all directions count, or those above rounding; see `IsotropicMergingCommon`.

    Returns:
        ``[m, n]`` in fp64; zero for zero.
    """
    factor, values = polar_and_values(matrix, VANISHING if rank == "numerical" else -1.0)
    return values.sum() / max(len(values), 1) * factor
