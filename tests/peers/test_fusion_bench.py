"""Merging beside fusion-bench.

They agree where the definitions do, on models whose tensors are floating point and whose task vectors are of full rank.
They differ

- in tensors that are not floating point: fusion-bench averages them (Task Arithmetic refuses them), byom keeps the
  pre-trained model's;
- in what is a matrix: there every 2-D tensor whose exact name is not excluded, none being excluded by default; here
  both sides exceed 1 and names matching a pattern are excluded, ``*text_projection*`` by default;
- in more tasks than directions (TSV-M): there the change is 0, here the scaled mean of the task vectors;
- in dependent directions (TSV-M, Iso-C): there LAPACK fills them with arbitrary ones, here they are left out;
- in rounding a task's share of directions up beyond what the matrix has (Iso-CTS): there it fails;
- in a zero task vector (WUDI): there it divides by 0, here the task is left out;
- in WUDI's other tensors: there the mean of the task vectors, here the pre-trained model's unless ``rest=mean``.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.iso_c import IsotropicMergingCommon
from byom.merge.iso_cts import IsotropicMergingCommonTaskSpecific
from byom.merge.svc import SingularValueCalibration
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.tsv import TaskSingularVectors
from byom.merge.wudi import Wudi
from byom.weights import Weights
from tests.peers.fusion import PEER, there

pytestmark = PEER

COMPARES = {
    "average": "equal on floating-point tensors",
    "task_arithmetic": "equal on floating-point tensors",
    "tsv": "equal for task vectors of full rank",
    "iso_c": "equal for a sum of full rank, rank=full everywhere",
    "iso_cts": "equal for task vectors of full rank",
    "svc": "equal for a merged change of full rank, exclude=[]",
    "wudi": "the same loss and the same steps of Adam, with exclude=[] and rest=mean",
}
SHAPES = {"attention": (24, 16), "narrow": (9, 20), "square": (12, 12), "bias": (16,), "patches": (4, 3, 2, 2)}


class Tiny(nn.Module):
    """A model with every kind of tensor of `SHAPES`."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.register_buffer("count", torch.tensor(10 * seed))


def pool(tasks, buffers=True):
    models = {"_pretrained_": Tiny(0)} | {str(t): Tiny(t) for t in range(1, tasks + 1)}
    for model in () if buffers else models.values():
        del model.count
    return models


def opened(models):
    weights = {name: Weights.of(model.state_dict()) for name, model in models.items()}
    return Problem(weights.pop("_pretrained_"), weights)


def vectors(tasks, size=1.0):
    generator = torch.Generator().manual_seed(tasks)
    draw = {"generator": generator, "dtype": torch.float64}
    return [{n: size * torch.randn(s, **draw) for n, s in SHAPES.items()} for _ in range(tasks)]


def merged(method, taus):
    """Return our merged change, of task vectors on a pre-trained model of zeros."""
    zero = Weights.of({name: torch.zeros_like(tensor) for name, tensor in taus[0].items()})
    return method(Problem(zero, {str(t): Weights.of(tau) for t, tau in enumerate(taus)}))


