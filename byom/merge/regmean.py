"""RegMean: regression mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.errors import CheckpointError, at_least, fraction
from byom.functional.deltas import total
from byom.functional.linalg import weighted_solve
from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.needs import Needs


@dataclass(frozen=True)
class RegMean(TensorwiseMethod):
    """Merge each linear map into the one whose outputs are nearest to every task's own on that task's inputs.

    ``W = sum_t W_t G~_t (sum_t G~_t)^-1`` with ``G_t`` the mean outer product of the inputs of the layer and
    ``G~_t = off_diagonal G_t + (1 - off_diagonal) diag(G_t)``. Input directions in which no task has anything, and
    parameters that are not a linear map, get the mean; `fallbacks` names the latter. Directions smaller than the
    rounding of the stored Grams are none (`byom.functional.linalg.without_rounding`); with `off_diagonal` below 1 there
    are no such directions. Grams are divided by their number of rows, so all tasks weigh alike however long their
    inputs.

    Args:
        off_diagonal: Factor on the off-diagonal entries of the Grams (alpha), in [0, 1]; 0 averages column by column.
        ridge: Pull towards the mean, relative to the mean diagonal of the summed Grams; at least 0.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Dataless Knowledge Fusion by Merging Weights of Language Models, section 3. https://arxiv.org/abs/2212.09849

    Differences:
        The authors recommend 0.9 and ship 0.1 or 1 by data set; 0.95 is fusion-bench's for CLIP. They invert the sum
        of the Grams without a ridge, which returns garbage where it is singular, and capture inputs by hooks that
        miss nn.MultiheadAttention (see `byom.statistics.gram.Gram`), so open_clip's attention was averaged.
    """

    off_diagonal: float = 0.95
    ridge: float = 1e-6

    elementwise = False
    title = "RegMean"
    grid: ClassVar = {"off_diagonal": (0.7, 0.8, 0.9, 1.0)}

    def __post_init__(self) -> None:
        require_options(self.off_diagonal, self.ridge)

    @property
    def needs(self) -> Needs:
        """The statistic ``gram``, which looks at training inputs and at no label."""
        return Needs(statistics=frozenset({"gram"}), inputs=frozenset({"train"}))

    def simpler(self, problem: Problem) -> list[str]:
        """Name the parameters that are averaged because they have no Gram."""
        return problem.uncovered("gram")

    def merge(self, group: Group) -> Tensor:
        """Return the regression mean, or the mean without a Gram."""
        deltas = group.deltas
        if "gram" not in group.statistics:
            return group.pretrained + total(deltas) / len(deltas)
        return group.pretrained + regression_mean(
            group.name, deltas, group.statistics["gram"], self.off_diagonal, self.ridge
        )


def regression_mean(name: str, deltas: Tensor, grams: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """Average the task vectors of one linear map, weighted by Grams.

    Args:
        name: The parameter's name, for the message.
        deltas: ``[T, m, n]``.
        grams: ``[T, n, n]``, or ``[T, 1, m, m]`` for a parameter stored in x out.
        off_diagonal: Factor on their off-diagonal entries.
        ridge: Pull towards the mean.

    Returns:
        ``[m, n]`` in fp64.

    Raises:
        CheckpointError: If the shapes do not fit.
    """
    if grams.ndim == 4 and deltas.ndim == 3:
        return regression_mean(name, deltas.mT, grams[:, 0], off_diagonal, ridge).mT
    if deltas.ndim != 3 or grams.shape != (len(deltas), deltas.shape[2], deltas.shape[2]):
        raise CheckpointError(
            f"the Gram of '{name}' has shape {tuple(grams.shape[1:])}, the parameter {tuple(deltas.shape[1:])}; "
            "compute it for this model"
        )
    eps = 0.0 if grams.dtype == torch.float64 else torch.finfo(grams.dtype).eps
    return weighted_solve((shrunk(gram, off_diagonal) for gram in grams), deltas, ridge, eps)


def shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    """Multiply the off-diagonal entries of ``[n, n]`` by a factor; in fp64."""
    gram = gram.double()
    return off_diagonal * gram + (1 - off_diagonal) * gram.diagonal().diag()


def require_options(off_diagonal: float, ridge: float) -> None:
    """Refuse hyperparameters out of range.

    Raises:
        OptionError: Naming the option.
    """
    fraction("merge.off_diagonal", off_diagonal)
    at_least("merge.ridge", ridge, 0, "1e-6")
