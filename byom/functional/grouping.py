"""Tasks in groups: in each block of a model the most alike are put together, until a size is reached."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

Members = tuple[int, ...]  # tasks by number, ascending
Pair = tuple[float, int, Members, Members]  # minus the similarity, the block, and two of its groups
Linkage = Literal["min", "mean", "max"]
LINKAGES = get_args(Linkage)
"""Similarities of two groups: of their least alike members, on average, or of those most alike."""


def cosines(products: Tensor) -> Tensor:
    """Return the cosine between every two vectors.

    They are rounded to fp32, so that what is equal but for the order of summation in fp64 is a tie.

    Args:
        products: Inner products ``[T, T]`` in fp64.

    Returns:
        ``[T, T]`` in fp32; 1 between two vectors of zeros, and 0 between such a one and another.
    """
    norms = products.diagonal().sqrt()
    both = norms.outer(norms)
    still = norms == 0
    return torch.where(both > 0, products / both, (still[:, None] & still[None, :]).double()).float()


def grouped(
    similarities: Sequence[Tensor], sizes: Sequence[int], most: float, linkage: Linkage = "min"
) -> list[list[Members]]:
    """Put tasks together greedily, of all blocks' groups always the two most alike, until they are small enough.

    Args:
        similarities: ``[T, T]``, symmetric, for each block.
        sizes: Parameters of each block in one model.
        most: Parameters that all groups of all blocks may have together; below one model's, one group is left of each.
        linkage: How alike two groups are, from their members.

    Returns:
        The groups of each block, the largest first and those of one size by their members. Ties go to the earlier
        block, and to the groups with the earlier members.
    """
    groups: list[list[Members]] = [[(task,) for task in range(len(each))] for each in similarities]
    rows = [each.tolist() for each in similarities]
    left = sum(size * len(each) for size, each in zip(sizes, groups, strict=True))
    pairs = [pair for block, each in enumerate(groups) if (pair := _nearest(block, each, rows[block], linkage))]
    heapify(pairs)
    while left > most and pairs:
        _, block, one, other = heappop(pairs)
        rest = [each for each in groups[block] if each not in (one, other)]
        groups[block] = sorted([*rest, tuple(sorted(one + other))])
        left -= sizes[block]
        if pair := _nearest(block, groups[block], rows[block], linkage):
            heappush(pairs, pair)
    return [sorted(each, key=lambda members: (-len(members), members)) for each in groups]


def _nearest(block: int, groups: Sequence[Members], rows: list[list[float]], linkage: Linkage) -> Pair | None:
    """Return the two groups of a block that are most alike; None where one is left."""
    alike = (
        (-_similarity([rows[i][j] for i in one for j in other], linkage), block, one, other)
        for one, other in combinations(groups, 2)
    )
    return min(alike, default=None)


def _similarity(values: list[float], linkage: Linkage) -> float:
    if linkage == "mean":
        return sum(values) / len(values)
    return min(values) if linkage == "min" else max(values)
