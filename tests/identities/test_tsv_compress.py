"""TSV-Compress: one task, the error and the size that the singular values say, and matrices too thin for a share."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.merge.base import Problem
from byom.variants.base import Shared
from byom.variants.tsv_compress import TaskSingularVectorsCompress
from byom.weights import Weights
from tests.problems import models, problem

SHAPES = [(6, 4), (4, 6), (12, 12), (40, 24)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def serve(*deltas, share=None):
    zero = Weights.of({"w": torch.zeros_like(deltas[0])})
    experts = {str(t): Weights.of({"w": delta}) for t, delta in enumerate(deltas)}
    return TaskSingularVectorsCompress(share).serve(Problem(zero, experts), zero)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_task_keeps_all(shape):
    assert_close(serve(random(*shape)).weights("0")["w"], random(*shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_task_is_exact_up_to_fp32_rounding(dtype):
    given = problem(*models(1, dtype))
    served = TaskSingularVectorsCompress().serve(given, given.pretrained).weights("task1")
    for name in given.pretrained.mergeable():
        step = torch.finfo(dtype).eps  # one unit of the last place where fp32 lies between two values of the dtype
        assert_close(served[name], given.finetuned["task1"][name], rtol=max(step, 1e-6), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_the_error_is_that_of_the_dropped_singular_values_and_the_size_that_of_the_kept(shape, tasks):
    deltas = [random(*shape, seed=t) for t in range(tasks)]
    served = serve(*deltas)
    rank = min(shape) // tasks
    for t, delta in enumerate(deltas):
        dropped = torch.linalg.svdvals(delta)[rank:]
        error = float((served.weights(str(t))["w"] - delta).norm())
        assert error == pytest.approx(float(dropped.norm()), rel=1e-9)
        assert served.deltas[str(t)].stored_parameters == rank * (sum(shape) + 1)


def test_all_tasks_together_take_as_many_singular_values_as_one_model_has():
    served = serve(*(random(40, 24, seed=t) for t in range(8)))
    assert sum(len(delta.parts["w"]["singular"]) for delta in served.deltas.values()) == 24


def test_a_stated_share_takes_the_place_of_the_number_of_tasks():
    deltas = [random(12, 12, seed=t) for t in range(3)]
    by_tasks, stated = serve(*deltas), serve(*deltas, share=1 / 3)
    assert all(torch.equal(by_tasks.weights(t)["w"], stated.weights(t)["w"]) for t in "012")
    assert serve(*deltas, share=0.5).deltas["0"].variant.share == 0.5


def test_a_matrix_of_low_rank_is_exact():
    low = random(40, 3) @ random(3, 24, seed=1)
    assert_close(serve(*[low] * 8).weights("0")["w"], low, rtol=1e-9, atol=1e-9)


def test_a_matrix_with_a_side_below_the_number_of_tasks_keeps_one_singular_value():
    served = serve(*(random(3, 9, seed=t) for t in range(8)))
    assert {len(delta.parts["w"]["singular"]) for delta in served.deltas.values()} == {1}


def test_what_is_no_matrix_is_stored_whole_and_what_did_not_change_not_at_all():
    given = problem(*models(3, torch.bfloat16))
    served = TaskSingularVectorsCompress().serve(given, given.pretrained)
    for task, expert in given.finetuned.items():
        for name in ("layer.bias", "one", "scale"):
            assert torch.equal(served.weights(task)[name], expert[name])
    idle = TaskSingularVectorsCompress().serve(Problem(given.pretrained, {"t": given.pretrained}), given.pretrained)
    assert idle.deltas["t"].nbytes == 0


@pytest.mark.parametrize("share", [0, 0.0, -0.1, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(OptionError, match=r"byom\.share="):
        TaskSingularVectorsCompress(share)


def test_factors_that_do_not_fit_are_refused():
    delta = serve(random(6, 4)).deltas["0"]
    with pytest.raises(CheckpointError, match=r"do not fit a tensor of shape \(4, 6\)"):
        delta.variant.unpack(delta.parts["w"], Shared(torch.zeros(4, 6)))
