"""EMR-Merging: golden vectors, one task, equal tasks, the norm that rescaling restores, and what it costs."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.pipeline import measure
from byom.variants.base import WHOLE, bits
from byom.variants.emr import ElectMaskRescale, unify
from byom.weights import Weights
from tests.problems import FLOATS, grid, models, same

A = torch.tensor([3, -1, 0.5, 0.125, -4])
B = torch.tensor([1, 2, -0.5, 0.25, -2])
C = torch.tensor([-6, 1, 0.5, -0.375, 1])
RESCALES = ["global", "tensor_mean_sum"]


def serve(*deltas, rescale="global", split=None):
    """Serve task vectors, whole or split in two tensors, on a pre-trained model of zeros."""
    cuts = {"w": slice(None)} if split is None else {"a": slice(split), "b": slice(split, None)}
    experts = {str(t): Weights.of({n: delta[cut] for n, cut in cuts.items()}) for t, delta in enumerate(deltas)}
    zero = Weights.of({n: torch.zeros_like(deltas[0][cut]) for n, cut in cuts.items()})
    return ElectMaskRescale(rescale).serve(Problem(zero, experts), zero)


def scales(served):
    return [float(delta.parts[WHOLE]["scale"]) for delta in served.deltas.values()]


def flat(weights):
    return torch.cat([weights[name].reshape(-1).double() for name in weights.mergeable()])


def test_unified_vector_golden():
    assert unify(torch.stack([A, B, C])).tolist() == [-6, 2, 0.5, -0.375, -4]
    assert serve(A, B, C).base["w"].tolist() == [-6, 2, 0.5, -0.375, -4]


def test_masks_and_scales_golden():
    served = serve(A, B, C)
    masks = [bits.unpack(delta.parts["w"]["mask"], 5).int().tolist() for delta in served.deltas.values()]
    assert masks == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 1, 0]]
    assert scales(served) == pytest.approx([1.916667, 0.958333, 1.0], abs=1e-6)


def test_scales_by_means_of_tensors_golden():
    assert scales(serve(A, B, C, rescale="tensor_mean_sum", split=2)) == pytest.approx(
        [2.361111, 1.035714, 0.961165], abs=1e-6
    )


def test_a_global_scale_does_not_depend_on_how_the_model_is_split_in_tensors():
    assert scales(serve(A, B, C, split=2)) == scales(serve(A, B, C))


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_task_and_equal_tasks_are_exact(rescale, tasks, dtype):
    base, tuned = models(1, dtype, values=grid)  # differences of the grid are exact
    experts = {str(t): Weights.of(tuned["task1"]) for t in range(tasks)}
    served = ElectMaskRescale(rescale).serve(Problem(Weights.of(base), experts), Weights.of(base))
    assert scales(served) == [1.0] * tasks
    for task, expert in experts.items():
        assert all(torch.equal(served.weights(task)[name], expert[name]) for name in FLOATS)


def test_one_task_is_exact_up_to_fp32_rounding():
    base, tuned = models(1)
    served = ElectMaskRescale().serve(Problem(Weights.of(base), {"t": Weights.of(tuned["task1"])}), Weights.of(base))
    assert_close(flat(served.weights("t")), flat(Weights.of(tuned["task1"])), rtol=3e-7, atol=1e-7)


def test_rescaling_restores_the_l1_norm_of_the_task_vector():
    base, tuned = models(4, torch.float64)
    problem = Problem(Weights.of(base), {t: Weights.of(s) for t, s in tuned.items()})
    served = ElectMaskRescale().serve(problem, problem.pretrained)
    for task, expert in problem.finetuned.items():
        moved, wanted = (flat(w) - flat(problem.pretrained) for w in (served.weights(task), expert))
        assert moved.abs().sum() == pytest.approx(float(wanted.abs().sum()), rel=1e-6)


@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("rescale", RESCALES)
def test_longer_task_vectors_move_the_models_as_much_farther(rescale, factor):
    once, scaled = serve(A, B, C, rescale=rescale), serve(*(factor * each for each in (A, B, C)), rescale=rescale)
    assert all(torch.equal(scaled.weights(t)["w"], factor * once.weights(t)["w"]) for t in "012")


def test_where_the_task_vectors_cancel_the_negative_one_is_elected():
    served = serve(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0]))
    assert served.base["w"].tolist() == [-1, 2]
    assert served.weights("0")["w"].tolist() == [0, 3] and served.weights("1")["w"].tolist() == [-1, 2]


def test_a_task_that_agrees_nowhere_is_served_the_pretrained_model():
    served = serve(torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -5.0]))
    assert scales(served) == [1.0, 1.0] and "w" not in served.deltas["0"].parts
    assert served.weights("0")["w"].tolist() == [0, 0] and served.weights("1")["w"].tolist() == [-3, -5]


def test_changes_whose_product_underflows_agree():
    tiny = torch.full((2,), 1e-30)
    assert serve(tiny, tiny).weights("1")["w"].tolist() == tiny.tolist()


def test_it_costs_two_models_a_bit_a_parameter_and_a_number_a_task():
    generator = torch.Generator().manual_seed(0)
    experts = {str(t): Weights.of({"w": torch.randn(100, 16, generator=generator)}) for t in range(3)}
    problem = Problem(Weights.of({"w": torch.zeros(100, 16)}), experts)
    said = measure.stored(ElectMaskRescale().serve(problem, problem.pretrained), problem)
    assert said["shared_models"] == 2 and said["shared_parameters"] == 2 * 1600
    assert said["task_parameters"] == dict.fromkeys("012", 1)
    assert said["task_bytes"] == dict.fromkeys("012", 1600 // 8 + 4)


def test_the_unified_vector_is_wide_and_reads_nothing_until_it_is_read():
    base, tuned = models(2, torch.bfloat16)
    problem = Problem(Weights.of(base), {t: Weights.of(s) for t, s in tuned.items()})
    shared = ElectMaskRescale().serve(problem, problem.pretrained).base
    assert {shared.dtype(name) for name in FLOATS} == {torch.float32} and shared.ties == problem.pretrained.ties
    assert same(shared, shared.materialise())


def test_an_unknown_rescaling_is_refused():
    with pytest.raises(OptionError, match=r"byom\.rescale=mean.*global or tensor_mean_sum"):
        ElectMaskRescale("mean")
