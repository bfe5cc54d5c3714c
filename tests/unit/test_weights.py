"""`Weights`: lazy, pure, and an algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from byom.errors import CheckpointError, WeightsMismatch
from byom.weights import Weights
from tests.problems import BUFFERS, FLOATS, TIED, bits, counted, grid, model, models, same

HALF = [torch.bfloat16, torch.float16]
ALL = [*HALF, torch.float32, torch.float64]


@pytest.fixture(params=["memory", "disk"])
def place(request, tmp_path):
    """Give weights that live in memory or on disk, in several shards."""

    def put(state, name="model"):
        held = Weights.of(state, name)
        return held if request.param == "memory" else Weights.open(held.save(tmp_path / name, shard_bytes=100))

    return put


def test_algebra_selection_and_metadata_read_nothing():
    (a, first), (b, second) = counted(Weights.of(model(1))), counted(Weights.of(model(2)))
    taus = [b - a, 2 * b - a, -(b - a)]
    merged = (a + 0.3 * sum(taus) / 2).select(lambda name: name != "one")
    assert merged.keys() and merged.canonical() and merged.mergeable() and merged.numel and repr(merged)
    assert merged.shape("embed") == (7, 5) and merged.dtype("embed") == torch.float32
    assert a != b and a == a and len(merged) == len(a) - 1 and "one" not in merged
    assert first == second == []


def test_indexing_reads_only_that_tensor():
    (a, first), (b, second) = counted(Weights.of(model(1))), counted(Weights.of(model(2)))
    _ = (a + (b - a))["scale"]
    assert set(first) == set(second) == {"scale"}


def test_equality_compares_identity():
    assert Weights.of(model(1)) != Weights.of(model(1))


def test_values_follow_the_formula():
    base, tuned = models(2)
    theta, tasks = Weights.of(base), [Weights.of(state) for state in tuned.values()]
    merged = theta + 0.3 * sum(task - theta for task in tasks)
    a, b = (state["layer.weight"] for state in tuned.values())
    zero = base["layer.weight"]
    assert torch.equal(merged["layer.weight"], zero + 0.3 * ((a - zero) + (b - zero)))


def test_negation_forgets_what_addition_learns():
    base, tuned = models(1, values=grid)
    theta, task = Weights.of(base), Weights.of(tuned["task1"])
    tau = task - theta
    forgotten = theta + -tau
    assert torch.equal(forgotten["embed"], 2 * base["embed"] - tuned["task1"]["embed"])
    assert same(forgotten + tau, theta) and same(theta - tau, forgotten)


def test_analogy_is_c_plus_b_minus_a():
    base, tuned = models(3, values=grid)
    theta, (a, b, c) = Weights.of(base), [Weights.of(state) for state in tuned.values()]
    analogy = theta + ((c - theta) + ((b - theta) - (a - theta)))
    expected = tuned["task3"]["embed"] + tuned["task2"]["embed"] - tuned["task1"]["embed"]
    assert torch.equal(analogy["embed"], expected)


def test_sum_of_one_task_vector_is_that_vector():
    a, b = Weights.of(model(1)), Weights.of(model(2))
    assert same(sum([b - a]), b - a)


@given(st.integers(0, 1000), st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 4.0]))
@settings(max_examples=25, deadline=None)
def test_laws_of_a_vector_space(seed, factor):
    a, b, c = (Weights.of(model(seed + i, values=grid)) for i in range(3))
    for left, right in [
        (a + b - b, a), ((a + b) + c, a + (b + c)), (factor * (b - a), factor * b - factor * a),
        (1 * a, a), (-1 * -a, a), (a / 2, 0.5 * a), (a * 3, 3 * a),
    ]:  # fmt: skip
        assert all(torch.equal(left[name], right[name]) for name in FLOATS)


@pytest.mark.parametrize("odd", [None, "weights", 1, 2.5])
def test_only_weights_are_added(odd):
    with pytest.raises(TypeError):
        Weights.of(model(1)) + odd


@pytest.mark.parametrize("odd", [None, "weights", Weights.of(model(1))])
def test_only_numbers_scale(odd):
    for scale in (lambda a: a * odd, lambda a: a / odd):
        with pytest.raises(TypeError):
            scale(Weights.of(model(1)))


# dtypes


@pytest.mark.parametrize("dtype", ALL)
def test_sums_and_multiples_keep_the_dtype_of_the_left(dtype):
    a, b = Weights.of(model(1, dtype)), Weights.of(model(2))
    for result in (a + b, 0.5 * a, -a, a / 3):
        assert result.dtype("embed") == result["embed"].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_differences_of_half_precision_are_exact_in_fp32(dtype):
    a, b = model(1, dtype), model(2, dtype)
    difference = Weights.of(b) - Weights.of(a)
    assert difference.dtype("embed") == torch.float32
    assert torch.equal(difference["embed"], b["embed"].float() - a["embed"].float())


def test_fp64_is_never_narrowed():
    a, b = model(1, torch.float64), model(2, torch.float64)
    difference = Weights.of(b) - Weights.of(a)
    assert difference.dtype("embed") == torch.float64
    assert torch.equal(difference["embed"], b["embed"] - a["embed"])


@pytest.mark.parametrize("dtype", HALF)
def test_an_expression_rounds_once(dtype):
    a, b, c = (model(i, dtype) for i in (1, 2, 3))
    result = Weights.of(a) + Weights.of(b) + Weights.of(c)
    exact = a["embed"].float() + b["embed"].float() + c["embed"].float()
    assert torch.equal(result["embed"], exact.to(dtype))


def test_buffers_come_from_the_left_operand():
    a, b = model(1), model(2)
    for result in (Weights.of(a) + Weights.of(b), Weights.of(a) - Weights.of(b), 3 * Weights.of(a)):
        assert all(bits(result[name]) == bits(a[name]) for name in BUFFERS)


# names, shapes and ties


def test_names_that_differ_are_listed():
    a, b = model(1), model(2)
    del a["one"], b["scale"]
    with pytest.raises(WeightsMismatch, match=r"scale only in the first, one only in the second.*heads") as error:
        Weights.of(a, "left.safetensors") - Weights.of(b, "right.safetensors")
    assert "left.safetensors" in str(error.value) and "right.safetensors" in str(error.value)


def test_many_names_that_differ_are_counted():
    a = {f"n{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(WeightsMismatch, match="n0, n1, n2, n3, n4 and 4 more"):
        Weights.of(a) + Weights.of({"n0x": torch.zeros(1)})


def test_shapes_that_differ_are_listed():
    a = model(1)
    with pytest.raises(WeightsMismatch, match=r"'one' \(1,\) and \(2,\).*task heads"):
        Weights.of(a) + Weights.of(a | {"one": torch.zeros(2)})


def test_broadcasting_is_refused():
    with pytest.raises(WeightsMismatch):
        Weights.of({"a": torch.zeros(3)}) + Weights.of({"a": torch.zeros(1)})


def test_an_unknown_name_is_refused():
    with pytest.raises(CheckpointError, match=r"left has no tensor 'nope'"):
        Weights.of(model(1), "left")["nope"]


def test_tied_tensors_count_once():
    weights = Weights.of(model(1))
    assert weights.ties == TIED
    assert "head" in weights and "head" not in weights.canonical()
    assert weights.numel == sum(torch.Size(shape).numel() for shape in FLOATS.values())
    flat = torch.cat([weights[name].reshape(-1) for name in FLOATS])
    assert weights.norm() == pytest.approx(float(flat.norm()))


def test_ties_survive_save_and_open(tmp_path):
    saved = Weights.open((Weights.of(model(1)) * 2).save(tmp_path / "model"))
    assert saved.ties == TIED
    assert bits(saved["head"]) == bits(saved["embed"])
    assert saved.materialise().ties == TIED
    assert (
        sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 2 * Weights.of(model(1)).numel * 4 + 2000
    )


def test_a_view_of_another_shape_is_no_tie():
    storage = torch.arange(6.0)
    weights = Weights.of({"a": storage, "b": storage.view(2, 3), "c": storage[:3], "d": storage.view(3, 2).t()})
    assert weights.ties == {}


def test_empty_tensors_are_no_ties():
    assert Weights.of({"a": torch.zeros(0, 3), "b": torch.zeros(0, 3)}).ties == {}


def test_an_alias_has_the_checksum_of_its_tensor(place):
    weights = place(model(1))
    assert weights.checksum("head") == weights.checksum("embed") != weights.checksum("one")


@pytest.mark.parametrize("op", [Weights.__add__, Weights.__sub__])
def test_what_one_model_ties_and_another_does_not_is_two_tensors_in_the_result(op):
    tied, free = model(1), model(2)
    free["head"] = free["head"] + 1
    for left, right in [(tied, free), (free, tied)]:
        result = op(Weights.of(left), Weights.of(right))
        assert result.ties == {}
        for name in ("embed", "head"):
            assert torch.equal(result[name], op(Weights.of({name: left[name]}), Weights.of({name: right[name]}))[name])


def test_select_keeps_what_satisfies_it():
    weights = Weights.of(model(1)).select(lambda name: name.startswith("layer"))
    assert weights.keys() == ["layer.bias", "layer.weight"]
    with pytest.raises(CheckpointError, match="'embed'"):
        weights["embed"]


def test_select_keeps_ties_and_frees_an_alias_of_what_is_dropped(tmp_path):
    weights = Weights.of(model(1))
    assert weights.select(lambda name: name in ("embed", "head")).ties == TIED
    freed = weights.select(lambda name: name == "head")
    assert freed.canonical() == ["head"] and bits(freed["head"]) == bits(weights["embed"])
    assert same(Weights.open(freed.save(tmp_path / "freed")), freed)


# purity


def test_reading_is_pure(place):
    base, tuned = models(2)
    a, b = place(base, "a"), place(tuned["task1"], "b")
    merged = a + 0.3 * (b - a)
    forth = {name: bits(merged[name]) for name in merged}
    back = {name: bits(merged[name]) for name in reversed(merged.keys())}
    assert forth == back == {name: bits(merged.materialise()[name]) for name in merged}


def test_disk_and_memory_give_the_same_bits(tmp_path):
    for dtype in ALL:
        held = Weights.of(model(1, dtype))
        opened = Weights.open(held.save(tmp_path / str(dtype), shard_bytes=150))
        assert same(opened, held) and opened.ties == held.ties
        assert same((0.3 * opened - opened).materialise(), 0.3 * held - held)


def test_inputs_are_never_modified():
    a, b = model(1), model(2)
    before = [{name: bits(tensor) for name, tensor in state.items()} for state in (a, b)]
    left, right = Weights.of(a), Weights.of(b)
    for result in (left + right, left - right, -left, left / 2, 0.3 * sum([left, right])):
        result.materialise().norm()
    assert before == [{name: bits(tensor) for name, tensor in state.items()} for state in (a, b)]


def test_materialise_reads_once():
    weights, reads = counted(Weights.of(model(1)))
    held = weights.materialise()
    assert sorted(reads) == weights.canonical()
    assert same(held, weights.select(lambda _: True)) and held.ties == TIED
    before = len(reads)
    held.state(), held.norm(), held.fingerprint()
    assert len(reads) == before


# fingerprints and finite values


@pytest.mark.parametrize("dtype", ALL)
def test_fingerprint_is_that_of_the_file(tmp_path, dtype):
    held = Weights.of(model(1, dtype))
    for shard_bytes in (60, 10_000):
        assert Weights.open(held.save(tmp_path / "model", shard_bytes)).fingerprint() == held.fingerprint()


def test_fingerprint_of_a_file_reads_no_tensor(tmp_path, monkeypatch):
    opened = Weights.open(Weights.of(model(1)).save(tmp_path / "model"))
    monkeypatch.setattr(opened, "_read", None)
    assert opened.fingerprint() == Weights.of(model(1)).fingerprint()


def test_fingerprint_sees_ties():
    shared = torch.randn(3, 2)
    tied, apart = Weights.of({"a": shared, "b": shared}), Weights.of({"a": shared, "b": shared.clone()})
    assert tied.ties and not apart.ties and tied.fingerprint() != apart.fingerprint()
    assert tied.fingerprint() != Weights.of({"a": shared}).fingerprint()


def test_fingerprint_sees_with_which_tensor_one_is_tied():
    one, two = torch.zeros(2), torch.ones(2)
    first, second = (Weights.of({"a": one, "b": two, "c": tied}) for tied in (one, two))
    assert first.ties == {"c": "a"} and second.ties == {"c": "b"} and first.fingerprint() != second.fingerprint()


def test_fingerprint_ignores_key_order_and_origin():
    state = model(1)
    assert Weights.of(dict(reversed(state.items())), "b").fingerprint() == Weights.of(state, "a").fingerprint()


@pytest.mark.parametrize("name", [name for name, shape in FLOATS.items() if torch.Size(shape).numel()])
def test_fingerprint_sees_one_bit(name):
    changed = model(1)
    changed[name] = changed[name].clone()
    changed[name].view(torch.int32).reshape(-1)[-1] ^= 1
    changed["head"] = changed["embed"]
    assert Weights.of(changed).fingerprint() != Weights.of(model(1)).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"one": torch.zeros(1, 1)}, {"one": torch.zeros(1, dtype=torch.int32)}, {"two": torch.zeros(1)},
        {"head": model(1)["embed"].clone()}, {"empty": torch.zeros(0, 4)}, {"one": torch.tensor([-0.0])},
    ],
    ids=["shape", "dtype", "name", "untied", "empty shape", "minus zero"],
)  # fmt: skip
def test_fingerprint_sees_names_shapes_dtypes_and_ties(change):
    state = model(1) | {"one": torch.zeros(1)}
    assert Weights.of(state | change).fingerprint() != Weights.of(state).fingerprint()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ALL)
def test_what_is_not_finite_is_refused_by_name_and_file(tmp_path, bad, dtype):
    state = model(1, dtype)
    folder = Weights.of(state).save(tmp_path / "expert")
    state["layer.weight"][2, 3] = bad
    save_file(state | {"head": state["head"].clone()}, folder / "model.safetensors")
    weights = Weights.open(folder)
    with pytest.raises(
        CheckpointError, match=r"expert: tensor 'layer.weight' has 1 of 24 values.*NaN.*Use a checkpoint"
    ):
        weights.read_finite("layer.weight")
    for name in {*weights} - {"layer.weight"}:
        assert bits(weights.read_finite(name)) == bits(state[name])


def test_overflow_of_a_merged_model_is_refused():
    large = Weights.of({"a": torch.tensor([60000.0], dtype=torch.float16)})
    with pytest.raises(CheckpointError, match="'a'"):
        (large + large).read_finite("a")
