"""TALL-masks: golden masks, one task, disjoint tasks, and how masks shrink."""

from itertools import pairwise

import pytest
import torch

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.variants.base import bits
from byom.variants.tall_mask import TallMasks
from byom.weights import Weights
from tests.problems import FLOATS, grid, models, problem
from tests.problems import bits as same_bits

A = [3, -1, 0.5, 0.125, -4]
B = [1, 2, -0.5, 0.25, -2]
C = [-6, 1, 0.5, -0.375, 1]
SUM = TaskArithmetic(1.0)


def vectors(*deltas):
    experts = {str(t): Weights.of({"w": torch.tensor(delta, dtype=torch.float32)}) for t, delta in enumerate(deltas)}
    return Problem(Weights.of({"w": torch.zeros(len(deltas[0]))}), experts)


def serve(given, mask_scale=0.4, method=SUM):
    return TallMasks(mask_scale).serve(given, method(given))


def mask(served, task, numel=5):
    parts = served.deltas[task].parts.get("w")
    return bits.unpack(parts["mask"], numel).int().tolist() if parts else [1] * numel


def test_masks_golden():
    served = serve(vectors(A, B, C))
    assert served.reference["w"].tolist() == [-2, 2, 0.5, 0, -5]
    assert [mask(served, t) for t in "012"] == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert served.weights("0")["w"].tolist() == [-2, 0, 0.5, 0, -5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask_scale", [0.0, 0.4, 3.0])
def test_one_task_alone_is_lossless(dtype, mask_scale):
    given = problem(*models(1, dtype, values=grid))
    served = serve(given, mask_scale)
    assert all(same_bits(served.weights("task1")[n]) == same_bits(given.finetuned["task1"][n]) for n in FLOATS)
    assert served.deltas["task1"].nbytes == 0


@pytest.mark.parametrize("mask_scale", [0.0, 0.2, 0.6, 10.0])
def test_tasks_that_change_different_parameters_are_lossless(mask_scale):
    given = vectors([1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, -4])
    served = serve(given, mask_scale)
    assert all(torch.equal(served.weights(t)["w"], given.finetuned[t]["w"]) for t in "012")


def test_a_scale_of_0_keeps_what_the_task_changed():
    base, tuned = models(3, values=grid)
    given = problem(base, tuned)
    served = serve(given, 0.0)
    for task, expert in tuned.items():
        for name in FLOATS:
            kept = torch.where(expert[name] != base[name], served.reference[name], base[name])
            assert torch.equal(served.weights(task)[name], kept)


def test_masks_shrink_as_the_scale_grows():
    given = problem(*models(3))
    reference = TaskArithmetic(1.0)(given).materialise()
    masks = []
    for scale in (0.0, 0.2, 0.4, 0.6, 1.0, 5.0):
        weights = TallMasks(scale).serve(given, reference).weights("task1")
        masks.append(torch.cat([(weights[n] == reference[n]).reshape(-1) for n in FLOATS]))
    assert all(bool((b <= a).all()) for a, b in pairwise(masks)) and masks[0].sum() > masks[-1].sum()


@pytest.mark.parametrize("method", [TaskArithmetic(1.0), TaskArithmetic(0.3), Ties()])
def test_every_entry_is_that_of_the_merged_or_of_the_pretrained_model(method):
    given = problem(*models(3, torch.bfloat16))
    served = serve(given, method=method)
    for task in given.tasks:
        for name in FLOATS:
            got, merged, base = (w[name] for w in (served.weights(task), served.reference, given.pretrained))
            assert torch.all((got == merged) | (got == base))


def test_it_costs_two_models_and_a_bit_a_parameter():
    generator = torch.Generator().manual_seed(0)
    experts = {str(t): Weights.of({"w": torch.randn(100, 16, generator=generator)}) for t in range(2)}
    served = serve(Problem(Weights.of({"w": torch.zeros(100, 16)}), experts))
    assert len(served.shared) == 2
    assert [(d.stored_parameters, d.nbytes) for d in served.deltas.values()] == [(0, 200)] * 2


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(OptionError, match=r"byom\.mask_scale=.*0 or more"):
        TallMasks(scale)
