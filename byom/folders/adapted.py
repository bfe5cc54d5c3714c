"""Adapters that come with a head of their own: the model that they are part of, as transformers names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from byom.checkpoint.adapters.config import CONFIG as ADAPTER
from byom.folders.beside import CONFIG, configuration
from byom.folders.skeleton import built
from byom.weights import Spec, Weights

AUTO = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
"""PEFT's names of tasks that have heads, and transformers' tables of the classes for them."""


class Whole(NamedTuple):
    """The model that an adapter with a head is part of.

    Args:
        weights: All of it, under its class's names.
        names: Its names to the base's, of what it shares.
        settings: What its configuration says otherwise than the base's.
    """

    weights: Weights
    names: dict[str, str]
    settings: dict[str, Any]


def whole(folder: Path, base: Path | None, shared: Weights, head: Mapping[str, Tensor]) -> Whole | None:
    """Return the model of an adapter's task: a class of transformers that has the head's tensors and the base's.

    Args:
        folder: The adapter's folder.
        base: The base's folder.
        shared: The adapted weights, in the base's names.
        head: The adapter's own tensors.

    Returns:
        The model; None where transformers has no such class, or the base is no folder.
    """
    kind = configuration(folder / ADAPTER).get("task_type")
    if base is None or not (base / CONFIG).is_file() or kind not in AUTO:
        return None
    config = configuration(base / CONFIG)
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, AUTO[kind]).get(config.get("model_type"))
    for classes in dict.fromkeys(len(tensor) for tensor in head.values() if tensor.dim() == 2):
        labels = {str(place): f"LABEL_{place}" for place in range(classes)}
        settings = {"architectures": [name], "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
        module = None if name is None else built(json.dumps(config | settings), name)
        if module is not None and (found := _fitted(module, shared, head)) is not None:
            return Whole(*found, settings)
    return None


def _fitted(module: nn.Module, shared: Weights, head: Mapping[str, Tensor]) -> tuple[Weights, dict[str, str]] | None:
    """Return a module's tensors of the adapted weights and the head; None if one of them has no place or no value."""
    start = f"{getattr(module, 'base_model_prefix', '')}."
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    names = {
        own: name for own in shapes for name in (own, own.removeprefix(start)) if name in shared and own not in head
    }
    own = {name: tensor for name, tensor in head.items() if shapes.get(name) == tuple(tensor.shape)}
    if len(own) < len(head) or set(shapes) - set(names) - set(own):
        return None
    specs = {n: Spec(shapes[n], shared.dtype(names[n]) if n in names else own[n].dtype) for n in (*names, *own)}
    return Weights(specs, lambda n: own[n] if n in own else shared[names[n]], origin=shared.origin), names
