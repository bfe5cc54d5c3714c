"""Top-magnitude cuts of the difference between two sets of weights, globally or tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

from torch import Tensor

from byom.functional.selection import Cut, Part, kept, locate
from byom.functional.tensors import wide
from byom.weights.weights import Weights

SWEEP = (0.01, 0.05, 0.1, 0.2)  # densities of the benchmark tables: one pass finds them all
Cuts = dict[str, tuple[Cut, int]]  # parameter name -> (cut, flat offset of the parameter in the cut's stream)


def cuts(target: Weights, reference: Weights, density: float, scope: str = "global") -> Cuts:
    """Find which entries of ``target - reference`` are the largest in magnitude.

    Args:
        target: theta_t.
        reference: theta_0 or theta_merged; same names and shapes.
        density: Fraction of entries kept, in [0, 1].
        scope: ``global`` ranks all parameters together, ``tensor`` each on its own.

    Returns:
        For every mergeable parameter its cut, and the parameter's offset in the stream that was cut.
    """
    known = _known(target.fingerprint(), reference.fingerprint(), scope)
    if density not in known:
        known.update(cuts_at(target, reference, tuple(sorted({*SWEEP, density})), scope))
    return known[density]


@lru_cache(maxsize=256)  # small, and keyed by content: one entry a (task, reference)
def _known(target: str, reference: str, scope: str) -> dict[float, Cuts]:
    return {}


def cuts_at(target: Weights, reference: Weights, densities: Sequence[float], scope: str) -> dict[float, Cuts]:
    """Find the cuts of several densities in one pass over the difference; see `cuts`."""
    names = target.mergeable()
    parts = [difference(target, reference, name) for name in names]
    by_density = _global(parts, densities) if scope == "global" else _per_tensor(parts, densities)
    return {density: dict(zip(names, found, strict=True)) for density, found in zip(densities, by_density, strict=True)}


def difference(target: Weights, reference: Weights, name: str) -> Part:
    """Return one parameter of ``target - reference`` as a stream part that subtracts what it is asked for."""
    numel = 1
    for extent in target.shape(name):
        numel *= extent
    left, right = _flat(target, name), _flat(reference, name)
    return Part(numel, lambda at: wide(left()[at]) - wide(right()[at]))


@lru_cache(maxsize=2)  # the stream asks for block after block of one parameter of two models
def _read(weights: Weights, name: str) -> Tensor:
    return weights.read_finite(name).reshape(-1)


def _flat(weights: Weights, name: str) -> Callable[[], Tensor]:
    return lambda: _read(weights, name)


def _global(parts: Sequence[Part], densities: Sequence[float]) -> list[list[tuple[Cut, int]]]:
    total = sum(part.numel for part in parts)
    offsets = [0, *accumulate(part.numel for part in parts)][: len(parts)]
    found = locate(parts, [kept(density, total) for density in densities])
    return [[(cut, offset) for offset in offsets] for cut in found]


def _per_tensor(parts: Sequence[Part], densities: Sequence[float]) -> list[list[tuple[Cut, int]]]:
    rows = [locate([part], [kept(density, part.numel) for density in densities]) for part in parts]
    return [[(row[i], 0) for row in rows] for i in range(len(densities))]
