"""Plain tensor helpers: the precision of arithmetic, finiteness, shared storage, packed experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UNNUMBERED = ("input_linear", "output_linear")  # what Granite and JetMoe call their packed experts


def wide(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in fp32, or as it is if it is fp64: the precision of all arithmetic here."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find names that view the same storage in the same way: tied parameters."""
    first: dict[tuple, str] = {}
    ties: dict[str, str] = {}
    for name in sorted(tensors):
        t = tensors[name]
        key = (t.device, t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        if t.numel() and first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def finite(tensor: Tensor) -> bool:
    """Return whether a non-empty tensor holds neither NaN nor infinity."""
    low, high = torch.aminmax(tensor)  # propagates NaN, and needs no mask as large as the tensor
    return math.isfinite(low.item()) and math.isfinite(high.item())


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
    return any(not part.isdigit() and "conv" not in part for part in after) or bool({*path[:-1]} & {*UNNUMBERED})


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict's values on the CPU, in storage of their own; tied names stay one tensor."""
    ties = shared({name: tensor.detach() for name, tensor in state.items()})
    own = {name: tensor.detach().cpu().clone() for name, tensor in state.items() if name not in ties}
    return {name: own[ties.get(name, name)] for name in state}
