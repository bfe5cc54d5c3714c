"""Bottleneck adapters: a small two-layer network after each chosen layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from byom.errors import OptionError
from byom.experts.finetune.added import Added
from byom.experts.finetune.targets import checked, chosen
from byom.functional.seeding import keyed


class Adapter(nn.Module):
    """``h + W_up gelu(W_down h)``, with biases below.

    Args:
        width: Features (d).
        bottleneck: Hidden units (b).
        seed: Draws W_down; W_up starts at 0, which makes the whole the identity.
    """

    def __init__(self, width: int, bottleneck: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(bottleneck, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[..., d]`` of ``[..., d]``."""
        return hidden + gelu(hidden @ self.down.T + self.bias) @ self.up.T


class Followed(nn.Module):
    """A layer and what comes after it.

    Args:
        base_layer: The layer.
        added: Applied to its output.
    """

    def __init__(self, base_layer: nn.Linear, added: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.added = base_layer, added

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the adapted output."""
        return self.added(self.base_layer(inputs))


@dataclass(frozen=True)
class Bottleneck(Added):
    """Train ``h <- h + W_up gelu(W_down h + c)`` after the chosen layers, everything else frozen.

    It cannot be folded into the weights: inference pays for it. ``b (2 d + 1)`` values per layer.

    Args:
        epochs: See `byom.experts.finetune.base.Recipe`, as for the next five, `augment` and `micro_batch`.
        batch_size: Examples per step.
        learning_rate: None takes `boost` times the backbone's own.
        weight_decay: On the added matrices.
        warmup: Fraction of the steps.
        clip: Largest norm of the gradient.
        width: Hidden units (b).
        targets: Words of `byom.experts.finetune.targets.WORDS`, or patterns of module paths.

    Raises:
        OptionError: If a value is out of range.

    References:
        Parameter-Efficient Transfer Learning for NLP, section 2. https://arxiv.org/abs/1902.00751

    Differences:
        The paper also trains layer norms; W_up starts near 0 there and at 0 here, and has a bias. PEFT has no such
        adapter, which is why this one is ours.
    """

    width: int = 16
    targets: tuple[str, ...] = ("out", "down")

    boost = 20.0
    marker = ".added."

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", checked("finetune.targets", self.targets))
        if not isinstance(self.width, int) or self.width < 1:
            raise OptionError(f"finetune.width={self.width} must be a whole number from 1 on")

    def extend(self, inner: nn.Module) -> None:
        """Let an adapter follow every chosen layer; what one starts from depends on the layer's path alone."""
        for path in chosen(inner, self.targets):
            parent, _, name = path.rpartition(".")
            layer = inner.get_submodule(path)
            assert isinstance(layer, nn.Linear)  # `chosen` gives no others
            adapter = Adapter(layer.out_features, self.width, keyed(0, path, "bottleneck"))
            setattr(inner.get_submodule(parent), name, Followed(layer, adapter))
