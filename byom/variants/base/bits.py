"""Masks and signs as bits: one bit per place, lowest bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from byom.errors import CheckpointError
from byom.variants.base.delta import Parts

GROUP = 4  # places that share one bit saying whether any of them is set


def pack(mask: Tensor) -> Tensor:
    """Write a mask as bits.

    Args:
        mask: Bool, any shape, ``n`` places.

    Returns:
        ``[ceil(n / 8)]`` uint8 on the CPU.
    """
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little"))


def unpack(data: Tensor, numel: int) -> Tensor:
    """Read a mask back.

    Args:
        data: What `pack` returned.
        numel: Number of places (n).

    Returns:
        ``[n]`` bool, where the bytes lie.

    Raises:
        CheckpointError: If the bytes are not those of n places.
    """
    if data.dtype != torch.uint8 or data.numel() != -(-numel // 8):
        raise CheckpointError(
            f"a mask of {numel} places is {-(-numel // 8)} bytes, not {data.numel()} of {data.dtype}; "
            "pack or fetch it again"
        )
    bits = np.unpackbits(data.reshape(-1).cpu().numpy(), bitorder="little", count=numel)
    return torch.from_numpy(bits.view(np.bool_)).to(data.device)


def pack_signs(signs: Tensor) -> Parts:
    """Write values -1, 0 and 1: which places are not 0, in the smaller of two forms, and one bit per sign.

    `bitmap` has one bit per place. `group4` has one bit per group of four places, the last one filled up with zeros,
    and four more for every group that is not all 0; it is the smaller below about 29 % of places not 0.

    Args:
        signs: Any shape, values -1, 0 and 1.

    Returns:
        ``bitmap`` or ``group4``, and ``signs``, all uint8.
    """
    filled = signs.reshape(-1) != 0
    forms = {"bitmap": pack(filled), "group4": _to_groups(filled)}
    kind = min(forms, key=lambda form: len(forms[form]))
    return {kind: forms[kind], "signs": pack(signs.reshape(-1)[filled] > 0)}


def unpack_signs(parts: Parts, numel: int) -> Tensor:
    """Read signs back.

    Args:
        parts: What `pack_signs` returned; other parts are ignored.
        numel: Number of places (n).

    Returns:
        ``[n]`` int8 with values -1, 0 and 1.

    Raises:
        CheckpointError: If the bytes are not those of n places.
    """
    filled = unpack(parts["bitmap"], numel) if "bitmap" in parts else _from_groups(parts["group4"], numel)
    signs = torch.zeros(numel, dtype=torch.int8, device=filled.device)
    signs[filled] = unpack(parts["signs"], int(filled.sum())).to(torch.int8) * 2 - 1
    return signs


def _to_groups(filled: Tensor) -> Tensor:
    groups = pad(filled, (0, -len(filled) % GROUP)).reshape(-1, GROUP)
    used = groups.any(1)
    return torch.cat([pack(used), pack(groups[used])])


def _from_groups(data: Tensor, numel: int) -> Tensor:
    count = -(-numel // GROUP)
    head = -(-count // 8)
    used = unpack(data[:head], count)
    groups = torch.zeros(count, GROUP, dtype=torch.bool, device=data.device)
    groups[used] = unpack(data[head:], GROUP * int(used.sum())).reshape(-1, GROUP)
    return groups.reshape(-1)[:numel]
