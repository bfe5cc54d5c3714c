"""CLIP's image tower in the names of open_clip and of transformers: the same tensors, cut and named differently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.weights import Spec, Weights
from byom.weights.match import PLAIN

MODEL = ("vision_model.", "")
"""Starts of transformers' names: its version 5 leaves the first out where the model is the tower alone."""
TOP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # sic
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PARTS = ("q_proj", "k_proj", "v_proj")
PROJECTION = "visual_projection.weight"
RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
THEIRS = re.compile(r"(?:vision_model\.)?encoder\.layers\.(\d+)\.(.+)")
FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


class Source(NamedTuple):
    """Origin of a tensor.

    Args:
        names: One tensor, or three that are stacked.
        transposed: Whether it is stored the other way round.
    """

    names: tuple[str, ...]
    transposed: bool = False


def hugging_face_names(name: str) -> Source | None:
    """Return where transformers keeps a tensor of open_clip's image tower, without prefixes; None if nowhere."""
    if name == "proj":
        return Source((PROJECTION,), transposed=True)
    if name in TOP:
        return Source((TOP[name],))
    if match := FUSED.fullmatch(name):
        return Source(tuple(f"encoder.layers.{match[1]}.self_attn.{part}.{match[2]}" for part in PARTS))
    if (match := RESBLOCK.fullmatch(name)) and match[2] in BLOCK:
        return Source((f"encoder.layers.{match[1]}.{BLOCK[match[2]]}.{match[3]}",))
    return None


def open_clip_name(name: str) -> str:
    """Return a name of a block of transformers' image tower, of a module or a parameter, as open_clip has it.

    Query, key and value keep names of their own, as parts of the fused layer; other names stay as they are.
    """
    match = THEIRS.match(name)
    if not match:
        return name
    module = next((f"{ours}{match[2].removeprefix(t)}" for ours, t in BLOCK.items() if match[2].startswith(t)), None)
    return f"transformer.resblocks.{match[1]}.{module or match[2].replace('self_attn.', 'attn.', 1)}"


def from_hugging_face(raw: Weights, base: Weights, tower: str) -> tuple[Weights, list[str], list[str]]:
    """View transformers' tensors under open_clip's names; nothing is read, and no value changes.

    Args:
        raw: A `CLIPVisionModel`, one with projection, or a whole `CLIPModel`.
        base: The pre-trained tower in open_clip's names; gives what `raw` lacks: the projection, which the vision
            model alone does not have.
        tower: What the names of `base` start with.

    Returns:
        The view, the names that were taken from `base`, and the names of `raw` that were used.

    Raises:
        CheckpointError: If a tensor is missing or has another shape.
    """
    start = MODEL[0] if any(name.startswith(MODEL[0]) for name in raw) else MODEL[1]
    places: dict[str, Source] = {}
    borrowed: list[str] = []
    for name in base:
        source = hugging_face_names(name.removeprefix(tower))
        if source is None:
            raise CheckpointError(f"{base.origin} has '{name}', which no CLIP image tower of transformers has")
        full = Source(tuple(n if n == PROJECTION else start + n for n in source.names), source.transposed)
        if all(n in raw for n in full.names):
            places[name] = _fitting(raw, full, base.shape(name))
        elif name.removeprefix(tower) == "proj":
            borrowed.append(name)
        else:
            raise CheckpointError(f"{raw.origin} lacks {', '.join(n for n in full.names if n not in raw)}")

    def read(name: str) -> Tensor:
        return _joined(raw, places[name]) if name in places else base[name]

    used = [n for source in places.values() for n in source.names]
    return base.derived(read, raw.origin), borrowed, used


def _fitting(raw: Weights, source: Source, shape: tuple[int, ...]) -> Source:
    upright = shape[::-1] if source.transposed else shape
    expected = (upright[0] // len(source.names), *upright[1:])
    for name in source.names:
        if not raw.dtype(name).is_floating_point:
            raise CheckpointError(
                f"{raw.origin}: '{name}' holds {raw.dtype(name)}, as of a quantised checkpoint. {PLAIN}"
            )
        if raw.shape(name) != expected:
            raise CheckpointError(
                f"{raw.origin}: '{name}' has shape {list(raw.shape(name))} where the backbone has {list(expected)}; "
                "choose the backbone of the same size"
            )
    return source


def _joined(raw: Weights, source: Source) -> Tensor:
    parts = [raw[name] for name in source.names]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (tensor.T if source.transposed else tensor).contiguous()


def to_hugging_face(weights: Weights, tower: str = "visual.") -> Weights:
    """View an image tower in open_clip's names as transformers' `CLIPVisionModelWithProjection` names it.

    Args:
        weights: The tower.
        tower: What its names start with.

    Returns:
        A view; nothing is read, and no value changes.

    Raises:
        CheckpointError: If a name is not one of an open_clip image tower.
    """
    specs: dict[str, Spec] = {}
    places: dict[str, tuple[str, int | None, bool]] = {}
    for name in weights:
        source = hugging_face_names(name.removeprefix(tower))
        if source is None:
            raise CheckpointError(f"{weights.origin}: '{name}' is not a tensor of an open_clip image tower")
        shape = weights.shape(name)
        for part, ours in enumerate(source.names):
            full = ours if ours == PROJECTION else MODEL[0] + ours
            cut = (shape[0] // len(source.names), *shape[1:])
            specs[full] = Spec(cut[::-1] if source.transposed else cut, weights.dtype(name))
            places[full] = (name, part if len(source.names) > 1 else None, source.transposed)
    return Weights(specs, lambda name: _cut(weights, places, name), origin=weights.origin)


def _cut(weights: Weights, places: Mapping[str, tuple[str, int | None, bool]], name: str) -> Tensor:
    ours, part, transposed = places[name]
    tensor = weights[ours]
    tensor = tensor if part is None else tensor.chunk(len(PARTS))[part]
    return (tensor.T if transposed else tensor).contiguous()
