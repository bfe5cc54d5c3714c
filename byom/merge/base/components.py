"""Singular components of task vectors, of which each is on or off: what they add up to, and the slope of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from byom.functional.iterative import square
from byom.functional.linalg import VANISHING


@dataclass(frozen=True)
class Components:
    """The leading singular components of one matrix in all tasks, the largest of a task first.

    Args:
        left: ``[T, r, m]`` left singular vectors as rows (u).
        values: ``[T, r]`` singular values (s); 0 where a task has fewer than r.
        right: ``[T, r, n]`` (v).
        complete: Whether nothing but rounding is beside these.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    complete: bool

    @classmethod
    def of(cls, deltas: Tensor, most: int) -> Components:
        """Decompose task vectors.

        Args:
            deltas: ``[T, m, n]``.
            most: Components to keep of a task, at most.

        Returns:
            As many for every task as that with most of them has above rounding, in the dtype given.
        """
        full = min(deltas.shape[1:])
        found = [_decomposed(delta, most) for delta in deltas]
        counts = [len(values) for _, values, _ in found]
        rank, (tasks, rows, columns) = max(counts), deltas.shape
        left, right = deltas.new_zeros(tasks, rank, rows), deltas.new_zeros(tasks, rank, columns)
        values = deltas.new_zeros(tasks, rank)
        for task, (each, count) in enumerate(zip(found, counts, strict=True)):
            left[task, :count], values[task, :count], right[task, :count] = each
        return cls(left, values, right, complete=rank < most or most >= full)

    def slopes(self, gradient: Tensor) -> Tensor:
        """Return ``s u G vᵀ``, how fast a loss rises with each component.

        It costs a product of ``2 T r m n`` operations.

        Args:
            gradient: ``[m, n]``, of the loss in the sum of all tasks' components (G).

        Returns:
            ``[T, r]``.
        """
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        rows, columns = gradient.shape
        along = (left @ gradient).mul_(right) if columns < rows else (right @ gradient.T).mul_(left)
        return self.values * along.sum(1).view_as(self.values)

    def part(self, task: int, chosen: Tensor) -> Tensor:
        """Return the sum of some of a task's components.

        Args:
            task: Its place.
            chosen: Bool ``[r]``, or factors ``[r]``, 0 for those left out.

        Returns:
            ``[m, n]``.
        """
        places = chosen.nonzero()[:, 0]
        weights = self.values[task, places] * chosen[places]
        return (self.left[task, places].T * weights) @ self.right[task, places]

    def masked(self, task: int, on: Tensor, delta: Tensor) -> Tensor:
        """Return a task vector without the components that are off; all of it, bit for bit, if none is.

        Args:
            task: Its place.
            on: Bool ``[r]``.
            delta: ``[m, n]``, the task vector.
        """
        if self.complete and 2 * int(on.sum()) >= len(on):
            return delta - self.part(task, ~on).to(delta) if not on.all() else delta
        return self.part(task, on).to(delta)


def _decomposed(delta: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return at most so many singular components above rounding, from the eigenvectors V of the smaller square in fp64.

    The others are ``A V``, so that all components add up to A however small their values are. Squaring mixes those
    below 1e-8 of the largest, which are left out, and costs a third of what `byom.functional.linalg.truncated_svd`
    takes where small values are to be as exact as large ones.

    Returns:
        ``[r, m]``, ``[r]`` descending, and ``[r, n]``, in fp64.
    """
    if delta.shape[0] < delta.shape[1]:
        left, values, right = _decomposed(delta.T, most)
        return right, values, left
    tall = delta.double()
    vectors = torch.linalg.eigh(square(tall))[1].flip(1)[:, :most]
    images = tall @ vectors
    values = torch.linalg.vector_norm(images, dim=0)
    exist = values > VANISHING * values[:1]
    return (images[:, exist] / values[exist]).T, values[exist], vectors[:, exist].T
