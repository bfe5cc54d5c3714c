"""Identities of TIES with task weights; those without are in tests/unit/test_identities.py."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.dare import Dare
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.storage.signature import signature
from byom.weights import Weights
from tests.problems import FLOATS, grid, models, problem, same

COMBINES = ["mean", "sum"]


def merged(method, *taus):
    base = Weights.of({"w": torch.zeros(len(taus[0]))})
    return method(Problem(base, {f"t{t}": Weights.of({"w": torch.tensor(tau)}) for t, tau in enumerate(taus)}))["w"]


def close(one, other, factor=1.0):
    for name in FLOATS:
        assert_close(one[name], factor * other[name], rtol=1e-12, atol=1e-12)


def deltas(method, base, finetuned):
    result = method(problem(base, finetuned))
    return {name: result[name] - base[name] for name in FLOATS}


def test_golden_weights_decide_the_election_and_the_mean():
    # weighted: [2, 0, -6], [-3, 4, -2]; elected: -, +, -
    weights = (2.0, 4.0)
    taus = [1.0, 0.0, -3.0], [-0.75, 1.0, -0.5]
    assert merged(Ties(1.0, weights=weights), *taus).tolist() == [-0.75, 1.0, pytest.approx(-8 / 6)]
    assert merged(Ties(1.0, combine="sum", weights=weights), *taus).tolist() == [-3.0, 4.0, -8.0]


def test_golden_negative_weights():
    # weighted: [1, 2, 2], [-3, 2, -1]; elected: -, +, +
    taus = [1.0, 2.0, 2.0], [3.0, -2.0, 1.0]
    assert merged(Ties(1.0, weights=(1.0, -1.0)), *taus).tolist() == [-3.0, 2.0, 2.0]
    assert merged(Ties(1.0, combine="sum", weights=(1.0, -1.0)), *taus).tolist() == [-3.0, 4.0, 2.0]


def test_golden_trimming_comes_before_weights():
    assert merged(Ties(1 / 3, weights=(1.0, 100.0)), [1.0, 3.0, 2.0], [0.1, 0.2, -0.3]).tolist() == [
        0.0,
        3.0,
        pytest.approx(-0.3),
    ]


def test_golden_densities_of_each_task():
    taus = [4.0, 3.0, -2.0], [-1.0, 2.0, -3.0]
    assert merged(Ties(1 / 3, densities=(2 / 3, 1 / 3)), *taus).tolist() == [4.0, 3.0, -3.0]
    assert merged(Ties(densities=(1.0, 0.0)), *taus).tolist() == taus[0]
    for scope in ("global", "tensor", "row"):
        assert torch.equal(
            merged(Ties(0.9, scope=scope, densities=(0.4, 0.4)), *taus), merged(Ties(0.4, scope=scope), *taus)
        )


def test_densities_are_one_fraction_per_task():
    with pytest.raises(OptionError, match=r"merge.densities has 3 values for 2 tasks \(t0, t1\)"):
        merged(Ties(densities=(0.1, 0.2, 0.3)), [1.0], [2.0])
    for odd in ((0.1, 1.5), "0.1", (0.1, "a"), 0.3):
        with pytest.raises(OptionError, match=r"merge\.densities="):
            Ties(densities=odd)  # pyright: ignore[reportArgumentType]
    assert signature(Ties()) == signature(Ties(densities=[]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_1_are_no_weights(combine, dtype):
    given = problem(*models(5, dtype))
    assert same(Ties(0.5, combine=combine, weights=(1,) * 5)(given), Ties(0.5, combine=combine)(given))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("left", [0, 2])
def test_a_task_of_weight_0_is_left_out(combine, left):
    base, finetuned = models(3, torch.float64, values=grid)
    rest = {task: state for t, (task, state) in enumerate(finetuned.items()) if t != left}
    weights = [0.5, 0.5, 0.5]
    weights[left] = 0
    alone = Ties(0.5, combine=combine, weights=(0.5, 0.5))(problem(base, rest))
    assert same(Ties(0.5, combine=combine, weights=tuple(weights))(problem(base, finetuned)), alone)


@pytest.mark.parametrize("combine", COMBINES)
def test_a_negative_weight_is_the_opposite_task_vector(combine):
    base, finetuned = models(3, torch.float64, values=grid)
    turned = finetuned | {
        "task2": {n: 2 * base[n] - v if v.is_floating_point() else v for n, v in finetuned["task2"].items()}
    }
    one = Ties(0.5, combine=combine, weights=(0.5, -2.0, 1.0))(problem(base, finetuned))
    close(one, Ties(0.5, combine=combine, weights=(0.5, 2.0, 1.0))(problem(base, turned)))


def test_only_ratios_matter_to_the_mean_and_the_sum_is_linear():
    base, finetuned = models(3, torch.float64, values=grid)
    for combine, factor in (("mean", 1.0), ("sum", 4.0)):
        once, more = (Ties(0.5, 1.0, combine, weights=w) for w in ((0.25, -0.5, 1.0), (1.0, -2.0, 4.0)))
        close(deltas(more, base, finetuned), deltas(once, base, finetuned), factor)


def test_the_mean_is_no_larger_than_the_largest_change_and_has_the_elected_sign():
    taus = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, -0.99, 0.5, -2.0])
    mean = merged(Ties(1.0, weights=tuple(weights.tolist())), *taus.tolist())
    assert bool((mean.abs() <= taus.abs().amax(0) * (1 + 1e-6)).all())
    assert torch.equal(mean.sign(), (weights[:, None] * taus).sum(0).sign())


def test_sums_that_weights_make_zero_take_the_sign_of_the_majority():
    assert merged(Ties(1.0, weights=(2.0, 1.0)), [1.0, -2.0, -3.0], [-2.0, -2.0, -3.0]).tolist() == [-2, -2, -3]


def test_all_weights_0_merge_nothing():
    base, finetuned = models(2)
    assert same(Ties(weights=(0, 0))(problem(base, finetuned)), Weights.of(base))


def test_dare_hands_weights_on():
    given = problem(*models(3, torch.float64, values=grid))
    for then in (Ties(0.5, weights=(1.0, -0.5, 2.0)), TaskArithmetic(0.3, (1.0, -0.5, 2.0))):
        assert same(Dare(then, 0.0)(given), then(given))


def test_without_weights_signatures_stay():
    assert signature(Ties()) == signature(Ties(weights=[])) != signature(Ties(weights=(1.0,)))  # pyright: ignore
    assert signature(Ties(weights=(1, 2))) == signature(Ties(weights=(1.0, 2.0)))


@pytest.mark.parametrize("weights", [(1.0,), (0.2, 0.3, 0.5)], ids=str)
@pytest.mark.parametrize("wrap", [lambda method: method, Dare])
def test_a_wrong_number_of_weights_is_refused_with_the_tasks(wrap, weights):
    said = rf"merge.weights has {len(weights)} values for 2 tasks \(t0, t1\); give one per task"
    with pytest.raises(OptionError, match=said):
        merged(wrap(Ties(weights=weights)), [1.0], [2.0])


@pytest.mark.parametrize("weights", [(float("nan"), 1.0), (float("inf"),), ("a",), "12", 0.5, (True,), None], ids=str)
def test_what_is_no_list_of_finite_numbers_is_refused(weights):
    with pytest.raises(OptionError, match=r"merge\.weights=.* is not a list of finite numbers"):
        Ties(weights=weights)
