"""Values in fewer bits: how far from native ones, what stays bit for bit, what is stored, and where it goes back."""

from dataclasses import replace
from math import lgamma, log

import pytest
import torch

from byom.checkpoint.adapters.export import adapters, write_one
from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.storage import tensor_files as storage
from byom.storage.signature import recorded, signature
from byom.variants.base import Shared, rounded
from byom.variants.base.delta import Delta, Served
from byom.variants.fft import ByomFft
from byom.variants.lora import ByomLora
from byom.variants.post_pruning import PostPruning
from byom.variants.prune_merge_prune import PruneMergePrune
from byom.variants.tsv_compress import TaskSingularVectorsCompress
from byom.variants.twin import TwinMerging
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece
from tests.problems import bits, module, same

SPARSE = [ByomFft(0.1), ByomFft(0.1, rescale="norm"), PostPruning(0.1), PruneMergePrune(0.1), TwinMerging(0.1)]
FACTORED = [TwinMerging(0.3, "svd"), TaskSingularVectorsCompress(0.3), ByomLora(3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CODES = ["bytes", "entropy"]
SHAPES = {"bias": (30,), "experts.gate_up_proj": (3, 8, 6), "matrix": (40, 30), "scale": (), "tall": (50, 1)}


def named(variant):
    return type(variant).__name__


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    reference = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    target = {n: v + 0.01 * torch.randn(v.shape, generator=generator) ** 3 for n, v in reference.items()}
    return tuple(Weights.of({n: v.to(dtype) for n, v in state.items()}) for state in (target, reference))


def moved(weights, reference):
    return {name: weights[name].double() - reference[name].double() for name in SHAPES}


def error(delta, target, reference):
    found, wanted = moved(delta.apply(reference), reference), moved(target, reference)
    squares = [sum((one[n] - wanted[n]).square().sum() for n in SHAPES) for one in (found, dict.fromkeys(SHAPES, 0.0))]
    return float((squares[0] / squares[1]).sqrt())


@pytest.mark.parametrize("variant", [ByomFft(1.0), PostPruning(1.0, positions="entropy"), TwinMerging(1.0)], ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_density_1_eight_bits_are_within_half_a_step(variant, dtype):
    target, reference = pair(dtype)
    delta = replace(variant, values="int8").delta(target, reference)
    for name, difference in moved(target, reference).items():
        step = float(difference.abs().max()) / 127
        half = 0.5001 * step + torch.finfo(dtype).eps * target[name].double().abs()  # the sum is rounded once
        assert bool(((delta.apply(reference)[name].double() - target[name].double()).abs() <= half).all())


@pytest.mark.parametrize("values", ["native", "bf16", "int8", "int2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_moved_is_the_reference_bit_for_bit(values, dtype):
    target, reference = pair(dtype)
    still = torch.zeros(40, dtype=torch.bool)
    still[::3] = True
    base = reference.state() | {"matrix": torch.where(still[:, None], -0.0, reference["matrix"])}
    state = target.state() | {"matrix": torch.where(still[:, None], base["matrix"], target["matrix"])}
    delta = ByomFft(1.0, values=values, positions="entropy").delta(Weights.of(state), Weights.of(base))
    assert bits(delta.apply(Weights.of(base))["matrix"][still]) == bits(base["matrix"][still])
    nothing = ByomFft(1.0, values=values).delta(Weights.of(base), Weights.of(base))
    assert (nothing.nbytes == 0) == (values != "native") and same(nothing.apply(Weights.of(base)), base)


@pytest.mark.parametrize("variant", [*SPARSE, *FACTORED], ids=named)
def test_fewer_bits_are_fewer_bytes_and_farther_from_native(variant):
    target, reference = pair()
    bits = ("native", "bf16", "int8", "int4", "int2")
    every = [replace(variant, values=values).delta(target, reference) for values in bits]
    sizes = [delta.nbytes for delta in every]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.9 * sizes[2]
    errors = [error(delta, target, reference) for delta in every]
    assert errors[1] == pytest.approx(errors[0], abs=2e-3) and errors[2] == pytest.approx(errors[0], abs=2e-2)
    assert errors[2:] == pytest.approx(sorted(errors[2:]), abs=2e-3)  # rounding may happen to help a little


@pytest.mark.parametrize("values", ["native", "bf16", "int4"])
@pytest.mark.parametrize("variant", SPARSE, ids=named)
def test_entropy_changes_bytes_of_positions_alone(variant, values):
    target, reference = pair()
    plain, coded = (replace(variant, values=values, positions=each).delta(target, reference) for each in CODES)
    assert same(plain.apply(reference), coded.apply(reference))
    assert coded.nbytes < plain.nbytes and coded.stored_parameters == plain.stored_parameters


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_four_bits_at_their_entropy(share):
    """Return what a table shows: positions near log2 C(n, k) bits, and values below 4 bits each."""
    generator = torch.Generator().manual_seed(0)
    reference = Weights.of({"w": torch.zeros(1000, 200)})
    target = Weights.of({"w": torch.randn(1000, 200, generator=generator)})
    delta = PostPruning(share, values="int4", positions="entropy").delta(target, reference)
    count, total = int(share * 200_000), 200_000
    places = (lgamma(total + 1) - lgamma(count + 1) - lgamma(total - count + 1)) / log(2) / 8
    assert len(delta.parts["w"]["coded"]) < 1.02 * places
    assert len(delta.parts["w"]["differences"]) < 0.8 * count / 2
    assert delta.nbytes == sum(tensor.nbytes for tensor in delta.parts["w"].values())


@pytest.mark.parametrize("variant", [SPARSE[1], SPARSE[4], *FACTORED], ids=named)
@pytest.mark.parametrize("values", ["bf16", "int3"])
def test_disk_memory_and_a_live_model_have_the_same_bits(variant, values, tmp_path):
    target, reference = pair()
    variant = replace(variant, values=values, **({} if variant in FACTORED else {"positions": "entropy"}))
    delta = variant.delta(target, reference)
    opened = Bundle.open(Bundle(reference, {"task": delta}).save(tmp_path / "bundle"))
    assert opened.deltas["task"].variant == variant and opened.deltas["task"].nbytes == delta.nbytes
    assert same(opened.weights("task"), delta.apply(reference))
    live = module(reference.state())
    handle = opened.attach(live)
    handle.switch("task")
    assert same(live.state_dict(), delta.apply(reference))
    handle.switch(None)
    assert same(live.state_dict(), reference)


def test_a_live_model_counts_the_values_that_it_decoded():
    target, reference = pair()
    kept = {}
    for values in ("native", "int4"):
        bundle = Bundle(reference, {"task": ByomFft(0.1, "tensor", values=values).delta(target, reference)})
        handle = bundle.attach(module(reference.state()))
        handle.switch("task")
        kept[values] = handle.cached_bytes
        assert "entries of 4 tensors in place" in handle.road("task")
    assert kept["int4"] >= 1.9 * kept["native"] - 8


def test_vectors_stored_whole_take_eight_bits_at_least():
    target, reference = pair()
    for values, expected in (("int8", 8), ("int2", 8)):
        delta = TaskSingularVectorsCompress(0.3, values=values).delta(target, reference)
        for name in ("bias", "scale", "tall"):
            assert int(delta.parts[name]["differences"][0]) % rounded.CODED == expected
            assert error_of(delta, name, target, reference) < 0.02
    matrix = ByomFft(1.0, values="int2").delta(target, reference)
    assert int(matrix.parts["matrix"]["differences"][0]) % rounded.CODED == 2


def error_of(delta, name, target, reference):
    wanted = target[name] - reference[name]
    return float((delta.apply(reference)[name] - target[name]).norm() / wanted.norm())


def test_singular_vectors_share_a_scale_which_goes_into_the_singular_value():
    target, reference = pair()
    native, fewer = (TaskSingularVectorsCompress(0.3, values=v).delta(target, reference) for v in ("native", "int4"))
    plain, stored = native.parts["matrix"], fewer.parts["matrix"]
    left, right = rounded.rounded(plain["left"], 4, 0), rounded.rounded(plain["right"], 4, 1)
    assert torch.equal(rounded.unpack(stored["left"], 1200), left.codes)
    assert torch.equal(rounded.unpack(stored["right"], 1200), right.codes)
    assert torch.equal(stored["singular"], plain["singular"] * left.scale[0] * right.scale[:, 0])
    product = (left.codes * left.scale * plain["singular"]) @ (right.codes * right.scale)
    assert torch.allclose(fewer.apply(reference)["matrix"], reference["matrix"] + product, rtol=1e-5, atol=1e-6)


def test_golden():
    reference = Weights.of({"w": torch.full((2, 8), 0.5)})
    state = torch.full((2, 8), 0.5)
    state[0, 1], state[1, 6] = 0.5 + 0.875, 0.5 - 0.25
    delta = ByomFft(0.125, values="int4").delta(Weights.of({"w": state}), reference)
    stored = delta.parts["w"]
    assert stored["gap8"].tolist() == [1, 12] and stored["scale"].item() == 0.125
    assert stored["differences"].tolist() == [4, 1, 2, 0x5E]  # 4 bits, 1 axis of 2, 7 + 7 and -2 + 7
    assert torch.equal(delta.apply(reference)["w"], state)


def test_adapters_keep_the_integers_of_their_factors():
    _, reference = pair()
    generator = torch.Generator().manual_seed(1)
    pieces = {"matrix": [Piece(0, torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator))]}
    target = Adapted(reference, pieces, {"bias": reference["bias"] + 0.1}, "task")
    variant = ByomLora(4, values="int8")
    delta = variant.delta(target, reference)
    assert {name: sorted(parts) for name, parts in delta.parts.items()} == {
        "bias": ["all", "differences", "scale"],
        "matrix": ["left@0", "right@0", "singular@0"],
    }
    wanted = target["matrix"] - reference["matrix"]
    assert (delta.apply(reference)["matrix"] - target["matrix"]).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("variant", [ByomLora(3, values="int4"), TaskSingularVectorsCompress(0.3, values="int2")])
def test_peft_gets_the_factors_that_are_put_back(variant, tmp_path):
    names = ("attention.bias", "attention.weight")
    made = [{n: w[old] for n, old in zip(names, ("bias", "matrix"), strict=True)} for w in pair()]
    target, reference = (Weights.of({n: v[:30] for n, v in state.items()}) for state in made)
    delta = variant.delta(target, reference)
    [folder] = adapters(Served(reference, {"task": delta}), tmp_path / "export", base_model="base")
    alone = write_one(Served(reference, {"task": delta}), "task", tmp_path / "alone", base_model="base")
    file = storage.TensorFiles(folder / "adapter_model.safetensors")
    assert storage.TensorFiles(alone / "adapter_model.safetensors").read(next(iter(file.specs))).is_floating_point()
    held = {name.removeprefix("base_model.model.attention."): file.read(name) for name in file.specs}
    served = delta.apply(reference)
    product = held["lora_B.weight"] @ held["lora_A.weight"]
    assert torch.allclose(reference["attention.weight"] + product, served["attention.weight"], rtol=1e-5, atol=1e-6)
    assert any(bits(value) == bits(served["attention.bias"]) for name, value in held.items() if "bias" in name)


def test_peft_refuses_sparse_differences_of_any_bits(tmp_path):
    target, reference = pair()
    served = Served(reference, {"task": ByomFft(0.1, values="int4").delta(target, reference)})
    with pytest.raises(OptionError, match="BYOM-FFT has no low-rank difference"):
        adapters(served, tmp_path / "export", base_model="base")


# signatures, records, refusals


@pytest.mark.parametrize("variant", [*SPARSE, *FACTORED], ids=named)
def test_the_defaults_name_and_record_nothing(variant):
    assert "values" not in recorded(variant) and "positions" not in recorded(variant)
    assert recorded(replace(variant, values="int4"))["values"] == "int4"
    assert signature(replace(variant, values="int4")) != signature(variant) == signature(replace(variant))


@pytest.mark.parametrize("kind", [ByomFft, TwinMerging, TaskSingularVectorsCompress, ByomLora])
def test_unknown_bits_are_refused(kind):
    with pytest.raises(OptionError, match=r"byom\.values=int7.*native, bf16, int8"):
        kind(values="int7")
    if hasattr(kind, "positions"):
        with pytest.raises(OptionError, match=r"byom\.positions=zip.*bytes or entropy"):
            kind(positions="zip")


def test_an_option_that_would_change_nothing_is_refused():
    with pytest.raises(OptionError, match=r"byom\.compress=svd stores no positions"):
        TwinMerging(compress="svd", positions="entropy")


def test_values_that_rounding_takes_beyond_float16_are_refused():
    reference = Weights.of({"w": torch.zeros(4, 2, dtype=torch.float16)})
    largest = torch.tensor([[65504.0, 65504], [30000, 1], [2, 3], [-9000, 7]], dtype=torch.float16)
    delta = PostPruning(1.0, values="int3").delta(Weights.of({"w": largest}), reference)
    delta.parts["w"]["scale"].mul_(1.1)
    with pytest.raises(CheckpointError, match=r"beyond what torch\.float16 holds.*pack again"):
        delta.apply(reference)["w"]


def spoiled(variant, name, **parts):
    target, reference = pair()
    delta = variant.delta(target, reference)
    held = {part: tensor for part, tensor in (delta.parts[name] | parts).items() if tensor is not None}
    return Delta(variant, {name: held}, {name: SHAPES[name]}).apply(reference)[name]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"scale": None}, "integers without their 'scale'"),
        ({"scale": torch.empty(0)}, "integers without their 'scale'"),
        ({"gap8": None}, "values and their positions are not stored together"),
        ({"differences": torch.zeros(3, dtype=torch.uint8)}, "coded integers are corrupt"),
        ({"differences": rounded.pack(torch.ones(5, dtype=torch.int8), 4)}, "positions where 5 are expected"),
        ({"differences": rounded.pack(torch.ones(2, 2, dtype=torch.int8), 4)}, r"shape \(2, 2\) are no flat ones"),
        ({"differences": rounded.pack(torch.ones(1201, dtype=torch.int8), 4)}, "of 1200 values"),
    ],
)
def test_corrupt_differences_are_refused(parts, said):
    with pytest.raises(CheckpointError, match=said):
        spoiled(ByomFft(0.1, values="int4"), "matrix", **parts)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"left": None}, "integers without their 'left'"),
        ({"singular": None}, "integers without their 'singular'"),
        ({"singular": torch.ones(2)}, r"'left' of shape \(40, 9\) does not fit \(2,\) singular values"),
        ({"right": rounded.pack(torch.ones(8, 30, dtype=torch.int8), 4)}, r"'right' of shape \(8, 30\) does not fit"),
        ({"left": rounded.pack(torch.ones(30, 9, dtype=torch.int8), 4)}, r"factors \(30, 9\) and"),
        ({"left": torch.zeros(3, dtype=torch.uint8)}, "coded integers are corrupt"),
    ],
)
def test_corrupt_singular_vectors_are_refused(parts, said):
    with pytest.raises(CheckpointError, match=said):
        spoiled(TaskSingularVectorsCompress(0.3, values="int4"), "matrix", **parts)


def test_positions_in_memory_are_places_in_order():
    reference = torch.zeros(9)
    for places in ([3, 3], [1, 9], [-1, 2]):
        parts = {"positions": torch.tensor(places), "values": torch.ones(2)}
        with pytest.raises(CheckpointError, match="not 2 ascending ones of 9 places"):
            ByomFft().unpack(parts, Shared(reference))


def test_differences_of_fp64_that_no_bfloat16_holds_are_refused():
    reference = Weights.of({"w": torch.zeros(3, dtype=torch.float64)})
    target = Weights.of({"w": torch.full((3,), 1e200, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match=r"byom\.values=native"):
        ByomFft(1.0, values="bf16").delta(target, reference)
    assert ByomFft(1.0, values="int4").delta(target, reference).apply(reference)["w"].tolist() == pytest.approx(
        [1e200] * 3
    )
