"""Fisher merging: equal and one-sided Fishers, scale, golden vectors, the joint fit of linear models, and refusals."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.fisher import FisherMerging
from byom.weights import Weights

FIRST = torch.tensor([1.0, 0.0, 0.5, -2.0], dtype=torch.float64)
SECOND = torch.tensor([0.0, 3.0, 0.5, 1.0], dtype=torch.float64)


def posed(experts, fishers, base=None):
    """Return a problem of one parameter `w`, from rows of values."""
    base = torch.zeros_like(experts[0]) if base is None else base
    finetuned = {f"task{t}": Weights.of({"w": value}, f"task{t}") for t, value in enumerate(experts)}
    fisher = {f"task{t}": Weights.of({"w": value}) for t, value in enumerate(fishers)}
    return Problem(Weights.of({"w": base}), finetuned, {"fisher": fisher})


def merged(experts, fishers, method=None, base=None):
    return (method or FisherMerging())(posed(experts, fishers, base))["w"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalise", ["none", "global"])
def test_equal_fishers_give_the_average(normalise):
    experts, fisher = random(4, 3, 5), random(3, 5).square() + 0.1
    problem = posed(experts, [fisher] * 4, random(3, 5, seed=1))
    assert_close(FisherMerging(normalise=normalise)(problem)["w"], Average()(problem)["w"])


def test_a_task_that_alone_depends_on_a_parameter_decides_it():
    fishers = [torch.tensor([1.0, 0, 0, 1]), torch.tensor([0.0, 1, 1, 0])]
    assert_close(merged([FIRST, SECOND], fishers), torch.tensor([1, 3, 0.5, -2]).double(), rtol=0, atol=1e-5)


def test_a_parameter_of_which_one_task_lacks_the_fisher_is_averaged_and_said():
    experts = {t: Weights.of({"w": value, "x": -value}) for t, value in (("a", FIRST), ("b", SECOND))}
    fishers = {"a": Weights.of({"w": torch.ones(4), "x": torch.ones(4)}), "b": Weights.of({"w": 2 * torch.ones(4)})}
    given = Problem(Weights.of({"w": torch.zeros(4), "x": torch.zeros(4)}), experts, {"fisher": fishers})
    assert FisherMerging().fallbacks(given) == ["x"]
    assert_close(FisherMerging()(given)["x"].double(), -(FIRST + SECOND) / 2)


def test_what_no_task_depends_on_is_averaged():
    assert_close(merged([FIRST, SECOND], [torch.zeros(4), torch.full((4,), 1e-9)]), (FIRST + SECOND) / 2)


def test_a_factor_on_all_fishers_changes_nothing():
    experts, fishers = random(3, 50), random(3, 50, seed=1).square() + 0.1
    assert_close(merged(experts, 1000 * fishers), merged(experts, fishers))


def test_a_factor_on_one_fisher_changes_nothing_once_they_are_normalised():
    experts, fishers = random(3, 50), random(3, 50, seed=1).square() + 0.1
    scaled = fishers * torch.tensor([1.0, 1000.0, 3.0]).unsqueeze(1)
    method = FisherMerging(normalise="global")
    assert_close(merged(experts, scaled, method), merged(experts, fishers, method), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(merged(experts, scaled), merged(experts, fishers), rtol=0.1)


def test_golden_vectors():
    found = merged([FIRST, SECOND], [torch.tensor([3.0, 1, 1, 1]), torch.ones(4)])
    assert_close(found, torch.tensor([0.75, 1.5, 0.5, -0.5]).double())


def test_golden_vectors_normalised_and_weighted():
    fishers = [torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])]  # norms 5 and 1
    experts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    assert_close(merged(experts, fishers, FisherMerging(normalise="global")), torch.tensor([2.0, 4.0]))
    assert_close(merged(experts, fishers, FisherMerging(normalise="global", weights=(3, 1))), torch.tensor([1.5, 3.0]))


def test_linear_models_merge_to_the_joint_fit_where_their_grams_are_diagonal():
    x = [torch.linalg.qr(random(20, 4, seed=t))[0] * torch.tensor([1.0, 2, 3, 4 + t]).double() for t in range(2)]
    y = [random(20, seed=9 + t) for t in range(2)]
    fits = [torch.linalg.lstsq(a, b.unsqueeze(1)).solution[:, 0] for a, b in zip(x, y, strict=True)]
    fishers = [a.square().sum(0) for a in x]
    joint = torch.linalg.lstsq(torch.cat(x), torch.cat(y).unsqueeze(1)).solution[:, 0]
    assert_close(merged(fits, fishers), joint)


def test_a_zero_fisher_loses_against_any_other_once_they_are_normalised():
    found = merged([FIRST, SECOND], [torch.zeros(4), torch.ones(4)], FisherMerging(normalise="global"))
    assert_close(found, SECOND, rtol=0, atol=1e-4)


def test_weights_go_by_the_order_of_tasks_and_reach_parameters_without_fisher():
    values = [
        {"w": torch.tensor([1.0]), "running": torch.tensor([4.0])},
        {"w": torch.zeros(1), "running": torch.zeros(1)},
    ]
    problem = Problem(
        Weights.of({name: torch.zeros(1) for name in values[0]}),
        {str(t): Weights.of(state) for t, state in enumerate(values)},
        {"fisher": {str(t): Weights.of({"w": torch.ones(1)}) for t in range(2)}},
    )
    assert FisherMerging().fallbacks(problem) == ["running"]
    assert FisherMerging()(problem)["running"] == 2
    assert FisherMerging(weights=(3, 1))(problem)["running"] == 3
    assert FisherMerging(weights=(3, 1), normalise="global")(problem)["w"] == 0.75


def test_a_fisher_that_is_not_finite_or_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match="'w' has 1 of 4 values that are NaN"):
        merged([FIRST, SECOND], [torch.ones(4), torch.tensor([1, 1, float("nan"), 1])])
    with pytest.raises(CheckpointError, match=r"statistic 'fisher' of 'w' has shape \(2,\), the parameter \(4,\)"):
        merged([FIRST, SECOND], [torch.ones(2), torch.ones(2)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"floor": 0}, "merge.floor=0"),
        ({"normalise": "tensor"}, "use none or global"),
        ({"weights": (1, -1)}, "merge.weights"),
        ({"weights": (0, 0)}, "merge.weights"),
        ({"weights": (float("nan"),)}, "merge.weights"),
    ],
)
def test_a_value_out_of_range_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        FisherMerging(**options)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(OptionError, match=r"3 values for 2 tasks \(task0, task1\)"):
        merged([FIRST, SECOND], [torch.ones(4)] * 2, FisherMerging(weights=(1, 1, 1)))


def test_statistics_without_a_probe_are_enough_and_none_at_all_are_refused():
    problem = posed([FIRST], [torch.ones(4)])
    assert problem.probe is None
    assert_close(FisherMerging()(problem)["w"], FIRST)
    with pytest.raises(OptionError, match="FisherMerging needs the statistics"):
        FisherMerging()(Problem(problem.pretrained, problem.finetuned))
