"""Levels of one tensor: its difference written as quantised factors, quantised entries or both, coarsely or finely."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from byom.functional import tables
from byom.functional.hull import Level
from byom.functional.linalg import randomised_svd

DEAD = 0.12  # how much of a step a magnitude must exceed one half to be rounded up: zeros are cheap
PRICE = 0.14  # the damage that a bit has to save, in squares of the step, for a component to be kept
SHARE = 6  # one in so many singular values may be written as factors; what is beyond is cheaper entry by entry
RARE = 8  # entries are written from steps of so many times their root mean square on: coarser ones keep next to none
FINEST = 0.03  # the last step, as a share of the entries' root mean square: some 7 bits an entry
COMPONENT = 32  # bits of a component beside its integers: a scale in fp16 and the numbers of two tables
SLACK = 1 + 1e-9  # for the rounding of costs and damages that are compared
FIXED = 144  # bits of a tensor beside its components: head, one more table, and the words in which a stream ends


class Factors(NamedTuple):
    """The largest singular values and vectors of a difference, in the metric of the inputs."""

    left: Tensor  # [m, K]
    values: Tensor  # [K]
    right: Tensor  # [K, n], such that left diag(values) right is the best approximation of rank K


class Way(NamedTuple):
    """How a difference is written."""

    step: float
    """The step of quantisation, representable in fp32."""
    factors: bool
    entries: bool
    """Whether entries are written: of the difference, or of what the factors leave."""


class Priced(NamedTuple):
    """A level, how it is written, and the factors that are written at its step."""

    level: Level
    way: Way
    product: Written | None


@dataclass(frozen=True)
class Written:
    """A difference of one tensor as integers.

    Args:
        left: Int8 ``[m, k]``.
        right: Int8 ``[k, n]``.
        scales: fp16 ``[k]``, in steps, of any size of difference; the first part is ``step left diag(scales) right``.
        entries: Int8 ``[m, n]``, or None; the second part is ``step * entries``.
        step: The step of quantisation.
        damage: The damage that is left, where that is known.
    """

    left: Tensor
    right: Tensor
    scales: Tensor
    entries: Tensor | None
    step: float
    damage: float | None = None

    def rows(self) -> list[np.ndarray]:
        """Return the integers row by row as they are coded: left vectors, right vectors, all entries."""
        rows = [*self.left.T.numpy(), *self.right.numpy()]
        return rows if self.entries is None else [*rows, self.entries.reshape(-1).numpy()]

    def difference(self) -> Tensor:
        """Return what is put back, ``[m, n]`` in fp32."""
        entries = None if self.entries is None else self.entries.float().mul_(self.step)
        if not len(self.scales) and entries is not None:
            return entries
        product = (self.left.float() * (self.scales.float() * self.step)) @ self.right.float()
        return product if entries is None else product.add_(entries)


@dataclass(frozen=True)
class Difference:
    """A difference to be written, and the metric in which damage is measured.

    The damage of writing D as D' is ``weight |(D - D') L|^2`` with ``L Lᵀ = G``, a second moment of the layer's
    inputs; without a root, ``weight |D - D'|^2``.

    Args:
        values: ``[m, n]`` in fp32 (D).
        root: ``[n, n]`` lower triangular (L), or None.
        weight: What one unit of squared error is worth.
        seed: Seeds the search for singular vectors of large matrices.
    """

    values: Tensor
    root: Tensor | None = None
    weight: float = 1.0
    seed: int = 0

    def damage(self, error: Tensor) -> float:
        """Return the damage of an error ``[m, n]``."""
        return self.weight * float(self._weighed(error).square().sum(dtype=torch.float64))

    def levels(self, price: float = 0.0) -> Iterator[Priced]:
        """Write the difference with finer and finer steps, in every way.

        Args:
            price: Damage per bit. Left out are levels that cannot be on the hull where a bit saves as much or more.

        Yields:
            The levels; the first writes nothing.
        """
        first = Priced(Level(0.0, self.damage(self.values)), Way(0.0, False, False), None)
        yield first
        least = first.level.damage  # of all levels, with their bits at that price
        for step in _steps(self.values):
            product = self.product(step) if self._several else None
            bits = []
            for way in self._ways(step, product):
                if written := self.write(way, product):
                    bits.append(_cost(written))
                    if price * bits[-1] <= SLACK * least:  # else not even without any damage
                        level = Level(bits[-1], self._left_by(written))
                        least = min(least, level.damage + price * level.cost)
                        yield Priced(level, way, product)
            if bits and price * min(bits) > SLACK * least and step <= self._coarsest:  # finer steps cost more
                return

    def write(self, way: Way, product: Written | None = None) -> Written | None:
        """Quantise the difference; None where that leaves nothing, or an integer is beyond what tables know.

        Args:
            way: How it is written.
            product: Its factors at the way's step, where they are known.
        """
        if way.factors and product is None and (product := self.product(way.step)) is None:
            return None
        if not way.entries:
            return product if way.factors else None
        first = product if way.factors else None
        entries = rounded((self.values if first is None else self.values - first.difference()) / way.step)
        low, high = entries.aminmax()
        if not (low or high) or max(-low, high) > tables.LIMIT:
            return None
        left, right, scales = self._nothing if first is None else (first.left, first.right, first.scales)
        return Written(left, right, scales, entries.to(torch.int8), way.step)

    @cached_property
    def factors(self) -> Factors | None:
        """The largest singular values and vectors, one in `SHARE` of all; None for a vector."""
        if min(self.values.shape) == 1:
            return None
        count = max(1, min(self.values.shape) // SHARE)
        left, values, right = (each.float() for each in randomised_svd(self.metric, count, self.seed))
        if self.root is not None:  # next to given left vectors the same right ones are best in every metric
            right = (left.T @ self.values) / values.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        return Factors(left, values, right)

    @cached_property
    def metric(self) -> Tensor:
        """The difference in the metric of the inputs, ``D L``."""
        return self._weighed(self.values)

    @cached_property
    def towards(self) -> Tensor:
        """The right singular vectors in the metric, ``[K, n]``."""
        assert self.factors is not None  # vectors have none
        return self._weighed(self.factors.right)

    @cached_property
    def _energy(self) -> Tensor:
        return self.metric.square().sum(dtype=torch.float64)

    @property
    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        none, (rows, columns) = torch.empty(0, dtype=torch.int8), self.values.shape
        return none.reshape(rows, 0), none.reshape(0, columns), none.half()

    @cached_property
    def _several(self) -> bool:
        return min(self.values.shape) > 1

    @cached_property
    def _coarsest(self) -> float:
        """The step from which on entries are written."""
        return RARE * float(self.values.norm()) / math.sqrt(self.values.numel())

    def _ways(self, step: float, product: Written | None) -> Iterator[Way]:
        if product:
            yield Way(step, factors=True, entries=False)
        if step <= self._coarsest:
            yield Way(step, factors=False, entries=True)
            if product:
                yield Way(step, factors=True, entries=True)

    def _weighed(self, rows: Tensor) -> Tensor:
        return rows if self.root is None else rows @ self.root

    def product(self, step: float) -> Written | None:
        """Quantise the factors, keeping the components that are worth their bits; None where none is."""
        assert self.factors is not None  # vectors have no way with factors
        count = int((self.factors.values > step * (0.5 + DEAD)).sum())
        vectors, values, right = self.factors.left[:, :count], self.factors.values[:count], self.factors.right[:count]
        one, other = rounded(vectors * values / step), self._right(right * values[:, None] / step)
        if not count or max(one.abs().max(), other.abs().max()) > tables.LIMIT:
            return None
        kept = (one * vectors).sum(0).square() / one.square().sum(0).clamp_min(1)
        weighed, towards = self._weighed(other), self.towards[:count]
        kept = kept * (weighed * towards).sum(1).square() / weighed.square().sum(1).clamp_min(1e-30)
        worth = values.square() * kept > PRICE * step**2 * (_bits(one.T) + _bits(other) + COMPONENT)
        return self._scaled(one[:, worth], other[worth], weighed[worth], step) if worth.any() else None

    def _right(self, rows: Tensor) -> Tensor:
        """Round right singular vectors, in steps; `benchmarks.budget_trials` has another way."""
        return rounded(rows)

    def _scaled(self, left: Tensor, right: Tensor, weighed: Tensor, step: float) -> Written | None:
        """Find the scales of the components that leave the least damage; no product of m n n is formed for it."""
        normal = (left.T @ left).double() * (weighed @ weighed.T).double()
        aim = ((left.T @ self.metric) * weighed).sum(1, dtype=torch.float64)
        ridge = torch.diag(normal.diagonal() * 1e-6)  # two components may have rounded to the same integers
        scales = (torch.linalg.solve(normal + ridge, aim) / step).to(torch.float16)
        if not torch.isfinite(scales).all():
            return None
        exact = scales.double() * step
        left_over = float(self._energy - 2 * exact @ aim + exact @ normal @ exact)
        return Written(left.to(torch.int8), right.to(torch.int8), scales, None, step, self.weight * max(0.0, left_over))

    def _left_by(self, written: Written) -> float:
        return self.damage(self.values - written.difference()) if written.damage is None else written.damage


def rounded(values: Tensor) -> Tensor:
    """Round to integers, to 0 a little more often than to the nearest: by `DEAD`."""
    return values.abs().add_(0.5 - DEAD).floor_().copysign_(values)


def _steps(values: Tensor) -> Iterator[float]:
    """Yield powers of the square root of 2 from a tensor's norm down to `FINEST` of its root mean square."""
    norm = float(values.norm())
    if norm:
        last = math.floor(2 * math.log2(FINEST * norm / math.sqrt(values.numel())))
        yield from (
            float(np.float32(2 ** (number / 2))) for number in range(math.ceil(2 * math.log2(norm)), last - 1, -1)
        )


def _cost(written: Written) -> float:
    """Return the bits of integers under their best tables, with what stands beside them."""
    bits = FIXED + COMPONENT * len(written.scales) + float(_bits(written.left.T).sum() + _bits(written.right).sum())
    return bits if written.entries is None else bits + float(_bits(written.entries.reshape(1, -1)))


def _bits(rows: Tensor) -> Tensor:
    """Return the bits of each row of integers under its best table."""
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.float64)
    return torch.from_numpy(tables.best(tables.histograms(rows.numpy()))[1])
