"""Pruning before merging: all or nothing kept, one task, TIES, and laziness."""

import pytest
import torch

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.variants.base.pruned import Pruned
from byom.variants.post_pruning import PostPruning
from byom.variants.prune_then_merge import PruneThenMerge
from byom.weights import Weights
from tests.problems import BUFFERS, FLOATS, TIED, bits, counted, grid, models, problem, same

METHODS = [Average(), TaskArithmetic(0.3), Ties()]
ONE, TWO = [1.0, 0.0, 0.5, -2.0], [0.0, 3.0, 0.5, 1.0]


def posed(*experts):
    vectors = {str(t): Weights.of({"w": torch.tensor(expert)}) for t, expert in enumerate(experts)}
    return Problem(Weights.of({"w": torch.zeros(len(experts[0]))}), vectors)


def merge(variant, given, method):
    reference = method(variant.before(given))
    return variant.serve(given, reference).weights(given.tasks[0])


def test_golden():
    pruned = PruneThenMerge(0.5).before(posed(ONE, TWO))
    assert [w["w"].tolist() for w in pruned.finetuned.values()] == [[1, 0, 0, -2], [0, 3, 0, 1]]
    assert merge(PruneThenMerge(0.5), posed(ONE, TWO), TaskArithmetic(0.5))["w"].tolist() == [0.5, 1.5, 0, -0.5]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_is_the_plain_merge(method, scope, dtype):
    given = problem(*models(3, dtype))
    assert same(merge(PruneThenMerge(1.0, scope), given, method), method(given))


@pytest.mark.parametrize("method", METHODS)
def test_keeping_nothing_is_the_pretrained_model(method):
    given = problem(*models(3, values=grid))  # the mean of equal values of the grid is exact
    merged = merge(PruneThenMerge(0.0), given, method)
    assert all(torch.equal(merged[name], given.pretrained[name]) for name in FLOATS)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.1, 0.29, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_expert_is_post_pruning(scope, density, dtype):
    given = problem(*models(3, dtype))
    pruned = Pruned(density, scope)(given).finetuned
    post = PostPruning(density, scope).serve(given, given.pretrained)
    assert all(bits(pruned[t][name]) == bits(post.weights(t)[name]) for t in given.tasks for name in FLOATS)


def test_one_task_is_post_pruning():
    given = problem(*models(1, values=grid))
    merged = merge(PruneThenMerge(0.3), given, TaskArithmetic(1.0))
    post = PostPruning(0.3).serve(given, given.pretrained).weights("task1")
    assert all(torch.equal(merged[name], post[name]) for name in FLOATS)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_at_the_same_density_or_above_trims_what_is_pruned_already(scope, density):
    given = problem(*models(3))
    pruned = merge(PruneThenMerge(0.2, scope), given, Ties(density, scope=scope))
    assert same(pruned, Ties(0.2, scope=scope)(given))


def test_pruning_is_lazy_and_reads_each_fingerprint_once():
    base, tuned = models(2)
    watched, reads = counted(Weights.of(tuned["task1"]))
    pruned = Pruned(0.3)(Problem(Weights.of(base), {"task1": watched, "task2": Weights.of(tuned["task2"])}))
    assert not reads
    expert = pruned.finetuned["task1"]
    expert["layer.bias"]
    first = len(reads)
    expert["one"]
    assert len(reads) == first + 1


def test_buffers_and_ties_are_the_experts_and_statistics_stay():
    base, tuned = models(1)
    given = problem(base, tuned)
    pruned = Pruned(0.3)(given)
    expert = pruned.finetuned["task1"]
    assert expert.ties == TIED and all(torch.equal(expert[name], tuned["task1"][name]) for name in BUFFERS)
    assert pruned.statistics is given.statistics and pruned.probe is given.probe


def test_it_stores_one_model():
    given = problem(*models(3))
    variant = PruneThenMerge(0.3)
    served = variant.serve(given, Average()(variant.before(given)))
    assert len(served.shared) == 1 and all(delta.nbytes == 0 for delta in served.deltas.values())


@pytest.mark.parametrize("make", [PruneThenMerge, Pruned])
def test_options_out_of_range_are_refused(make):
    with pytest.raises(OptionError, match=r"byom\.density=10 is not a fraction"):
        make(10)
    with pytest.raises(OptionError, match=r"byom\.scope=layer.*global, tensor or row"):
        make(0.1, "layer")
