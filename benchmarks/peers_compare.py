"""How far two merged models, or two merged adapters, lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from byom.checkpoint.adapters.adapter import Adapter
from byom.weights import Weights

Pair = tuple[Tensor, Tensor]


def difference(base: Path, ours: Path, theirs: Path, adapters: bool) -> float:
    """Return the largest difference of a tensor, relative to what was changed.

    Args:
        base: Folder of the base.
        ours: Folder of byom's result.
        theirs: Folder of another tool's result.
        adapters: Whether the results are adapters, whose products are compared.

    Returns:
        The largest ``||theirs - ours|| / ||ours - theta_0||`` (Frobenius) of a tensor that byom changed.

    Raises:
        SystemExit: If the results do not hold the same tensors.
    """
    pairs = _products(base, ours, theirs) if adapters else _changes(base, ours, theirs)
    return max(float((b - a).norm() / a.norm()) for a, b in pairs if a.any())


def norm_ratio(base: Path, ours: Path, theirs: Path, adapters: bool) -> float:
    """Return the norm of another tool's change over that of byom's; arguments as for `difference`."""
    pairs = _products(base, ours, theirs) if adapters else _changes(base, ours, theirs)
    squares = torch.zeros(2, dtype=torch.float64)
    for a, b in pairs:
        squares += torch.stack([a.square().sum(), b.square().sum()])
    return float((squares[1] / squares[0]).sqrt())


def _changes(base: Path, ours: Path, theirs: Path) -> Iterator[Pair]:
    start, mine, other = (Weights.open(folder) for folder in (base, ours, theirs))
    _require_same(set(mine), set(other), theirs)
    for name in mine.mergeable():
        origin = start[name].double()
        yield mine[name].double() - origin, other[name].double() - origin


def _products(base: Path, ours: Path, theirs: Path) -> Iterator[Pair]:
    start = Weights.open(base)
    mine, other = (Adapter.open(folder).on(start) for folder in (ours, theirs))
    _require_same(set(mine.factored), set(other.factored), theirs)
    for name in mine.factored:
        yield tuple(sum(p.left.double() @ p.right.double() for p in each.pieces(name)) for each in (mine, other))  # type: ignore[misc]


def _require_same(ours: set[str], theirs: set[str], folder: Path) -> None:
    if odd := ours ^ theirs:
        raise SystemExit(f"{folder} and byom's result differ in {len(odd)} tensors, such as {min(odd)}")
