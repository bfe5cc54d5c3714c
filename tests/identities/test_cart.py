"""CART: the formula, and its ends: the average, and nothing left out."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.cart import CenteredArithmeticWithRankReducedTaskVectors as Cart
from byom.merge.cart import share_of
from byom.variants.lora import ByomLora
from tests.problems import one_tensor, random


def literal(deltas, rank, scale):
    mean = deltas.mean(0)
    change = mean.clone()
    for delta in deltas:
        left, values, right = torch.linalg.svd(delta - mean, full_matrices=False)
        change += scale * left[:, :rank] * values[:rank] @ right[:rank]
    return change


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)], ids=str)
def test_the_formula(shape):
    deltas = random(4, *shape)
    rank = min(shape) // 2 + 1
    found = Cart(rank=(rank - 0.5) / min(shape), scale=1.7)(one_tensor(deltas))["w"]
    assert_close(found - 0.5, literal(deltas, rank, 1.7))


def test_it_adds_what_byom_lora_puts_back_on_the_average():
    deltas = random(3, 8, 6)
    problem = one_tensor(deltas)
    average = Average()(problem)
    served = ByomLora(rank=2).serve(problem, average)
    back = sum(served.weights(task)["w"] - average["w"] for task in problem.tasks)
    assert_close(Cart(rank=2 / 6)(problem)["w"], average["w"] + back, rtol=1e-5, atol=1e-6)


def test_golden():
    """Two tasks, apart along one direction each way: what is added cancels, and with three it does not."""
    one, two = torch.zeros(2, 2, 2).double()
    one[0, 0], two[1, 1] = 2.0, 2.0
    assert_close(
        Cart(rank=1.0)(one_tensor(torch.stack([one, two])))["w"], torch.full((2, 2), 0.5).double() + (one + two) / 2
    )
    deltas = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]], [[0.0, 0.0]]]).double().expand(3, 2, 2)
    assert_close(Cart(rank=0.5)(one_tensor(deltas))["w"] - 0.5, deltas.mean(0))


@pytest.mark.parametrize("method", [Cart(rank=0.0), Cart(rank=1.0, scale=2.0), Cart(scale=0.0)], ids=str)
def test_its_ends_are_the_average(method):
    deltas = random(3, 6, 5)
    assert_close(method(one_tensor(deltas))["w"], Average()(one_tensor(deltas))["w"])


def test_one_task_and_vectors_are_averaged():
    assert_close(Cart()(one_tensor(random(1, 6, 5)))["w"], 0.5 + random(1, 6, 5)[0])
    assert_close(Cart()(one_tensor(random(3, 6)))["w"], 0.5 + random(3, 6).mean(0))
    matrices = one_tensor(random(3, 6, 5), "text_projection")
    assert_close(Cart()(matrices)["text_projection"], Average()(matrices)["text_projection"])


def test_ranks_are_rounded_up():
    assert [share_of(0.08, n) for n in (1, 12, 25, 100, 768)] == [1, 1, 2, 8, 62]
    assert share_of(0.7, 10) == 7 and share_of(0.0, 9) == 0 and share_of(1.0, 9) == 9


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(OptionError, match="merge.rank=1.2 is not a fraction"):
        Cart(rank=1.2)
