"""AdaMerging against Task Arithmetic, TIES, finite differences and its own clamp."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.adamerging import AdaMerging, entropies, entropy
from byom.merge.awd import AdaptiveWeightDisentanglement
from byom.merge.base import Problem
from byom.merge.base.descent import JOINED, Blend, blended, encoded, unchanged
from byom.merge.base.probe import Batch
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.probes import TinyProbe, networks
from tests.problems import models, problem, same

LAYER = AdaMerging(steps=5, learning_rate=0.05)
TASK = replace(LAYER, granularity="task")


def close(a, b, **tolerance):
    for name in b.mergeable():
        assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def losses(held, coefficients):
    """The entropy of every example of every task at coefficients ``[L, T]``, through an ordinary graph."""
    state = {}
    for name, row in zip(held.pretrained.mergeable(), coefficients, strict=True):
        group = held.group(name)
        state[name] = group.pretrained + torch.einsum("t,t...->...", row, group.deltas)
    probe = held.probe
    every = {task: probe.take(task, "test", torch.arange(probe.count)).inputs for task in held.tasks}
    return sum(entropy(probe.readout(task)(probe.encode(state, inputs))) for task, inputs in every.items())


def slope(held, start, rows=None):
    """The gradient of the same loss as AdaMerging takes it."""
    blend = Blend(held, "test")
    learnt = blend.start(start, rows)
    coefficients = learnt.clamp(0, 1).expand(len(blend.names), -1)
    thetas = blend.at(coefficients)
    batches = [(task, next(held.probe.batches(task, "test", held.probe.count, 0))) for task in held.tasks]
    for loss in entropies(held.probe, thetas, batches):
        loss.backward()
    blend.backward(coefficients, thetas)
    return learnt.grad


# where it starts


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_without_steps_it_is_task_arithmetic(granularity):
    held = problem(*models())
    start = AdaMerging(steps=0, granularity=granularity, scale=0.3)(held)
    close(start, TaskArithmetic(scale=0.3)(held), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_plus_plus_without_steps_is_ties_with_sums(density):
    held = problem(*models(4))
    start = AdaMerging(steps=0, plus_plus=True, density=density, scale=0.3)(held)
    close(start, Ties(density=density, scale=0.3, combine="sum")(held), rtol=1e-6, atol=1e-7)


def test_elected_vectors_are_entries_of_the_task_vectors_that_share_one_sign():
    held = problem(*models(5))
    vectors = Ties(density=0.5).plan(held).agreeing
    for name in held.pretrained.mergeable():
        group = held.group(name)
        found = vectors(group, 0)
        assert torch.all((found == 0) | (found == group.deltas))
        assert torch.all(found.sign().abs().sum(0) == found.sign().sum(0).abs())


# its gradient


def test_the_gradient_is_that_of_an_ordinary_graph():
    held = networks(3)
    coefficients = torch.full((len(held.pretrained.mergeable()), 3), 0.3, requires_grad=True)
    losses(held, coefficients).backward()
    assert coefficients.grad.abs().max() > 1e-3
    assert_close(slope(held, 0.3), coefficients.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    held = networks(2)
    found = slope(held, 0.4)
    for place in [(0, 0), (2, 1), (5, 0)]:
        step = torch.zeros_like(found)
        step[place] = 1e-2
        rise = losses(held, 0.4 + step) - losses(held, 0.4 - step)
        assert found[place].item() == pytest.approx(rise.item() / 2e-2, rel=1e-2, abs=1e-4)


def test_one_coefficient_a_task_has_the_summed_gradient_of_its_tensors():
    held = networks(3)
    assert_close(slope(held, 0.3, rows=1)[0], slope(held, 0.3).sum(0), rtol=1e-5, atol=1e-7)


def test_one_coefficient_a_task_is_the_same_for_every_tensor():
    found = torch.stack(list(TASK.plan(networks(3)).coefficients.values()))
    assert torch.equal(found, found[:1].expand_as(found)) and not torch.allclose(found[0], torch.tensor(0.3))
    layered = torch.stack(list(LAYER.plan(networks(3)).coefficients.values()))
    assert len(layered.unique(dim=0)) == len(layered)


# its descent


def at(held, method):
    return float(losses(held, torch.stack(list(method.plan(held).coefficients.values()))))


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_entropy_falls_with_the_steps(granularity):
    held = networks(3)
    found = [at(held, AdaMerging(granularity, steps=steps, learning_rate=3e-3)) for steps in (0, 5, 20, 60)]
    assert found == sorted(found, reverse=True) and len(set(found)) == 4


@pytest.mark.parametrize("start", [0.0, 0.3, 1.0])
def test_coefficients_stay_in_the_unit_interval(start):
    for tasks in (1, 3):
        found = AdaMerging(steps=20, learning_rate=0.3, scale=start).plan(networks(tasks)).coefficients
        values = torch.stack(list(found.values()))
        assert values.min() >= 0 and values.max() <= 1 and {0.0, 1.0} & set(values.reshape(-1).tolist())


def test_a_coefficient_outside_the_interval_has_no_gradient():
    held = networks(2)
    blend = Blend(held, "test")
    learnt = torch.tensor([0.3, 1.2]).repeat(len(blend.names), 1).requires_grad_()
    coefficients = learnt.clamp(0, 1)
    thetas = blend.at(coefficients)
    next(iter(entropies(held.probe, thetas, [("task1", next(held.probe.batches("task1", "test", 12, 0)))]))).backward()
    blend.backward(coefficients, thetas)
    assert torch.all(learnt.grad[:, 1] == 0) and torch.all(learnt.grad[:, 0] != 0)


def test_an_idle_task_keeps_its_coefficient():
    held = networks(2)
    idle = Problem(held.pretrained, {**held.finetuned, "idle": held.pretrained})
    idle = replace(idle, probe=TinyProbe(idle.pretrained, idle.finetuned, held.probe.encoder, (4, 6)))
    for row in LAYER.plan(idle).coefficients.values():
        assert row[2].item() == pytest.approx(0.3) and row[:2].tolist() != [pytest.approx(0.3)] * 2


def test_what_is_returned_is_the_blend_of_the_learnt_coefficients():
    held = networks(3)
    merged, plan = LAYER(held), LAYER.plan(held)
    for name in held.pretrained.mergeable():
        assert torch.equal(merged[name], blended(held.group(name), plan.coefficients[name], unchanged))
    blend = Blend(held, "test")
    thetas = blend.at(torch.stack([plan.coefficients[name] for name in blend.names]))
    close(merged, Weights.of(thetas), rtol=1e-6, atol=1e-6)


# what it looks at


class Poisoned(TinyProbe):
    def take(self, task, split, index):
        return super().take(task, split, index)._replace(labels=torch.full((len(index),), -1))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_only_the_inputs_of_its_split_are_looked_at(split):
    held = networks(2)
    method = replace(LAYER, inputs=split)
    merged = method(held)
    assert held.probe.seen == method.needs.inputs == {split} and not method.needs.labels
    assert method.needs.sees_test == (split == "test")
    poisoned = Poisoned(held.pretrained, held.finetuned, held.probe.encoder, (4, 6))
    assert same(merged, method(replace(held, probe=poisoned)))


def test_without_inputs_it_says_how_to_get_them():
    with pytest.raises(OptionError, match="looks at inputs of the tasks"):
        LAYER(replace(networks(), probe=None))


def test_the_seed_orders_the_inputs():
    held, method = networks(2), replace(LAYER, batch_size=4, batches=1)
    assert same(method(held), method(held))
    assert not same(method(held), replace(method, seed=1)(held))


# behind a method that changes the experts first


def test_awd_hands_on_the_inputs_and_what_is_left_of_the_task_vectors():
    held, then = networks(3), AdaMerging(steps=2, learning_rate=0.05)
    wrapped = AdaptiveWeightDisentanglement(then=then)
    assert wrapped.needs == then.needs
    merged = wrapped(held)
    assert held.probe.seen == {"test"} and all(merged[name].isfinite().all() for name in merged)
    assert not same(merged, then(held))
    left = AdaptiveWeightDisentanglement(then=TaskArithmetic())(held)
    start = AdaptiveWeightDisentanglement(then=replace(then, steps=0))(held)
    close(start, left, rtol=1e-5, atol=1e-6)
    close(AdaptiveWeightDisentanglement(then=then, steps=0)(held), then(held), rtol=1e-4, atol=1e-5)


# one pass for several batches


def batch(size, width=4):
    return Batch({"x": torch.randn(size, width)}, torch.zeros(size, dtype=torch.int64), torch.arange(size))


@pytest.mark.parametrize("sizes", [[16] * 16, [5], [JOINED + 1, 3, 3], [40, 40, 24], [1, JOINED]])
def test_joined_batches_have_the_features_they_have_alone(sizes):
    probe = networks().probe
    batches = [batch(size) for size in sizes]
    passes = list(encoded(probe, {}, batches))
    found = {place: features for each in passes for place, features in each}
    assert sorted(found) == list(range(len(sizes)))
    for place, features in found.items():
        assert_close(features, probe.encode({}, batches[place].inputs), rtol=1e-5, atol=1e-6)
    examples = [sum(len(features) for _, features in each) for each in passes]
    assert all(size <= JOINED or len(each) == 1 for size, each in zip(examples, passes, strict=True))
    assert len(passes) == 1 or all(a + b > JOINED for a, b in itertools.pairwise(examples))


def test_batches_of_other_shapes_are_not_joined():
    probe = TinyProbe(networks().pretrained, {}, lambda _, x: x)
    batches = [batch(3), batch(2), batch(3, 7), batch(1)]
    assert [[place for place, _ in each] for each in encoded(probe, {}, batches)] == [[0, 1], [2], [3]]


# entropy and options


def test_entropy_is_that_of_its_definition():
    assert entropy(torch.zeros(2, 5)).item() == pytest.approx(torch.tensor(5.0).log().item())
    assert entropy(torch.tensor([[1e4, 0.0, -1e4]])).item() == 0
    shares = torch.tensor([[0.5, 0.25, 0.25]])
    assert entropy(shares.log()).item() == pytest.approx(1.5 * torch.tensor(2.0).log().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "tensor"}, r"merge\.granularity=tensor.*layer or task"),
        ({"inputs": "train"}, r"merge\.inputs=train.*test.*validation"),
        ({"scale": 1.5}, r"merge\.scale=1\.5"),
        ({"density": 20}, r"merge\.density=20"),
        ({"steps": -1}, r"merge\.steps=-1"),
        ({"learning_rate": 0.0}, r"merge\.learning_rate=0"),
        ({"learning_rate": float("nan")}, r"merge\.learning_rate=nan"),
        ({"batch_size": 0}, r"merge\.batch_size=0"),
        ({"batches": 0}, r"merge\.batches=0"),
    ],
)
def test_what_is_out_of_range_is_refused(change, message):
    with pytest.raises(OptionError, match=message):
        replace(LAYER, **change)
