"""Every option of ``conf/merge`` against the laws of merging; a new method joins by having its yaml."""

from dataclasses import dataclass, fields, replace
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.merge.base import PlannedMethod, TensorwiseMethod
from byom.merge.base import group as merging
from byom.merge.base.needs import Needs
from byom.weights import Weights
from tests.problems import (
    BUFFERS,
    DTYPES,
    FLOATS,
    IN_AND_OUT_OF_PLACE,
    NARROW_AND_WIDE,
    TIED,
    bits,
    counted,
    grid,
    model,
    models,
    options,
    posed,
    problem,
    rows,
    same,
    scaled,
    slow,
)

METHODS = options("merge")
BLOCKS = [(torch.float32, 2), *slow((torch.float64, 7), (torch.bfloat16, 3))]
EXEMPT = {
    "test_what_has_no_parameter_merges_to_the_pretrained": {
        "awd": "one task has nothing in common with another; more tasks are in identities",
    },
    "test_a_zero_task_vector_gives_no_nan": {
        "awd": "one task has nothing in common with another; more tasks are in identities",
    },
    "test_any_number_of_tasks_merges_to_finite_values": {
        "awd": "one task has nothing in common with another; more tasks are in identities",
    },
    "test_experts_equal_to_the_pretrained_change_nothing": {
        "awd": "one task has nothing in common with another; more tasks are in identities",
    },
    "test_merging_is_lazy": {
        "lines": "it streams the norms of the sum and of what was merged before it knows alpha",
        "awd": "it streams all inner products before it knows what to subtract; reading after that is in identities",
    },
    "test_the_order_of_tasks_does_not_matter": {
        "dare": "the draws are keyed by the tasks' names, which this law changes; the order alone is in identities",
        "adarank": "long steps of Adam in fp32 multiply rounding by more than this law grants; it is in identities",
    },
    "test_the_experts_matter": {"pretrained": "it is the row without experts"},
    "test_what_is_not_finite_is_refused_by_name": {
        "mtl": "it reads no fine-tuned model; a joint model that is not finite is refused in identities",
    },
    "test_the_difference_scales_with_the_task_vectors": {
        "pcb": "the tanh of its scores is no multiple; changes of sign are in identities",
        "adamerging": "coefficients follow predictions, which are not linear in the task vectors",
        "adarank": "masks follow predictions, which are not linear in the task vectors",
        "localize_and_stitch-masks=learned": "masks follow predictions, which are not linear in the task vectors",
        "mixture": "which member is responsible depends on distances in units of the posteriors",
        "wudi": "a step of Adam has the same length for task vectors of any size; the closed form is in identities",
    },
    "test_moving_every_model_moves_the_merged_one": {
        "adamerging": "predictions change when every model moves, and coefficients follow them",
        "adarank": "predictions change when every model moves, and masks follow them",
        "localize_and_stitch-masks=learned": "predictions change when every model moves, and masks follow them",
    },
}


