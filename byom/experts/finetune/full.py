"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from byom.backbone.base import Backbone
from byom.experts.finetune.base import Recipe
from byom.functional.tensors import on_cpu
from byom.weights import Weights


@dataclass(frozen=True)
class Full(Recipe):
    """Train every parameter, and keep the whole model; see `Recipe` for the options."""

    def attach(self, encoder: nn.Module, backbone: Backbone, seed: int) -> nn.Module:
        """Return the encoder itself."""
        return encoder.requires_grad_(True)

    def save(self, trained: nn.Module, folder: Path) -> None:
        """Write the state dict."""
        Weights.of(on_cpu(trained.state_dict())).save(folder)

    def open(self, folder: Path, pretrained: Weights) -> Weights:
        """Open the state dict, read on demand."""
        return Weights.open(folder)
