"""Task Grams: the filtered solution beside a literal one, the family's members, and the limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.task_grams import TaskGrams, participation
from byom.merge.wudi import Wudi
from tests.problems import one_tensor, random

SHAPES = [(6, 4), (4, 6), (8, 8)]


def merge(method, deltas, name="w", base=0.0):
    """Return the merged value of one tensor."""
    return method(one_tensor(deltas, name, base))[name]


def literal(deltas, count, time=None, start="sum"):
    """Return the formula of SWUDI term by term."""
    sizes = [delta.square().sum() for delta in deltas]
    gram = sum(d.T @ d / n for d, n in zip(deltas, sizes, strict=True))
    right = sum(d @ d.T @ d / n for d, n in zip(deltas, sizes, strict=True))
    values, vectors = torch.linalg.eigh(gram)
    shares = torch.ones_like(values) if time is None else 1 - torch.exp(-values * time)
    shares[: len(values) - count] = 0
    first = sum(deltas) if start == "sum" else torch.zeros_like(right)
    return first - first @ vectors * shares @ vectors.T + right @ vectors * (shares / values) @ vectors.T


@pytest.mark.parametrize("start", ["sum", "zero"])
@pytest.mark.parametrize("time", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_filtered_solution_is_the_formula(shape, time, start):
    deltas = random(3, *shape)
    method = TaskGrams(cut=0.5, time=time, start=start)
    assert_close(merge(method, deltas), literal(deltas, shape[1] // 2, time, start))


def test_the_automatic_cut_is_the_participation_ratio_of_the_roots():
    deltas = random(3, 8, 6) * torch.tensor([9.0, 5.0, 1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    values = torch.linalg.eigvalsh(sum(d.T @ d / d.square().sum() for d in deltas))
    count = math.ceil(values.sqrt().sum() ** 2 / values.sum())
    assert 1 < count < 6
    assert_close(merge(TaskGrams(), deltas), literal(deltas, count))


def test_participation_golden():
    assert participation(torch.tensor([9.0, 4.0, 1.0])) == 3  # 36 / 14
    assert participation(torch.tensor([16.0, 1.0, 0.0])) == 2  # 25 / 17
    assert participation(torch.full((7,), 0.3)) == 7
    assert participation(torch.tensor([2.0, 0.0, 0.0])) == 1
    assert participation(torch.zeros(3)) == 0


def test_golden():
    """Two tasks of one input each, which do not interfere: each output is the task's own."""
    deltas = torch.tensor([[[3.0, 0.0]] * 2, [[0.0, 4.0]] * 2])
    assert_close(merge(TaskGrams(), deltas), torch.tensor([[3.0, 4.0]] * 2))
    both = torch.tensor([[[2.0, 0.0]] * 2, [[4.0, 0.0]] * 2])  # Grams of 1 each after division by the norm: the mean
    assert_close(merge(TaskGrams(), both), torch.tensor([[3.0, 0.0]] * 2))
    assert_close(merge(TaskGrams(normalise="none"), both), torch.tensor([[(2 * 4 + 4 * 16) / 20, 0.0]] * 2))


