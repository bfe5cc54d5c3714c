"""What an error in a parameter does to a task's answers, estimated from a few of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from byom.weights import Weights

RIDGE = 0.03  # of the mean second moment, on the diagonal: directions that few inputs have not shown
LEAST = 1e-6  # of the mean weight of all parameters, for tensors that the inputs do not reach


@dataclass(frozen=True)
class Damage:
    """Second moments of a layer's inputs, and what a squared error of a parameter is worth.

    Args:
        fisher: Name to the diagonal of the Fisher information, ``[*shape]``.
        gram: Matrix to the second moment of what it multiplies, ``[n, n]``; other parameters have none.
    """

    fisher: Weights
    gram: Weights

    def weight(self, name: str, difference: Tensor) -> float:
        """Return what a squared error of a tensor is worth: its Fisher information where the difference is large.

        Args:
            name: The parameter.
            difference: ``[*shape]`` (D).

        Returns:
            ``sum F D^2 / sum D^2``, in units of the mean Fisher information of all parameters; 1 where there is none.
        """
        if name not in self.fisher or not self._mean:
            return 1.0
        squares = difference.double().square()
        total = float(squares.sum())
        worth = float((self.fisher[name].to(squares).reshape(squares.shape) * squares).sum()) / (total or 1.0)
        return max(worth / self._mean, LEAST)

    def root(self, name: str, columns: int) -> Tensor | None:
        """Return L, lower triangular in fp32; ``L L'`` is the second moment, scaled to a mean diagonal of 1.

        Args:
            name: The parameter.
            columns: Columns of its difference as a matrix (n).

        Returns:
            The root; None where there is no second moment, or it is that of a matrix stored in x out.
        """
        if name not in self.gram or self.gram.shape(name) != (columns, columns):
            return None
        moment = self.gram[name].double()
        scale = moment.diagonal().mean()
        if not scale > 0:
            return None
        identity = torch.eye(columns, dtype=moment.dtype, device=moment.device)
        return torch.linalg.cholesky((moment / scale + RIDGE * identity) / (1 + RIDGE)).float()

    @cached_property
    def _mean(self) -> float:
        """The mean of all entries."""
        sums = [(self.fisher[name].sum(dtype=torch.float64), self.fisher[name].numel()) for name in self.fisher]
        return float(sum(total for total, _ in sums)) / max(1, sum(count for _, count in sums))
