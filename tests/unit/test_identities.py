"""Identities and golden vectors of averaging, Task Arithmetic, TIES and BYOM, and slow oracles for what streams."""

from functools import reduce
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byom.functional import selection, stream
from byom.functional.deltas import agreeing, disjoint_mean, elect_sign, total
from byom.functional.selection import kept
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.base import group as merging
from byom.merge.pretrained import Pretrained
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.variants.fft import ByomFft
from byom.variants.post_pruning import PostPruning
from byom.weights import Weights

ZERO = [0.0, 0.0, 0.0, 0.0]
ONE = [1.0, 0.0, 0.5, -2.0]
TWO = [0.0, 3.0, 0.5, 1.0]
A = [3, -1, 0.5, 0.125, -4]
B = [1, 2, -0.5, 0.25, -2]
C = [-6, 1, 0.5, -0.375, 1]


def vector(values):
    return Weights.of({"w": torch.tensor(values, dtype=torch.float32)})


def merge(method, *experts, base=None):
    vectors = {str(t): vector(expert) for t, expert in enumerate(experts)}
    return method(Problem(vector(base or [0.0] * len(experts[0])), vectors))


def values(weights):
    return weights["w"].tolist()


# averaging and Task Arithmetic


def test_task_arithmetic_golden():
    assert values(merge(TaskArithmetic(0.5), ONE, TWO)) == [0.5, 1.5, 0.5, -0.5]


def test_task_arithmetic_by_one_over_t_is_the_average():
    for tasks in (1, 2, 4, 8):
        experts = [[t * x + y for x, y in zip(ONE, TWO, strict=True)] for t in range(tasks)]
        assert values(merge(TaskArithmetic(1 / tasks), *experts, base=TWO)) == values(merge(Average(), *experts))


def test_task_arithmetic_of_one_task_at_scale_1_is_that_task():
    assert values(merge(TaskArithmetic(1.0), ONE, base=TWO)) == ONE == values(merge(Average(), ONE, base=TWO))


def test_task_arithmetic_at_scale_0_is_the_pretrained():
    assert (
        values(merge(TaskArithmetic(0.0), ONE, TWO, base=A[:4]))
        == A[:4]
        == values(merge(Pretrained(), ONE, base=A[:4]))
    )


def test_negative_scale_forgets():
    assert values(merge(TaskArithmetic(-1.0), ONE, base=TWO)) == [-1, 6, 0.5, 4]


@pytest.mark.parametrize("method", [TaskArithmetic(0.25), Average(), Ties(1.0), Ties(0.5, combine="sum")])
def test_the_order_of_two_tasks_does_not_matter(method):
    assert values(merge(method, ONE, TWO)) == values(merge(method, TWO, ONE))


def test_the_algebra_says_the_same_as_the_method():
    theta, tasks = vector(A), [vector(B), vector(C)]
    by_hand = theta + 0.3 * sum(task - theta for task in tasks)
    assert torch.equal(by_hand["w"], merge(TaskArithmetic(0.3), B, C, base=A)["w"])


# TIES


def test_ties_golden_at_density_1():
    assert values(merge(Ties(1.0), A, B, C)) == [-6, 1.5, 0.5, 0, -3]


def test_ties_golden_at_density_06():
    assert values(merge(Ties(0.6), A, B, C)) == [-6, 1.5, 0, 0, -3]


def test_ties_golden_sum():
    assert values(merge(Ties(0.6, combine="sum"), A, B, C)) == [-6, 3, 0, 0, -6]


def test_ties_scale_multiplies_what_was_merged():
    assert values(merge(Ties(0.6, scale=0.5), A, B, C, base=[0] * 5)) == [-3, 0.75, 0, 0, -1.5]


def test_ties_of_equal_signs_at_density_1_is_the_mean():
    experts = [[1, -2, 3], [3, -4, 1], [2, -3, 2]]
    assert values(merge(Ties(1.0), *experts)) == values(merge(Average(), *experts)) == [2, -3, 2]


def test_ties_sum_of_equal_signs_at_density_1_is_task_arithmetic():
    experts = [[1, -2, 3], [3, -4, 1]]
    assert values(merge(Ties(1.0, scale=0.25, combine="sum"), *experts)) == values(
        merge(TaskArithmetic(0.25), *experts)
    )


def test_ties_of_one_task_at_density_1_is_that_task():
    assert values(merge(Ties(1.0), B, base=A)) == B


def test_ties_keeps_the_whole_of_the_heavier_sign():
    assert values(merge(Ties(1.0), [3.0, 1.0], [-2.0, -4.0])) == [3, -4]


