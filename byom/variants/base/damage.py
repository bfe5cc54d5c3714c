"""What an error in a parameter does to a task's answers, estimated from its task vector or a few of its inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from byom.functional.tensors import wide
from byom.weights import Weights

RIDGE = 0.03  # of the mean second moment, on the diagonal: directions that few inputs have not shown
LEAST = 1e-6  # of the mean weight of all parameters, for tensors that the inputs do not reach


class Damage(ABC):
    """A metric for the errors of each tensor."""

    @property
    @abstractmethod
    def content(self) -> list[str]:
        """Fingerprints of what it is made of."""

    @abstractmethod
    def weight(self, name: str, difference: Tensor) -> float:
        """Return what a squared error of a tensor is worth.

        Args:
            name: The parameter.
            difference: What is written of it, ``[*shape]`` (D).
        """

    @abstractmethod
    def root(self, name: str, columns: int) -> Tensor | None:
        """Return L, lower triangular in fp32; ``L Lᵀ`` is the second moment of inputs, with a mean diagonal of 1.

        Args:
            name: The parameter.
            columns: Columns of its difference as a matrix (n).

        Returns:
            ``[n, n]``; None for squared errors as they are.
        """


@dataclass(frozen=True)
class FromTask(Damage):
    """Damage by the task vector alone: ``tau_tᵀ tau_t`` stands for the second moment of a layer's inputs.

    Gradients of a linear map are outer products with its inputs, so the rows of what was learnt lie where inputs are.

    Args:
        target: theta_t.
        base: theta_0.
    """

    target: Weights
    base: Weights

    @property
    def content(self) -> list[str]:
        """The fingerprint of theta_0; that of theta_t is known to whoever packs it."""
        return ["task", self.base.fingerprint()]

    def weight(self, name: str, difference: Tensor) -> float:
        """Return 1: tensors are alike."""
        return 1.0

    def root(self, name: str, columns: int) -> Tensor | None:
        """See `Damage.root`; a matrix that the task did not change has none."""
        if name not in self.base:
            return None
        vector = (wide(self.target[name]) - wide(self.base[name])).reshape(-1, columns)
        return None if min(vector.shape) == 1 else _root(vector.T @ vector)


@dataclass(frozen=True)
class FromInputs(Damage):
    """Damage by a few unlabelled inputs.

    Args:
        fisher: Name to the diagonal of the Fisher information, ``[*shape]``.
        gram: Matrix to the second moment of what it multiplies, ``[n, n]``; other parameters have none.
    """

    fisher: Weights
    gram: Weights

    @property
    def content(self) -> list[str]:
        """Fingerprints of both."""
        return [self.fisher.fingerprint(), self.gram.fingerprint()]

    def weight(self, name: str, difference: Tensor) -> float:
        """Return the Fisher information of a tensor's entries where the difference is large.

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
        """See `Damage.root`; None too where a matrix is stored in x out."""
        known = name in self.gram and self.gram.shape(name) == (columns, columns)
        return _root(self.gram[name]) if known else None

    @cached_property
    def _mean(self) -> float:
        """The mean of all entries."""
        sums = [(self.fisher[name].sum(dtype=torch.float64), self.fisher[name].numel()) for name in self.fisher]
        return float(sum(total for total, _ in sums)) / max(1, sum(count for _, count in sums))


def _root(moment: Tensor) -> Tensor | None:
    """Return the root of a second moment scaled to a mean diagonal of 1, with a ridge; None where it is 0."""
    scale = moment.diagonal().mean()
    if not scale > 0:
        return None
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return torch.linalg.cholesky((moment.double() / scale + RIDGE * identity) / (1 + RIDGE)).float()