def agree(ours, theirs, names=SHAPES, **tolerance):
    for name in names:
        assert_close(ours[name], theirs[name].detach(), **({"rtol": 1e-6, "atol": 1e-7} | tolerance))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_average(tasks):
    theirs = there().SimpleAverageAlgorithm(inplace=False).run(pool(tasks)).state_dict()
    agree(Average()(opened(pool(tasks))), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_task_arithmetic(tasks, scale):
    theirs = there().TaskArithmeticAlgorithm(scaling_factor=scale).run(pool(tasks, buffers=False)).state_dict()
    agree(TaskArithmetic(scale)(opened(pool(tasks))), theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_tsv_m(tasks):
    agree(merged(TaskSingularVectors(), vectors(tasks)), there().tsv_m(vectors(tasks), accelerator="cpu"))


@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_iso_c(tasks, rank):
    agree(merged(IsotropicMergingCommon(1.0, rank), vectors(tasks)), there().iso_c(vectors(tasks), "cpu"))


@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize(("tasks", "common"), [(1, 0.5), (2, 0.8), (3, 0.5), (4, 0.1), (8, 0.8)])
def test_iso_cts(tasks, common, rank):
    ours = merged(IsotropicMergingCommonTaskSpecific(1.0, common, rank), vectors(tasks))
    agree(ours, there().iso_cts(vectors(tasks), common, "cpu"))


@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("then", [TaskArithmetic(1.0), TaskSingularVectors()], ids=lambda method: method.title)
def test_svc(then, floor):
    taus = vectors(3)
    merged_by, ours = merged(then, taus), merged(SingularValueCalibration(then, floor, exclude=()), taus)
    for name in ("attention", "narrow", "square"):
        theirs = there().svc(torch.zeros(SHAPES[name]).double(), [tau[name] for tau in taus], merged_by[name], floor)
        assert_close(ours[name], theirs)
    assert torch.equal(ours["bias"], merged_by["bias"]) and torch.equal(ours["patches"], merged_by["patches"])


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("steps", [1, 100])
def test_wudi(tasks, steps):
    ours = merged(Wudi(steps=steps, rest="mean", exclude=()), vectors(tasks, 1e-3))
    agree(ours, there().wudi_merging(vectors(tasks, 1e-3), "cpu", steps))


# known differences


def test_integers_are_averaged_or_refused_there_and_carried_here():
    problem = opened(pool(2))
    assert there().SimpleAverageAlgorithm(inplace=False).run(pool(2)).count == 15
    with pytest.raises(ValueError, match="Dtype mismatch for key 'count'"):
        there().TaskArithmeticAlgorithm(scaling_factor=1.0).run(pool(2))
    assert Average()(problem)["count"] == TaskArithmetic(1.0)(problem)["count"] == 0


def test_a_single_row_is_a_matrix_there_and_a_vector_here():
    taus = [{"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[3.0, 0.0]])}]
    ours, theirs = merged(IsotropicMergingCommon(1.0), taus), there().iso_c(taus, "cpu")
    assert_close(theirs["w"], torch.tensor([[6.0, 4.0]]))
    assert_close(ours["w"], torch.tensor([[3.0, 2.0]]))


def test_a_text_projection_is_a_matrix_there_and_excluded_here():
    taus = [{"text_projection": tau["square"]} for tau in vectors(2)]
    mean = sum(tau["text_projection"] for tau in taus) / 2
    for method, theirs in ((IsotropicMergingCommon(1.0), there().iso_c), (TaskSingularVectors(), there().tsv_m)):
        agree(merged(method, taus), {"text_projection": mean}, taus[0])
        found = theirs(taus, accelerator="cpu")
        agree(merged(type(method)(1.0, exclude=()), taus), found, taus[0])
        assert (found["text_projection"] - mean).abs().max() > 0.1


def test_more_tasks_than_directions_cancel_there_and_take_the_mean_here():
    taus = vectors(10)
    theirs, ours = there().tsv_m(taus, accelerator="cpu"), merged(TaskSingularVectors(), taus)
    assert not theirs["narrow"].any()
    assert_close(ours["narrow"], sum(tau["narrow"] for tau in taus) / 10)


def test_identical_tasks_get_noise_there_and_their_truncation_here():
    tau = {"w": vectors(1)[0]["attention"]}
    left, values, right = torch.linalg.svd(tau["w"], full_matrices=False)
    truncation = left[:, :8] * values[:8] @ right[:8]
    assert_close(merged(TaskSingularVectors(), [tau, tau])["w"], truncation)
    assert (there().tsv_m([tau, tau], accelerator="cpu")["w"] - truncation).norm() > 0.1 * truncation.norm()


def test_a_sum_of_low_rank_is_filled_there_and_kept_here_unless_rank_is_full():
    tau = {"w": torch.diag(torch.tensor([2.0, 0.0]))}
    assert_close(there().iso_c([tau], "cpu")["w"].abs(), torch.eye(2))
    assert_close(merged(IsotropicMergingCommon(1.0, "full"), [tau])["w"].abs(), torch.eye(2))
    assert_close(merged(IsotropicMergingCommon(1.0), [tau])["w"], tau["w"])


def test_too_large_a_share_of_directions_fails_there_and_is_cut_here():
    taus = [{"w": torch.randn(5, 5, generator=torch.Generator().manual_seed(t))} for t in range(3)]
    with pytest.raises(RuntimeError):
        there().iso_cts(taus, 0.0, "cpu")
    values = torch.linalg.svdvals(merged(IsotropicMergingCommonTaskSpecific(1.0, 0.0), taus)["w"])
    assert_close(values, values[:1].expand(5))


def test_a_zero_task_vector_divides_by_zero_there_and_is_left_out_here():
    taus = [{"w": tau["square"]} for tau in vectors(2, 1e-3)]
    idle = [*taus, {"w": torch.zeros(12, 12, dtype=torch.float64)}]
    assert there().wudi_merging(idle, "cpu", 3)["w"].isnan().any()
    method = Wudi(steps=3)
    assert torch.equal(merged(method, idle)["w"], merged(method, taus)["w"])


def test_what_is_no_matrix_is_averaged_there_and_pretrained_here():
    taus = vectors(3)
    assert_close(there().wudi_merging(taus, "cpu", 1)["bias"].detach(), sum(tau["bias"] for tau in taus) / 3)
    assert not merged(Wudi(steps=1), taus)["bias"].any()
