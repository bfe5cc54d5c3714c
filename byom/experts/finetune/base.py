"""Recipes of fine-tuning: the parameters that are trained, how, and the format of the expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from byom.backbone.base import Backbone
from byom.errors import OptionError, one_of
from byom.weights import Weights

AUGMENTATIONS = ("none", "crop")


@dataclass(frozen=True)
class Recipe(ABC):
    """Hyperparameters of training: AdamW, linear warm-up, cosine decay, gradient clipping.

    Args:
        epochs: Passes over the training examples.
        batch_size: Examples per step.
        learning_rate: Peak learning rate; None takes the backbone's own, times the recipe's `boost`.
        weight_decay: Decoupled weight decay, on matrices only.
        warmup: Fraction of the steps in which the learning rate rises linearly.
        clip: Largest Euclidean norm of the gradient.
        augment: ``crop`` trains on random crops, as CLIP is fine-tuned (`byom.experts.finetune.augment`); images only.
        micro_batch: Examples that go through the model at a time, where the device cannot hold a whole batch; ``auto``
            halves it whenever memory runs out. Gradients of the pieces are summed, each weighted by its share, so that
            it changes the result only by rounding and by which neurons dropout drops.

    Raises:
        OptionError: If a value is out of range.
    """

    epochs: int = 4
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    augment: Literal["none", "crop"] = field(default="none", kw_only=True)
    micro_batch: int | str | None = field(default=None, kw_only=True, metadata={"signature": False})

    boost: ClassVar[float] = 1.0
    """Factor on the learning rate of full fine-tuning that suits this recipe."""

    def __post_init__(self) -> None:
        positive = (
            self.epochs,
            self.batch_size,
            self.clip,
            1 if self.learning_rate is None else self.learning_rate,
        )
        if min(positive) <= 0 or not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise OptionError(f"finetune options out of range: {self}; sizes must be positive, warmup in [0, 1)")
        one_of("finetune.augment", self.augment, AUGMENTATIONS)
        number = isinstance(self.micro_batch, int) and not isinstance(self.micro_batch, bool) and self.micro_batch >= 1
        if not (number or self.micro_batch in (None, "auto")):
            raise OptionError(
                f"finetune.micro_batch={self.micro_batch} must be a whole number from 1 on, auto, or null"
            )

    def rate(self, backbone: Backbone) -> float:
        """Return the peak learning rate."""
        return self.boost * backbone.learning_rate if self.learning_rate is None else self.learning_rate

    def host(self, encoder: nn.Module, backbone: Backbone) -> nn.Module:
        """Return the encoder that all models of a lab are loaded into, with room for what the recipe adds.

        Args:
            encoder: The backbone's; may be modified.
            backbone: Where it comes from.

        Returns:
            An encoder that computes the same as long as nothing was trained.
        """
        return encoder

    @abstractmethod
    def attach(self, encoder: nn.Module, backbone: Backbone, seed: int) -> nn.Module:
        """Make what is trained: of its parameters, those that ask for gradients.

        Args:
            encoder: What `host` returned, with pre-trained weights; may be modified in its values only.
            backbone: Where it comes from.
            seed: Draws what starts at random.
        """

    @abstractmethod
    def save(self, trained: nn.Module, folder: Path) -> None:
        """Keep an expert, all or nothing.

        Args:
            trained: What `attach` returned, after training.
            folder: Created, or replaced as a whole.
        """

    @abstractmethod
    def open(self, folder: Path, pretrained: Weights) -> Weights:
        """Return the expert that `save` kept, with the names of the hosting encoder."""
