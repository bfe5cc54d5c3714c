"""Top-magnitude cuts of the difference between two sets of weights, globally or tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal, get_args

from torch import Tensor

from byom.errors import one_of
from byom.functional.rows import RowCut, row_cuts
from byom.functional.selection import Cut, Part, kept, locate
from byom.functional.tensors import wide
from byom.weights.weights import Weights

SWEEP = (0.01, 0.05, 0.1, 0.2)  # densities of the benchmark tables: one pass finds them all
Scope = Literal["global", "tensor", "row"]
"""Entries that are ranked together: those of the whole model, of one tensor, or of one row along its last axis."""
Located = tuple[Cut | RowCut, int]  # a cut, and the flat offset of a parameter in the stream that was cut
Cuts = dict[str, Located]  # by parameter name


def require_scope(option: str, scope: str) -> None:
    """Refuse a scope that is not known.

    Args:
        option: The option's name, for the message.
        scope: What was chosen.

    Raises:
        OptionError: Listing the scopes.
    """
    one_of(option, scope, get_args(Scope))


def cuts(target: Weights, reference: Weights, density: float, scope: str = "global") -> Cuts:
    """Find which entries of ``target - reference`` are the largest in magnitude.

    Args:
        target: theta_t.
        reference: theta_0 or theta_merged; same names and shapes.
        density: Fraction of entries kept, in [0, 1].
        scope: ``global`` ranks all parameters together, ``tensor`` each on its own, ``row`` each vector along the
            last axis of a parameter on its own.

    Returns:
        For every mergeable parameter its cut, and the parameter's offset in the stream that was cut.

    Raises:
        OptionError: If the scope is not known or the density is not a fraction.
    """
    require_scope("scope", scope)
    known = _known(target.fingerprint(), reference.fingerprint(), scope)
    if density not in known:
        known.update(cuts_at(target, reference, tuple(sorted({*SWEEP, density})), scope))
    return known[density]


@lru_cache(maxsize=256)  # small, and keyed by content: one entry a (task, reference)
def _known(target: str, reference: str, scope: str) -> dict[float, Cuts]:
    return {}


def cuts_at(target: Weights, reference: Weights, densities: Sequence[float], scope: str) -> dict[float, Cuts]:
    """Find the cuts of several densities in one pass over the difference; see `cuts`."""
    require_scope("scope", scope)
    names = target.mergeable()
    parts = [difference(target, reference, name) for name in names]
    if scope == "global":
        by_density = _global(parts, densities)
    elif scope == "tensor":
        by_density = _apart([locate([part], [kept(m, part.numel) for m in densities]) for part in parts], densities)
    else:
        widths = [(target.shape(name) or (1,))[-1] for name in names]
        counts = [[kept(m, width) for m in densities] for width in widths]
        by_density = _apart(list(map(row_cuts, parts, widths, counts)), densities)
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


def _global(parts: Sequence[Part], densities: Sequence[float]) -> list[list[Located]]:
    total = sum(part.numel for part in parts)
    offsets = [0, *accumulate(part.numel for part in parts)][: len(parts)]
    found = locate(parts, [kept(density, total) for density in densities])
    return [[(cut, offset) for offset in offsets] for cut in found]


def _apart(by_parameter: Sequence[Sequence[Cut | RowCut]], densities: Sequence[float]) -> list[list[Located]]:
    return [[(cuts[i], 0) for cuts in by_parameter] for i in range(len(densities))]