def test_ties_keeps_exactly_k():
    assert values(merge(Ties(0.4), [5, 4, 3, 2, 1])) == [5, 4, 0, 0, 0]
    assert values(merge(Ties(0.5), [1, 1, 1, 1])) == [1, 1, 0, 0]
    assert [kept(density, 100) for density in (0.29, 0.57, 0.58, 0.1)] == [29, 57, 58, 10]


@pytest.mark.parametrize(
    ("others", "expected"),
    [([2, 3], 1), ([-2, -3], -1), ([2, -3], 0), ([0, 0], 0)],
    ids=["plus", "minus", "undecided", "empty"],
)
def test_ties_gives_zero_sums_the_sign_of_the_majority(others, expected):
    assert values(merge(Ties(1.0), [1, *others], [-1, *others])) == [expected, *others]


def test_ties_lets_zero_sums_not_vote():
    assert values(merge(Ties(1.0), [1, 2, -2], [-1, -2, -2])) == [-1, -2, -2]


def test_ties_counts_the_majority_over_the_whole_model():
    base = Weights.of({"a": torch.zeros(1), "b": torch.zeros(3)})
    tasks = {
        str(sign): Weights.of({"a": torch.tensor([sign]), "b": torch.tensor([-2.0, -5.0, 7.0])}) for sign in (1.0, -1.0)
    }
    merged = Ties(1.0)(Problem(base, tasks))
    assert merged["a"].tolist() == [-1] and merged["b"].tolist() == [-2, -5, 7]


def test_ties_counts_only_trimmed_coordinates_for_the_majority():
    assert values(merge(Ties(0.4), [4, -1, -1, -1, 5], [-4, -1, -1, -1, 5])) == [4, 0, 0, 0, 5]


def test_ties_at_density_0_is_the_pretrained():
    assert values(merge(Ties(0.0), ONE, TWO, base=A[:4])) == A[:4]


def test_pieces_of_ties():
    stacked = torch.tensor([A, B, C])
    sign = elect_sign(stacked)
    assert sign.tolist() == [-1, 1, 1, 0, -1] and elect_sign(stacked, -1.0).tolist() == [-1, 1, 1, -1, -1]
    assert agreeing(stacked, sign).tolist() == [[0, 0, 0.5, 0, -4], [0, 2, 0, 0, -2], [-6, 1, 0.5, 0, 0]]
    assert disjoint_mean(agreeing(stacked, sign)).tolist() == [-6, 1.5, 0.5, 0, -3]
    assert total(stacked).tolist() == [-2, 2, 0.5, 0, -5] and stacked.tolist() == [A, B, C]


# BYOM-FFT and Post-Pruning


def put_back(variant, task, reference):
    target, reference = vector(task), vector(reference)
    return values(variant.delta(target, reference).apply(reference))


def test_byom_golden():
    merged = values(merge(TaskArithmetic(0.5), ONE, TWO))
    assert put_back(ByomFft(0.25), ONE, merged) == [0.5, 0, 0.5, -0.5]
    assert put_back(ByomFft(0.5), ONE, merged) == [0.5, 0, 0.5, -2]
    assert put_back(PostPruning(0.5), ONE, ZERO) == [1, 0, 0, -2]


def test_byom_at_density_1_is_the_task_and_at_0_the_merged():
    merged = values(merge(TaskArithmetic(0.5), ONE, TWO))
    assert put_back(ByomFft(1.0), ONE, merged) == ONE
    assert put_back(ByomFft(0.0), ONE, merged) == merged


def test_byom_of_one_task_at_scale_1_has_nothing_to_put_back():
    merged = values(merge(TaskArithmetic(1.0), ONE, base=TWO))
    assert [put_back(ByomFft(density), ONE, merged) for density in (0.0, 0.25, 0.5, 1.0)] == [ONE] * 4


def test_byom_restores_what_adding_a_difference_would_not():
    generator = torch.Generator().manual_seed(0)
    task, reference = (torch.randn(10_000, generator=generator) * scale for scale in (1e-3, 1.0))
    assert not torch.equal(reference + (task - reference), task)
    target, base = Weights.of({"w": task}), Weights.of({"w": reference})
    assert torch.equal(ByomFft(1.0).delta(target, base).apply(base)["w"], task)


def test_the_energy_to_store_follows_from_the_scale():
    experts = torch.eye(8)
    merged = merge(TaskArithmetic(0.25), *experts.tolist())["w"]
    assert float((experts[0] - merged).square().sum()) == (1 - 0.25) ** 2 + 7 * 0.25**2


# slow oracles: everything in memory, sorted in full, one formula after the other


def flatten(state):
    return torch.cat([state[name].reshape(-1).float() for name in sorted(state)])


