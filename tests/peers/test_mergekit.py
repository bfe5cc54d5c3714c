"""Merging beside mergekit's in-memory API.

They agree with ``lambda`` as the scale, and with weights of their models as `weights` (1 where there are none):

- ``task_arithmetic`` (normalize off) is Task Arithmetic; ``linear`` (normalize on) is the average;
- ``ties`` trims each tensor on its own (``scope="tensor"``); normalize on is ``combine="mean"``, because the sum of
  the agreeing weights is then their number, and normalize off is ``combine="sum"``.

They differ

- in the mean of TIES with negative weights: mergekit divides by the sum of the weights that agree, byom by that of
  their magnitudes;
- in coordinates whose weighted sum is exactly 0: mergekit elects +, byom the majority of the model;
- in k: ``max(1, int(density * n))`` against ``floor(density * n + 1e-9)``: a bias of 4 at density 0.2 keeps one entry
  there and none here;
- in precision: mergekit subtracts in the checkpoints' dtype, byom in fp32, so half precision agrees only roughly;
- in Model Stock, where experts disagree on average: the formula's ratio is then negative, byom's is 0; and mergekit
  takes norms below 1e-6 for that;
- in the outliers of Breadcrumbs at density 1: mergekit returns the tensor before it removes any. (Its code once gave
  zeros where ``gamma * n < 1``; 0.1.5 does not, as the test with the bias of 30 shows.)
- in the rescaling of DARE: mergekit keeps the L1 norm of each tensor, byom divides by the chance of surviving;
- in buffers: mergekit refuses counters that differ between models, byom carries the pre-trained model's.
"""

import pytest
import torch
from torch.testing import assert_close

from byom.functional.seeding import keyed
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.breadcrumbs import ModelBreadcrumbs
from byom.merge.dare import Dare, flips
from byom.merge.model_stock import ModelStock
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights

mergekit = pytest.importorskip("mergekit.merge_methods")
pytestmark = pytest.mark.peer

COMPARES = {
    "task_arithmetic": "equal",
    "average": "equal",
    "ties": "equal, trimmed per tensor",
    "breadcrumbs": "equal, per tensor",
    "model_stock": "equal where experts agree",
    "dare": "equal with the same flips, without rescaling",
}
SHAPES = {"embed": (20, 10), "bias": (30,), "weight": (8, 5, 5)}
TASKS = [1, 2, 3, 8]


def states(tasks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tasks)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    near = [{n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()} for _ in range(tasks)]
    return [{name: tensor.to(dtype) for name, tensor in state.items()} for state in (base, *near)]


def ours(method, base, *experts):
    return method(Problem(Weights.of(base), {str(t): Weights.of(state) for t, state in enumerate(experts)})).state()


def theirs(method, base, *experts, **parameters):
    named = {"base": base} | {str(t): state for t, state in enumerate(experts)}
    return mergekit.merge_state_dicts(named, method, base="base", parameters={"weight": 1.0} | parameters)


WEIGHTS = [[0.7, 1.5, 0.2], [0.7, -0.2, 1.5]]


