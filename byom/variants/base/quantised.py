"""Variants whose values take fewer bits: differences and singular vectors as integers with a scale, or in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from byom.errors import CheckpointError, one_of
from byom.functional.tensors import WIDER_BASE, wide, widened
from byom.storage.signature import ADDED
from byom.variants.base import positions as encoding
from byom.variants.base import rounded
from byom.variants.base.unpacker import Parts
from byom.variants.base.variant import PackingVariant

Values = Literal["native", "bf16", "int8", "int6", "int5", "int4", "int3", "int2"]
Positions = Literal["bytes", "entropy"]
DIFFERENCES, SCALE = "differences", "scale"  # the parts that stand for values where these are not native
SIDES = {"left": -2, "right": -1}  # part of singular vectors: the axis along which each of them runs


@dataclass(frozen=True)
class QuantisedVariant(PackingVariant):
    """A packing variant of which floating-point values may be stored in fewer bits.

    Integers of b bits lie in ``[-L, L]``, ``L = 2^(b-1) - 1``, with one scale per group in fp32 (in fp64 for models in
    fp64), and are written by a range coder where that takes less than b bits each. The scale is ``max|x| / L`` with 8
    bits and the least-squares one with fewer (`byom.variants.base.rounded`).

    Values that native parts assign are stored as differences to the reference and added to it: rounding the weights
    themselves would lose far more. Their group is what is stored of a tensor. A tensor that is stored whole and is a
    vector or a single number takes 8 bits at least.

    Of singular vectors the group is one vector; the scales of a pair go into its singular value, so that rank k costs k
    numbers in fp32, as without rounding.

    Running statistics of normalisation layers are never rounded.

    Args:
        values: ``native`` stores what the variant packs, in its own dtype. ``bf16``, and ``int8``, ``int6``, ``int5``,
            ``int4``, ``int3`` and ``int2``, as above; int2 has -1, 0 and 1.

    Raises:
        OptionError: If `values` is not known.
    """

    values: Values = field(default="native", kw_only=True, metadata=ADDED)

    def __post_init__(self) -> None:
        one_of("byom.values", self.values, get_args(Values))

    def shrink(self, parts: Parts, read: Callable[[], Tensor]) -> Parts:
        """Store differences and singular vectors in fewer bits; see `PackingVariant.shrink`."""
        if self.values == "native" or not parts:
            return parts
        bits = 0 if self.values == "bf16" else int(self.values.removeprefix("int"))
        return _differences(parts, read(), bits, self._placed) if "values" in parts else _vectors(parts, bits)

    def _placed(self, positions: Tensor, numel: int) -> tuple[str, Tensor]:
        """Return what is stored of positions."""
        return encoding.encode(positions, numel)

    def expand(self, parts: Parts, read: Callable[[], Tensor]) -> Parts:
        """Return differences as values of the task, and singular vectors in floating point; see `Unpacker.expand`."""
        if self.values == "native" or "values" in parts:
            return parts
        reference = read()
        return _values(parts, reference) if DIFFERENCES in parts else _factors(parts, reference)


@dataclass(frozen=True)
class CompactVariant(QuantisedVariant):
    """A variant of which values and their positions may be stored in fewer bits.

    Args:
        values: As `QuantisedVariant` says.
        positions: ``bytes``: a byte per gap or a bit per place. ``entropy``: the gaps by a range coder where that is
            smaller, which for positions drawn at random is within 1 % of ``log2 C(n, k)`` bits and 6 bytes per tensor.

    Raises:
        OptionError: If an option is not known.
    """

    positions: Positions = field(default="bytes", kw_only=True, metadata=ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("byom.positions", self.positions, get_args(Positions))

    def shrink(self, parts: Parts, read: Callable[[], Tensor]) -> Parts:
        """Store differences and singular vectors, and positions, in fewer bits; see `PackingVariant.shrink`."""
        if self.values != "native" or self.positions == "bytes" or "values" not in parts:
            return super().shrink(parts, read)
        numel = read().numel()
        positions, values = encoding.decoded(parts, numel)
        return dict([self._placed(positions, numel)]) | {"values": values}

    def _placed(self, positions: Tensor, numel: int) -> tuple[str, Tensor]:
        return (encoding.smallest if self.positions == "entropy" else encoding.encode)(positions, numel)


def _differences(
    parts: Parts, reference: Tensor, bits: int, place: Callable[[Tensor, int], tuple[str, Tensor]]
) -> Parts:
    """Return values that are assigned as rounded differences, without those that are rounded to 0."""
    numel = reference.numel()
    positions, values = encoding.decoded(parts, numel)
    at = reference.reshape(-1)[positions.to(reference.device)]
    differences = (wide(values).to(at.device) - wide(at)).cpu()
    whole, vector = len(positions) == numel, numel == max(reference.shape, default=1)
    bits = max(bits, 8) if bits and whole and vector else bits
    codes, scale = rounded.rounded(differences, bits) if bits else (_halved(differences), None)
    if not whole:
        positions, codes = positions[codes.to(positions.device) != 0], codes[codes != 0]
    if not bool(codes.any()):
        return {}
    stored = {DIFFERENCES: codes} if scale is None else {DIFFERENCES: rounded.pack(codes, bits), SCALE: scale.squeeze()}
    return dict([place(positions, numel)]) | stored


def _values(parts: Parts, reference: Tensor) -> Parts:
    """Return what `_differences` rounded as values to assign, in the reference's dtype."""
    stored, dtype = parts[DIFFERENCES], widened(reference.dtype)
    kinds = {part: data for part, data in parts.items() if part not in (DIFFERENCES, SCALE)}
    if stored.dtype == torch.uint8:
        scale = _required(parts, SCALE).to(dtype).reshape(-1)[:1]
        differences = rounded.unpack(stored, reference.numel()).to(dtype) * scale
    else:
        differences = stored.to(dtype)
    if differences.ndim != 1:
        raise CheckpointError(
            f"differences of shape {tuple(differences.shape)} are no flat ones; pack or fetch it again"
        )
    positions, differences = encoding.decoded(kinds | {"values": differences}, reference.numel())
    at = reference.reshape(-1)[positions.to(reference.device)].to(differences.device)
    values = torch.where(differences == 0, wide(at), wide(at) + differences).to(at.dtype)  # -0 + 0 would be 0
    if at.dtype == torch.float16 and not bool(values.isfinite().all()):
        raise CheckpointError(
            f"rounded values of a task are beyond what {at.dtype} holds; {WIDER_BASE}, and pack again"
        )
    return {**(kinds if "all" in kinds else {encoding.PLAIN: positions}), "values": values}


