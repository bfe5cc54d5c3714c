"""Mixtures of Gaussians: one member is Hessian-weighted merging; responsibilities by hand; EM climbs."""

from itertools import pairwise, product

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Member, Problem
from byom.merge.hessian_weighted import HessianWeighted
from byom.merge.mixture import MixtureOfGaussians
from byom.weights import Weights

TASKS, MEMBERS, SHAPES = 2, 3, {"a": (4,), "b": (3, 2)}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(weights):
    return torch.cat([weights[name].double().reshape(-1) for name in SHAPES])


def weights(vector):
    pieces = vector.split([4, 6])
    return Weights.of({name: p.reshape(SHAPES[name]) for name, p in zip(SHAPES, pieces, strict=True)})


def posed(spread=1.0, members=MEMBERS, seed=0):
    """Return a problem, and its means and precisions ``[T, K, d]``."""
    means, precisions = (
        spread * random(TASKS, members, 10, seed=seed),
        random(TASKS, members, 10, seed=seed + 1).square() + 0.2,
    )
    found = {
        str(t): [Member(weights(m), {"fisher": weights(h)}) for m, h in zip(means[t], precisions[t], strict=True)]
        for t in range(TASKS)
    }
    return (
        Problem(
            weights(torch.zeros(10).double()),
            {task: ones[0].weights for task, ones in found.items()},
            {"fisher": {task: ones[0].statistics["fisher"] for task, ones in found.items()}},
            found,
        ),
        means,
        precisions,
    )


def by_hand(means, precisions, alpha, steps, temperature, prior):
    """EM on ``[T, K, d]`` in the words of the docstring."""
    shares = torch.full(means.shape[:2], 1 / means.shape[1]).double()
    for step in range(steps + 1):
        scaled = (alpha.unsqueeze(1) * shares).unsqueeze(2) * precisions
        theta = (scaled * means).sum((0, 1)) / (prior + scaled.sum((0, 1)))
        believed = precisions + prior
        logs = 0.5 * (believed.log() - believed * (theta - means).square()).sum(2)
        if step < steps:
            shares = (logs / temperature).softmax(1)
    return theta


@pytest.mark.parametrize(("steps", "temperature", "prior"), [*product((0, 1, 5), (1.0, 7.0), (0.0, 0.5))])
def test_it_is_em_by_hand(steps, temperature, prior):
    problem, means, precisions = posed()
    alpha = torch.tensor([0.7, 0.3]).double()
    method = MixtureOfGaussians(steps=steps, temperature=temperature, prior=prior, weights=(0.7, 0.3))
    assert_close(flat(method(problem)), by_hand(means, precisions, alpha, steps, temperature, prior))


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_one_member_is_hessian_weighted_merging(prior):
    problem, *_ = posed()
    expected = HessianWeighted(prior=prior, weights=(0.7, 0.3))(problem)
    single = MixtureOfGaussians(members=1, prior=prior, weights=(0.7, 0.3))
    assert_close(flat(single(problem)), flat(expected))
    alone = Problem(problem.pretrained, problem.finetuned, problem.statistics)  # no members given at all
    assert_close(flat(single(alone)), flat(expected))


def test_identical_members_are_one():
    problem, *_ = posed()
    same = {task: [ones[0]] * MEMBERS for task, ones in problem.members.items()}
    repeated = Problem(problem.pretrained, problem.finetuned, problem.statistics, same)
    assert_close(flat(MixtureOfGaussians()(repeated)), flat(MixtureOfGaussians(members=1)(problem)))


def test_distant_members_are_chosen_between_and_not_averaged():
    """Two tasks with one good compromise each: EM finds the pair of members that lie together."""
    precision = torch.ones(10).double()
    near, far, away = torch.zeros(10).double(), torch.full((10,), 9.0).double(), torch.full((10,), -30.0).double()
    found = {
        "0": [
            Member(weights(near), {"fisher": weights(precision)}),
            Member(weights(away), {"fisher": weights(precision)}),
        ],
        "1": [
            Member(weights(near + 1), {"fisher": weights(precision)}),
            Member(weights(far), {"fisher": weights(precision)}),
        ],
    }
    own = {t: ones[0].weights for t, ones in found.items()}
    problem = Problem(weights(near), own, {"fisher": {t: weights(precision) for t in own}}, found)
    assert_close(flat(MixtureOfGaussians(members=2)(problem)), torch.full((10,), 0.5).double())


def test_em_never_lowers_the_density():
    for seed in range(20):
        problem, means, precisions = posed(spread=2.0, seed=7 * seed)

        def density(theta, means=means, precisions=precisions):
            logs = 0.5 * (precisions.log() - precisions * (theta - means).square()).sum(2)
            return float(logs.logsumexp(1).mean())

        climbed = [density(flat(MixtureOfGaussians(steps=s, prior=0.0)(problem))) for s in range(5)]
        assert all(after >= before - 1e-9 for before, after in pairwise(climbed))


def test_an_infinite_temperature_keeps_members_alike():
    problem, *_ = posed()
    hot = MixtureOfGaussians(temperature=1e30)(problem)
    assert_close(flat(hot), flat(MixtureOfGaussians(steps=0)(problem)))


def test_elements_without_precision_give_no_nan():
    problem, *_ = posed()
    blank = {
        task: [Member(one.weights, {"fisher": weights(torch.zeros(10).double())}) for one in ones]
        for task, ones in problem.members.items()
    }
    unknown = Problem(problem.pretrained, problem.finetuned, problem.statistics, blank)
    for prior in (0.0, 1e-12):
        assert torch.equal(flat(MixtureOfGaussians(prior=prior)(unknown)), torch.zeros(10).double())


def test_too_few_members_or_members_without_statistics_are_refused():
    problem, *_ = posed(members=2)
    with pytest.raises(OptionError, match="merges 3 models per task, and task '0' has fewer"):
        MixtureOfGaussians()(problem)
    bare = {task: [Member(one.weights) for one in ones] for task, ones in problem.members.items()}
    with pytest.raises(OptionError, match="member '0/0' has no statistic 'fisher'"):
        MixtureOfGaussians(members=2)(Problem(problem.pretrained, problem.finetuned, problem.statistics, bare))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"members": 0}, "merge.members=0"),
        ({"steps": -1}, "merge.steps=-1"),
        ({"temperature": 0}, "merge.temperature=0"),
        ({"posterior": "adam"}, "use fisher or ivon"),
        ({"prior": -1}, "merge.prior"),
        ({"weights": (0,)}, "merge.weights"),
    ],
)
def test_a_value_out_of_range_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        MixtureOfGaussians(**options)