@pytest.mark.parametrize("shape", [(6, 4), (8, 8)], ids=str)
def test_the_whole_spectrum_is_wudis_minimum(shape):
    deltas = random(3, *shape)
    assert_close(merge(TaskGrams(cut=1), deltas), merge(Wudi("closed_form", ridge=1e-12), deltas), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_actmat_is_the_pseudo_inverse(shape):
    deltas = random(2, *shape)
    grams = [delta.T @ delta for delta in deltas]
    expected = sum(d @ c for d, c in zip(deltas, grams, strict=True)) @ torch.linalg.pinv(sum(grams))
    assert_close(merge(TaskGrams(normalise="none", start="zero", cut=1), deltas), expected)


def test_tact_thins_the_grams_alone():
    deltas = random(3, 6, 4)
    thin = []
    for delta in deltas:
        least = delta.abs().flatten().sort(descending=True).values[11]
        thin.append(torch.where(delta.abs() >= least, delta, 0))
    grams = [delta.T @ delta for delta in thin]
    expected = sum(d @ c for d, c in zip(deltas, grams, strict=True)) @ torch.linalg.pinv(sum(grams))
    assert_close(merge(TaskGrams(normalise="none", start="zero", cut=1, density=0.5), deltas), expected)


def test_ace_centres_the_rows():
    deltas = random(3, 9, 4)
    grams = [torch.cov(delta.T) for delta in deltas]
    grams = [gram / gram.trace() for gram in grams]
    expected = sum(d @ c for d, c in zip(deltas, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    method = TaskGrams(normalise="trace", centred=True, start="zero", cut=1)
    assert_close(merge(method, deltas), expected)


def test_a_short_time_is_the_start_and_a_long_one_the_solution():
    deltas = random(3, 6, 4)
    assert_close(merge(TaskGrams(cut=1, time=1e-12), deltas), deltas.sum(0))
    assert_close(merge(TaskGrams(cut=1, time=1e12), deltas), merge(TaskGrams(cut=1), deltas))


def test_gradient_descent_passes_through_the_soft_filter():
    deltas, rate, steps = random(3, 6, 4), 1e-4, 20000
    grams = [d.T @ d / d.square().sum() for d in deltas]
    change = deltas.sum(0)
    for _ in range(steps):
        change = change - rate * sum((change - d) @ g for d, g in zip(deltas, grams, strict=True))
    assert_close(merge(TaskGrams(cut=1, time=rate * steps), deltas), change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["sum", "zero"])
def test_one_task_is_its_own(start):
    delta = random(1, 6, 4)
    assert_close(merge(TaskGrams(cut=1, start=start), delta), delta[0])


def test_a_zero_task_vector_weighs_nothing():
    deltas = random(2, 6, 4)
    idle = torch.cat([deltas, torch.zeros(1, 6, 4, dtype=torch.float64)])
    assert_close(merge(TaskGrams(), idle), merge(TaskGrams(), deltas))
    assert not merge(TaskGrams(), torch.zeros(2, 6, 4, dtype=torch.float64)).any()


def test_unused_inputs_keep_the_start():
    deltas = random(3, 6, 5)
    deltas[:, :, 3:] = 0
    assert not merge(TaskGrams(cut=1), deltas)[:, 3:].any()


def test_what_is_no_matrix_is_averaged_or_left():
    deltas = random(3, 5)
    assert_close(merge(TaskGrams(), deltas, "bias", base=2.0), 2.0 + deltas.mean(0))
    assert_close(merge(TaskGrams(scale=0.5), deltas, "bias", base=2.0), 2.0 + 0.5 * deltas.mean(0))
    assert_close(merge(TaskGrams(rest="pretrained"), deltas, "bias", base=2.0), torch.full((5,), 2.0).double())
    matrices = random(3, 5, 4)
    assert_close(merge(TaskGrams(), matrices, "embed.weight"), matrices.mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "size"}, "merge.normalise=size"),
        ({"density": 0.0}, "merge.density=0 leaves nothing"),
        ({"cut": 0}, "merge.cut=0 leaves nothing"),
        ({"cut": "most"}, "merge.cut=most is neither"),
        ({"cut": 1.5}, "merge.cut=1.5 is not a fraction"),
        ({"time": 0.0}, "merge.time=0.0"),
        ({"start": "mean"}, "merge.start=mean"),
        ({"rest": "sum"}, "merge.rest=sum"),
        ({"exclude": "*embed*"}, "merge.exclude"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        TaskGrams(**options)


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, "ASWUDI"),
        ({"cut": 0.65, "time": 1300}, "SWUDI"),
        ({"cut": 1}, "WUDI, exact"),
        ({"normalise": "none", "start": "zero", "cut": 1}, "ACTMat"),
        ({"normalise": "none", "start": "zero", "cut": 1.0, "density": 0.5}, "TACT"),
        ({"normalise": "trace", "centred": True, "start": "zero", "cut": 1}, "ACE, step 1"),
        ({"normalise": "none"}, "Task Grams"),
    ],
    ids=str,
)
def test_options_have_the_names_under_which_they_were_published(options, title):
    method = TaskGrams(**options)
    assert method.title == title and TaskGrams.title == "Task Grams"
    assert method == TaskGrams(**options) and hash(method) == hash(TaskGrams(**options))
