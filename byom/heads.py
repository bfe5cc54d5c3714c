"""Heads as tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from byom.backbone.base import Head
from byom.probe import Readout


def pack(head: Readout) -> dict[str, Tensor]:
    """Return a head as tensors."""
    assert isinstance(head, Head)
    return {"weight": head.weight, "temperature": torch.tensor(head.temperature)}


def unpack(tensors: Mapping[str, Tensor]) -> Readout:
    """Return the head that `pack` made tensors of."""
    return Head(tensors["weight"], float(tensors["temperature"]))
