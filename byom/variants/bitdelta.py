"""BitDelta: the signs of each matrix's changes, and one magnitude."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from byom.errors import CheckpointError, one_of
from byom.functional.tensors import wide
from byom.merge.base.matrices import is_matrix, is_stack, patterns
from byom.variants.base import PackingVariant, Parts, Shared, bits, sparse


@dataclass(frozen=True)
class BitDelta(PackingVariant):
    """Keep one bit of every entry of a matrix's change, and its mean magnitude: ``theta_0 + alpha * sign(tau_t)``.

    ``alpha = mean |tau_t|`` of each matrix is the least-squares scale of its signs: it minimises
    ``||tau_t - alpha * sign(tau_t)||``. Entries that did not change count as positive. Experts of a mixture that lie
    in one tensor have a scale each. Other tensors are stored whole, and unchanged ones are not stored.

    Args:
        reference: ``pretrained``, or ``merged``: what differs from the merged model is put back, as BYOM-FFT does.
        exclude: Shell-style patterns of parameter names that are stored whole although they are matrices.

    Raises:
        OptionError: If a hyperparameter is not known.

    References:
        BitDelta: Your Fine-Tune May Only Be Worth One Bit, section 3. https://arxiv.org/abs/2402.10193

    Differences:
        The authors then train the scales of all matrices to reproduce the fine-tuned model's logits on calibration
        text; that is left out here, and these are the scales that it starts from. Their code compresses the linear
        layers of Llama's blocks, by name, and stores the rest; here all matrices but embeddings and output layers,
        `exclude` being empty compresses those, too. Their differences are taken in the model's dtype, here in fp32.
        ``merged`` is an addition. One scale per tensor as it is stored: where query, key and value are fused they
        share one.
    """

    reference: Literal["pretrained", "merged"] = field(default="pretrained", kw_only=True)
    exclude: tuple[str, ...] = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "*shared.weight")

    title = "BitDelta"
    stores = "one bit per entry of a matrix and one scale, other tensors whole"

    @property
    def on(self) -> Literal["pretrained", "merged"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model that differences are taken to, an option here."""
        return self.reference

    def __post_init__(self) -> None:
        one_of("byom.reference", self.reference, ("pretrained", "merged"))
        object.__setattr__(self, "exclude", patterns("byom.exclude", self.exclude))

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store a matrix's signs and scale, or all values of another tensor."""
        if not (is_matrix(name, target.shape, self.exclude) or is_stack(name, target.shape, self.exclude)):
            return sparse.whole(target, shared.reference)
        delta = wide(target) - wide(shared.reference)
        scale = delta.abs().mean((-2, -1), dtype=torch.float64).to(delta.dtype)
        return {"signs": bits.pack(delta >= 0), "scale": scale} if scale.any() else {}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the scaled signs to the reference, or put all values back."""
        reference = shared.reference
        if "values" in parts:
            return sparse.assign(parts, reference)
        scale = parts["scale"]
        if scale.shape != reference.shape[:-2]:
            raise CheckpointError(
                f"scales of shape {tuple(scale.shape)} do not fit a tensor of shape {tuple(reference.shape)}; "
                "pack or fetch it again"
            )
        positive = bits.unpack(parts["signs"], reference.numel()).reshape(reference.shape)
        scale = scale[..., None, None]
        return (wide(reference) + torch.where(positive, scale, -scale)).to(reference.dtype)
