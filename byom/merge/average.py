"""Uniform weight averaging."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from byom.deltas import total
from byom.merge.base import Group, TensorwiseMethod


@dataclass(frozen=True)
class Average(TensorwiseMethod):
    """Average the fine-tuned models: ``theta = (1/T) sum_t theta_t``.

    References:
        Model soups, uniform soup. https://arxiv.org/abs/2203.05482

    Differences:
        Buffers that are not floating point are carried from the pre-trained model; implementations that average
        the whole state dict turn them into floats or truncate them.
    """

    title = "Average"

    def merge(self, group: Group) -> Tensor:
        """Return the mean over tasks, accumulated in fp32."""
        return total(group.finetuned) / len(group.experts)
