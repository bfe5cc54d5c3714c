"""WUDI: its loss and gradient, both solvers against independent ones, and the limits that need neither."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.wudi import Wudi, descend, gram, interference
from byom.weights import Weights

SHAPES = [(6, 4), (4, 6), (8, 8)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(method, deltas, name="w", base=0.0):
    """Return the merged value of one tensor, from task vectors ``[T, ...]`` on a constant pre-trained model."""
    experts = {str(t): Weights.of({name: delta + base}) for t, delta in enumerate(deltas)}
    return method(Problem(Weights.of({name: torch.full_like(deltas[0], base)}), experts))[name]


def literal(change, deltas):
    return sum(torch.linalg.norm((change - d) @ d.T) ** 2 / torch.linalg.norm(d) ** 2 for d in deltas)


def orthogonal_rows():
    """Two task vectors whose rows span different coordinates."""
    deltas = torch.zeros(2, 5, 6, dtype=torch.float64)
    deltas[0, :, :2], deltas[1, :, 2:5] = random(5, 2), random(5, 3, seed=1)
    return deltas


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss(shape):
    deltas, change = random(3, *shape), random(*shape, seed=1)
    assert_close(interference(change, deltas), literal(change, deltas))


def test_loss_golden():
    deltas = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert_close(interference(torch.tensor([[1.0, 1.0]]), deltas), torch.tensor((18 / 5) ** 2 + 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_by_the_summed_grams(shape):
    deltas, change = random(3, *shape), random(*shape, seed=1).requires_grad_()
    interference(change, deltas).backward()
    by_grams = sum(2 * (change - delta) @ gram(delta) for delta in deltas)
    assert_close(change.grad, by_grams.detach())
    direction, step = random(*shape, seed=2), 1e-6
    ends = [interference(change.detach() + sign * step * direction, deltas) for sign in (1, -1)]
    assert_close((ends[0] - ends[1]) / (2 * step), (change.grad * direction).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 50])
def test_descending_is_adam_on_the_loss(shape, steps):
    deltas = 1e-2 * random(3, *shape)
    change = deltas.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([change], lr=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        literal(change, deltas).backward()
        optimiser.step()
    assert_close(descend(deltas, steps, 1e-4), change.detach(), rtol=1e-6, atol=1e-9)
    assert_close(merge(Wudi(steps=steps, learning_rate=1e-4), deltas), change.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_closed_form_is_the_pseudo_inverse_and_has_no_gradient(shape):
    deltas = random(3, *shape)
    found = merge(Wudi("closed_form", ridge=1e-12), deltas)
    weights = [delta.T @ delta / delta.square().sum() for delta in deltas]
    by_inverse = sum(d @ w for d, w in zip(deltas, weights, strict=True)) @ torch.linalg.pinv(sum(weights))
    assert_close(found, by_inverse, rtol=1e-6, atol=1e-6)
    assert sum((found - d) @ w for d, w in zip(deltas, weights, strict=True)).abs().max() < 1e-8


def test_closed_form_golden():
    """Inputs 1 and 2 weigh 0.36 + 0 and 0.64 + 1; their product 0.48 couples them."""
    deltas = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[0.0, 2.0], [0.0, 0.0]]])
    expected = torch.tensor([[-8 / 3, 2.0], [25 / 3, 0.0]])
    assert_close(merge(Wudi("closed_form", ridge=1e-12), deltas), expected)


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_task_is_that_task(solver, shape, dtype):
    delta = random(1, *shape).to(dtype)
    assert torch.equal(merge(Wudi(solver, learning_rate=0.1), delta), delta[0])


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
def test_tasks_of_orthogonal_rows_add_up(solver):
    deltas = orthogonal_rows()
    assert interference(deltas.sum(0), deltas) < 1e-20
    assert_close(merge(Wudi(solver), deltas), deltas.sum(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
def test_an_idle_task_changes_nothing(solver):
    deltas = random(2, 6, 4)
    idle = torch.cat([deltas[:1], torch.zeros(1, 6, 4), deltas[1:]])
    assert torch.equal(merge(Wudi(solver), idle), merge(Wudi(solver), deltas))


@pytest.mark.parametrize("tasks", [2, 5])
def test_small_steps_never_raise_the_loss_and_end_above_the_minimum(tasks):
    deltas = 1e-2 * random(tasks, 12, 8)
    losses = [float(interference(descend(deltas, steps, 1e-5), deltas)) for steps in (1, 10, 100, 300)]
    assert float(interference(deltas.sum(0), deltas)) > losses[0]
    assert losses == sorted(losses, reverse=True)
    assert float(interference(merge(Wudi("closed_form", ridge=1e-12), deltas), deltas)) < losses[-1]


@pytest.mark.parametrize("factor", [0.25, -4.0])
def test_only_the_closed_form_scales_with_the_task_vectors(factor):
    deltas = random(3, 6, 4)
    closed, adam = Wudi("closed_form"), Wudi()
    assert_close(merge(closed, factor * deltas), factor * merge(closed, deltas))
    assert (merge(adam, factor * deltas) - factor * merge(adam, deltas)).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(), (3,), (1, 4), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_stays_or_takes_the_mean(shape):
    deltas = random(3, *shape)
    assert torch.equal(merge(Wudi(), deltas, base=2.0), torch.full(shape, 2.0, dtype=torch.float64))
    assert_close(merge(Wudi(rest="mean"), deltas, base=2.0), 2 + deltas.mean(0))


@pytest.mark.parametrize(
    "name", ["token_embedding.weight", "visual.positional_embedding", "text_projection", "visual.proj"]
)
def test_matrices_that_are_no_linear_layers_are_left_out(name):
    deltas = random(2, 6, 4)
    assert not merge(Wudi(), deltas, name).any()
    assert merge(Wudi(exclude=()), deltas, name).any()
    assert merge(Wudi(), deltas, "visual.attn.out_proj.weight").any()


@pytest.mark.parametrize(
    "given",
    [{"solver": "sgd"}, {"rest": "none"}, {"steps": 0}, {"steps": 1.5}, {"learning_rate": 0.0}, {"ridge": -1.0},
     {"ridge": float("nan")}, {"exclude": "embed"}],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused(given):
    with pytest.raises(OptionError, match=f"merge.{next(iter(given))}="):
        Wudi(**given)
