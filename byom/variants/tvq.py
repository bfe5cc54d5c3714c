"""TVQ and RTVQ: task vectors rounded to a few bits, alone or around their average."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from byom.errors import one_of, whole
from byom.functional.tensors import wide
from byom.merge.base import Problem
from byom.merge.base.matrices import patterns
from byom.merge.base.running import is_running
from byom.variants.base import PackingVariant, Parts, Served, Shared, integers, sparse
from byom.weights import Weights, require_match

BITS = range(1, 9)


@dataclass(frozen=True)
class TaskVectorQuantisation(PackingVariant):
    """Round every entry of a task vector to one of ``2^b`` evenly spaced values: ``theta_0 + s (q - z)``.

    ``s = (max - min) / (2^b - 1)``, ``z = -round(min / s)`` and ``q = clamp(round(tau_t / s + z), 0, 2^b - 1)`` over
    each tensor: 0 is among the values where changes have both signs, and no entry is off by more than ``s / 2``.
    Tensors with fewer than two axes, those that `exclude` names and those of which all entries changed alike are stored
    whole, and unchanged ones are not stored.

    RTVQ, with `shared_bits`, rounds the average of the task vectors to that many bits and shares theta_0 with it added;
    what a task differs by from that sum is rounded to `bits`, and so corrects what the average is off by. The merge
    method plays no part.

    Args:
        bits: Bits of an entry (b), from 1 to 8.
        shared_bits: Bits of an entry of the average (b_o), from 1 to 8; None is TVQ, which has none.
        exclude: Shell-style patterns of parameter names that are stored whole whatever their axes.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Task Vector Quantization for Memory-Efficient Model Merging, section 4. https://arxiv.org/abs/2503.06921

    Differences:
        Their code divides by the reciprocal of s, which rounds differently in the last place. It rounds the tensors
        of CLIP whose names have ``weight`` in them, but those of layer normalisation and the token embedding; here
        all with two axes or more, but embeddings of tokens and positions and CLIP's projections, which are the same
        ones. A tensor whose entries are equal gives NaN there. They store theta_0, the rounded average and the tasks;
        here theta_0 with the rounded average is one model, as many bytes as theta_0, so that the average costs none.
        Beside a theta_0 that is at hand anyway it would be b_o bits an entry, which no number here includes. They put
        what is rounded into merge methods; here each task is served its own.
    """

    bits: int = 3
    shared_bits: int | None = None
    exclude: tuple[str, ...] = (
        "*token_embed*", "*word_embed*", "*embed_tokens*", "*wte*", "*wpe*", "*shared.weight", "*position*embed*",
        "*pos_embed*", "*text_projection*", "*visual.proj",
    )  # fmt: skip

    title = "TVQ"
    stores = "b bits per entry and two numbers per tensor, tensors with one axis whole"
    on = "pretrained"

    def __post_init__(self) -> None:
        one_of("byom.bits", whole("byom.bits", self.bits, least=1), BITS)
        if self.shared_bits is not None:
            one_of("byom.shared_bits", whole("byom.shared_bits", self.shared_bits, least=1), BITS)
            object.__setattr__(self, "title", "RTVQ")
        object.__setattr__(self, "exclude", patterns("byom.exclude", self.exclude))

    @property
    def passes(self) -> int:
        """Once to average, where that is asked for, and once to pack."""
        return 1 + (self.shared_bits is not None)

    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Pack every task; see `Variant.serve`. The shared model is made once."""
        shared = self._shared(problem, reference)
        lazy = super().streamed(problem, shared if shared is reference else shared.materialise())
        return Served(lazy.reference, dict(lazy.deltas), lazy.base)

    def streamed(self, problem: Problem, reference: Weights) -> Served:
        """Pack a task each time its difference is asked for; see `Variant.streamed`."""
        return super().streamed(problem, self._shared(problem, reference))

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store the codes of a tensor's changes with their scale and zero, or all of its values."""
        if not self._rounds(name, target.shape):
            return sparse.whole(target, shared.reference)
        delta = wide(target) - wide(shared.reference)
        if not delta.any():
            return {}
        if (found := quantised(delta, self.bits)) is None:
            return sparse.whole(target, shared.reference)
        codes, scale, zero = found
        return {"codes": integers.pack(codes, self.bits), "scale": scale, "zero": zero}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the rounded change to the shared model, or put all values back."""
        reference = shared.reference
        if "values" in parts:
            return sparse.assign(parts, reference)
        codes = integers.unpack(parts["codes"], self.bits, reference.numel()).reshape(reference.shape)
        return (wide(reference) + dequantised(codes, parts["scale"], parts["zero"])).to(reference.dtype)

    def _rounds(self, name: str, shape: tuple[int, ...]) -> bool:
        kept = any(fnmatchcase(name, pattern) for pattern in self.exclude)
        return len(shape) > 1 and min(shape) > 0 and not kept

    def _shared(self, problem: Problem, reference: Weights) -> Weights:
        """Return what differences are taken to: the reference, or theta_0 with the rounded average, lazily."""
        if self.shared_bits is None:
            return reference
        require_match(problem.pretrained, reference)
        base, bits = problem.pretrained, self.shared_bits

        def read(name: str) -> Tensor:
            if not base.merges(name):
                return base[name]
            if is_running(name) or not self._rounds(name, base.shape(name)):
                return base.read_finite(name)
            group = problem.group(name)
            origin = wide(group.pretrained)
            average = sum((wide(expert) - origin for expert in group.experts), torch.zeros_like(origin))
            found = quantised(average / len(group.experts), bits)
            return group.pretrained if found is None else origin + dequantised(*found)

        return problem.back(base.derived(read, f"{base.origin} + the average in {bits} bits"))


def quantised(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Round values to an even grid between their extremes, shifted so that 0 is on it.

    Args:
        values: ``[*shape]`` in fp32 or fp64, finite, not empty.
        bits: Bits of a code (b).

    Returns:
        Codes ``[*shape]`` uint8 (q), the grid's step (s) and the code of 0, a whole number (z), both in the dtype of
        `values`; None if there is no step, as where all values are equal.
    """
    low, high = torch.aminmax(values)
    step = (high - low) / ((1 << bits) - 1)
    if not (step > 0 and step.isfinite()):
        return None
    zero = -(low / step).round()
    codes = values.div(step).add_(zero).round_().clamp_(0, (1 << bits) - 1)
    return codes.to(torch.uint8), step, zero


def dequantised(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Return what `quantised` stands for: ``s (q - z)``, in the dtype of the step."""
    return (codes.to(step.dtype) - zero) * step
