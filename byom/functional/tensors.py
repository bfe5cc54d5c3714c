"""Plain tensor helpers: the precision of arithmetic, finiteness, shared storage, packed experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from byom.errors import CheckpointError, listed

REMEDIES = {
    "quantised": "Call dequantize() on it, or save the model before it was quantised",
    "sparse": "Call to_dense() on it, and save again",
    "nested": "Call to_padded_tensor or take it apart, and save again",
    "not initialised": "Run the model once, so that its lazy modules know their shapes",
}
WIDER = "write it in a wider dtype (Weights.save(folder, dtype=torch.float32))"
WIDER_BASE = "give the base and the merged model in a wider dtype (base.to(torch.float32))"
_PACKED = re.compile(r"torch\.(u?int[1-7]|bits\w+|float4\w+|float8_e8m0fnu)")

UNNUMBERED = ("input_linear", "output_linear")  # what Granite and JetMoe call their packed experts
NUMBERED = re.compile(r"(expert_?)?\d+")  # one expert among several; NLLB and Switch call theirs expert_3


def wide(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in fp32, or as it is if it is fp64: the precision of all arithmetic here."""
    return tensor.to(widened(tensor.dtype))


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which arithmetic on a type happens; torch has no promotion for those of 8 bits."""
    eight = dtype.is_floating_point and dtype.itemsize == 1
    return torch.float32 if eight else torch.promote_types(dtype, torch.float32)


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find names that view the same storage in the same way: tied parameters."""
    first: dict[tuple, str] = {}
    ties: dict[str, str] = {}
    for name in sorted(tensors):
        t = tensors[name]
        key = (t.device, t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        if t.data_ptr() and first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def finite(tensor: Tensor) -> bool:
    """Return whether a non-empty tensor holds neither NaN nor infinity."""
    values = wide(tensor) if tensor.itemsize == 1 else tensor  # torch has no such kernel for 8 bits
    if math.isfinite(values.sum().item()):  # a sum passes NaN and infinity on, and takes half as long as the extremes
        return True
    low, high = torch.aminmax(values)  # propagates NaN, and needs no mask as large as the tensor
    return math.isfinite(low.item()) and math.isfinite(high.item())


def require_values(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Refuse tensors on the meta device, and those that are no dense arrays of numbers.

    Args:
        tensors: Name to tensor.
        origin: What the message calls them.

    Raises:
        CheckpointError: Naming the tensors.
    """
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(
            f"{origin}: {listed(empty)} have no values (they are on the meta device), as device_map='auto' leaves what "
            "it offloads; load the model onto a real device, without device_map"
        )
    for name, tensor in tensors.items():
        if kind := special(tensor):
            remedy = REMEDIES.get(kind, "Take plain tensors: dequantize() or full_tensor() makes one of most kinds")
            raise CheckpointError(f"{origin}: tensor '{name}' is {kind}, and cannot be merged as it is. {remedy}")


def special(tensor: Tensor) -> str | None:
    """Say what a tensor is that is no dense array of numbers; None if it is one."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if is_lazy(tensor):
        return "not initialised"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a {type(tensor).__name__}"
    return f"of the type {tensor.dtype}, which packs codes or holds scales" if packed(tensor.dtype) else None


def packed(dtype: torch.dtype) -> bool:
    """Say whether a type is of codes or of their scales, in which no weights are held on their own."""
    return _PACKED.fullmatch(str(dtype)) is not None


def require_result(tensor: Tensor, what: str) -> Tensor:
    """Return what is about to be written, refusing NaN and infinity but for masks.

    Args:
        tensor: ``[*shape]``.
        what: What the message calls it.

    Raises:
        CheckpointError: If a value is not finite.
    """
    if tensor.is_floating_point() and tensor.numel() and not (finite(tensor) or is_mask(tensor)):
        raise CheckpointError(
            f"{what} came out with values that are NaN or infinite, and nothing was written. Look at the inputs, and "
            "at hyperparameters such as the scale"
        )
    return tensor


def is_mask(tensor: Tensor) -> bool:
    """Return whether a tensor is a mask to add to scores: 0 and minus infinity only."""
    return bool(((tensor == 0) | (tensor == -math.inf)).all())


def narrowed(tensor: Tensor, dtype: torch.dtype, what: str, remedy: str = WIDER) -> Tensor:
    """Return a tensor in another dtype, refusing values that become infinite.

    Args:
        tensor: ``[*shape]``.
        dtype: What it is cast to.
        what: What the message calls the tensor.
        remedy: How the message ends.

    Raises:
        CheckpointError: Naming the largest value that the dtype holds.
    """
    cast = tensor.to(dtype)
    if dtype == tensor.dtype or not (dtype.is_floating_point and tensor.is_floating_point() and tensor.numel()):
        return cast
    most = torch.finfo(dtype).max  # bf16 reaches as far as fp32 but for the last step
    narrower = most < 1e38 and most < torch.finfo(tensor.dtype).max
    beyond = narrower and (_saturates(tensor, most) if dtype.itemsize == 1 else not finite(cast))
    if beyond and finite(tensor):
        raise CheckpointError(
            f"{what} has values up to {float(tensor.abs().max()):.3g}, and {str(dtype).removeprefix('torch.')} holds "
            f"{most:.3g} at most; {remedy}"
        )
    return cast


def _saturates(tensor: Tensor, most: float) -> bool:
    """Say whether values are beyond the largest one of 8 bits, which torch writes in their place."""
    return float(wide(tensor).abs().max()) > most


def packs_experts(name: str, shape: Sequence[int]) -> bool:
    """Say whether a parameter packs one matrix for each expert of a mixture, ``[E, m, n]``.

    The name tells: three axes alone may be the kernel of a convolution, whose axes belong together. Packed are
    parameters within a module called ``experts`` (Mixtral, Qwen, Llama 4, DeepSeek, gpt-oss and others in
    transformers 5: ``mlp.experts.gate_up_proj``), but not those of one numbered expert (``experts.3.conv.weight``).

    Args:
        name: The parameter's name.
        shape: Its shape.
    """
    return len(shape) == 3 and of_all_experts(name)


def of_all_experts(name: str) -> bool:
    """Say whether a parameter's name is that of something of all experts of a mixture, its first axis being theirs."""
    path = name.split(".")
    after = [path[i + 1] for i, part in enumerate(path[:-1]) if part.endswith("experts")]
    packed = any(not NUMBERED.fullmatch(part) and "conv" not in part for part in after)
    return packed or bool({*path[:-1]} & {*UNNUMBERED})


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict's values on the CPU: those that are there as they are; tied names stay one tensor.

    Copying name by name would make two tensors of a tied one, and merging goes by what is tied.
    """
    own = {name: tensor.detach() for name, tensor in state.items()}
    ties = shared(own)
    moved = {name: tensor.cpu() for name, tensor in own.items() if name not in ties}
    return {name: moved[ties.get(name, name)] for name in state}


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict's values on the CPU, in storage of their own; tied names stay one tensor."""
    ties = shared({name: tensor.detach() for name, tensor in state.items()})
    own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items() if name not in ties}
    return {name: own[ties.get(name, name)] for name in state}