@pytest.fixture(params=rows("merge"))
def method(request):
    reasons = EXEMPT.get(request.function.__name__, {})
    if reason := reasons.get(request.param) or reasons.get(request.param.split("-")[0]):
        pytest.skip(reason)
    return METHODS[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def difference(merged, base):
    return {name: merged[name].double() - base[name].double() for name in FLOATS}


def equal(a, b):
    for name in FLOATS:
        assert_close(a[name], b[name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def snapshot(*states):
    return [{name: bits(tensor) for name, tensor in state.items()} for state in states]


@cache
def usual(method, dtype=torch.float32):
    """Return the merge of the usual models, made once and read from the last name to the first, and its state."""
    merged = method(problem(*models(dtype=dtype)))
    return merged, {name: merged[name] for name in reversed(merged.keys())}


# reading


def test_merging_is_lazy(method):
    base, finetuned = models()
    watched = {"base": counted(Weights.of(base))} | {t: counted(Weights.of(s)) for t, s in finetuned.items()}
    reads = [read for _, read in watched.values()]
    merged = method(posed(watched["base"][0], {t: watched[t][0] for t in finetuned}))
    assert merged.keys() == Weights.of(base).keys() and merged.shape("embed") == (7, 5)
    assert not any(reads) or isinstance(method, PlannedMethod)
    for read in reads:
        read.clear()
    merged["layer.weight"]
    assert {name for read in reads for name in read} <= {"layer.weight"}


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=str)
def test_reading_is_pure(method, dtype):
    merged = method(problem(*models(dtype=dtype)))
    forth = {name: bits(merged[name]) for name in merged}
    back = {name: bits(merged[name]) for name in reversed(merged.keys())}
    assert forth == back == {name: bits(tensor) for name, tensor in usual(method, dtype)[1].items()}


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE, ids=str)
def test_disk_and_memory_give_the_same_bits(method, dtype, tmp_path):
    base, finetuned = models(dtype=dtype)
    held = problem(base, finetuned)
    opened = posed(
        Weights.open(held.pretrained.save(tmp_path / "base", shard_bytes=90)),
        {t: Weights.open(w.save(tmp_path / t, shard_bytes=150)) for t, w in held.finetuned.items()},
    )
    expected = usual(method, dtype)[1]
    merged = method(opened)
    assert same(merged, expected)
    assert same(Weights.open(merged.save(tmp_path / "merged", shard_bytes=60)), expected)


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_inputs_are_not_modified(method, dtype):
    base, finetuned = models(dtype=dtype)
    before = snapshot(base, *finetuned.values())
    method(problem(base, finetuned)).materialise()
    assert snapshot(base, *finetuned.values()) == before


def test_names_shapes_dtypes_and_ties_are_those_of_the_pretrained(method, dtype):
    merged, state = usual(method, dtype)
    expected = Weights.of(model(0, dtype))
    assert merged.keys() == expected.keys() and merged.ties == TIED
    assert merged.shape("scale") == ()
    for name, tensor in state.items():
        assert (tuple(tensor.shape), tensor.dtype) == (expected.shape(name), expected.dtype(name))


def test_buffers_are_those_of_the_pretrained(method):
    base, _ = models()
    assert all(bits(usual(method)[1][name]) == bits(base[name]) for name in BUFFERS)


def test_experts_of_another_precision_are_merged_in_the_wider_one(method):
    base, finetuned = models(dtype=torch.bfloat16, values=grid)
    widened = {t: {n: v.float() if v.is_floating_point() else v for n, v in s.items()} for t, s in finetuned.items()}
    widened = {t: s | {alias: s[name] for alias, name in TIED.items()} for t, s in widened.items()}
    assert same(method(problem(base, widened)), method(problem(base, finetuned)))


def test_tied_tensors_are_merged_once(method):
    merged = method(problem(*models()))
    state = merged.state()
    assert all(state[alias] is state[name] for alias, name in TIED.items())
    base, finetuned = models()
    for alias in TIED:
        for weights in (base, *finetuned.values()):
            del weights[alias]
    alone = method(problem(base, finetuned))
    assert all(bits(alone[name]) == bits(state[name]) for name in alone)


def test_writing_reads_no_model_more_often_than_merging(method, tmp_path):
    base, finetuned = models()
    counts = []
    for finish in (lambda merged: [merged.raw(name) for name in merged.canonical()], lambda m: m.save(tmp_path / "m")):
        watched = {task: counted(Weights.of(state)) for task, state in finetuned.items()}
        merged = method(posed(Weights.of(base), {task: weights for task, (weights, _) in watched.items()}))
        for _, read in watched.values():
            read.clear()
        finish(merged)
        counts.append([sorted(read) for _, read in watched.values()])
    assert counts[0] == counts[1]


def test_several_threads_give_the_bits_of_one(method, threads):
    threads(3)
    merged = method(problem(*models()))
    assert same(merged, usual(method)[1])


@pytest.mark.parametrize("dtype_and_size", BLOCKS, ids=str)
def test_merging_by_blocks_gives_the_bits_of_the_whole(method, dtype_and_size, monkeypatch):
    (dtype, size), asked, blocks = dtype_and_size, [], merging.Group.blocks

    def counted_blocks(group, *given, **named):
        asked.append(group)
        return blocks(group, *given, **named)

    monkeypatch.setattr(merging.Group, "blocks", counted_blocks)
    given = problem(*models(tasks=9, dtype=dtype))
    whole = method(given).state()
    if asked:  # else it takes whole tensors: the size of blocks is nothing to it
        monkeypatch.setattr(merging, "BLOCK", size)
        assert same(method(problem(*models(tasks=9, dtype=dtype))).state(), whole)


def test_key_order_does_not_matter(method):
    base, finetuned = models()
    turned = {t: dict(reversed(s.items())) for t, s in finetuned.items()}
    assert same(method(problem(dict(reversed(base.items())), turned)).state(), usual(method)[1])


# what is merged


def test_the_experts_matter(method):
    base, finetuned = models(values=grid)
    merged = method(problem(base, finetuned))
    assert any(bits(merged[name]) != bits(base[name]) for name in FLOATS)


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_experts_equal_to_the_pretrained_change_nothing(method, dtype):
    base = model(0, dtype, values=grid)
    for tasks in (1, 2, 3):
        merged = method(problem(base, dict.fromkeys(map(str, range(tasks)), base)))
        for name in FLOATS:
            assert_close(merged[name], base[name], msg=lambda text, at=(tasks, name): f"{at}: {text}")


def test_any_number_of_tasks_merges_to_finite_values(method, dtype):
    for tasks in (1, 2, 5):
        merged = method(problem(*models(tasks, dtype)))
        assert all(merged[name].isfinite().all() for name in merged), f"{tasks} tasks"


@pytest.mark.parametrize("dtype", IN_AND_OUT_OF_PLACE, ids=str)
def test_a_zero_task_vector_gives_no_nan(method, dtype):
    for others in (0, 2):
        base, finetuned = models(others, dtype)
        merged = method(problem(base, finetuned | {"idle": base}))
        assert all(merged[name].isfinite().all() for name in merged), f"beside {others} others"


def test_the_order_of_tasks_does_not_matter(method):
    base, finetuned = models(4, torch.float64, values=grid)
    expected = method(problem(base, finetuned))
    equal(method(problem(base, dict(reversed(finetuned.items())))), expected)
    equal(method(problem(base, {f"renamed {t}": s for t, s in finetuned.items()})), expected)


def test_the_difference_scales_with_the_task_vectors(method):
    base, finetuned = models(4, torch.float64, values=grid)
    once = difference(method(problem(base, finetuned)), base)
    for factor in (0.25, 2.0, -1.0, -4.0):
        stretched = difference(method(problem(base, scaled(base, finetuned, factor))), base)
        equal(stretched, {name: factor * tensor for name, tensor in once.items()})


def test_moving_every_model_moves_the_merged_one(method):
    base, finetuned = models(4, torch.float64, values=grid)
    moved = [{n: v + 2 if v.is_floating_point() else v for n, v in s.items()} for s in (base, *finetuned.values())]
    moved = [state | {alias: state[name] for alias, name in TIED.items()} for state in moved]
    merged = method(problem(moved[0], dict(zip(finetuned, moved[1:], strict=True))))
    equal(difference(merged, moved[0]), difference(method(problem(base, finetuned)), base))


def test_what_has_no_parameter_merges_to_the_pretrained(method):
    base = {"count": torch.tensor(3), "nothing": torch.zeros(0, 2)}
    assert same(method(problem(base, {"a": {"count": torch.tensor(4), "nothing": torch.zeros(0, 2)}})), base)


# refusals


@pytest.mark.parametrize("culprit", ["pre-trained", "task1", "task3"])
def test_what_is_not_finite_is_refused_by_name(method, culprit):
    for bad in (float("nan"), float("inf")):
        base, finetuned = models()
        state = base if culprit == "pre-trained" else finetuned[culprit]
        state["layer.bias"][4] = bad
        with pytest.raises(CheckpointError, match=rf"{culprit}: tensor 'layer\.bias' has 1 of 6"):
            method(problem(base, finetuned))["layer.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("one"), "one only in the first"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra only in the second"),
        (lambda s: s.update(one=torch.zeros(2)), r"'one' \(1,\) and \(2,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_models_of_another_architecture_are_refused(method, change, message):
    base, finetuned = models()
    change(finetuned["task2"])
    with pytest.raises(WeightsMismatch, match=f"pre-trained and task2.*{message}"):
        method(problem(base, finetuned))


def test_what_one_expert_unties_is_two_tensors_in_all(method):
    base, finetuned = models()
    finetuned["task2"]["head"] = finetuned["task2"]["head"] + 1
    apart = {t: Weights.of(s, t).untied() for t, s in finetuned.items()}
    expected = method(posed(Weights.of(base, "pre-trained").untied(), apart))
    merged = method(problem(base, finetuned))
    assert merged.ties == {}
    if method.needs.statistics or method.needs.inputs or method.needs.members > 1:
        return  # what is drawn for two tensors is not what is drawn for one
    for name in ("head", "embed", "layer.weight"):
        assert bits(merged[name]) == bits(expected[name])


def test_no_expert_at_all_is_refused():
    with pytest.raises(CheckpointError, match="at least one task"):
        problem(model(0), {})


def test_a_missing_statistic_is_refused():
    @dataclass(frozen=True)
    class Needy(TensorwiseMethod):
        needs = Needs(statistics=frozenset({"fisher"}))

        def merge(self, group):
            raise AssertionError

    with pytest.raises(OptionError, match=r"Needy needs the statistics \['fisher'\].*byom statistics fisher"):
        Needy()(replace(problem(*models()), statistics={}))


def test_every_option_is_titled_frozen_and_hashable(method):
    assert method.title
    assert hash(method) == hash(replace(method))
    assert set(method.grid) <= {field.name for field in fields(method)}
