"""Merging beside mergekit's in-memory API.

They agree with weight 1 for every model and ``lambda`` as the scale:

- ``task_arithmetic`` (normalize off) is Task Arithmetic; ``linear`` (normalize on) is the average;
- ``ties`` trims each tensor on its own (``scope="tensor"``); normalize on is ``combine="mean"``, because the sum of
  the agreeing weights is then their number, and normalize off is ``combine="sum"``.

They differ

- in coordinates whose weighted sum is exactly 0: mergekit elects +, byom the majority of the model;
- in k: ``max(1, int(density * n))`` against ``floor(density * n + 1e-9)``: a bias of 4 at density 0.2 keeps one entry
  there and none here;
- in precision: mergekit subtracts in the checkpoints' dtype, byom in fp32, so half precision agrees only roughly;
- in buffers: mergekit refuses counters that differ between models, byom carries the pre-trained model's.
"""

import pytest
import torch
from torch.testing import assert_close

from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights

mergekit = pytest.importorskip("mergekit.merge_methods")
pytestmark = pytest.mark.peer

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
