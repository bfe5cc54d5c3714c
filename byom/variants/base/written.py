"""One task's difference to a shared model, tensor by tensor: its levels, and what is stored of each."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from byom.functional.hull import Level, Price, lower_hull, slope
from byom.functional.seeding import keyed
from byom.functional.tensors import wide
from byom.merge.base.running import is_running
from byom.storage import tensor_files as storage
from byom.variants.base import code, sparse
from byom.variants.base.damage import Damage
from byom.variants.base.levels import FIXED, Difference, Priced, Way
from byom.variants.base.unpacker import Parts
from byom.weights import Weights

BYTE = 8
LEFT = sys.float_info.min  # the damage of what is off by less than fp32 shows


@dataclass(frozen=True)
class Hull:
    """The lower convex hull of a tensor's levels, in the order of their costs.

    Args:
        levels: Costs and damages.
        ways: How each is written; None is the task's own values.
        products: The factors of each as they are stored; None where it has none, or they have to be found again.
        price: Damage per bit down to which this is the hull of all levels.
    """

    levels: list[Level]
    ways: list[Way | None]
    products: list[Tensor | None]
    price: float


@lru_cache(maxsize=32)  # keyed by content; the factors of a task take a few times what may be spent on it
def _known(key: str) -> dict[str, Hull]:
    return {}


@dataclass(frozen=True)
class TaskDifference:
    """The difference of a task to a shared model.

    Args:
        target: theta_t.
        reference: theta_merged or theta_0.
        damage: The metric of its errors; None for squared errors as they are.
        seed: Seeds the search for singular vectors of large matrices.
    """

    target: Weights
    reference: Weights
    damage: Damage | None
    seed: int

    def hulls(self, room: float) -> dict[str, Hull]:
        """Return the hulls of all tensors down to where so many bits are spent; sizes of a sweep find them in memory.

        Args:
            room: Bits that may be spent on all tensors.
        """
        weighed = self.damage.content if self.damage else []
        known = _known(storage.digest([self.target.fingerprint(), self.reference.fingerprint(), *weighed, self.seed]))
        names, price = [name for name in self.target.mergeable() if not is_running(name)], Price(room)
        for name in sorted(names, key=lambda name: math.prod(self.target.shape(name))):  # long ones at a known price
            if name not in known:
                known[name] = self._hull(name, price.now, price.now)
            elif known[name].price > price.now:  # a larger size of a sweep, after which there may be larger ones yet
                known[name] = self._hull(name, 0.0, price.now)
            price.add(known[name].levels)
        return {name: known[name] for name in names}

    def stored(self, name: str, way: Way | None, product: Tensor | None) -> Parts:
        """Return what is stored of a tensor.

        Args:
            name: The tensor.
            way: How it is written; None puts back the task's own values.
            product: Its factors as they are stored, where they are known.
        """
        if way is None:
            return sparse.whole(self.target[name], self.reference[name])
        if not (way.factors or way.entries):
            return {}
        values = self._values(name)
        known = None if product is None else code.from_bytes(product, sides(self.target.shape(name)))
        difference = Difference(values) if known or not way.factors else self._difference(name)
        written = difference.write(way, known)
        assert written is not None  # as it was written when its level was found
        return {"code": code.to_bytes(written)}

    def _hull(self, name: str, price: float, kept: float) -> Hull:
        """Return the hull down to a price, with factors kept down to another."""
        difference = self._difference(name)
        listed = [self._inexact(name, each) for each in difference.levels(price)]
        levels = [each.level for each in listed]
        ways: list[Way | None] = [each.way for each in listed]
        if levels[0].damage:
            levels.append(Level(FIXED + BYTE * self.target.dtype(name).itemsize * difference.values.numel(), 0.0))
            ways.append(None)
        hull = lower_hull(levels)
        products: list[Tensor | None] = [None]
        for low, high in pairwise(hull):
            worth = high < len(listed) and slope(levels, low, high) >= kept and listed[high].way.factors
            product = listed[high].product if worth else None
            products.append(None if product is None else code.to_bytes(product))
        return Hull([levels[number] for number in hull], [ways[number] for number in hull], products, price)

    def _inexact(self, name: str, priced: Priced) -> Priced:
        """Leave some damage to a way that leaves none in fp32 and does not put the task's own values back."""
        if priced.level.damage:
            return priced
        product = priced.product and code.to_bytes(priced.product)
        parts, reference = self.stored(name, priced.way, product), self.reference[name]
        again = put_back(parts, reference) if parts else reference
        if torch.equal(again, self.target[name].to(again)):
            return priced
        return priced._replace(level=Level(priced.level.cost, LEFT))

    def _values(self, name: str) -> Tensor:
        one, other = self.target.read_finite(name), self.reference.read_finite(name)
        return (wide(one) - wide(other)).float().reshape(sides(one.shape)).cpu()

    def _difference(self, name: str) -> Difference:
        values, seed = self._values(name), keyed(self.seed, name)
        if self.damage is None:
            return Difference(values, seed=seed)
        root = self.damage.root(name, values.shape[1])
        return Difference(values, None if root is None else root.cpu(), self.damage.weight(name, values), seed)


def put_back(parts: Parts, reference: Tensor) -> Tensor:
    """Add what is stored of a tensor to the reference, or put all values back."""
    if "values" in parts:
        return sparse.assign(parts, reference)
    difference = code.from_bytes(parts["code"], sides(reference.shape)).difference().reshape(reference.shape)
    return (wide(reference) + difference.to(reference.device)).to(reference.dtype)


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a tensor written as a matrix: its first axis longer than 1 against the others."""
    long = [side for side in shape if side != 1]
    return (long[0], math.prod(long[1:])) if len(long) > 1 else (1, math.prod(long))
