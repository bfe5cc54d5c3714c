"""LoRA: two thin factors per layer are trained through PEFT, and kept in PEFT's own format."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from byom.backbone.base import Backbone
from byom.backbone.split_attention import split
from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import OptionError
from byom.experts.finetune.base import Recipe
from byom.experts.finetune.targets import checked, chosen
from byom.functional.seeding import keyed
from byom.storage.atomic import replacing
from byom.storage.tensor_files import written
from byom.weights import Weights


@dataclass(frozen=True)
class Lora(Recipe):
    """Train ``W + s B A`` with ``B [out, r]``, ``A [r, in]`` in the chosen layers, everything else frozen.

    Fused attention is taken apart first (`byom.split_attention`), so that query, key and value are layers of their own
    in every backbone. The expert is a PEFT adapter folder, read as `byom.weights.lowrank.Adapted`.

    Args:
        epochs: See `Recipe`, as for the next five, `augment` and `micro_batch`.
        batch_size: Examples per step.
        learning_rate: None takes `boost` times the backbone's own: factors start small.
        weight_decay: On the factors.
        warmup: Fraction of the steps.
        clip: Largest norm of the gradient.
        rank: Columns of B (r).
        alpha: The scale is ``alpha / rank``; None takes the rank, for a scale of 1.
        rslora: Scale by ``alpha / sqrt(rank)`` instead.
        targets: Words of `byom.experts.finetune.targets.WORDS` (q, k, v, out, up, down, mlp), or patterns of module
            paths.
        dropout: Probability in [0, 1) with which an input of A is zeroed in training.
        bias: Which biases are trained along: ``none``, ``lora_only`` (those of the adapted layers) or ``all``.
        modules_to_save: Names of modules that are trained whole alongside the factors, such as ``norm``.

    Raises:
        OptionError: If a value is out of range.

    References:
        LoRA: Low-Rank Adaptation of Large Language Models. https://arxiv.org/abs/2106.09685
        A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. https://arxiv.org/abs/2312.03732
    """

    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    dropout: float = 0.0
    bias: Literal["none", "lora_only", "all"] = "none"
    modules_to_save: tuple[str, ...] = ()

    boost = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", checked("finetune.targets", self.targets))
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        if not (isinstance(self.rank, int) and self.rank >= 1) or (self.alpha is not None and self.alpha <= 0):
            raise OptionError(f"finetune.rank={self.rank} must be a whole number from 1 on, finetune.alpha above 0")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"finetune.dropout={self.dropout} must be in [0, 1)")
        if self.bias not in ("none", "lora_only", "all"):
            raise OptionError(f"finetune.bias={self.bias} is not known; use none, lora_only or all")

    def attach(self, encoder: nn.Module, backbone: Backbone, seed: int) -> nn.Module:
        """Return a copy of the encoder, attention taken apart, with PEFT's factors in it."""
        from peft import get_peft_model

        adapted = copy.deepcopy(encoder)
        inner = split(adapted.get_submodule(backbone.inner.rstrip(".")))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers renames
            torch.manual_seed(keyed(seed, "factors", 0))
            wrapped = get_peft_model(inner, self._config(inner, backbone))  # pyright: ignore[reportArgumentType]
        return _replaced(adapted, backbone.inner.rstrip("."), wrapped)

    def save(self, trained: nn.Module, folder: Path) -> None:
        """Write PEFT's folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""
        wrapped: Any = next(child for child in trained.modules() if hasattr(child, "peft_config"))
        with replacing(folder, written("adapter_config.json", "training.json")) as partial:
            wrapped.save_pretrained(str(partial), save_embedding_layers=False)
            (partial / "README.md").unlink(missing_ok=True)  # a model card to be filled in

    def open(self, folder: Path, pretrained: Weights) -> Weights:
        """Read the folder onto the pre-trained model."""
        return Adapter.open(folder).on(pretrained)

    def _config(self, inner: nn.Module, backbone: Backbone) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # pyright: ignore[reportArgumentType]
            use_rslora=self.rslora,
            target_modules=chosen(inner, self.targets),
            lora_dropout=self.dropout,
            bias=self.bias,
            modules_to_save=list(self.modules_to_save) or None,
        )


def _replaced(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    if not path:
        return child
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
    return module
