"""Packed differences in one piece: a file whose header does not grow with the number of parameters."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.variants.base.unpacker import Parts

Shapes = Mapping[str, tuple[int, ...]]

JOINED = "@joined"  # the entry of a file that stands for all parameters


def index(parts: Mapping[str, Parts], shapes: Shapes) -> Tensor:
    """Return what `split` needs to know, compressed: names, types and shapes.

    Args:
        parts: Parameter name to what is stored for it.
        shapes: Parameter name to the shape it was packed from.

    Returns:
        Uint8 ``[n]``.
    """
    stored = [
        [name, part, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, each in parts.items()
        for part, tensor in each.items()
    ]
    notes = {"stored": stored, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    text = json.dumps(notes, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def join(parts: Mapping[str, Parts], shapes: Shapes) -> Parts:
    """Lay all tensors of a packed difference end to end.

    Returns:
        ``index`` and ``data``, both uint8; what `split` takes apart.
    """
    pieces = [_bytes(tensor) for each in parts.values() for tensor in each.values()]
    return {"index": index(parts, shapes), "data": torch.cat([torch.empty(0, dtype=torch.uint8), *pieces])}


def split(joined: Parts, where: object) -> tuple[dict[str, Parts], dict[str, tuple[int, ...]]]:
    """Take apart what `join` laid end to end.

    Args:
        joined: What it returned.
        where: The file, for errors.

    Returns:
        Parameter name to what is stored for it, and to the shape it was packed from.

    Raises:
        CheckpointError: If index and data do not fit each other.
    """
    try:
        notes = json.loads(zlib.decompress(joined["index"].numpy().tobytes()))
        stored = [(name, part, getattr(torch, dtype), tuple(shape)) for name, part, dtype, shape in notes["stored"]]
        sizes = [dtype.itemsize * torch.Size(shape).numel() for _, _, dtype, shape in stored]
        pieces = joined["data"].split(sizes)
        shapes = {name: tuple(shape) for name, shape in notes["shapes"].items()}
        parts: dict[str, Parts] = {}
        for (name, part, dtype, shape), piece in zip(stored, pieces, strict=True):
            parts.setdefault(name, {})[part] = piece.clone().view(dtype).reshape(shape)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise CheckpointError(
            f"{where} is not what a packed difference in one piece is; pack or fetch it again"
        ) from error
    return parts, shapes


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
