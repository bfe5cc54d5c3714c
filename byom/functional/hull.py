"""Spending a budget over many items, each with several levels of cost and damage."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Level(NamedTuple):
    """What one level of an item costs, and the damage that is left with it."""

    cost: float
    damage: float


def lower_hull(levels: Sequence[Level]) -> list[int]:
    """Return the levels that are best for some price of cost.

    Args:
        levels: Levels of one item, in any order.

    Returns:
        Their numbers, by rising cost: the corners of the lower convex hull from the cheapest level on, down to the
        least damage, each step saving less for its cost than the one before also as computed. Of equal levels the
        first.
    """
    order = sorted(range(len(levels)), key=lambda number: (*levels[number], number))
    hull: list[int] = []
    for number in order:
        if hull and levels[number].damage >= levels[hull[-1]].damage:
            continue
        while len(hull) > 1 and slope(levels, hull[-2], hull[-1]) <= slope(levels, hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull


def slope(levels: Sequence[Level], low: int, high: int) -> float:
    """Return the damage that is saved for each unit of cost between two levels."""
    cost = levels[high].cost - levels[low].cost
    return (levels[low].damage - levels[high].damage) / cost if cost else float("inf")


def allocate(items: Sequence[Sequence[Level]], budget: float) -> list[int]:
    """Choose a level of every item so that the damage in all is least for what is spent.

    All items begin with their cheapest level, and the step along any item's hull that saves the most damage for its
    cost is taken next, until one does not fit. No other choice that costs as much in all, or less, has less damage
    (every step that was taken saves more for its cost than any that was not: Lagrange's condition). Each larger budget
    takes the same steps and perhaps more.

    Args:
        items: Levels of each item; none has no level.
        budget: What may be spent. The cheapest levels are taken even where they cost more.

    Returns:
        The number of each item's level.
    """
    hulls = [lower_hull(levels) for levels in items]
    chosen = [hull[0] for hull in hulls]
    spent = sum(levels[number].cost for levels, number in zip(items, chosen, strict=True))
    steps = [
        (-slope(levels, low, high), item, at, levels[high].cost - levels[low].cost, high)
        for item, (levels, hull) in enumerate(zip(items, hulls, strict=True))
        for at, (low, high) in enumerate(pairwise(hull))
    ]
    for _, item, _, cost, level in sorted(steps):
        if spent + cost > budget:
            break
        spent += cost
        chosen[item] = level
    return chosen


class Price:
    """What a bit saves where a budget ends, as items come in one by one.

    It rises with each item, so that what some of them are worth is a bound for all.

    Args:
        budget: What may be spent, as for `allocate`.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._steps: list[tuple[float, float]] = []  # minus what a unit of cost saves, and the cost; best first

    def add(self, levels: Sequence[Level]) -> None:
        """Let one more item take part."""
        hull = lower_hull(levels)
        self._budget -= levels[hull[0]].cost
        for low, high in pairwise(hull):
            insort(self._steps, (-slope(levels, low, high), levels[high].cost - levels[low].cost))

    @property
    def now(self) -> float:
        """What a unit of cost saves in the first step that `allocate` would not take; 0 where it takes all."""
        left = self._budget
        for saved, cost in self._steps:
            left -= cost
            if left < 0:
                return -saved
        return 0.0
