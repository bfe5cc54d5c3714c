"""Fused attention in the weights of a model: the rows that are query, key and value."""

from __future__ import annotations

from typing import NamedTuple

from byom.weights.weights import Weights

PARTS = ("q_proj", "k_proj", "v_proj")


class Rows(NamedTuple):
    """The place of a module's matrix in the weights of the model as it is stored.

    Args:
        name: The parameter.
        start: First row.
        height: Number of rows.
    """

    name: str
    start: int
    height: int


def located(path: str, weights: Weights, kind: str = "weight") -> Rows | None:
    """Find a module's parameter in weights whose attention may be fused.

    Args:
        path: A module's path, for example ``blocks.0.attn.qkv.q_proj`` or ``resblocks.0.attn.q_proj``.
        weights: The model as it is stored.
        kind: ``weight`` or ``bias``.

    Returns:
        The parameter and the module's rows in it; None if the weights have no such parameter.
    """
    if f"{path}.{kind}" in weights:
        return Rows(f"{path}.{kind}", 0, weights.shape(f"{path}.{kind}")[0])
    stem, _, last = path.rpartition(".")
    if last not in PARTS:
        return None
    for name in (f"{stem}.in_proj_{kind}", f"{stem}.{kind}"):
        if name in weights:
            count = weights.shape(name)[0] // len(PARTS)
            return Rows(name, PARTS.index(last) * count, count)
    return None


def module_of(name: str, start: int, count: int, weights: Weights) -> str:
    """Return the path of the module, taken apart if need be, that holds some rows of a parameter: `located` backwards.

    Args:
        name: A parameter, for example ``blocks.0.attn.qkv.weight``.
        start: First row.
        count: Number of rows; all of them name the module as it is stored.
        weights: The model as it is stored.
    """
    stem, _, last = name.rpartition(".")
    if count == weights.shape(name)[0] and not last.startswith("in_proj_"):
        return stem
    return f"{stem}.{PARTS[start // count]}"
