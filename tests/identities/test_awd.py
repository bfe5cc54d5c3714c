"""AWD: descent in the span is descent in the whole space; orthogonal, equal, idle tasks; a common part; wrapping."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.functional.deltas import inner_products
from byom.merge.awd import AdaptiveWeightDisentanglement, disentangle, gradient, loss, redundant
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.problems import IN_AND_OUT_OF_PLACE, configured, counted, grid, models, problem, same

SCOPES = ["global", "tensor"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(tasks=4, d=60):
    """Return orthogonal vectors of different length, and the same plus one common vector."""
    own = torch.zeros(tasks, d, dtype=torch.float64)
    own[range(tasks), range(tasks)] = 1 + torch.arange(tasks, dtype=torch.float64) / tasks
    return own, own + torch.linspace(0.05, 0.25, d, dtype=torch.float64)


def mean_cosine(deltas):
    units = deltas / deltas.norm(dim=1, keepdim=True)
    cosines = (units @ units.T).abs().fill_diagonal_(0)
    return float(cosines.sum() / (len(deltas) * (len(deltas) - 1)))


def single(deltas):
    return Problem(
        Weights.of({"w": torch.zeros_like(deltas[0])}), {str(t): Weights.of({"w": d}) for t, d in enumerate(deltas)}
    )


@pytest.mark.parametrize("tasks", [2, 3, 6])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_gradient_is_that_of_automatic_differentiation(tasks, penalty):
    vectors = random(tasks, 5, seed=tasks)
    point = (random(5, seed=9) / 3).requires_grad_()
    left = vectors - point
    units = left / left.norm(dim=1, keepdim=True)
    cosines = (units @ units.T).abs()
    value = (cosines.sum() - cosines.trace()) / (tasks * (tasks - 1)) + penalty * point.norm()
    (expected,) = torch.autograd.grad(value, point)
    assert loss(vectors, point.detach(), penalty) == pytest.approx(float(value.detach()), rel=1e-12)
    assert_close(gradient(vectors, point.detach(), penalty), expected)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("steps", [1, 20, 300])
def test_descent_in_the_span_is_descent_in_the_whole_space(tasks, steps):
    deltas = random(tasks, 40, seed=tasks) + random(40)
    size = deltas.square().sum(1).mean().sqrt()
    whole = disentangle(deltas / size, 0.1, 0.01, steps) * size
    assert_close(redundant(inner_products(deltas), 0.1, 0.01, steps) @ deltas, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("then", [TaskArithmetic(), Ties(0.5)], ids=["task_arithmetic", "ties"])
def test_orthogonal_tasks_are_merged_as_they_are(scope, then):
    deltas = planted()[0]
    given = single(deltas)
    assert same(AdaptiveWeightDisentanglement(then, scope=scope)(given), then(given))


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_tasks_are_merged_as_they_are(scope):
    given = single(random(40).expand(3, -1))
    assert same(AdaptiveWeightDisentanglement(scope=scope)(given), TaskArithmetic()(given))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("field", [{"steps": 0}, {"penalty": 1e6}], ids=["no steps", "large penalty"])
def test_nothing_subtracted_is_the_wrapped_method(field, scope):
    given = problem(*models(3))
    assert same(AdaptiveWeightDisentanglement(scope=scope, **field)(given), TaskArithmetic()(given))


def test_a_planted_common_part_is_found():
    own, deltas = planted()
    assert mean_cosine(deltas) > 0.4 > 0.01 > mean_cosine(own)
    found = redundant(inner_products(deltas), 0.0, 0.01, 1000) @ deltas
    assert mean_cosine(deltas - found) < 0.02


@pytest.mark.parametrize("penalty", [0.01, 0.1, 2.0])
def test_the_loss_never_rises(penalty):
    vectors = random(4, 10) + random(10, seed=1)
    reached = [loss(vectors, disentangle(vectors, penalty, 0.05, steps), penalty) for steps in range(0, 60, 5)]
    assert reached == sorted(reached, reverse=True)
    assert reached[0] == pytest.approx(mean_cosine(vectors))
    assert penalty > 1 or reached[-1] < reached[0] - 0.01


@pytest.mark.parametrize("factor", [1e-4, 7.0, -1.0])
def test_coefficients_do_not_depend_on_the_size_of_the_task_vectors(factor):
    deltas = random(4, 30) + random(30, seed=1)
    once, stretched = (redundant(inner_products(d), 0.1, 0.01, 300) for d in (deltas, factor * deltas))
    assert once.any()
    assert_close(stretched, once)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_merged_change_is_that_of_the_disentangled_tasks(scope):
    deltas = random(3, 30) + random(30, seed=1)
    coefficients = redundant(inner_products(deltas), 0.1, 0.01, 300)
    expected = 0.3 * (deltas - coefficients @ deltas).sum(0)
    assert_close(AdaptiveWeightDisentanglement(scope=scope)(single(deltas))["w"], expected)


def test_a_scope_of_tensors_disentangles_each_alone():
    first, second = random(3, 30) + random(30, seed=1), random(3, 20, seed=2)
    base = Weights.of({"a": torch.zeros(30, dtype=torch.float64), "b": torch.zeros(20, dtype=torch.float64)})
    experts = {str(t): Weights.of({"a": a, "b": b}) for t, (a, b) in enumerate(zip(first, second, strict=True))}
    merged = AdaptiveWeightDisentanglement(scope="tensor")(Problem(base, experts))
    assert torch.equal(merged["a"], AdaptiveWeightDisentanglement()(single(first))["w"])
    assert torch.equal(merged["b"], AdaptiveWeightDisentanglement()(single(second))["w"])
    together = AdaptiveWeightDisentanglement()(Problem(base, experts))
    assert not torch.equal(together["b"], merged["b"])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_idle_experts_give_no_nan(scope, dtype):
    method = AdaptiveWeightDisentanglement(scope=scope)
    base, finetuned = models(2, dtype)
    some = method(problem(base, finetuned | {"idle": base}))
    assert all(some[name].isfinite().all() for name in some)
    assert same(method(problem(base, {"x": base, "y": base})), base)
    empty = {"count": torch.tensor(3), "nothing": torch.zeros(0, 2)}
    assert same(method(problem(empty, {"x": empty, "y": empty})), empty)


@pytest.mark.parametrize("scope", SCOPES)
def test_reading_after_the_inner_products_is_lazy(scope):
    base, finetuned = models()
    watched = {name: counted(Weights.of(state)) for name, state in ({"base": base} | finetuned).items()}
    merged = AdaptiveWeightDisentanglement(scope=scope)(
        Problem(watched["base"][0], {t: watched[t][0] for t in finetuned})
    )
    reads = [read for _, read in watched.values()]
    assert any(reads) == (scope == "global")
    for read in reads:
        read.clear()
    merged["layer.weight"]
    assert {name for read in reads for name in read} == {"layer.weight"}


@pytest.mark.parametrize("culprit", ["pre-trained", "task2"])
def test_what_is_not_finite_is_refused_before_anything_is_found(culprit):
    base, finetuned = models()
    (base if culprit == "pre-trained" else finetuned[culprit])["one"][0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{culprit}: tensor 'one' has 1 of 1"):
        AdaptiveWeightDisentanglement()(problem(base, finetuned))


@pytest.mark.parametrize("scope", SCOPES)
def test_one_task_is_refused(scope):
    with pytest.raises(OptionError, match="there is one task"):
        AdaptiveWeightDisentanglement(scope=scope)(problem(*models(1, values=grid)))


def test_the_wrapped_method_is_an_option():
    built = configured(["merge=awd", "merge@merge.then=ties", "merge.then.density=0.1"])
    assert built == AdaptiveWeightDisentanglement(Ties(0.1))
    with pytest.raises(OptionError, match="does not merge the experts alone"):
        configured(["merge=awd", "merge@merge.then=mtl"])


@pytest.mark.parametrize(
    "values",
    [{"penalty": -0.1}, {"penalty": float("nan")}, {"rate": 0}, {"steps": -1}, {"steps": 1.5}, {"scope": "layer"}],
    ids=str,
)
def test_what_is_out_of_range_is_refused(values):
    with pytest.raises(OptionError, match=rf"merge\.{next(iter(values))}="):
        AdaptiveWeightDisentanglement(**values)
