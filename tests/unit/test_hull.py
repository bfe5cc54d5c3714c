"""Allocation over convex hulls: no choice of levels is better for what was spent, by brute force on small cases."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byom.functional.hull import Level, Price, allocate, lower_hull, slope

LEVEL = st.builds(Level, st.integers(0, 12), st.integers(0, 12))
ITEMS = st.lists(st.lists(LEVEL, min_size=1, max_size=5), min_size=1, max_size=4)
STEEP = [Level(0, 9), Level(1, 4), Level(3, 0)]


def total(items, chosen):
    """Return what a choice costs in all, and the damage that it leaves."""
    levels = [item[number] for item, number in zip(items, chosen, strict=True)]
    return sum(level.cost for level in levels), sum(level.damage for level in levels)


def cheapest(items):
    return sum(min(item).cost for item in items)


@given(ITEMS, st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_no_other_choice_costs_as_little_and_leaves_less(items, budget):
    chosen = allocate(items, budget)
    cost, damage = total(items, chosen)
    assert cost <= max(budget, cheapest(items))
    every = (total(items, choice) for choice in product(*map(range, map(len, items))))
    assert damage == min(left for spent, left in every if spent <= cost)


@given(ITEMS)
@settings(max_examples=60, deadline=None)
def test_a_larger_budget_takes_the_same_steps_and_more(items):
    hulls = [lower_hull(item) for item in items]
    ranks = [
        [hull.index(number) for hull, number in zip(hulls, allocate(items, budget), strict=True)]
        for budget in range(50)
    ]
    assert all(low <= high for less, more in pairwise(ranks) for low, high in zip(less, more, strict=True))
    totals = [total(items, allocate(items, budget)) for budget in range(50)]
    assert all(one[0] <= other[0] and one[1] >= other[1] for one, other in pairwise(totals))
    assert totals[-1][1] == sum(min(level.damage for level in item) for item in items)


@given(st.lists(LEVEL, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_the_hull_lies_below_every_level(levels):
    hull = [levels[number] for number in lower_hull(levels)]
    assert hull[0] == min(levels) and hull[-1].damage == min(level.damage for level in levels)
    slopes = [(one.damage - other.damage) / (other.cost - one.cost) for one, other in pairwise(hull)]
    assert all(one > other > 0 for one, other in pairwise([*slopes, 1e-9]))
    for cost, damage in levels:
        for (low, one), (high, other) in pairwise(hull):
            if low <= cost <= high:
                assert damage >= one + (other - one) * (cost - low) / (high - low) - 1e-9


@given(st.lists(st.floats(0, 10), min_size=3, max_size=6), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_levels_on_one_line_are_taken_in_order_whatever_rounding_does(costs, slope):
    levels = [Level(cost, 5 - slope * cost) for cost in costs]
    assert allocate([levels], 1e9) == lower_hull(levels)[-1:]


def test_a_step_of_an_item_is_never_taken_before_the_one_below_it():
    levels = [  # on one line up to rounding, which a test of slopes from the first level passed
        Level(9.098511774051024, -3.5383964686144687),
        Level(0.4200453196734122, 4.605813174371413),
        Level(7.4913482339086315, -2.030171845025518),
        Level(7.013248175948597, -1.5815042004803086),
        Level(6.553618646747296, -1.150170016773914),
    ]
    assert allocate([levels], 1e9) == [0]


def test_golden():
    items = [STEEP, [Level(2, 8), Level(4, 1), Level(5, 0.5)]]
    steps = [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]  # they save 5, 3.5, 2 and 0.5 for each unit of cost
    spent = [total(items, choice)[0] for choice in steps]
    assert spent == [2, 3, 5, 7, 8]
    found = {budget: tuple(allocate(items, budget)) for budget in range(10)}
    assert found == {b: steps[max([0, *(k for k, cost in enumerate(spent) if cost <= b)])] for b in range(10)}


@pytest.mark.parametrize(
    ("levels", "hull"),
    [
        ([Level(3, 5)], [0]),
        ([Level(3, 0)], [0]),
        ([Level(1, 2), Level(1, 2)], [0]),
        ([Level(1, 2), Level(1, 1)], [1]),
        ([Level(0, 0), Level(5, 0)], [0]),
        ([Level(0, 4), Level(1, 2), Level(2, 0)], [0, 2]),  # the middle of a line is no corner
        ([Level(0, 4), Level(1, 3), Level(2, 0)], [0, 2]),
        ([Level(2, 0), Level(0, 4), Level(1, 1)], [1, 2, 0]),
        ([Level(0, 4), Level(1, 5), Level(2, 4)], [0]),
    ],
)
def test_degenerate_hulls(levels, hull):
    assert lower_hull(levels) == hull


def test_the_cheapest_levels_are_taken_even_beyond_the_budget():
    assert allocate([[Level(7, 1), Level(9, 0)], STEEP], 3) == [0, 0]
    assert allocate([], 5) == []
    assert allocate([[Level(0, 0)], STEEP], float("inf")) == [0, 2]


@given(ITEMS, st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_a_price_parts_the_steps_that_are_taken_from_the_others(items, budget):
    price, prices = Price(budget), []
    for item in items:
        price.add(item)
        prices.append(price.now)
    assert all(one <= other for one, other in pairwise(prices))  # few items are a bound for all
    taken, left = [], []
    for item, number in zip(items, allocate(items, budget), strict=True):
        hull = lower_hull(item)
        for at, (low, high) in enumerate(pairwise(hull)):
            (taken if at < hull.index(number) else left).append(slope(item, low, high))
    assert all(each >= prices[-1] for each in taken) and all(each <= prices[-1] for each in left)
    assert prices[-1] == max(left, default=0)
