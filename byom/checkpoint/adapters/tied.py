"""Tied parameters of the model that an adapter is loaded onto."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from byom.functional.tensors import shared
from byom.storage.declared import declared
from byom.weights import Weights
from byom.weights.ties import groups


def tied_names(reference: Weights, prefix: str, module: nn.Module | None, base_model: str) -> frozenset[str]:
    """Name the parameters that are one tensor with another: in the weights, in the module, or by configuration.

    Args:
        reference: The weights that differences were taken to.
        prefix: Start of every parameter's name that is missing in the plain model's.
        module: The model, with the names of `reference`, if there is one.
        base_model: The plain model; asked if it is a folder with a ``config.json``.
    """
    every = [list(pair) for pair in reference.ties.items()]
    every += groups(shared(module.state_dict())).values() if module else ()
    if base_model and Path(base_model).is_dir():
        plain = [name.removeprefix(prefix) for name in reference]
        every += [[prefix + name for name in group] for group in declared(Path(base_model), plain)]
    return frozenset(name for group in every for name in group)
