"""TVQ and RTVQ: golden vectors, exact cases, the bound of the error, its decline with bits, and the bytes they take."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.pipeline import measure
from byom.variants.base import Shared
from byom.variants.tvq import TaskVectorQuantisation, dequantised, quantised
from byom.weights import Weights
from tests.problems import counted, models, problem, random, same

ROUNDED = "layer.weight"


def served(delta, bits=2):
    target = Weights.of({"w": delta})
    packed = TaskVectorQuantisation(bits).delta(target, target * 0)
    return packed, packed.apply(target * 0)["w"]


def three(dtype=torch.float64, **options):
    given = problem(*models(3, dtype, **options))
    return given, given.pretrained


def test_golden():
    delta = torch.tensor([[-1.4, -0.6, 0.0], [0.3, 0.9, 1.6]], dtype=torch.float64)  # s = 1, z = 1
    codes, step, zero = quantised(delta, 2)
    assert codes.tolist() == [[0, 0, 1], [1, 2, 3]] and (float(step), float(zero)) == (pytest.approx(1), 1)
    assert_close(served(delta)[1], torch.tensor([[-1.0, -1, 0], [0, 1, 2]]).double())


def test_residual_golden():
    tasks = torch.tensor([[[-2, 2], [1, 4]], [[-4.5, 3], [1, 4]]])  # their average is -3.25, 2.5, 1, 4
    experts = {str(t): Weights.of({"w": each}) for t, each in enumerate(tasks)}
    zero = Weights.of({"w": torch.zeros(2, 2)})
    served = TaskVectorQuantisation(1, shared_bits=1).serve(Problem(zero, experts), zero)
    assert served.reference["w"].tolist() == [[0, 0], [0, 7.25]]  # s = 7.25, z = 0
    assert served.weights("0")["w"].tolist() == [[0, 0], [0, 2]]  # -2, 2, 1 and -3.25 are left: s = 5.25, z = 1
    assert served.weights("1")["w"].tolist() == [[-7.5, 0], [0, 7.25]]  # -4.5, 3, 1 and -3.25: s = 7.5, z = 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_multiples_of_one_step_are_exact(bits):
    most = (1 << bits) - 1
    whole = torch.arange(most + 1).repeat(3)[: 2 * (most + 1)].reshape(2, -1) - most // 2
    assert torch.equal(served(0.125 * whole.double(), bits)[1], 0.125 * whole.double())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shift", [0.0, 2.0, -30.0])
def test_no_entry_is_off_by_more_than_half_a_step_and_0_stays_0(bits, shift):
    delta = random(40, 24) + shift
    step = (delta.max() - delta.min()) / ((1 << bits) - 1)
    error = (served(delta, bits)[1] - delta).abs().max()
    assert float(error) <= float(step / 2) * (1 + 1e-9)
    if shift == 0:
        delta[3, 4] = 0
        assert served(delta, bits)[1][3, 4] == 0


def test_every_bit_more_than_halves_the_bound():
    delta = random(40, 24)
    steps = [float(quantised(delta, bits)[1]) for bits in range(1, 9)]
    assert all(0 < 2 * finer < coarser for coarser, finer in pairwise(steps))


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_longer_task_vectors_are_served_as_much_farther(factor):
    assert_close(served(factor * random(6, 4))[1], factor * served(random(6, 4))[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.5, -3.0])
def test_a_tensor_whose_entries_changed_alike_is_stored_whole(value):
    packed, put_back = served(torch.full((3, 4), value))
    assert torch.equal(put_back, torch.full((3, 4), value)) and packed.nbytes == 3 * 4 * 4


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_it_takes_b_bits_an_entry_and_two_numbers(bits):
    packed, _ = served(random(7, 5).float(), bits)
    assert packed.nbytes == -(-7 * 5 * bits // 8) + 8 and packed.stored_parameters == 2


def test_other_tensors_are_stored_whole_and_unchanged_ones_not_at_all():
    given, reference = three(torch.bfloat16)
    target = given.finetuned["task1"]
    put_back = TaskVectorQuantisation().delta(target, reference).apply(reference)
    assert all(torch.equal(put_back[name], target[name]) for name in ("layer.bias", "one", "scale"))
    kept = TaskVectorQuantisation(exclude=["*weight"]).delta(target, reference).apply(reference)
    assert torch.equal(kept[ROUNDED], target[ROUNDED]) and not torch.equal(put_back[ROUNDED], target[ROUNDED])
    assert TaskVectorQuantisation().delta(reference, reference).nbytes == 0


@pytest.mark.parametrize("shared_bits", [1, 3, 8])
def test_the_shared_model_holds_the_rounded_average(shared_bits):
    given, reference = three()
    shared = TaskVectorQuantisation(shared_bits=shared_bits).serve(given, reference).reference
    average = Average()(given)[ROUNDED] - reference[ROUNDED]
    expected = reference[ROUNDED] + dequantised(*quantised(average, shared_bits))
    assert_close(shared[ROUNDED], expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(shared[name], reference[name]) for name in ("layer.bias", "one", "scale"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_average_is_off_by_is_corrected(dtype):
    given, reference = three(dtype)
    for shared_bits in (1, 2, 8):
        served = TaskVectorQuantisation(8, shared_bits).serve(given, reference)
        for task, expert in given.finetuned.items():
            left = (expert[ROUNDED].double() - served.reference[ROUNDED].double()).aminmax()
            error = (served.weights(task)[ROUNDED].double() - expert[ROUNDED].double()).abs()
            rounding = expert[ROUNDED].double().abs().max() * torch.finfo(dtype).eps
            assert float(error.max()) <= float((left.max - left.min) / 510 + rounding)


def test_around_a_close_average_two_bits_are_nearer_than_without_it():
    common = random(12, 8)
    zero = Weights.of({"w": torch.zeros(12, 8, dtype=torch.float64)})
    experts = {str(t): Weights.of({"w": common + 0.01 * random(12, 8, seed=t)}) for t in range(1, 4)}
    alone, around = (
        TaskVectorQuantisation(2, shared_bits).serve(Problem(zero, experts), zero) for shared_bits in (None, 8)
    )
    for task, expert in experts.items():
        errors = [float((each.weights(task)["w"] - expert["w"]).norm()) for each in (alone, around)]
        assert errors[1] < 0.1 * errors[0]


def test_one_task_alone_is_its_average_and_what_that_is_off_by():
    given = problem(*models(1, torch.float64))
    expert = given.finetuned["task1"]
    served = TaskVectorQuantisation(2, 3).serve(given, given.pretrained)
    left = expert[ROUNDED] - served.reference[ROUNDED]
    step = float(quantised(expert[ROUNDED] - given.pretrained[ROUNDED], 3)[1])
    assert float(left.abs().max()) <= step / 2 * (1 + 1e-9)
    assert float((served.weights("task1")[ROUNDED] - expert[ROUNDED]).abs().max()) <= step / 6 * (1 + 1e-9)


def test_streamed_and_served_are_the_same_and_the_average_costs_nothing_more():
    given, reference = three(torch.float32)
    once, lazily = (getattr(TaskVectorQuantisation(2, 3), how)(given, reference) for how in ("serve", "streamed"))
    assert same(once.reference, lazily.reference)
    assert all(same(once.weights(task), lazily.weights(task)) for task in given.tasks)
    plain = TaskVectorQuantisation(2).serve(given, reference)
    sizes = [measure.stored(each, given) for each in (once, plain)]
    assert sizes[0]["bytes"] == sizes[1]["bytes"] and sizes[0]["shared_models"] == 1


def test_running_statistics_are_each_task_s_own_and_not_averaged():
    base = {"bn.running_var": torch.rand(2, 3)}
    tasks = {str(t): Weights.of({"bn.running_var": torch.rand(2, 3) + t}) for t in range(2)}
    served = TaskVectorQuantisation(2, 3).serve(Problem(Weights.of(base), tasks), Weights.of(base))
    assert torch.equal(served.reference["bn.running_var"], base["bn.running_var"])
    assert all(torch.equal(served.weights(t)["bn.running_var"], w["bn.running_var"]) for t, w in tasks.items())


def test_titles_are_those_of_the_paper():
    assert (TaskVectorQuantisation().title, TaskVectorQuantisation(2, 3).title) == ("TVQ", "RTVQ")


def test_what_does_not_fit_is_refused():
    parts = served(random(6, 4))[0].parts["w"]
    with pytest.raises(CheckpointError, match="28 integers of 2 bits are 7 bytes, not 6"):
        TaskVectorQuantisation(2).unpack(parts, Shared(torch.zeros(7, 4)))
    given, reference = three()
    with pytest.raises(WeightsMismatch, match="one only in the"):
        TaskVectorQuantisation(2, 3).serve(given, reference.select(lambda name: name != "one"))


@pytest.mark.parametrize(
    ("bits", "remedy"), [(0, "a whole number, 1 or more"), (2.0, "a whole number"), (9, "use 1, 2, .* 7 or 8")]
)
def test_bits_out_of_range_are_refused(bits, remedy):
    with pytest.raises(OptionError, match=rf"byom\.bits=.*{remedy}"):
        TaskVectorQuantisation(bits)
    with pytest.raises(OptionError, match=rf"byom\.shared_bits=.*{remedy}"):
        TaskVectorQuantisation(2, shared_bits=bits)


@pytest.mark.parametrize("shared_bits", [None, 3])
def test_every_expert_is_read_as_often_as_it_says(shared_bits):
    given, reference = three()
    expert, reads = counted(given.finetuned["task1"])
    variant = TaskVectorQuantisation(2, shared_bits)
    variant.serve(Problem(given.pretrained, given.finetuned | {"task1": expert}), reference)
    assert reads.count(ROUNDED) == variant.passes
