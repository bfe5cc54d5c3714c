"""Top-magnitude cuts of the difference between two sets of weights, globally or tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import accumulate
from typing import Literal, get_args
from weakref import WeakKeyDictionary

from torch import Tensor

from byom.errors import one_of
from byom.functional.rows import RowCut, row_cuts
from byom.functional.selection import Cut, Part, kept, locate
from byom.functional.tensors import wide
from byom.weights.weights import Weights

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


_HELD: WeakKeyDictionary[Weights, dict[tuple[str, Scope], dict[float, Cuts]]] = WeakKeyDictionary()
"""Cuts by target, reference (its fingerprint) and scope; those of a target end with it."""
_SWEEP: ContextVar[tuple[float, ...]] = ContextVar("densities of a sweep", default=())


@contextmanager
def sweep(densities: Iterable[float]) -> Iterator[None]:
    """Say which densities are going to be asked for, so that one pass over a difference finds all of them.

    Args:
        densities: Fractions of entries kept; those of another block around this one are added.
    """
    token = _SWEEP.set((*_SWEEP.get(), *densities))
    try:
        yield
    finally:
        _SWEEP.reset(token)


def cuts(
    target: Weights, reference: Weights, density: float, scope: Scope = "global", densities: Iterable[float] = ()
) -> Cuts:
    """Find which entries of ``target - reference`` are the largest in magnitude.

    They are kept as long as the target, so that a density that an earlier pass found costs nothing.

    Args:
        target: theta_t.
        reference: theta_0 or theta_merged; same names and shapes.
        density: Fraction of entries kept, in [0, 1].
        scope: ``global`` ranks all parameters together, ``tensor`` each on its own, ``row`` each vector along the
            last axis of a parameter on its own.
        densities: Others that the same pass finds, for later calls; see `sweep`.

    Returns:
        For every mergeable parameter its cut, and the parameter's offset in the stream that was cut.

    Raises:
        OptionError: If the scope is not known or the density is not a fraction.
    """
    require_scope("scope", scope)
    held = _HELD.setdefault(target, {}).setdefault((reference.fingerprint(), scope), {})
    if density not in held:
        held.update(cuts_at(target, reference, sorted({density, *densities, *_SWEEP.get()}), scope))
    return held[density]


def cuts_at(target: Weights, reference: Weights, densities: Sequence[float], scope: Scope) -> dict[float, Cuts]:
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
    return {density: dict(zip(names, row, strict=True)) for density, row in zip(densities, by_density, strict=True)}


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
    return [[(cut, offset) for offset in offsets] for cut in locate(parts, [kept(m, total) for m in densities])]


def _apart(by_parameter: Sequence[Sequence[Cut | RowCut]], densities: Sequence[float]) -> list[list[Located]]:
    return [[(cuts[i], 0) for cuts in by_parameter] for i in range(len(densities))]
