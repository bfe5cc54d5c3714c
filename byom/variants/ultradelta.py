"""UltraDelta: few random entries of each matrix's changes, in a few bits, more where changes are large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from byom.errors import at_least, fraction, one_of, whole
from byom.functional.iterative import square
from byom.functional.seeding import keyed
from byom.functional.tensors import wide
from byom.merge.base import Problem
from byom.merge.base.matrices import is_matrix, is_stack, patterns
from byom.merge.base.running import is_running
from byom.storage import tensor_files as storage
from byom.variants.base import PackingVariant, Parts, Shared, bits, integers, sparse
from byom.variants.base import positions as encoding
from byom.weights import Weights, matched

KINDS = ("gap8", "bitmap", "all")


class Plan(NamedTuple):
    """Knowledge about one task's whole change."""

    fingerprint: str  # of the expert: its randomness is not another's
    drops: Mapping[str, float]  # matrix to the fraction of its entries that is dropped
    factor: float  # on every entry that is kept


class Rounded(NamedTuple):
    """The change of one matrix, rounded."""

    codes: Tensor  # uint8 [n]
    low: Tensor  # what code 0 stands for
    step: Tensor  # by how much the next code is more
    counts: list[int]  # how many entries have each code

    @property
    def values(self) -> list[float]:
        """What each code stands for."""
        return (self.low + self.step * torch.arange(len(self.counts), device=self.low.device)).tolist()

    @property
    def deviation(self) -> float:
        """The standard deviation of the rounded entries."""
        every, counts = torch.tensor(self.values, dtype=torch.float64), torch.tensor(self.counts)
        mean = (every * counts).sum() / counts.sum()
        return float((((every - mean) ** 2 * counts).sum() / counts.sum()).sqrt())


