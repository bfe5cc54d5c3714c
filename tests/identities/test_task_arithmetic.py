"""Identities of Task Arithmetic with task weights; those without are in tests/unit/test_identities.py."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.breadcrumbs import ModelBreadcrumbs
from byom.merge.task_arithmetic import TaskArithmetic
from byom.storage.signature import signature
from byom.weights import Weights
from tests.problems import FLOATS, configured, grid, models, problem, same

METHODS = {
    "task_arithmetic": lambda weights=(): TaskArithmetic(0.5, weights),
    "breadcrumbs": lambda weights=(): ModelBreadcrumbs(0.5, 0.1, 0.5, "per_tensor", weights),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def pair(*taus):
    base = Weights.of({"w": torch.ones(2)})
    return Problem(base, {f"t{t}": Weights.of({"w": 1 + torch.tensor(tau)}) for t, tau in enumerate(taus)})


def test_golden_by_hand():
    given = pair([1.0, 4.0], [2.0, -2.0])
    assert TaskArithmetic(0.5, (2.0, -1.0))(given)["w"].tolist() == [1.0, 6.0]
    crumbs = ModelBreadcrumbs(0.5, 0.5, 0.5, weights=(2.0, -1.0))  # the first loses the 4, the second its first 2
    assert crumbs(given)["w"].tolist() == [2.0, 2.0]


def test_weights_of_1_are_no_weights(method):
    given = problem(*models(5))
    assert same(method((1,) * 5)(given), method()(given))


def test_a_task_of_weight_0_is_left_out(method):
    base, finetuned = models(3)
    rest = {task: state for task, state in finetuned.items() if task != "task2"}
    assert same(method((1.5, 0.0, -1.0))(problem(base, finetuned)), method((1.5, -1.0))(problem(base, rest)))


def test_it_is_linear_in_the_weights(method):
    base, finetuned = models(3, torch.float64, values=grid)
    one, other, both = (
        method(w)(problem(base, finetuned)) for w in ((1.0, -2.0, 0.5), (0.5, 1.0, -3.0), (2.0, -3.0, -2.0))
    )
    for name in FLOATS:
        expected = base[name] + 2 * (one[name] - base[name]) + (other[name] - base[name])
        assert_close(method((2.5, -3.0, -2.0))(problem(base, finetuned))[name], expected, rtol=1e-12, atol=1e-12)
    assert not same(one, both)


def test_weights_that_add_up_to_1_are_the_weighted_average():
    given = problem(*models(3, torch.float64))
    weights = (1.2, -0.5, 0.3)
    added, averaged = TaskArithmetic(1.0, weights)(given), Average(weights)(given)
    for name in FLOATS:
        assert_close(added[name], averaged[name], rtol=1e-12, atol=1e-12)


def test_golden_removing_a_task_that_was_added():
    given = pair([1.0, 4.0], [1.0, 4.0])
    assert TaskArithmetic(1.0, (1.0, -1.0))(given)["w"].tolist() == [1.0, 1.0]


def test_without_weights_signatures_stay(method):
    assert signature(method()) == signature(method([])) != signature(method((1.0,)))
    assert signature(method((1, 2))) == signature(method((1.0, 2.0)))


def test_a_wrong_number_of_weights_is_refused_with_the_tasks(method):
    with pytest.raises(OptionError, match=r"merge.weights has 1 values for 2 tasks \(t0, t1\); give one per task"):
        method((1.0,))(pair([1.0, 2.0], [3.0, 4.0]))


@pytest.mark.parametrize("weights", [(float("nan"), 1.0), ("a",), "12", 0.5])
def test_what_is_no_list_of_finite_numbers_is_refused(method, weights):
    with pytest.raises(OptionError, match=r"merge\.weights=.* is not a list of finite numbers"):
        method(weights)


@pytest.mark.parametrize("name", [*METHODS, "ties", "average"])
def test_the_command_line_takes_them(name):
    assert configured([f"merge={name}", "merge.weights=[1,-0.5]"]).weights == (1, -0.5)