def _vectors(parts: Parts, bits: int) -> Parts:
    """Return singular vectors in fewer bits, and singular values that are multiplied by the scales of both."""
    if not bits:
        return {part: _halved(tensor.cpu()) for part, tensor in parts.items()}
    found: Parts = {}
    for part, tensor in parts.items():
        side, mark, place = part.partition("@")
        if side in SIDES:
            codes, scale = rounded.rounded(tensor.cpu(), bits, SIDES[side])
            found[part] = rounded.pack(codes, bits)
            singular = f"singular{mark}{place}"
            found[singular] = found.get(singular, parts[singular].cpu()) * scale.squeeze(SIDES[side])
    return {part: found[part] for part in parts}


def _halved(values: Tensor) -> Tensor:
    """Return values in bfloat16, refusing those of fp64 that it cannot hold."""
    found = values.to(torch.bfloat16)
    rounded.require_finite(found)
    return found


def _factors(parts: Parts, reference: Tensor) -> Parts:
    """Return singular vectors as they were packed, in fp32, or fp64 where the reference is."""
    dtype = widened(reference.dtype)

    def factor(part: str, stored: Tensor) -> Tensor:
        return (rounded.unpack(stored, reference.numel()) if part.partition("@")[0] in SIDES else stored).to(dtype)

    found = {part: factor(part, t) if t.dtype == torch.uint8 else t.to(dtype) for part, t in parts.items()}
    for part, tensor in found.items():
        side, mark, place = part.partition("@")
        for other in SIDES:
            _required(found, f"{other}{mark}{place}")
        rank = _required(found, f"singular{mark}{place}").shape
        if side in SIDES and (tensor.ndim < 2 or (*tensor.shape[:-2], tensor.shape[-3 - SIDES[side]]) != rank):
            raise CheckpointError(
                f"'{part}' of shape {tuple(tensor.shape)} does not fit {tuple(rank)} singular values; pack or fetch it "
                "again"
            )
    return found


def _required(parts: Parts, part: str) -> Tensor:
    if part not in parts or not parts[part].numel():
        raise CheckpointError(f"integers without their '{part}' cannot be put back; pack or fetch it again")
    return parts[part]
