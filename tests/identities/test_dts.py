"""DTS: golden vectors, exact cases, norms that stay, scale equivariance, both references, and the bytes it takes."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.functional.linalg import truncated_svd
from byom.variants.base import Shared
from byom.variants.dts import DecompositionThresholdingScaling, reduced, restored
from byom.weights import Weights
from tests.problems import models, random


def served(delta, name="w", **options):
    target = Weights.of({name: delta})
    packed = DecompositionThresholdingScaling(**options).delta(target, target * 0)
    return packed, packed.apply(target * 0)[name]


def four(values):
    """Return what a row becomes."""
    return restored(reduced(values[None], "x"), "x", 1, len(values))[0]


def hadamard(size):
    """Return an orthogonal matrix of entries +-1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def test_golden():
    values = torch.tensor([7.0, 1, -3, 5, 0, 1, -4, -1, 7])
    small, large, low = 9**0.5, 7.0, 5**0.5  # of 1, 1, 5; 7, 7; -3, -1: halves are rounded down to the larger one
    assert four(values).tolist() == pytest.approx([large, small, -low, small, 0, small, -4, -low, large])
    parts = reduced(values[None], "x")
    assert {part: tensor.nbytes for part, tensor in parts.items()} == {"x": 3, "x-levels": 16, "x-zeros": 2}


def test_matrix_golden():
    delta = torch.outer(torch.tensor([3.0, 4, 0]), torch.tensor([0.6, -0.8])).double()  # 5 (.6, .8, 0) (.6, -.8)
    expected = 5 * torch.outer(torch.tensor([0.6, 0.8, 0]), torch.tensor([0.6, -0.8])).double()
    assert_close(served(delta)[1], expected, rtol=1e-6, atol=1e-6)  # each side of a factor has one entry or two


@pytest.mark.parametrize("shape", [(4, 4), (16, 8), (8, 16)])
def test_singular_vectors_of_one_magnitude_are_exact(shape):
    left, right = (hadamard(size)[:, 1:4] for size in shape)
    delta = left * torch.tensor([3.0, 2, 1]) @ right.T
    assert_close(served(delta, share=0.75)[1], delta, rtol=1e-12, atol=1e-12)


def test_two_magnitudes_of_either_sign_are_exact():
    values = torch.tensor([3.0, -2, 1, -1, 3, -2, 1, -1])
    assert torch.equal(four(values), values)
    delta = torch.cat([values, values])
    assert torch.equal(served(delta)[1], delta)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_signs_and_norms_stay(size):
    values = random(size)
    got = four(values)
    assert torch.equal(got.sign(), values.sign()) and len(got.unique()) <= 4
    assert float(got.norm()) == pytest.approx(float(values.norm()), rel=1e-9)
    for side in (1, -1):
        assert int((got * side == (got * side).max()).sum()) >= int((values * side > 0).sum()) // 2


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_it_is_the_reduced_factors_of_the_largest_singular_values(shape):
    delta = random(*shape)
    packed, put_back = served(delta, share=0.5)
    left, values, right = truncated_svd(delta, 4)
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    left, right = left * signs, right * signs.T
    expected = four(left.flatten()).reshape(left.shape) * values @ four(right.flatten()).reshape(right.shape)
    assert_close(put_back, expected, rtol=1e-9, atol=1e-9)
    assert packed.parts["w"]["singular"].shape == (1, 4)


def test_the_opposite_change_is_served_the_opposite_and_the_order_of_rows_does_not_matter():
    assert_close(served(-random(12, 8))[1], -served(random(12, 8))[1], rtol=1e-9, atol=1e-9)
    assert_close(served(random(12, 8).flip(0))[1], served(random(12, 8))[1].flip(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [0.25, 3.0])
@pytest.mark.parametrize("shape", [(12, 8), (40,), (3, 4, 5)])
def test_longer_task_vectors_are_served_as_much_farther(factor, shape):
    assert_close(served(factor * random(*shape))[1], factor * served(random(*shape))[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("shape", "rank"), [((40, 24), 7), ((24, 40), 7), ((3, 9), 1)])
def test_it_takes_two_bits_an_entry_and_the_numbers(shape, rank):
    packed, _ = served(random(*shape).float())
    assert packed.nbytes == sum(-(-side * rank // 4) for side in shape) + 4 * rank + 2 * 16
    assert packed.stored_parameters == rank + 8


def test_other_tensors_are_reduced_or_whole_where_that_is_no_larger():
    packed, _ = served(random(40).float())
    assert packed.nbytes == 10 + 16
    for shape in ((), (1,), (4,), (4, 1)):
        delta = random(*shape).float()
        packed, put_back = served(delta)
        assert torch.equal(put_back, delta) and packed.nbytes == 4 * delta.numel()


def test_experts_of_a_mixture_are_one_matrix_each():
    name, stack = "mlp.experts.gate_up_proj", torch.stack([random(12, 8), 10 * random(12, 8, seed=1)])
    put_back = served(stack, name)[1]
    assert all(torch.allclose(put_back[e], served(stack[e])[1], rtol=1e-9, atol=1e-9) for e in range(2))


def test_rows_and_columns_that_did_not_change_stay():
    delta = random(60, 40)  # of which LAPACK returns entries of 1e-16 for the column
    delta[[2, 5]], delta[:, 3] = 0, 0
    packed, put_back = served(delta)
    assert not put_back[[2, 5]].any() and not put_back[:, 3].any() and put_back.any()
    assert {"left-zeros", "right-zeros"} <= set(packed.parts["w"])


def test_values_that_are_rounding_are_left_out():
    delta = (random(40, 2) @ random(2, 24, seed=1)).float()
    assert served(delta)[0].parts["w"]["singular"].shape == (1, 2)


def test_on_a_merged_model_it_is_the_same_of_what_is_left():
    base, tuned = models(1)
    target, merged = Weights.of(tuned["task1"]), Weights.of(base) * 0.5
    kinds = ("pretrained", "merged")
    one, other = (DecompositionThresholdingScaling(reference=kind).delta(target, merged) for kind in kinds)
    assert (one.variant.on, other.variant.on) == kinds
    assert all(torch.equal(one.apply(merged)[name], other.apply(merged)[name]) for name in merged.mergeable())
    assert DecompositionThresholdingScaling().delta(merged, merged).nbytes == 0


def test_parts_that_do_not_fit_are_refused():
    packed, _ = served(random(12, 8))
    unpack, parts = packed.variant.unpack, packed.parts["w"]
    with pytest.raises(CheckpointError, match=r"1 matrices do not fit a tensor of shape \(2, 12, 8\)"):
        unpack(parts, Shared(torch.zeros(2, 12, 8)))
    with pytest.raises(CheckpointError, match="integers of 2 bits are"):
        unpack(parts, Shared(torch.zeros(13, 8)))
    with pytest.raises(CheckpointError, match=r"levels of shape \(1, 3\) are not those of 1 matrices"):
        unpack(parts | {"left-levels": torch.zeros(1, 3)}, Shared(torch.zeros(12, 8)))


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 30}, {"reference": "tuned"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=rf"byom\.{next(iter(options))}="):
        DecompositionThresholdingScaling(**options)
