"""The pre-trained model, unchanged: the reference row below which no merged model should fall."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from byom.merge.base import Group, TensorwiseMethod


@dataclass(frozen=True)
class Pretrained(TensorwiseMethod):
    """Return the pre-trained model; every task uses it with its own frozen head.

    Nothing is merged: ``theta = theta_0``.
    """

    title = "Pre-trained"
    merges = False

    def merge(self, group: Group) -> Tensor:
        """Return theta_0."""
        return group.pretrained
