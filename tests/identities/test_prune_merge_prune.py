"""Prune, merge, prune: its two ends are BYOM-FFT and pruning before merging."""

import pytest
import torch

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.variants.base.pruned import Pruned
from byom.variants.fft import ByomFft
from byom.variants.prune_merge_prune import PruneMergePrune
from byom.variants.prune_then_merge import PruneThenMerge
from byom.weights import Weights
from tests.problems import FLOATS, models, problem, same

ONE, TWO = [1.0, 0.0, 0.5, -2.0], [0.0, 3.0, 0.5, 1.0]
SCOPES = ["global", "tensor"]
MERGE = TaskArithmetic(0.3)


def serve(variant, given, method=MERGE):
    prepared = variant.before(given) if variant.before else given
    return variant.serve(given, method(prepared))


def test_golden():
    vectors = {t: Weights.of({"w": torch.tensor(expert)}) for t, expert in (("1", ONE), ("2", TWO))}
    given = Problem(Weights.of({"w": torch.zeros(4)}), vectors)
    served = serve(PruneMergePrune(0.25, before_density=0.5), given, TaskArithmetic(0.5))
    assert served.reference["w"].tolist() == [0.5, 1.5, 0, -0.5]
    assert served.weights("1")["w"].tolist() == [0.5, 0, 0, -0.5]
    assert served.weights("2")["w"].tolist() == [0.5, 3, 0, -0.5]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
def test_without_pruning_before_it_is_byom_fft(scope, density):
    given = problem(*models(3))
    ours, fft = serve(PruneMergePrune(density, scope, 1.0), given), serve(ByomFft(density, scope), given)
    assert all(same(ours.weights(task), fft.weights(task)) for task in given.tasks)


@pytest.mark.parametrize("scope", SCOPES)
def test_putting_nothing_back_is_pruning_before_merging(scope):
    given = problem(*models(3))
    ours, merged = serve(PruneMergePrune(0.0, scope, 0.3), given), serve(PruneThenMerge(0.3, scope), given)
    assert all(same(ours.weights(task), merged.weights(task)) for task in given.tasks)


@pytest.mark.parametrize("before_density", [0.0, 0.1, 1.0])
def test_putting_all_back_is_the_expert_and_not_its_pruned_self(before_density):
    given = problem(*models(3, torch.bfloat16))
    served = serve(PruneMergePrune(1.0, before_density=before_density), given)
    assert all(torch.equal(served.weights(t)[n], given.finetuned[t][n]) for t in given.tasks for n in FLOATS)


def test_both_prunings_have_their_own_density_and_one_scope():
    assert PruneMergePrune(0.2, "tensor", 0.05).before == Pruned(0.05, "tensor")


def test_a_density_out_of_range_is_refused():
    with pytest.raises(OptionError, match=r"byom\.before_density=10 is not a fraction"):
        PruneMergePrune(before_density=10)
