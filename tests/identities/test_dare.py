"""DARE: nothing dropped, unbiased masks, keyed draws, the magnitude variant, and what it wraps."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Group, Problem, TensorwiseMethod
from byom.merge.base.needs import Needs
from byom.merge.dare import Dare, flips
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.problems import configured, grid, models, problem, same


def single(n=20_000, seed=0):
    delta = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return delta, Problem(Weights.of({"w": torch.zeros(n, dtype=torch.float64)}), {"task": Weights.of({"w": delta})})


@pytest.mark.parametrize("then", [TaskArithmetic(), Ties(0.5)], ids=["task_arithmetic", "ties"])
@pytest.mark.parametrize("select", ["random", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dropping_nothing_is_the_wrapped_method(then, select, dtype):
    given = problem(*models(3, dtype))
    assert same(Dare(then, 0.0, select=select)(given), then(given))


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_what_survives_is_the_change_divided_by_the_chance(drop):
    delta, given = single()
    merged = Dare(TaskArithmetic(1.0), drop)(given)["w"]
    left = merged != 0
    assert_close(merged[left], delta[left] / (1 - drop))
    chance = (1 - drop) * len(delta)
    assert abs(int(left.sum()) - chance) < 5 * (chance * drop) ** 0.5
    unscaled = Dare(TaskArithmetic(1.0), drop, rescale=False)(given)["w"]
    assert_close(unscaled, delta * left)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_the_sum_is_unbiased(drop):
    delta, given = single()
    merged = Dare(TaskArithmetic(1.0), drop)(given)["w"]
    deviation = float((delta**2).sum() * drop / (1 - drop)) ** 0.5
    assert abs(float(merged.sum() - delta.sum())) < 5 * deviation


def test_the_mean_over_seeds_approaches_the_change():
    delta, given = single(50)
    mean = torch.stack([Dare(TaskArithmetic(1.0), 0.5, seed=seed)(given)["w"] for seed in range(400)]).mean(0)
    assert bool(((mean - delta).abs() < 5 * delta.abs() / 400**0.5).all())


def test_seeds_tasks_and_parameters_draw_apart():
    ones = {"a": torch.ones(200), "b": torch.ones(200)}
    base = Weights.of({name: torch.zeros(200) for name in ones})

    def merged(task, seed=0):
        return Dare(TaskArithmetic(1.0), seed=seed)(Problem(base, {task: Weights.of(ones)}))

    assert not torch.equal(merged("x")["a"], merged("x")["b"])
    assert not torch.equal(merged("x")["a"], merged("y")["a"])
    assert not torch.equal(merged("x")["a"], merged("x", seed=1)["a"])
    assert torch.equal(merged("x")["a"], merged("x")["a"])


@pytest.mark.parametrize("select", ["random", "magnitude"])
def test_the_order_of_tasks_does_not_matter(select):
    base, finetuned = models(4, torch.float64, values=grid)
    forth, back = (Dare(select=select)(problem(base, f)) for f in (finetuned, dict(reversed(finetuned.items()))))
    for name in forth.mergeable():
        assert_close(forth[name], back[name], rtol=1e-12, atol=1e-12)


def test_a_model_with_more_parameters_keeps_the_masks_of_the_others():
    base, finetuned = models(2)
    whole = Dare()(problem(base, finetuned))
    part = {"layer.weight", "layer.bias"}
    fewer = [{n: v for n, v in state.items() if n in part} for state in (base, *finetuned.values())]
    alone = Dare()(problem(fewer[0], dict(zip(finetuned, fewer[1:], strict=True))))
    assert all(torch.equal(alone[name], whole[name]) for name in part)


def test_golden_magnitudes():
    delta = torch.tensor([5.0, -4, 3, -2, 1, 2])
    given = Problem(Weights.of({"w": torch.zeros(6)}), {"t": Weights.of({"w": delta})})
    assert Dare(TaskArithmetic(1.0), 0.5, select="magnitude")(given)["w"].tolist() == [10, -8, 6, 0, 0, 0]
    third = Dare(TaskArithmetic(1.0), 1 / 3, rescale=False, select="magnitude")
    assert third(given)["w"].tolist() == [5, -4, 3, -2, 0, 0]


def test_dropping_the_smallest_then_ties_is_ties_of_that_density():
    given = problem(*models(3, torch.float64, values=grid))
    thinned = Dare(Ties(1.0, scope="tensor"), 0.5, rescale=False, select="magnitude")(given)
    trimmed = Ties(0.5, scope="tensor")(given)
    for name in trimmed.mergeable():
        assert_close(thinned[name], trimmed[name], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_a_device_has_the_masks_of_the_cpu():
    delta = torch.ones(1000)
    assert torch.equal(flips(delta.cuda(), 0.5, 3).cpu(), flips(delta, 0.5, 3))


def test_needs_and_fallbacks_are_those_of_the_wrapped_method():
    class Needy(TensorwiseMethod):
        title = "needy"
        needs = Needs(statistics=frozenset({"fisher"}))  # pyright: ignore

        def merge(self, group: Group):
            raise AssertionError

        def fallbacks(self, problem):
            return ["one"]

    base, finetuned = models()
    given = Problem(Weights.of(base), {t: Weights.of(state) for t, state in finetuned.items()})
    assert Dare(Needy()).needs == Needy().needs
    assert Dare(Needy()).fallbacks(given) == ["one"]
    with pytest.raises(OptionError, match=r"Dare needs the statistics \['fisher'\]"):
        Dare(Needy())(given)


def test_statistics_and_experts_stay():
    seen = []

    class Watch(TaskArithmetic):
        def __call__(self, problem):
            seen.append(problem)
            return super().__call__(problem)

    base, finetuned = models()
    statistics = {"fisher": {t: Weights.of(state) for t, state in finetuned.items()}}
    given = Problem(Weights.of(base), {t: Weights.of(s) for t, s in finetuned.items()}, statistics)
    Dare(Watch())(given)
    assert seen[0].statistics is statistics and seen[0].tasks == given.tasks
    assert all(seen[0].finetuned[t].dtype("one") == torch.float32 for t in finetuned)


@pytest.mark.parametrize("nested", ["ties", "magmax"])
def test_the_wrapped_method_is_an_option(nested):
    built = configured(["merge=dare", f"merge@merge.then={nested}", "merge.then.scale=1"])
    assert type(built.then).__name__.lower() == nested and built.then.scale == 1


@pytest.mark.parametrize("drop", [1, 1.5, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(drop):
    with pytest.raises(OptionError, match=rf"merge\.drop={drop} is not a fraction in \[0, 1\)"):
        Dare(drop=drop)


@pytest.mark.parametrize("nested", ["mtl", "mixture"])
def test_a_method_that_merges_something_else_is_not_wrapped(nested):
    with pytest.raises(OptionError, match="does not merge the experts alone"):
        configured(["merge=dare", f"merge@merge.then={nested}"])