@dataclass(frozen=True)
class UltraDelta(PackingVariant):
    """Keep a few entries of each matrix's change, drawn at random and rounded: ``theta_0 + gamma_t / m * kept(tau_t)``.

    Changes are rounded to the nearest of ``2^b`` values, evenly spaced from the least to the largest of their matrix.
    Of the entries of each value the same fraction is dropped at random, so that the values keep their shares. Matrices
    are sorted by the standard deviation of the rounded changes into thirds of all entries: the first drops
    ``1 - m + spread``, the second ``1 - m``, the last what makes it ``1 - m`` of all. ``gamma_t = min_s N_s / N_t``
    where ``N_t`` is the sum of the singular values of all kept changes of task t, so that tasks that changed more are
    shortened; alone, a task is not.

    Args:
        density: Fraction of entries kept (m), in [0, 1].
        spread: How much more than the others the smallest changes drop, in [0, 1].
        bits: Bits of an entry (b), from 1 to 8.
        smallest: Sum of singular values up to which a task is not shortened. None finds the smallest among the tasks
            served together.
        rest: ``drop`` leaves other tensors the reference's; ``whole`` stores them.
        exclude: Shell-style patterns of parameter names that are not matrices here.
        seed: Seeds what is dropped, together with the expert's own values and the parameter's name.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Breaking the Compression Ceiling: Data-Free Pipeline for Ultra-Efficient Delta Compression, section 3.
        https://arxiv.org/abs/2505.13563

    Differences:
        Where the paper and the authors' code differ this is the code, whose ``mask_rate`` is ``1 - m``: biases and all
        other tensors stay the pre-trained ones, gamma is not chosen in [0.5, 1] but follows from the tasks, and the
        last third may drop at most 0.99 there, here 1. A first third that would drop more than all stops there, here
        it drops all. A matrix whose changes are equal gives NaN there. The paper stores Golomb codes of run lengths and
        of values; here positions take a byte per gap or a bit per entry, whichever is less, and values ``b`` bits.
    """

    density: float = 0.03
    spread: float = 0.01
    bits: int = 4
    smallest: float | None = None
    rest: Literal["drop", "whole"] = "drop"
    exclude: tuple[str, ...] = (
        "*embed*", "*text_projection*", "*visual.proj", "*lm_head*", "*wte*", "*wpe*", "*shared.weight",
    )  # fmt: skip
    seed: int = 0

    title = "UltraDelta"
    stores = "b bits and a position for each of m d entries of matrices, and two numbers per matrix"
    on = "pretrained"

    def __post_init__(self) -> None:
        fraction("byom.density", self.density)
        fraction("byom.spread", self.spread)
        one_of("byom.bits", whole("byom.bits", self.bits, least=1), range(1, 9))
        if self.smallest is not None:
            at_least("byom.smallest", self.smallest, 0, example="null, which finds it")
        one_of("byom.rest", self.rest, ("drop", "whole"))
        object.__setattr__(self, "exclude", patterns("byom.exclude", self.exclude))

    @property
    def passes(self) -> int:
        """Once each for deviations, for norms, and to pack."""
        return 3

    def suited(self, problem: Problem, reference: Weights) -> UltraDelta:
        """Find the smallest sum of singular values among the tasks; see `PackingVariant.suited`."""
        if self.smallest is not None or len(problem.tasks) == 1:
            return self
        bar = tqdm(problem.finetuned.values(), desc=self.title, unit="task", leave=False, mininterval=1)
        norms = [self._norm(*matched(expert, reference)) for expert in bar]
        return replace(self, smallest=min([norm for norm in norms if norm > 0], default=None))

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> Plan:
        """Find how many entries each matrix drops, and by how much those that are kept are longer."""
        norm = 0.0 if self.smallest is None else self._norm(target, reference)
        shortened = 1.0 if self.smallest is None or norm <= self.smallest else self.smallest / norm
        factor = shortened / self.density if self.density else 0.0
        return Plan(target.fingerprint(), self._drops(target, reference), factor)

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Plan) -> Parts:
        """Store the kept entries of a matrix, or of other tensors what `rest` says."""
        if name not in plan.drops:
            return sparse.whole(target, shared.reference) if self.rest == "whole" else {}
        change = rounded(wide(target) - wide(shared.reference), self.bits)
        positions, codes = thinned(change, plan.drops[name], keyed(self.seed, plan.fingerprint, name))
        if not len(positions):
            return {}
        kind, data = encoding.encode(positions, target.numel())
        numbers = {"low": change.low * plan.factor, "step": change.step * plan.factor}
        return {kind: data, "codes": integers.pack(codes, self.bits), **numbers}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the kept changes to theta_0, or put all values back."""
        reference = shared.reference
        if "values" in parts:
            return sparse.assign(parts, reference)
        kind = next(kind for kind in KINDS if kind in parts)
        count = _count(kind, parts[kind], reference.numel())
        positions = encoding.decode(kind, parts[kind], reference.numel(), count)
        codes = integers.unpack(parts["codes"], self.bits, count)
        moved = wide(reference).clone().reshape(-1)
        moved[positions] += parts["low"] + parts["step"] * codes
        return moved.reshape(reference.shape).to(reference.dtype)

    def _matrices(self, weights: Weights) -> list[str]:
        shapes = {name: weights.shape(name) for name in weights.mergeable() if not is_running(name)}
        return [n for n, s in shapes.items() if is_matrix(n, s, self.exclude) or is_stack(n, s, self.exclude)]

    def _drops(self, target: Weights, reference: Weights) -> dict[str, float]:
        """Return how much each matrix drops; its deviation is found once for a task."""
        names, held = self._matrices(target), self._held(target, reference)
        for name in names:
            if name not in held:
                held[name] = rounded(_delta(target, reference, name), self.bits).deviation
        sized = {name: (held[name], torch.Size(target.shape(name)).numel()) for name in names}
        return drops(sized, 1 - self.density, self.spread)

    def _norm(self, target: Weights, reference: Weights) -> float:
        """Return the sum of the singular values of all kept changes, found once for a task."""
        held = self._held(target, reference, self.density, self.spread, self.seed)
        if not held:
            fingerprint, found = target.fingerprint(), {}
            for name, drop in self._drops(target, reference).items():
                delta = _delta(target, reference, name)
                change = rounded(delta, self.bits)
                positions, codes = thinned(change, drop, keyed(self.seed, fingerprint, name))
                dense = delta.new_zeros(delta.numel(), dtype=torch.float64)
                dense[positions] = (change.low + change.step * codes).double()
                found[name] = trace_norm(dense.reshape(delta.shape))
            held.update(found)
        return sum(held.values())

    def _held(self, target: Weights, reference: Weights, *options: float) -> dict[str, float]:
        places = sorted({str(target.place(name)) for name in target.mergeable()})
        prints = [target.fingerprint(), reference.fingerprint(), *places]
        return _known(storage.digest([*prints, self.bits, list(self.exclude), *options]))


def rounded(delta: Tensor, bits: int) -> Rounded:
    """Round a change to even steps between its extremes.

    Args:
        delta: ``[*shape]`` in fp32 or fp64, finite, not empty.
        bits: Bits of an entry (b).
    """
    flat, most = delta.reshape(-1), (1 << bits) - 1
    low, high = torch.aminmax(flat)
    step = (high - low) / most
    codes = flat.sub(low).div_(high - low).mul_(most).round_() if step > 0 else torch.zeros_like(flat)
    codes = codes.to(torch.uint8)
    return Rounded(codes, low, step, torch.bincount(codes, minlength=most + 1).tolist())


def thinned(change: Rounded, drop: float, seed: int) -> tuple[Tensor, Tensor]:
    """Drop the same fraction of the entries of each value at random; entries whose value is 0 count as dropped.

    Args:
        change: What `rounded` returned.
        drop: Fraction dropped, in [0, 1].
        seed: Seeds the choice.

    Returns:
        Flat positions, ascending, and the codes of what is kept.
    """
    every = [*zip(change.counts, change.values, strict=True)]
    zero = sum(count for count, value in every if value == 0) / len(change.codes)
    further = max(0.0, (drop - zero) / (1 - zero)) if zero < 1 else 0.0
    generator, start = torch.Generator().manual_seed(seed), 0
    order = change.codes.sort(stable=True).indices  # the entries of each value together
    keeps = torch.zeros_like(change.codes, dtype=torch.bool)
    for count, value in every:
        stays = count - round(count * further) if value else 0
        left = torch.randperm(count, generator=generator)[count - stays :]
        keeps[order[start : start + count][left.to(order.device)]] = True
        start += count
    positions = keeps.nonzero().reshape(-1)
    return positions, change.codes[positions]


def drops(sized: Mapping[str, tuple[float, int]], drop: float, spread: float) -> dict[str, float]:
    """Say how many entries matrices drop: more where changes are small, and `drop` of all together.

    Args:
        sized: Matrix to the standard deviation of its rounded change, and its number of entries.
        drop: Fraction of all entries that is dropped.
        spread: How much more than that the first third of the entries drops.

    Returns:
        Matrix to a fraction in [0, 1].
    """
    more, total = min(1.0, drop + spread), sum(size for _, size in sized.values())
    found, seen, first, second = {}, 0, 0, 0
    for name in sorted(sized, key=lambda name: (sized[name][0], name)):
        size = sized[name][1]
        seen += size
        if seen <= total / 3:
            found[name], first = more, first + size
        elif seen <= 2 * total / 3:
            found[name], second = drop, second + size
    left = total - first - second
    last = (drop * total - drop * second - more * first) / left if left else drop
    return {name: found.get(name, min(1.0, max(0.0, last))) for name in sized}


def trace_norm(matrix: Tensor) -> float:
    """Return the sum of the singular values of ``[m, n]``, or of every matrix of ``[E, m, n]``, given in fp64."""
    every = matrix.reshape(-1, *matrix.shape[-2:])
    grams = (square(each if len(each) >= each.shape[1] else each.T) for each in every)
    return sum(float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()) for gram in grams)


def _delta(target: Weights, reference: Weights, name: str) -> Tensor:
    return wide(target.read_finite(name)) - wide(reference.read_finite(name))


@lru_cache(maxsize=64)  # keyed by content; an entry holds a number per matrix
def _known(key: str) -> dict[str, float]:
    return {}


def _count(kind: str, data: Tensor, numel: int) -> int:
    """Return how many positions are encoded."""
    if kind == "gap8":
        return int((data != encoding.ESCAPE).sum())
    return numel if kind == "all" else int(bits.unpack(data, numel).sum())
