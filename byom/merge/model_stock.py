"""Model Stock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from byom.functional.deltas import piece_length, products, room
from byom.merge.base import Group, TensorwiseMethod, blockwise


@dataclass(frozen=True)
class ModelStock(TensorwiseMethod):
    """Move each tensor's average towards the pre-trained model, the further the more the experts' directions differ.

    ``theta = r * mean_t theta_t + (1 - r) * theta_0`` with ``r = T c / ((T - 1) c + 1)``, and ``c`` the mean cosine
    between the changes that two experts made to the tensor, over all pairs. Orthogonal changes give theta_0, equal
    ones their average, one expert itself. A change of norm 0 has cosine 0 with every other. Where the mean cosine
    is negative, r is 0.

    References:
        Model Stock: All we need is just a few fine-tuned models.
        https://arxiv.org/abs/2403.19522

    Differences:
        The paper considers experts of one task, whose cosines are positive, and says nothing of negative ones; its
        formula then moves away from the average, without bound near ``c = -1 / (T - 1)``. mergekit and fusion-bench
        use the formula as it is. The authors' code takes two experts and adds 1e-8 to the denominator, mergekit
        takes norms below 1e-6 for 1e-6. A parameter is one layer here, as in their code.
    """

    elementwise: ClassVar[bool] = False
    exposing: ClassVar[bool] = True
    title = "Model Stock"

    def merge(self, group: Group) -> Tensor:
        """Return ``theta_0`` plus r times the mean change."""
        tasks = len(group.experts)
        start = torch.zeros(tasks, tasks, dtype=torch.float64)
        pieces = group.blocks(piece_length(tasks))
        ratio = interpolation(sum((_inner_products(piece) for _, piece in pieces), start))
        return blockwise(group, lambda _, piece: piece.moved(ratio / len(piece.experts)), final=True)


def _inner_products(piece: Group) -> Tensor:
    """Return those of the task vectors of a piece, which are made in blocks that stay in the caches."""
    if piece.pretrained.device.type != "cpu":
        return products(piece.deltas.double()).cpu()
    rows = room(len(piece.experts), piece.pretrained.numel())
    for start, block in piece.blocks():
        rows[:, start : start + block.pretrained.numel()] = block.deltas
    return products(rows)


def interpolation(gram: Tensor) -> float:
    """Return how much of the average to take (r).

    Args:
        gram: ``[T, T]`` inner products between task vectors.

    Returns:
        A number in [0, 1].
    """
    tasks = len(gram)
    if tasks == 1:
        return 1.0
    norms = gram.diagonal().sqrt()
    cosines = gram / torch.outer(norms, norms)
    pairs = torch.ones_like(gram).tril(-1).bool()
    cosine = float(torch.where(torch.outer(norms, norms) > 0, cosines, 0.0)[pairs].mean())
    cosine = min(max(cosine, 0.0), 1.0)
    return tasks * cosine / ((tasks - 1) * cosine + 1)
