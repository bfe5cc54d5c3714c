"""Hessian-weighted merging: quadratics, extreme priors and weights, and Fisher merging as a special case."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.base.needs import Needs
from byom.merge.fisher import FisherMerging
from byom.merge.hessian_weighted import HessianWeighted
from byom.weights import Weights


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXPERTS, BASE = random(3, 20), random(20, seed=1)
HESSIANS = random(3, 20, seed=2).square() + 0.1
ALPHA = (0.5, 0.3, 0.2)


def posed(experts=EXPERTS, hessians=HESSIANS, kind="fisher"):
    named = {str(t): Weights.of({"w": value}) for t, value in enumerate(experts)}
    return Problem(
        Weights.of({"w": BASE}), named, {kind: {t: Weights.of({"w": h}) for t, h in zip(named, hessians, strict=True)}}
    )


def merged(problem, **options):
    return HessianWeighted(**options)(problem)["w"]


def test_equal_hessians_without_prior_give_the_weighted_average():
    problem = posed(hessians=HESSIANS[:1].expand(3, -1))
    expected = (torch.tensor(ALPHA).double().unsqueeze(1) * EXPERTS).sum(0)
    assert_close(merged(problem, prior=0.0, weights=ALPHA), expected)


@pytest.mark.parametrize("prior", [0.0, 0.7])
def test_it_is_the_optimum_of_weighted_quadratics(prior):
    """The gradient of ``sum_t a_t/2 ||w - w_t||^2_H_t + prior/2 ||w - w_0||^2`` vanishes."""
    found = merged(posed(), prior=prior, weights=ALPHA)
    pulls = sum(a * h * (found - w) for a, h, w in zip(ALPHA, HESSIANS, EXPERTS, strict=True))
    assert_close(pulls + prior * (found - BASE), torch.zeros(20).double(), rtol=0, atol=1e-10)


def test_a_large_prior_gives_the_pretrained_model():
    assert_close(merged(posed(), prior=1e12), BASE, rtol=0, atol=1e-9)


@pytest.mark.parametrize("task", range(3))
def test_weight_on_one_task_gives_its_model(task):
    weights = tuple(float(t == task) for t in range(3))
    assert_close(merged(posed(), prior=0.0, weights=weights), EXPERTS[task])


def test_one_task_gives_its_model():
    assert_close(merged(posed(EXPERTS[:1], HESSIANS[:1]), prior=0.0), EXPERTS[0])


@pytest.mark.parametrize("weights", [(), ALPHA])
def test_without_prior_it_is_fisher_merging(weights):
    assert_close(merged(posed(), prior=0.0, weights=weights), FisherMerging(weights=weights)(posed())["w"])


@pytest.mark.parametrize("prior", [0.0, 1e-12])
def test_where_nothing_is_known_the_pretrained_model_stays(prior):
    assert torch.equal(merged(posed(hessians=torch.zeros(3, 20)), prior=prior), BASE)


def test_golden_vector():
    hessians = [torch.tensor([3.0]), torch.tensor([1.0])]
    problem = Problem(
        Weights.of({"w": torch.tensor([1.0])}),
        {"a": Weights.of({"w": torch.tensor([3.0])}), "b": Weights.of({"w": torch.tensor([0.0])})},
        {"fisher": {t: Weights.of({"w": h}) for t, h in zip("ab", hessians, strict=True)}},
    )
    assert_close(merged(problem, prior=2.0), torch.tensor([1.625]))  # 1 + (1.5 * 2 - 0.5 * 1) / (2 + 1.5 + 0.5)


def test_ivon_and_fisher_are_the_same_rule_on_another_statistic():
    assert_close(merged(posed(kind="ivon"), posterior="ivon"), merged(posed()))
    with pytest.raises(OptionError, match=r"needs the statistics \['ivon'\]"):
        merged(posed(), posterior="ivon")


def test_what_it_needs():
    train = frozenset({"train"})
    assert HessianWeighted().needs == Needs(frozenset({"fisher"}), train)
    assert HessianWeighted(posterior="ivon").needs == Needs(frozenset({"ivon"}), train, labels=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"posterior": "adam"}, "use fisher or ivon"),
        ({"prior": -1}, "merge.prior=-1"),
        ({"weights": (-1, 2)}, "merge.weights"),
    ],
)
def test_a_value_out_of_range_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        HessianWeighted(**options)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(OptionError, match="2 values for 3 tasks"):
        merged(posed(), weights=(1, 1))