def top(flat, density):
    order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[: floor(density * len(flat) + 1e-9)]] = True
    return mask


def top_in(state, difference, density, scope):
    if scope == "global":
        return top(difference, density)
    sizes = [state[name].numel() for name in sorted(state)]
    return torch.cat([top(piece, density) for piece in torch.split(difference, sizes)])


def ties_oracle(method, base, experts):
    zero = flatten(base)
    taus = [flatten(state) - zero for state in experts]
    taus = [torch.where(top_in(base, tau, method.density, method.scope), tau, 0.0) for tau in taus]
    sign = reduce(torch.add, taus).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = [torch.where(tau.sign() == sign, tau, 0.0) for tau in taus]
    merged = reduce(torch.add, agree)
    if method.combine == "mean":
        merged = merged / torch.stack([tau != 0 for tau in agree]).sum(0).clamp(min=1)
    return zero + method.scale * merged


SHAPES = [(), (1,), (0, 2), (5,), (2, 3), (2, 1, 4), (11,)]
NUMBERS = st.integers(-12, 12).map(lambda i: i / 8) | st.sampled_from([0.0, 1.0, -1.0, 32.0])
DENSITIES = st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 0.6, 0.9, 1.0]) | st.floats(0, 1)


@st.composite
def states(draw, count):
    """State dicts of one architecture, whose sums are exact in fp32 and whose magnitudes tie."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def tensor(shape):
        n = torch.Size(shape).numel()
        return torch.tensor(draw(st.lists(NUMBERS, min_size=n, max_size=n)), dtype=dtype).reshape(shape)

    return [{f"{i}": tensor(shape) for i, shape in enumerate(shapes)} for _ in range(count)]


def small_blocks(patch):
    """Stream in pieces of a few elements, with a sample so poor that brackets miss."""
    patch.setattr(merging, "BLOCK", 3)
    for name, value in {"BLOCK": 4, "SAMPLE": 5, "MARGIN": 0.0}.items():
        patch.setattr(stream if name == "BLOCK" else selection, name, value)


METHODS = st.builds(
    Ties,
    density=DENSITIES,
    scale=st.sampled_from([1.0, 0.3, 2.5]),
    combine=st.sampled_from(["mean", "sum"]),
    scope=st.sampled_from(["global", "tensor"]),
)


@given(METHODS, st.integers(1, 5).flatmap(lambda tasks: states(tasks + 1)), st.booleans())
@settings(max_examples=80, deadline=None)
def test_streamed_ties_is_the_formula(method, models, streamed):
    base, *experts = models
    with pytest.MonkeyPatch.context() as patch:
        if streamed:
            small_blocks(patch)
        weights = {str(t): Weights.of(state, str(t)) for t, state in enumerate(experts)}
        merged = method(Problem(Weights.of(base), weights)).state()
    expected = ties_oracle(method, base, experts).to(next(iter(base.values())).dtype)
    assert torch.equal(torch.cat([merged[name].reshape(-1) for name in sorted(base)]), expected)


@given(DENSITIES, st.sampled_from(["global", "tensor"]), states(2), st.booleans())
@settings(max_examples=80, deadline=None)
def test_streamed_byom_is_the_formula(density, scope, models, streamed):
    reference, target = models
    with pytest.MonkeyPatch.context() as patch:
        if streamed:
            small_blocks(patch)
        base = Weights.of(reference)
        result = ByomFft(density, scope).delta(Weights.of(target), base).apply(base).state()
    mask = top_in(reference, flatten(target) - flatten(reference), density, scope)
    expected = torch.where(mask, flatten(target), flatten(reference))
    assert torch.equal(flatten(result), expected)


@given(st.sampled_from([0.3, 1.0, -0.5]), st.integers(1, 9).flatmap(lambda tasks: states(tasks + 1)), st.booleans())
@settings(max_examples=40, deadline=None)
def test_streamed_task_arithmetic_and_average_are_the_formulas(scale, models, streamed):
    base, *experts = models
    zero, dtype = flatten(base), next(iter(base.values())).dtype
    problem = Problem(Weights.of(base), {str(t): Weights.of(state) for t, state in enumerate(experts)})
    with pytest.MonkeyPatch.context() as patch:
        if streamed:
            small_blocks(patch)
        added, averaged = (method(problem).state() for method in (TaskArithmetic(scale), Average()))
    taus = reduce(torch.add, [flatten(state) - zero for state in experts])
    mean = reduce(torch.add, map(flatten, experts)) / len(experts)
    assert torch.equal(flatten(added), (zero + scale * taus).to(dtype).float())
    assert torch.equal(flatten(averaged), mean.to(dtype).float())
