"""Sums over tasks that are taken one expert at a time have the bits of those of the stack, and are rounded the same."""

import pytest
import torch
from torch import float16, float32, float64

from byom.errors import CheckpointError
from byom.functional.deltas import inner_products, total, weighted
from byom.functional.tensors import finite, narrowed
from byom.merge.average import Average
from byom.merge.base import Group, Problem
from byom.merge.base import group as pieces
from byom.merge.base.method import TensorwiseMethod
from byom.merge.dare import Dare
from byom.merge.model_stock import ModelStock
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.problems import bits

bf16 = torch.bfloat16
TYPES = [
    (bf16,) * 4,
    (float16,) * 9,
    (float32,) * 4,
    (float32,) * 2,
    (bf16, float32, float16),
    (float64, bf16, float32),
]
TYPES += [(float32, float64, bf16), (bf16, float32, float64), (torch.float8_e4m3fn,) * 3]


def drawn(*dtypes, size=37):
    draw = torch.Generator().manual_seed(len(dtypes))
    base = torch.randn(size, generator=draw)
    experts = (base + 0.1 * torch.randn(size, generator=draw) for _ in dtypes[1:])
    return [value.to(dtype) for value, dtype in zip((base, *experts), dtypes, strict=True)]


def posed(tensors):
    return Problem(Weights.of({"a": tensors[0]}), {f"t{n}": Weights.of({"a": t}) for n, t in enumerate(tensors[1:])})


@pytest.mark.parametrize("dtypes", TYPES, ids=str)
@pytest.mark.parametrize("weighed", [False, True])
def test_sums_one_by_one_are_those_of_the_stack(dtypes, weighed):
    base, *experts = drawn(*dtypes)
    kept = [each.clone() for each in (base, *experts)]
    group, weights = Group("a", base, tuple(experts)), [0.3 - 0.7 * n for n in range(len(experts))] if weighed else ()
    wide = base if base.dtype == float64 else base.float()
    assert bits(group.total(weights)) == bits(total(weighted(group.finetuned, weights)))
    assert bits(group.moved(0.3, weights)) == bits(wide + 0.3 * total(weighted(group.deltas, weights)))
    assert all(bits(now) == bits(then) for now, then in zip((base, *experts), kept, strict=True))


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), ModelStock(), Ties(), Dare()], ids=str)
@pytest.mark.parametrize("dtypes", TYPES, ids=str)
def test_values_rounded_by_pieces_are_those_rounded_whole(method, dtypes, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 8)
    merged = method(posed(drawn(*dtypes)))
    assert bits(merged["a"]) == bits(narrowed(merged.raw("a"), merged.dtype("a"), "a"))


@pytest.mark.parametrize("dtype", [bf16, float16, float32])
def test_a_result_beyond_its_type_is_not_blamed_on_the_experts(dtype, tmp_path):
    ones, largest = torch.ones(3).to(dtype), torch.full((3,), torch.finfo(dtype).max / 2).to(dtype)
    merged = TaskArithmetic(scale=4.0)(posed([ones, largest]))
    with pytest.raises(CheckpointError, match="came out with values|holds 6.55e"):
        merged.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_methods_that_look_at_the_result_alone_show_what_is_not_finite_in_any_expert():
    found = [Average(), Average(weights=(1, 0)), TaskArithmetic(scale=0), TaskArithmetic(weights=(0, 1)), ModelStock()]
    assert all(method.exposing for method in found) and not TensorwiseMethod.exposing
    for method in found:
        for bad in (float("nan"), float("inf"), -float("inf")):
            tensors = drawn(bf16, bf16, bf16)
            tensors[1][5] = bad
            with pytest.raises(CheckpointError, match="not finite|NaN or inf"):
                method(posed(tensors))["a"]


def test_inner_products_do_not_depend_on_what_lay_in_their_memory():
    short, long = torch.randn(2, 50), torch.randn(3, 900)
    first = inner_products(short)
    assert torch.allclose(inner_products(long), long.double() @ long.double().T)
    assert torch.equal(inner_products(short), first)


@pytest.mark.parametrize("dtype", [bf16, float16, float32, float64])
def test_values_whose_sum_overflows_are_finite(dtype):
    assert finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
    assert not finite(torch.tensor([1.0, float("inf"), -float("inf")], dtype=dtype))
