"""PCB-Merging: golden vectors, the definition in one piece, identical and opposite tasks, degenerate competitions."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.pcb import ParameterCompetitionBalancing, Range, minmax, score
from byom.weights import Weights
from tests.problems import grid, models, problem, scaled

VECTORS = torch.tensor([[3, -1, 0.5, 0.125, -4], [1, 2, -0.5, 0.25, -2], [-6, 1, 0.5, -0.375, 1]])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(deltas, cut=None, **fields):
    """Merge task vectors ``[T, d]`` on a pre-trained model of zeros, stored as one tensor or as two."""
    cut = cut or deltas.shape[1] // 2
    experts = {str(t): Weights.of({"a": delta[:cut], "b": delta[cut:]}) for t, delta in enumerate(deltas)}
    base = Weights.of({"a": torch.zeros_like(deltas[0, :cut]), "b": torch.zeros_like(deltas[0, cut:])})
    merged = ParameterCompetitionBalancing(**fields)(Problem(base, experts))
    return torch.cat([merged["a"], merged["b"]])


def by_definition(deltas, density, clip):
    d = deltas.shape[1]
    clipped, count = int(clip * d + 1e-9), int(density * d + 1e-9)
    ranked = deltas.abs().sort(dim=1).values
    sizes = deltas.abs().clamp(ranked[:, clipped, None], ranked[:, d - 1 - clipped, None])
    scores = torch.exp(len(deltas) * rescaled(sizes) ** 2) * torch.tanh(deltas * deltas.sum(0))
    shares = rescaled(scores.maximum(scores.sort(dim=1).values[:, d - count, None]))
    return (deltas.sign() * sizes * shares).sum(0) / shares.sum(0).clamp(min=1e-12)


def rescaled(values):
    low, high = values.min(1, keepdim=True).values, values.max(1, keepdim=True).values
    return (values - low) / (high - low)


def test_golden_vectors():
    assert merge(VECTORS, density=0.4, scale=1.0, clip=0.0).tolist() == [-6, 0, 0, 0, -3]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("clip", [0.0, 0.01, 0.3])
def test_the_definition(tasks, density, clip):
    deltas = random(tasks, 300, seed=tasks) / 10
    merged = merge(deltas, density=density, scale=1.0, clip=clip)
    assert_close(merged, by_definition(deltas, density, clip), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_a_task_that_opposes_all_others_is_ranked_as_well(density):
    common = random(200)
    deltas = torch.stack([-common, common * 1.5, common * 2])
    assert (deltas[0] * deltas.sum(0) < 0).all()
    merged = merge(deltas, density=density, scale=1.0, clip=0.0)
    assert_close(merged, by_definition(deltas, density, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_identical_tasks_are_that_task_where_it_takes_part(tasks):
    delta = random(500)
    merged = merge(delta.expand(tasks, -1), density=0.1, scale=1.0, clip=0.0)
    assert_close(merged[merged != 0], delta[merged != 0])
    assert int((merged != 0).sum()) == 49  # the 50th largest score is where the shares begin
    assert delta[merged != 0].abs().min() > delta[merged == 0].abs().max()


@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0])
def test_the_scale_multiplies(factor):
    deltas = random(3, 100)
    assert_close(merge(deltas, scale=factor), factor * merge(deltas, scale=1.0))


def test_another_sign_of_all_tasks_is_another_sign_of_the_result():
    base, finetuned = models(4, torch.float64, values=grid)
    turned = scaled(base, finetuned, -1)
    forth, back = (ParameterCompetitionBalancing(0.5)(problem(base, experts)) for experts in (finetuned, turned))
    for name in forth.mergeable():
        assert_close(forth[name] - base[name], base[name] - back[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 50, 99])
def test_parameters_compete_across_tensors(cut):
    deltas = random(3, 100)
    assert torch.equal(merge(deltas, cut), merge(deltas, 30))


def test_scores_stay_below_1_whatever_the_number_of_tasks():
    delta = random(100)
    found = score(delta, delta * 500, Range(0.0, float(delta.abs().max())), 500)
    assert found.isfinite().all() and found.abs().max() <= 1
    many = merge(random(90, 4).float(), density=0.5)
    assert many.isfinite().all() and many.any()


def test_equal_bounds_map_to_zero():
    assert minmax(torch.tensor([1.0, 2, 3]), Range(2.0, 2.0)).tolist() == [0, 0, 0]
    assert minmax(torch.tensor([1.0, 2, 3, 9]), Range(1.0, 3.0)).tolist() == [0, 0.5, 1, 1]


def test_a_task_whose_scores_are_all_equal_has_no_share():
    constant, other = torch.ones(40, dtype=torch.float64), random(40)
    assert not merge(torch.stack([constant, constant])).any()
    idle = merge(torch.stack([torch.zeros_like(other), other]), density=0.5, scale=1.0)
    assert idle.any()
    assert_close(idle[idle != 0], other[idle != 0])


def test_nobody_takes_part_in_a_model_too_small():
    assert not merge(random(3, 9), density=0.1).any()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"density": 1.5}, r"merge\.density=1\.5 is not a fraction"),
        ({"clip": 0.5}, r"merge\.clip=0\.5 is not a fraction in \[0, 0\.5\)"),
        ({"clip": -0.1}, r"merge\.clip=-0\.1 is not a fraction in \[0, 0\.5\)"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(values, said):
    with pytest.raises(OptionError, match=said):
        ParameterCompetitionBalancing(**values)
