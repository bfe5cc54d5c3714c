"""MagMax: maximum magnitude selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from byom.functional.deltas import total
from byom.merge.base import Group, TensorwiseMethod


@dataclass(frozen=True)
class MagMax(TensorwiseMethod):
    """Take each parameter's change from the task that changed it most.

    ``theta = theta_0 + scale * tau_t*`` with ``t* = argmax_t |tau_t|``, element by element. Where several tasks share
    the largest magnitude, the sign that most of them have is taken, and nothing is merged where as many have
    either, so that the result depends neither on the order of tasks nor on a sign.

    Args:
        scale: Scaling coefficient (lambda), any real number.

    References:
        MagMax: Leveraging Model Merging for Seamless Continual Learning. https://arxiv.org/abs/2407.06322

    Differences:
        The authors fine-tune the tasks one after the other, each from the one before; here the experts are those of
        the problem. In their code and in fusion-bench the last of several equal magnitudes wins.
    """

    scale: float = 0.5

    title = "MagMax"
    grid: ClassVar = {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus the scaled change of largest magnitude."""
        return group.pretrained + self.scale * largest(group.deltas)


def largest(deltas: Tensor) -> Tensor:
    """Select the entry of largest magnitude of each coordinate.

    Args:
        deltas: ``[T, *shape]`` task vectors.

    Returns:
        ``[*shape]``; equal magnitudes take the sign that most of them have, 0 if none is in the majority.
    """
    size = deltas.abs().amax(0)
    return size * total(deltas.sign() * (deltas.abs() == size)).sign()
