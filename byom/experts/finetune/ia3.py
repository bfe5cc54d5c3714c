"""IA3: learned factors on keys, values and hidden units, through PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from byom.experts.finetune.added import Added
from byom.experts.finetune.targets import checked, chosen


@dataclass(frozen=True)
class Ia3(Added):
    """Train one factor per unit: on what the layers of `targets` put out, and on what those of `inputs` take in.

    Everything else is frozen, factors start at 1. ``2 d + h`` values per block at the defaults, h hidden units.

    Args:
        epochs: See `byom.experts.finetune.base.Recipe`, as for the next five, `augment` and `micro_batch`.
        batch_size: Examples per step.
        learning_rate: None takes `boost` times the backbone's own.
        weight_decay: On the factors, as far as they are matrices: PEFT makes them ``[n, 1]``, so that it pulls to 0.
        warmup: Fraction of the steps.
        clip: Largest norm of the gradient.
        targets: Layers whose outputs are scaled; words of `byom.experts.finetune.targets.WORDS`, or patterns of module
            paths.
        inputs: Layers whose inputs are scaled.

    Raises:
        OptionError: If a value is out of range.

    References:
        Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, section 3.3.
        https://arxiv.org/abs/2205.05638
    """

    weight_decay: float = 0.0
    targets: tuple[str, ...] = ("k", "v")
    inputs: tuple[str, ...] = ("down",)

    boost = 100.0
    marker = ".ia3_l."

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", checked("finetune.targets", self.targets))
        object.__setattr__(self, "inputs", checked("finetune.inputs", self.inputs))

    def extend(self, inner: nn.Module) -> None:
        """Let PEFT put its layers in."""
        from peft import IA3Config, inject_adapter_in_model

        taken = chosen(inner, self.inputs)
        config = IA3Config(target_modules=[*chosen(inner, self.targets), *taken], feedforward_modules=taken)
        inject_adapter_in_model(config, inner)
