"""Merging beside PEFT's `merge_utils`.

They agree where the definitions do: PEFT trims each tensor on its own (``scope="tensor"``), keeps exactly k,
elects the sign of the *unweighted* sum, and divides by the number of agreeing tasks. They differ

- in coordinates whose sum is exactly 0: PEFT elects +, byom the majority of the model, so a zero sum of opposite
  values is never drawn here but in the test that states it;
- in k: ``int(density * n)`` against ``floor(density * n + 1e-9)``, so 0.29 of 100 is 28 there and 29 here;
- in the weights of TIES: PEFT multiplies after the election and divides by the number of tasks that agree, byom before
  it, and by the magnitudes of their weights;
- in the flips of DARE: PEFT draws in the order of calls, byom by seed, task and parameter, so they are compared with
  the same flips, and by how often they drop.
"""

import pytest
import torch
from torch.testing import assert_close

from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.merge.dare import Dare, flips
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.problems import FLOATS

merge_utils = pytest.importorskip("peft.utils.merge_utils")
pytestmark = pytest.mark.peer

COMPARES = {
    "ties": "equal, trimmed per tensor",
    "task_arithmetic": "equal",
    "dare": "equal with the same flips, over task arithmetic and TIES",
}
SHAPES = {name: shape for name, shape in FLOATS.items() if torch.Size(shape).numel() > 1} | {"wide": (40, 25)}


def vectors(tasks):
    generator = torch.Generator().manual_seed(tasks)
    return [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(tasks)]


def merged(method, taus):
    zero = Weights.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    return method(Problem(zero, {str(t): Weights.of(tau) for t, tau in enumerate(taus)}))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_ties_of_each_tensor(tasks, density, scale):
    taus = vectors(tasks)
    ours = merged(Ties(density, scale, scope="tensor"), taus)
    for name in SHAPES:
        theirs = merge_utils.ties([tau[name] for tau in taus], torch.full((tasks,), scale), density)
        assert_close(ours[name], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_task_arithmetic(tasks, scale):
    taus = vectors(tasks)
    ours = merged(TaskArithmetic(scale), taus)
    for name in SHAPES:
        theirs = merge_utils.task_arithmetic([tau[name] for tau in taus], torch.full((tasks,), scale))
        assert_close(ours[name], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_pruning_before_adding(density):
    taus = vectors(1)
    ours = merged(Ties(density, scope="tensor", combine="sum"), taus)
    for name in SHAPES:
        theirs = merge_utils.magnitude_prune([taus[0][name]], torch.ones(1), density)
        assert torch.equal(ours[name], theirs)


def test_algebra_of_unequal_weights():
    taus, weights = vectors(3), [0.7, -0.2, 1.5]
    ours = sum(weight * Weights.of(tau) for weight, tau in zip(weights, taus, strict=True))
    method = merged(TaskArithmetic(1.0, tuple(weights)), taus)
    for name in SHAPES:
        theirs = merge_utils.task_arithmetic([tau[name] for tau in taus], torch.tensor(weights))
        assert_close(ours[name], theirs, rtol=1e-6, atol=1e-6)
        assert_close(method[name], theirs, rtol=1e-6, atol=1e-6)


def test_a_zero_sum_goes_to_plus_there_and_to_the_majority_here():
    taus = [{"w": torch.tensor([1.0, -2.0, -3.0])}, {"w": torch.tensor([-1.0, -2.0, -3.0])}]
    zero = Weights.of({"w": torch.zeros(3)})
    ours = Ties(1.0)(Problem(zero, {str(t): Weights.of(tau) for t, tau in enumerate(taus)}))
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = merge_utils.ties([tau["w"] for tau in taus], torch.ones(2), 1.0)
    assert ours["w"].tolist() == [-1, -2, -3] and theirs.tolist() == [1, -2, -3]


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare_with_the_same_flips(density, combine, monkeypatch):
    taus = vectors(3)
    then = TaskArithmetic(0.3) if combine == "linear" else Ties(1.0, 0.3, scope="tensor")
    ours = merged(Dare(then, 1 - density, seed=7), taus)
    for name in SHAPES:
        drawn = iter([flips(tau[name], 1 - density, keyed(7, str(t), name)).float() for t, tau in enumerate(taus)])
        monkeypatch.setattr(torch, "bernoulli", lambda _, drawn=drawn: next(drawn))
        peer = {"linear": merge_utils.dare_linear, "ties": merge_utils.dare_ties}[combine]
        theirs = peer([tau[name] for tau in taus], torch.full((3,), 0.3), density)
        assert_close(ours[name], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_dare_flips_as_often(density):
    torch.manual_seed(0)
    delta = torch.ones(100_000)
    theirs = merge_utils.random_pruning(delta, density, rescale=True)
    ours = delta * flips(delta, 1 - density, 0) / density
    deviation = (density * (1 - density) / len(delta)) ** 0.5
    assert abs(float((ours != 0).float().mean() - (theirs != 0).float().mean())) < 7 * deviation
    assert_close(ours.max(), theirs.max())


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_dropping_the_smallest_without_rescaling_is_magnitude_prune(density):
    taus = vectors(2)
    thinned = Dare(TaskArithmetic(0.3), 1 - density, rescale=False, select="magnitude")
    ours = merged(thinned, taus)
    for name in SHAPES:
        theirs = merge_utils.magnitude_prune([tau[name] for tau in taus], torch.full((2,), 0.3), density)
        assert_close(ours[name], theirs, rtol=1e-6, atol=1e-6)
