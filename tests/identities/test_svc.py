"""SVC: the calibration term by term, its fixed points, and what it leaves alone."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.svc import SingularValueCalibration, calibrated
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from tests.problems import one_tensor, random


def literal(change, deltas, floor):
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    for r in range(len(values)):
        ours = left[:, r] @ change
        theirs = [left[:, r] @ delta for delta in deltas]
        multiples = [max(floor, float(ours @ a / (a @ a))) for a in theirs]
        values[r] *= len(deltas) / sum(multiples)
    return left * values @ right


@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_calibration_is_the_formula(shape, floor):
    deltas = random(3, *shape)
    change = deltas.sum(0)
    assert_close(calibrated(change, deltas, floor), literal(change, deltas, floor))


def test_golden():
    """Two equal tasks, added up, do twice what each does, and are brought back to it."""
    tau = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    assert_close(calibrated(2 * tau, torch.stack([tau, tau]), 0.5), tau)
    half = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]).double()  # orthogonal: each is done once, nothing is shared
    assert_close(calibrated(half.sum(0), half, 0.5), half.sum(0))


@pytest.mark.parametrize("then", [TaskArithmetic(1.0), Ties(0.6)], ids=lambda method: method.title)
def test_it_calibrates_what_the_method_made(then):
    deltas = random(3, 6, 4)
    merged = then(one_tensor(deltas))["w"] - 0.5
    assert_close(SingularValueCalibration(then)(one_tensor(deltas))["w"] - 0.5, literal(merged, deltas, 1 / 3))
    assert_close(SingularValueCalibration(then, floor=1.0)(one_tensor(deltas))["w"] - 0.5, literal(merged, deltas, 1.0))


def test_one_task_of_scale_one_is_unchanged():
    delta = random(1, 6, 4)
    assert_close(SingularValueCalibration(TaskArithmetic(1.0))(one_tensor(delta))["w"] - 0.5, delta[0])


def test_equal_tasks_give_the_task_whatever_the_scale_above_the_floor():
    delta = random(1, 6, 4)
    for scale in (0.5, 1.0, 3.0):
        merged = SingularValueCalibration(TaskArithmetic(scale))(one_tensor(delta.expand(4, 6, 4)))["w"]
        assert_close(merged - 0.5, delta[0])


def test_a_floor_of_one_only_damps():
    deltas = random(4, 6, 5)
    before = torch.linalg.svdvals(deltas.mean(0))
    after = torch.linalg.svdvals(SingularValueCalibration(Average(), floor=1.0)(one_tensor(deltas))["w"] - 0.5)
    assert (after <= before * (1 + 1e-9)).all()


def test_what_is_no_matrix_or_excluded_stays():
    vectors, matrices = random(3, 5), random(3, 5, 4)
    then = TaskArithmetic(0.3)
    assert torch.equal(SingularValueCalibration(then)(one_tensor(vectors))["w"], then(one_tensor(vectors))["w"])
    embed = one_tensor(matrices, "embed.weight")
    assert torch.equal(SingularValueCalibration(then)(embed)["embed.weight"], then(embed)["embed.weight"])


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan")])
def test_a_floor_that_is_not_positive_is_refused(floor):
    with pytest.raises(OptionError, match="merge.floor"):
        SingularValueCalibration(floor=floor)
