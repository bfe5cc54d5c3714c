"""Task weights on the simplex: which weightings are previewed, and which of them are trained jointly. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np

from byom.errors import OptionError
from byom.functional.seeding import keyed

Point = tuple[float, ...]  # one weight per task, 0 or more, with the sum 1
Exact = tuple[Fraction, ...]

LARGEST = 5000
# a drawn weight is a whole number of thousandths: short to write down, and the same on every machine
GRAIN = 1000


def simplex(tasks: int, steps: int) -> list[Point]:
    """Return every weighting in whole multiples of ``1 / steps``: ``comb(steps + tasks - 1, tasks - 1)`` points.

    Args:
        tasks: Number of tasks (T), at least 1.
        steps: Intervals along every edge, at least 1.

    Returns:
        The points, in lexicographic order from all weight on the last task to all weight on the first.

    Raises:
        OptionError: If there are more than 5000.
    """
    if (count := comb(steps + tasks - 1, tasks - 1)) > LARGEST:
        raise OptionError(
            f"steps={steps} over {tasks} tasks are {count:,} weightings; use fewer steps, or leave steps out and draw "
            "points=64 of them"
        )
    return [_point(counts) for counts in _compositions(steps, tasks)]


def spread(tasks: int, points: int, seed: int = 0) -> list[Point]:
    """Return a few weightings of many tasks: the vertices, the centre, the middles of the edges, and a sample.

    Args:
        tasks: Number of tasks (T).
        points: How many are drawn uniformly from the simplex (Dirichlet with all parameters 1).
        seed: Of the draw.

    Returns:
        ``T + 1 + T (T - 1) / 2 + points`` points, without repetitions.
    """
    corners = [_point(corner) for corner in _corners(tasks)]
    middles = [_point(_mix(a, b)) for a, b in combinations(_corners(tasks), 2)]
    return list(dict.fromkeys([*corners, _point(_centre(tasks)), *middles, *_drawn(tasks, points, seed)]))


def trained(tasks: int, count: int, seed: int = 0) -> list[Point]:
    """Return the weightings at which a preview is compared with joint fine-tuning.

    Args:
        tasks: Number of tasks (T).
        count: How many.
        seed: Of those that are drawn.

    Returns:
        First the centre, then half-way from it to each vertex, then half-way to the middle of each edge, then three
        quarters of the way to each vertex, then drawn ones. No vertex: joint fine-tuning on one task is its expert.
    """
    centre, corners = _centre(tasks), _corners(tasks)
    near, middles = [_mix(centre, corner) for corner in corners], [_mix(a, b) for a, b in combinations(corners, 2)]
    nearer = [_mix(a, b) for a, b in zip(near, corners, strict=True)]
    inner = [_point(point) for point in [centre, *near, *(_mix(centre, middle) for middle in middles), *nearer]]
    drawn = [point for point in _drawn(tasks, 2 * count, seed) if max(point) < 1]
    return list(dict.fromkeys([*inner, *drawn]))[:count]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def _point(shares: Sequence[int | Fraction]) -> Point:
    """Divide by the sum exactly, so that equal weightings are equal floats however they were reached."""
    whole = sum(shares)
    return tuple(float(Fraction(share) / whole) for share in shares)


def _corners(tasks: int) -> list[Exact]:
    return [tuple(Fraction(task == one) for task in range(tasks)) for one in range(tasks)]


def _centre(tasks: int) -> Exact:
    return (Fraction(1, tasks),) * tasks


def _mix(a: Exact, b: Exact) -> Exact:
    return tuple((x + y) / 2 for x, y in zip(a, b, strict=True))


def _drawn(tasks: int, points: int, seed: int) -> list[Point]:
    generator = np.random.Generator(np.random.PCG64(keyed("simplex", tasks, seed)))
    rows = -np.log1p(-generator.random((points, tasks)))  # exponential: normalised, uniform on the simplex
    return [_point(_grained(row / row.sum())) for row in rows]


def _grained(shares: np.ndarray) -> list[int]:
    """Round shares to grains that still sum to the whole, the largest remainders up."""
    floors = np.floor(GRAIN * shares).astype(int)
    up = np.argsort(floors - GRAIN * shares, kind="stable")[: GRAIN - floors.sum()]
    floors[up] += 1
    return floors.tolist()