def weighed(weights):
    return {"weight": {str(t): weight for t, weight in enumerate(weights)}}


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_task_arithmetic(tasks, scale):
    models = states(tasks)
    peer = theirs("task_arithmetic", *models, **{"lambda": scale})
    assert_close(ours(TaskArithmetic(scale), *models), peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", TASKS)
def test_average(tasks):
    base, *experts = states(tasks)
    peer = mergekit.merge_state_dicts(experts, "linear", parameters={"weight": 1.0})
    assert_close(ours(Average(), base, *experts), peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_ties_of_each_tensor(tasks, density, scale, combine):
    models = states(tasks)
    peer = theirs("ties", *models, density=density, normalize=combine == "mean", **{"lambda": scale})
    assert_close(ours(Ties(density, scale, combine, "tensor"), *models), peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("remove_top", [0.0, 0.006, 0.1])
def test_breadcrumbs_of_each_tensor(tasks, keep, remove_top):
    models = states(tasks)
    peer = theirs("breadcrumbs", *models, density=keep, gamma=remove_top, **{"lambda": 0.3})
    ours_ = ours(ModelBreadcrumbs(keep, remove_top, 0.3, "per_tensor"), *models)
    assert_close(ours_, peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights(weights):
    models, parameters = states(3), weighed(weights) | {"lambda": 0.5}
    peer = theirs("task_arithmetic", *models, **parameters)
    assert_close(ours(TaskArithmetic(0.5, tuple(weights)), *models), peer, rtol=1e-6, atol=1e-6)
    peer = theirs("breadcrumbs", *models, density=0.5, gamma=0.1, **parameters)
    crumbs = ModelBreadcrumbs(0.5, 0.1, 0.5, "per_tensor", tuple(weights))
    assert_close(ours(crumbs, *models), peer, rtol=1e-6, atol=1e-6)
    peer = mergekit.merge_state_dicts(dict(zip("012", models[1:], strict=True)), "linear", parameters=weighed(weights))
    assert_close(ours(Average(tuple(weights)), *models), peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_weights_of_ties(weights, combine):
    models = states(3)
    peer = theirs("ties", *models, density=0.5, normalize=combine == "mean", **weighed(weights))
    own = ours(Ties(0.5, 1.0, combine, "tensor", tuple(weights)), *models)
    if combine == "sum" or min(weights) >= 0:
        assert_close(own, peer, rtol=1e-6, atol=1e-6)
    else:
        assert not torch.allclose(own["weight"], peer["weight"], rtol=1e-2)


def test_the_mean_of_ties_turns_its_sign_there_and_not_here():
    models = [{"w": torch.tensor([value])} for value in (0.0, 2.0, -4.0)]
    peer = theirs("ties", *models, **weighed([0.5, -1.0]))
    assert peer["w"].tolist() == [-10.0]  # (0.5 * 2 + -1 * -4) / (0.5 - 1): both vote for +
    assert ours(Ties(1.0, weights=(0.5, -1.0)), *models)["w"].tolist() == [pytest.approx(5 / 1.5)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_of_dare(weights, monkeypatch):
    models = [{"w": state["weight"]} for state in states(3)]
    for combine, then in (
        ("linear", TaskArithmetic(1.0, tuple(weights))),
        ("ties", Ties(1.0, 1.0, "sum", "tensor", tuple(weights))),
    ):
        inject(monkeypatch, models, 0.5)
        peer = theirs(f"dare_{combine}", *models, density=0.5, rescale=False, normalize=False, **weighed(weights))
        assert_close(ours(Dare(then, 0.5, rescale=False), *models), peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_model_stock_of_experts_that_agree(tasks):
    base, *experts = states(tasks)
    generator = torch.Generator().manual_seed(0)
    common = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    near = [{name: tensor + common[name] for name, tensor in state.items()} for state in experts]
    peer = mergekit.merge_state_dicts({"base": base} | dict(enumerate(near)), "model_stock", base="base")
    assert_close(ours(ModelStock(), base, *near), peer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combine", ["linear", "ties"])
@pytest.mark.parametrize("drop", [0.2, 0.5, 0.9])
def test_dare_with_the_same_flips(combine, drop, monkeypatch):
    models = [{"w": state["weight"]} for state in states(3)]
    then = TaskArithmetic(0.3) if combine == "linear" else Ties(1.0, 0.3, "sum", "tensor")
    inject(monkeypatch, models, drop)
    peer = theirs(f"dare_{combine}", *models, density=1 - drop, rescale=False, normalize=False, **{"lambda": 0.3})
    assert_close(ours(Dare(then, drop, rescale=False), *models), peer, rtol=1e-6, atol=1e-6)


def inject(monkeypatch, models, drop):
    """Let mergekit draw what byom draws."""
    drawn = iter([flips(state["w"], drop, keyed(0, str(t), "w")).float() for t, state in enumerate(models[1:])])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(drawn))


def test_dare_keeps_the_norm_there_and_the_expectation_here(monkeypatch):
    base, expert = ({"w": state["weight"]} for state in states(1))
    delta, mask = expert["w"] - base["w"], flips(base["w"], 0.5, keyed(0, "0", "w"))
    inject(monkeypatch, [base, expert], 0.5)
    peer = theirs("dare_linear", base, expert, density=0.5, rescale=True)["w"] - base["w"]
    own = ours(Dare(TaskArithmetic(1.0), 0.5), base, expert)["w"] - base["w"]
    assert_close(peer.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=0)
    assert_close(own, 2 * delta * mask, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own, peer, rtol=1e-3)


def test_outliers_stay_at_density_1_there_and_go_here():
    models = [{"w": torch.tensor(values)} for values in ([0.0] * 4, [1.0, 2, 3, 9])]
    assert theirs("breadcrumbs", *models, density=1.0, gamma=0.25)["w"].tolist() == [1, 2, 3, 9]
    assert ours(ModelBreadcrumbs(0.75, 0.25, 1.0, "per_tensor"), *models)["w"].tolist() == [1, 2, 3, 0]


def test_experts_that_disagree_move_away_there_and_not_here():
    models = [{"w": torch.tensor(values)} for values in ([0.0, 0], [1.0, 0], [-0.6, 0.8])]
    peer = mergekit.merge_state_dicts(dict(zip("bxy", models, strict=True)), "model_stock", base="b")["w"]
    assert ours(ModelStock(), *models)["w"].tolist() == [0, 0]
    assert_close(peer, 2 * -0.6 / (1 - 0.6) * torch.tensor([0.2, 0.4]))


def test_half_precision_agrees_roughly():
    models = states(3, torch.bfloat16)
    peer = theirs("task_arithmetic", *models, **{"lambda": 0.5})
    assert_close(ours(TaskArithmetic(0.5), *models), peer, rtol=2**-6, atol=2**-6)


def test_a_zero_sum_goes_to_plus_there_and_to_the_majority_here():
    models = [{"w": torch.tensor(values)} for values in ([0.0] * 3, [1.0, -2, -3], [-1.0, -2, -3])]
    assert ours(Ties(1.0), *models)["w"].tolist() == [-1, -2, -3]
    assert theirs("ties", *models)["w"].tolist() == [1, -2, -3]


def test_a_tiny_tensor_keeps_one_entry_there_and_none_here():
    models = [{"w": torch.tensor(values)} for values in ([0.0] * 4, [1.0, -2, -3, 4])]
    assert ours(Ties(0.2, scope="tensor"), *models)["w"].tolist() == [0, 0, 0, 0]
    assert theirs("ties", *models, density=0.2)["w"].tolist() == [0, 0, 0, 4]


def test_counters_that_differ_are_refused_there_and_the_pretrained_ones_here():
    models = [{"w": torch.ones(2), "steps": torch.tensor(n)} for n in (0, 5)]
    assert ours(TaskArithmetic(), *models)["steps"] == 0
    with pytest.raises(ValueError, match="steps"):
        theirs("task_arithmetic", *models)
