"""Fused attention taken apart: query, key and value as modules of their own, so that each can be adapted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from byom.errors import OptionError
from byom.weights.fused import PARTS


class SplitLinear(nn.Module):
    """The fused query-key-value layer of timm as three layers.

    Args:
        fused: ``[3 d, n]``, queries first.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = _thirds(fused.weight, fused.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[..., 3 d]`` of ``[..., n]``."""
        return torch.cat([self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)], -1)


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention`, as open_clip uses it, with four layers.

    Args:
        fused: The module; query, key and value of one width, without extra keys.

    Raises:
        OptionError: If it is of another kind.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if fused.in_proj_weight is None or fused.bias_k is not None or fused.add_zero_attn:
            raise OptionError("only attention with one fused in_proj_weight and no extra keys can be taken apart")
        self.heads, self.batch_first = fused.num_heads, fused.batch_first
        self.q_proj, self.k_proj, self.v_proj = _thirds(fused.in_proj_weight, fused.in_proj_bias)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return ``(outputs, None)`` of ``[B, L, d]`` (``[L, B, d]`` unless the module is batch-first)."""
        if need_weights:
            raise OptionError("attention that was taken apart returns no attention weights; use need_weights=False")
        each = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (self._headed(tensor) for tensor in each)
        mask = attn_mask if attn_mask is None or attn_mask.dtype != torch.bool else ~attn_mask
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.out_proj(mixed if self.batch_first else mixed.transpose(0, 1)), None

    def _headed(self, tensor: Tensor) -> Tensor:
        batched = tensor if self.batch_first else tensor.transpose(0, 1)
        return batched.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def split(module: nn.Module) -> nn.Module:
    """Take apart every fused attention of a module, in place; what it computes stays the same.

    Args:
        module: Any module; timm's ``qkv`` layers and `nn.MultiheadAttention` are found by what they are.

    Returns:
        The module.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.MultiheadAttention):
            setattr(module, name, SplitAttention(child).train(child.training))
        elif name == "qkv" and isinstance(child, nn.Linear):
            setattr(module, name, SplitLinear(child).train(child.training))
        else:
            split(child)
    return module


def _thirds(weight: Tensor, bias: Tensor | None) -> list[nn.Linear]:
    biases = [None] * len(PARTS) if bias is None else bias.chunk(len(PARTS))
    return [_linear(w, b) for w, b in zip(weight.chunk(len(PARTS)), biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
