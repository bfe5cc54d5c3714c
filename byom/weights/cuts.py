"""Top-magnitude cuts of the difference between two sets of weights, globally or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, product
from threading import Lock
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from byom.errors import CheckpointError, one_of
from byom.functional.rows import RowCut, row_cuts
from byom.functional.selection import Cut, Part, kept, locate_each
from byom.functional.tensors import wide
from byom.weights import kept as kept_cuts
from byom.weights.placed import home
from byom.weights.watched import unwatched
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
    return cuts_of_each([target], reference, density, scope, densities)[0]


def cuts_of_each(
    targets: Sequence[Weights],
    reference: Weights,
    density: float,
    scope: Scope = "global",
    densities: Iterable[float] = (),
) -> list[Cuts]:
    """Find the cuts of several targets side by side, reading the reference once for all of them; see `cuts`."""
    require_scope("scope", scope)
    key = (reference.fingerprint(), scope)
    every = [_HELD.setdefault(home(target), {}).setdefault(key, {}) for target in targets]
    if lacking := [index for index, held in enumerate(every) if density not in held]:
        wanted = sorted({density, *densities, *_SWEEP.get()})
        asked = [targets[index] for index in lacking]
        found = kept_cuts.shared(asked, reference, wanted, scope, lambda some, at: _each(some, reference, at, scope))
        for index, by_density in zip(lacking, found, strict=True):
            every[index].update(by_density)
    return [held[density] for held in every]


def cuts_at(target: Weights, reference: Weights, densities: Sequence[float], scope: Scope) -> dict[float, Cuts]:
    """Find the cuts of several densities in one pass over the difference; see `cuts`."""
    require_scope("scope", scope)
    return _each([target], reference, densities, scope)[0]


def _each(
    targets: Sequence[Weights], reference: Weights, densities: Sequence[float], scope: Scope
) -> list[dict[float, Cuts]]:
    latest = _Latest(checked=scope == "row")
    names = reference.mergeable() if not targets else targets[0].mergeable()
    every = [[_difference(target, reference, name, latest) for name in names] for target in targets]
    try:
        found = _located(every, [reference.shape(name) for name in names], densities, scope)
    except CheckpointError:
        for weights, name in product((*targets, reference), names):
            weights.read_finite(name)  # which says in which model and tensor a value is not finite
        raise
    return [
        {density: dict(zip(names, row, strict=True)) for density, row in zip(densities, each, strict=True)}
        for each in found
    ]


def _located(
    every: Sequence[Sequence[Part]], shapes: Sequence[tuple[int, ...]], densities: Sequence[float], scope: Scope
) -> list[list[list[Located]]]:
    """Return cuts by target, density and parameter."""
    if scope == "global":
        return _global(every, densities)
    if scope == "tensor":
        counts = [[kept(m, part.numel) for m in densities] for part in every[0]]
        alone = [[[part] for part in parts] for parts in zip(*every, strict=True)]  # [parameter][target]
        columns = list(map(locate_each, alone, counts))
        return [_apart([column[index] for column in columns], densities) for index in range(len(every))]
    widths = [(shape or (1,))[-1] for shape in shapes]
    counts = [[kept(m, width) for m in densities] for width in widths]
    return [_apart(list(map(row_cuts, parts, widths, counts)), densities) for parts in every]


def differences(target: Weights, reference: Weights) -> list[Part]:
    """Return ``target - reference``, parameter by parameter, as parts that subtract what they are asked for."""
    latest = _Latest(checked=True)
    return [_difference(target, reference, name, latest) for name in target.mergeable()]


def _difference(target: Weights, reference: Weights, name: str, latest: _Latest) -> Part:
    sources = home(unwatched(target)), home(unwatched(reference))

    def read(at: slice | Tensor) -> Tensor:
        left, right = wide(latest.read(target, name)[at]), latest.read(reference, name)[at]
        return left - wide(right)

    def peek(at: slice | Tensor) -> Tensor:
        left, right = (wide(source[name].reshape(-1)[at]) for source in sources)
        return left - right.to(left.device)

    def pair() -> tuple[Tensor, Tensor]:
        return latest.read(target, name), latest.read(reference, name)

    return Part(torch.Size(target.shape(name)).numel(), read, peek, pair, target.place(name))


class _Latest:
    """The tensor of each of some models that was read last: a stream asks for block after block of one.

    Args:
        checked: Whether NaN and infinity are refused here; where a selection refuses them, that would be one more pass.
    """

    def __init__(self, *, checked: bool) -> None:
        self._checked, self._lock = checked, Lock()
        self._held: WeakKeyDictionary[Weights, tuple[str, Tensor]] = WeakKeyDictionary()
        self._told: set[tuple[Weights, str]] = set()  # what watchers have been told of, who count each tensor once

    def read(self, weights: Weights, name: str) -> Tensor:
        """Return a tensor, flat."""
        with self._lock:
            held = self._held.pop(weights, None)
            if held is None or held[0] != name:
                held = None  # freed before the next is computed
                source = unwatched(weights) if (weights, name) in self._told else weights
                self._told.add((weights, name))
                held = name, (source.read_finite(name) if self._checked else source[name]).reshape(-1)
            self._held[weights] = held
            return held[1]


def _global(every: Sequence[Sequence[Part]], densities: Sequence[float]) -> list[list[list[Located]]]:
    sizes = [part.numel for part in every[0]]
    offsets = [0, *accumulate(sizes)][: len(sizes)]
    found = locate_each(every, [kept(m, sum(sizes)) for m in densities])
    return [[[(cut, offset) for offset in offsets] for cut in cuts] for cuts in found]


def _apart(by_parameter: Sequence[Sequence[Cut | RowCut]], densities: Sequence[float]) -> list[list[Located]]:
    return [[(cuts[i], 0) for cuts in by_parameter] for i in range(len(densities))]
