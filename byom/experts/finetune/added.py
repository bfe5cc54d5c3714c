"""Recipes that add small tensors to a frozen encoder and train those alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from byom.backbone.base import Backbone
from byom.backbone.split_attention import split
from byom.errors import CheckpointError
from byom.experts.finetune.base import Recipe
from byom.functional.tensors import on_cpu
from byom.weights import Weights
from byom.weights.lowrank import Adapted


@dataclass(frozen=True)
class Added(Recipe):
    """A recipe whose encoder has further tensors that change nothing until they are trained.

    All models of such a lab hold them, the pre-trained one as they start, so that merge methods and variants work on
    them as on any others. An expert keeps its own values of them and nothing else.
    """

    marker: ClassVar[str]
    """The word that the names of added parameters contain."""

    @abstractmethod
    def extend(self, inner: nn.Module) -> None:
        """Add the tensors to an encoder whose attention was taken apart, in place."""

    def host(self, encoder: nn.Module, backbone: Backbone) -> nn.Module:
        """Take attention apart and add the tensors."""
        self.extend(split(encoder.get_submodule(backbone.inner.rstrip("."))))
        return encoder

    def attach(self, encoder: nn.Module, backbone: Backbone, seed: int) -> nn.Module:
        """Ask for gradients of what was added alone."""
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(self.adds(name))
        return encoder

    def adds(self, name: str) -> bool:
        """Say whether a parameter is one that was added."""
        return self.marker in name

    def save(self, trained: nn.Module, folder: Path) -> None:
        """Write what was added."""
        added = {name: tensor for name, tensor in trained.state_dict().items() if self.adds(name)}
        Weights.of(on_cpu(added)).save(folder)

    def open(self, folder: Path, pretrained: Weights) -> Weights:
        """Put the trained values of what was added into the pre-trained model."""
        values = Weights.open(folder)
        if lost := [name for name in values if name not in pretrained or values.shape(name) != pretrained.shape(name)]:
            raise CheckpointError(f"{folder} holds '{lost[0]}', which this encoder lacks; delete it to train again")
        return Adapted(pretrained, {}, values.state(), origin=str(folder))
