"""Compiled passes give the bits of torch's road, whatever the dtypes, ties, zeros, cuts and threads; or stay away."""

import builtins
import sys

import numpy as np
import pytest
import torch

from byom.errors import CheckpointError
from byom.functional import compiled, election, stream
from byom.functional.selection import Cut, Part, kept, locate
from byom.merge.base import Problem
from byom.merge.ties import Ties
from byom.variants.base import positions
from byom.variants.fft import ByomFft
from byom.weights import Weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = [
    {},
    {"density": 0.0},
    {"density": 1.0, "combine": "sum", "scale": 0.3},
    {"weights": (1.0, -2.0, 0.0), "density": 0.5},
    {"scope": "tensor", "density": 0.4},
    {"scope": "row"},
    {"densities": (0.1, 0.5, 0.9)},
]


@pytest.fixture
def road(monkeypatch):
    """Switch between kernels, for any amount of work and in pieces that end unevenly, and torch's road."""
    monkeypatch.setattr(stream, "BLOCK", 100)
    monkeypatch.setattr(election, "PIECE", 96)

    def take(name):
        monkeypatch.setattr(compiled, "LEAST", 0)
        monkeypatch.setenv(compiled.SWITCH, "1" if name == "kernels" else "0")

    return take


def values(shape, seed, step=1 / 1024):
    """Multiples of a step, which tie and cancel, with zeros of both signs and numbers that are not normal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-6, 7, shape, generator=generator) * step
    drawn.reshape(-1)[::7] = -0.0
    drawn.reshape(-1)[3::11] = 1e-41
    return drawn


def problem(dtype, mixed=False):
    """Three experts of a model with empty, one-element, 0-dim and uneven tensors."""
    shapes = {"a": (13, 29), "b": (311,), "c": (1,), "d": (), "e": (0, 3)}
    base = {name: values(shape, 1, 1 / 64) if shape else torch.tensor(0.5) for name, shape in shapes.items()}
    experts = {}
    for task in range(3):
        own = torch.float32 if mixed and task else dtype
        moved = {n: b + values(b.shape, 10 + task) if b.dim() else b - 0.25 * task for n, b in base.items()}
        experts[f"task{task}"] = Weights.of({name: value.to(own) for name, value in moved.items()})
    return Problem(Weights.of({name: value.to(dtype) for name, value in base.items()}), experts)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fresh(given):
    """The same models, of which no cuts are kept."""
    again = {task: each.derived(each.raw, each.origin) for task, each in given.finetuned.items()}
    return Problem(given.pretrained, again)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_packing_have_the_bits_of_torchs_road(dtype, options, road, monkeypatch):
    given, found = problem(dtype), {}
    passes = []
    elect = election.Election.merge
    monkeypatch.setattr(election.Election, "merge", lambda self, *rest: passes.append(1) or elect(self, *rest))
    for name in ("kernels", "torch"):
        road(name)
        fitted = fresh(given)
        merged = Ties(**options)(fitted)
        state = {key: bits(value) for key, value in merged.state().items()}
        reference = Weights.of(merged.state())
        packed = ByomFft(0.3, scope=options.get("scope", "global")).streamed(fitted, reference).deltas
        parts = {
            task: {n: {k: bits(t) for k, t in p.items()} for n, p in packed[task].parts.items()} for task in packed
        }
        found[name] = state, parts, [*packed["task1"].parts]
        assert bool(passes) == (name == "kernels" and dtype != torch.float64 and options.get("scope") != "row")
        passes.clear()
    assert found["kernels"] == found["torch"]


def test_experts_of_another_dtype_than_the_base(road):
    given, found = problem(torch.bfloat16, mixed=True), []
    for name in ("kernels", "torch"):
        road(name)
        merged = Ties(density=0.5, scale=1.3)(fresh(given))
        found.append([(bits(merged.raw(key)), bits(merged[key])) for key in merged.mergeable()])
    assert found[0] == found[1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_cuts_are_those_of_a_stable_sort(number, threads, road):
    given = problem(torch.float32)
    left, right = (each["a"].reshape(-1) for each in (given.finetuned["task1"], given.pretrained))
    part = Part(len(left), lambda at: left[at] - right[at], pair=lambda: (left, right))
    sizes = (left - right).abs()
    order = sizes.argsort(descending=True, stable=True)
    counts = [1, 5, kept(0.3, len(left)), len(left) - 1]
    road("kernels")
    threads(number)
    for count, cut in zip(counts, locate([part], counts), strict=True):
        last = int(order[count - 1])
        assert cut == Cut(sizes[last].item(), last, count)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad, road):
    road("kernels")
    given = problem(torch.float32)
    state = given.finetuned["task1"].state()
    state["b"] = state["b"].clone()
    state["b"][-1] = bad
    with pytest.raises(CheckpointError, match=r"'b' has 1 of 311 values"):
        Ties()(Problem(given.pretrained, {**given.finetuned, "task1": Weights.of(state, "spoilt")}))


@pytest.mark.parametrize("numel", [1, 8, 300, 5000])
@pytest.mark.parametrize("density", [0.002, 0.05, 0.5, 1.0])
def test_positions_are_written_alike(numel, density, road):
    chosen = torch.rand(numel, generator=torch.Generator().manual_seed(0)) <= density
    places, found = chosen.nonzero().flatten(), []
    for name in ("kernels", "torch"):
        road(name)
        kind, data = positions.encode(places, numel)
        found.append((kind, data.tolist()))
        if len(places) > 1:
            for wrong in (places.flip(0), places + numel, places - numel):
                with pytest.raises(ValueError, match="strictly ascending"):
                    positions.encode(wrong, numel)
    assert found[0] == found[1]


@pytest.mark.parametrize(("low", "high"), [(2.0, 5.0), (3.0, 3.0), (-1.0, np.inf), (8.5, 8.6)])
@pytest.mark.parametrize("size", [1, 4096, 4099])
def test_a_tally_counts_edges_apart_and_collects_between(low, high, size):
    numbers = np.abs(np.random.default_rng(0).integers(-9, 10, size)).astype(np.float32)
    room = np.empty(size + 1, dtype=np.float32)
    *counts, between = compiled.kernels(compiled.LEAST).tally(numbers, np.float32(low), np.float32(high), room)
    at_low = (numbers == low).sum() * (low < high)
    assert counts == [(numbers > high).sum(), (numbers == high).sum(), at_low]
    assert room[:between].tolist() == numbers[(numbers > low) & (numbers < high)].tolist()


def test_little_work_loads_nothing_and_numba_may_be_missing(monkeypatch):
    monkeypatch.setattr(compiled, "_LOADED", [])
    assert compiled.kernels(compiled.LEAST - 1) is None
    monkeypatch.delitem(sys.modules, "byom.functional.kernels", raising=False)
    compiled._load.cache_clear()
    imports = builtins.__import__

    def without(name, *rest):
        if name.startswith("numba"):
            raise ImportError(name)
        return imports(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        assert compiled.kernels(compiled.LEAST) is None
    compiled._load.cache_clear()


def test_a_number_beyond_single_precision_takes_torchs_road(road):
    given = problem(torch.float32)
    for method in (Ties(weights=(1.0, 1e300, 1.0)), Ties(scale=1e300)):
        found = []
        for name in ("kernels", "torch"):
            road(name)
            found.append({key: bits(value) for key, value in method(fresh(given)).state().items()})
        assert found[0] == found[1]
