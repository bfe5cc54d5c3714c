"""Adapters as one: the exact sum, the nearest of a rank, fused matrices, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece, cat, truncated

SHAPES = {"bias": (6,), "layer": (6, 4), "qkv": (9, 5)}
WEIGHTS = {"a": 0.5, "b": -0.25, "c": 2.0}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base(dtype=torch.float64):
    return Weights.of({name: normal(*shape, seed=9).to(dtype) for name, shape in SHAPES.items()}, "base")


def piece(start, height, width, rank, seed):
    return Piece(start, normal(height, rank, seed=seed), normal(rank, width, seed=seed + 50))


def adapters(zero):
    """Return three adapters of different ranks; one leaves `layer` alone, all change other thirds of `qkv`."""
    return {
        "a": Adapted(zero, {"layer": [piece(0, 6, 4, 2, 1)], "qkv": [piece(0, 3, 5, 2, 2)]}, origin="a"),
        "b": Adapted(zero, {"qkv": [piece(0, 3, 5, 3, 3), piece(6, 3, 5, 1, 4)]}, origin="b"),
        "c": Adapted(zero, {"layer": [piece(0, 6, 4, 1, 5)], "qkv": [piece(3, 3, 5, 2, 6)]}, origin="c"),
    }


def weighted(zero, given, weights):
    return zero + sum(weights[task] * (expert - zero) for task, expert in given.items())


def test_cat_is_the_weighted_sum():
    zero = base()
    given = adapters(zero)
    combined, expected = cat(given, WEIGHTS), weighted(zero, given, WEIGHTS)
    assert combined.origin == "a + b + c"
    for name in SHAPES:
        assert_close(combined[name], expected[name])


def test_ranks_add_up_and_rows_stay_apart():
    combined = cat(adapters(base()), WEIGHTS)
    assert [p.left.shape for p in combined.pieces("layer")] == [(6, 3)]
    assert [(p.start, p.left.shape) for p in combined.pieces("qkv")] == [(0, (3, 5)), (3, (3, 2)), (6, (3, 1))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_adapted_parameter_of_a_half_precision_base_is_read_in_fp32(dtype):
    zero = base(dtype)
    given = adapters(zero)
    combined = cat(given, WEIGHTS)
    assert combined["layer"].dtype == torch.float32 and combined["bias"].dtype == dtype
    assert_close(combined["layer"], weighted(zero, given, WEIGHTS)["layer"].float(), rtol=1e-2, atol=5e-2)


def test_one_adapter_of_weight_one_is_itself():
    given = {"a": adapters(base())["a"]}
    for name in SHAPES:
        assert torch.equal(cat(given, {"a": 1.0})[name], given["a"][name])


def test_the_order_of_tasks_does_not_matter():
    given = adapters(base())
    forth, back = cat(given, WEIGHTS), cat(dict(reversed(given.items())), WEIGHTS)
    for name in SHAPES:
        assert_close(forth[name], back[name])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncated_is_the_truncated_svd_of_each_product(rank):
    zero = base()
    combined = cat(adapters(zero), WEIGHTS)
    cut = truncated(combined, rank)
    for name in ("layer", "qkv"):
        for before, after in zip(combined.pieces(name), cut.pieces(name), strict=True):
            left, values, right = torch.linalg.svd(before.left @ before.right, full_matrices=False)
            assert after.left.shape[1] == len(after.right) <= rank and after.start == before.start
            assert_close(after.left @ after.right, left[:, :rank] * values[:rank] @ right[:rank])
    assert torch.equal(cut["bias"], zero["bias"])


def test_a_rank_that_holds_everything_changes_nothing():
    combined = cat(adapters(base()), WEIGHTS)
    for name in SHAPES:
        assert_close(truncated(combined, 5)[name], combined[name])


def test_factors_keep_their_precision():
    zero = base(torch.float32)
    single = Adapted(zero, {"layer": [Piece(0, *(part.float() for part in piece(0, 6, 4, 3, 1)[1:]))]})
    (cut,) = truncated(single, 2).pieces("layer")
    assert cut.left.dtype == cut.right.dtype == torch.float32


@pytest.mark.parametrize("narrow", [1, 2], ids=["left", "right"])
def test_one_factor_in_fp64_is_enough_to_stay_in_it(narrow):
    parts = list(piece(0, 6, 4, 3, 1))
    parts[narrow] = parts[narrow].float()
    (cut,) = truncated(Adapted(base(), {"layer": [Piece(*parts)]}), 3).pieces("layer")
    assert_close(cut.left @ cut.right, parts[1].double() @ parts[2].double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine", [lambda a: cat({"a": a}, {"a": 0.5}), lambda a: truncated(a, 2)])
def test_an_adapter_of_nothing(combine):
    zero = base()
    empty = Adapted(zero, {"layer": [Piece(0, torch.zeros(6, 0), torch.zeros(0, 4))], "qkv": []})
    for name in SHAPES:
        assert torch.equal(combine(empty)[name], zero[name])


def test_a_zero_product_stays_zero_at_any_rank():
    zero = base()
    idle = Adapted(zero, {"layer": [Piece(0, torch.zeros(6, 2), normal(2, 4))]})
    assert torch.equal(truncated(idle, 1)["layer"], zero["layer"])


def test_what_all_trained_alike_is_kept():
    zero = base()
    bias = zero["bias"] + 1
    given = {task: Adapted(zero, e.factored, {"bias": bias.clone()}) for task, e in adapters(zero).items()}
    combined = cat(given, WEIGHTS)
    assert torch.equal(combined["bias"], bias) and torch.equal(truncated(combined, 1)["bias"], bias)


@pytest.mark.parametrize("other", [{"bias": torch.zeros(6, dtype=torch.float64)}, {}], ids=["another", "the base's"])
def test_different_values_trained_whole_are_refused_by_name(other):
    zero = base()
    first = Adapted(zero, {}, {"bias": zero["bias"] + 1})
    with pytest.raises(CheckpointError, match="different values of bias, which were trained whole"):
        cat({"a": first, "b": Adapted(zero, {}, other)}, {"a": 0.5, "b": 0.5})


def test_rows_together_here_and_apart_there_are_refused():
    zero = base()
    whole = Adapted(zero, {"qkv": [piece(0, 9, 5, 2, 1)]})
    with pytest.raises(CheckpointError, match="rows of 'qkv' together"):
        cat({"a": whole, "b": adapters(zero)["b"]}, {"a": 1.0, "b": 1.0})


def test_another_base_is_refused_and_an_equal_one_is_not():
    given = adapters(base()) | {"b": adapters(base())["b"]}
    cat(given, WEIGHTS)
    moved = Weights.of({name: base()[name] + 1 for name in SHAPES})
    with pytest.raises(CheckpointError, match="b and a adapt different base models"):
        cat(given | {"b": adapters(moved)["b"]}, WEIGHTS)


def test_no_adapter_is_refused():
    with pytest.raises(CheckpointError, match="at least one task"):
        cat({}, {})


@pytest.mark.parametrize("weights", [{"a": 1.0}, WEIGHTS | {"d": 1.0}, WEIGHTS | {"a": float("nan")}], ids=repr)
def test_weights_of_other_tasks_or_not_finite_are_refused(weights):
    with pytest.raises(OptionError, match="one finite number for each of a, b, c"):
        cat(adapters(base()), weights)


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank):
    with pytest.raises(OptionError, match=f"rank={rank} must be"):
        truncated(adapters(base())["a"], rank)
