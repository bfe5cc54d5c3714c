"""Sparse patches: bit-equal round trips, beside a plain application of the format, and refusals by name."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from byom.checkpoint.bundle import Bundle
from byom.checkpoint.patch import difference, read_patch, write_patch, write_task_patch
from byom.errors import CheckpointError, OptionError, WeightsMismatch
from byom.merge.average import Average
from byom.variants.base.delta import READOUT, Delta, Served
from byom.variants.surgery import RepresentationSurgery
from byom.weights import Spec, Weights
from tests.problems import models, options, problem, same

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
VARIANTS = ["fft", "post_pruning", "lora", "emr", "t_switch", "tall_mask", "twin", "single_task", "tsv_compress"]


def applied(file, state):
    """Apply a patch as its format says, with torch alone."""
    state, held = dict(state), load_file(file)
    for key in held:
        if key.endswith(".indices"):
            name = key.removesuffix(".indices")
            flat = state[name].clone().reshape(-1)
            flat.index_copy_(0, held[key].long(), held[f"{name}.values"])
            state[name] = flat.reshape(state[name].shape)
    return state


def header(file):
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_round_trip_has_the_bits_of_the_model(dtype, tmp_path):
    base, tuned = models(1, dtype)
    tuned = tuned["task1"] | {name: base[name] for name in ("counter", "flags", "layer.bias")}
    reference, weights = Weights.of(base, "base"), Weights.of(tuned, "tuned")
    file = write_patch(weights, reference, tmp_path / "patch.safetensors", model_version=3)
    held = load_file(file)
    assert {name.rpartition(".")[0] for name in held} == {"embed", "layer.weight", "one", "scale"}
    assert all(v.dtype == (torch.int32 if n.endswith("indices") else dtype) for n, v in held.items())
    assert all(v.ndim == 1 for v in held.values())
    patched = read_patch(file, reference)
    assert same(patched, weights) and patched.ties == reference.ties
    plain = applied(file, {n: v for n, v in base.items() if n != "head"})
    assert same(plain, {n: v for n, v in tuned.items() if n != "head"})


def test_the_header_counts_what_changed(tmp_path):
    base = torch.zeros(4, 5, dtype=torch.bfloat16)
    tuned = base.clone()
    tuned[1, 2], tuned[3, 4] = 1.5, -0.0
    same_ = {"b": torch.ones(5)}
    file = write_patch(Weights.of({"w": tuned} | same_), Weights.of({"w": base} | same_), tmp_path / "patch")
    assert load_file(file)["w.indices"].tolist() == [7, 19]
    assert load_file(file)["w.values"].tolist() == [1.5, -0.0]
    said = header(file)
    assert said["sparse"] == "True" and said["model_version"] == "0" and said["encoding"] == "raw"
    assert (said["num_changed_params"], said["total_changed_elements"], said["total_elements"]) == ("1", "2", "25")
    assert float(said["sparsity"]) == 1 - 2 / 25


@pytest.mark.parametrize("choice", VARIANTS)
def test_every_task_of_a_bundle_is_a_patch_of_its_reference(choice, tmp_path):
    given = problem(*models(2))
    variant = options("byom")[choice]
    reference = given.pretrained if variant.on == "pretrained" else Average()(given).materialise()
    served = variant.serve(given, reference)
    Bundle(served.reference, served.deltas, served.base).save(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    for task in bundle.deltas:
        file = write_task_patch(bundle, task, tmp_path / f"{task}.safetensors")
        back = read_patch(file, bundle.reference)
        assert same(back, {name: bundle.weights(task)[name] for name in back})
        assert load_file(file)


def test_what_a_task_keeps_outside_its_weights_is_no_patch(tmp_path):
    base = Weights.of(BASE, "base")
    served = Served(base, {"task": Delta(RepresentationSurgery(), {READOUT: {"down": torch.ones(2, 3)}})})
    with pytest.raises(OptionError, match="keeps a part of 'task' between features and head"):
        write_task_patch(served, "task", tmp_path / "p")
    with pytest.raises(OptionError, match="the bundle has no task 'tusk'; did you mean 'task'"):
        write_task_patch(served, "tusk", tmp_path / "p")


def test_equal_models_make_an_empty_patch(tmp_path):
    reference = Weights.of(models(0)[0], "base")
    file = write_patch(reference, reference, tmp_path / "patch")
    assert load_file(file) == {} and header(file)["num_changed_params"] == "0"
    assert same(read_patch(file, reference), reference)


def test_reading_is_lazy_and_reads_one_tensor(tmp_path):
    base, tuned = models(1)
    reference = Weights.of(base)
    file = write_patch(Weights.of(tuned["task1"]), reference, tmp_path / "patch")
    seen = []
    watched = reference.derived(lambda name: seen.append(name) or reference[name], "base")
    patched = read_patch(file, watched)
    assert not seen
    assert torch.equal(patched["layer.weight"], tuned["task1"]["layer.weight"])
    assert set(seen) == {"layer.weight"}


def test_entries_differ_by_their_bits_across_pieces(monkeypatch):
    monkeypatch.setattr("byom.checkpoint.patch.PIECE", 3)
    before = torch.tensor([0.0, 1, 2, 3, 4, float("nan"), 6])
    after = torch.tensor([-0.0, 1, 2, 5, 4, float("nan"), 7])
    found = difference(after, before)
    assert found.indices.tolist() == [0, 3, 6] and found.values.tolist() == [-0.0, 5, 7]
    assert found.values[0].signbit()
    turned = torch.arange(6.0).reshape(2, 3).mT
    assert difference(turned, turned.clone()).indices.tolist() == []


BASE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3)}


def foreign(file, header=None, **tensors):
    """Write a patch as others do, without notes."""
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, file, header or {"sparse": "True"})
    return file


def test_a_patch_of_others_is_read_in_any_order_of_its_positions(tmp_path):
    file = foreign(tmp_path / "p", w__indices=torch.tensor([5, 0], dtype=torch.int32), w__values=torch.tensor([9.0, 8]))
    assert read_patch(file, Weights.of(BASE))["w"].tolist() == [[8, 1, 2], [3, 4, 9]]


INT = torch.tensor([0, 5], dtype=torch.int32)
VALUES = torch.ones(2)
BROKEN = {
    "another parameter": ({"v__indices": INT, "v__values": VALUES}, None, "changes v, which base does not have"),
    "a position beyond": ({"w__indices": INT + 1, "w__values": VALUES}, None, "not different places of its 6"),
    "a negative position": ({"w__indices": INT - 1, "w__values": VALUES}, None, "not different places of its 6"),
    "a position twice": ({"w__indices": INT * 0, "w__values": VALUES}, None, "not different places of its 6"),
    "fewer values": ({"w__indices": INT, "w__values": VALUES[:1]}, None, "of one length"),
    "positions as fractions": ({"w__indices": INT.float(), "w__values": VALUES}, None, "int32 or int64"),
    "another dtype": ({"w__indices": INT, "w__values": VALUES.half()}, None, r"torch.float16 and the model's .*\.to"),
    "a whole tensor": ({"w": BASE["w"]}, None, "holds w, which are no positions"),
    "positions alone": ({"w__indices": INT}, None, "holds w.indices, which are no positions"),
    "no patch": ({"w__indices": INT, "w__values": VALUES}, {"format": "pt"}, "does not say sparse: True"),
    "gaps": (
        {"w__idx": INT, "w__val": VALUES}, {"sparse": "True", "encoding": "gap_delta"}, "encoded as gap_delta; write",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_before_it_is_applied(what, tmp_path):
    tensors, header, said = BROKEN[what]
    with pytest.raises(CheckpointError, match=said):
        read_patch(foreign(tmp_path / "p", header, **tensors), Weights.of(BASE, "base"))


def test_a_patch_of_another_model_and_a_damaged_one_are_refused(tmp_path):
    tuned = Weights.of(BASE | {"w": BASE["w"] + 1})
    file = write_patch(tuned, Weights.of(BASE), tmp_path / "p")
    other = Weights.of(BASE | {"w": BASE["w"] * 2}, "other")
    with pytest.raises(CheckpointError, match="taken to another model: its 'w' is not that of other"):
        read_patch(file, other)["w"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="'w.values' does not match its checksum|'w.indices' does not match"):
        read_patch(file, Weights.of(BASE))["w"]


def test_what_a_patch_cannot_say_is_refused_and_nothing_is_written(tmp_path):
    base, file = Weights.of(BASE, "base"), tmp_path / "p"
    with pytest.raises(WeightsMismatch, match=r"'b' is bfloat16 in mine and float32 in base.*weights.to\(torch.float"):
        write_patch(Weights.of({n: v.bfloat16() for n, v in BASE.items()}, "mine"), base, file)
    with pytest.raises(CheckpointError, match="mine: 'b' has NaN where it differs"):
        write_patch(Weights.of(BASE | {"b": torch.tensor([0, float("nan"), 0])}, "mine"), base, file)
    with pytest.raises(WeightsMismatch, match="only in"):
        write_patch(Weights.of({"w": BASE["w"]}, "mine"), base, file)
    with pytest.raises(OptionError, match="model_version=-1"):
        write_patch(base, base, file, model_version=-1)
    shared = torch.ones(2, 2)
    tied, apart = Weights.of({"a": shared, "c": shared}, "tied"), Weights.of({"a": shared, "c": shared + 1}, "apart")
    with pytest.raises(WeightsMismatch, match="'c' and 'a' are one tensor in tied and two in apart.*whole"):
        write_patch(apart, tied, file)
    assert not file.exists()


@pytest.mark.parametrize(("rows", "fits"), [(2**16, True), (2**16 + 1, False)])
def test_positions_beyond_int32_are_refused_by_name_before_anything_is_read(rows, fits, tmp_path):
    def read(name):
        raise LookupError(name)

    huge = Weights({"embed.weight": Spec((rows, 2**15), torch.bfloat16)}, read, origin="huge")
    error, said = (
        (LookupError, "embed") if fits else (CheckpointError, "'embed.weight' has 2,147,516,416 places.*whole")
    )
    with pytest.raises(error, match=said):
        write_patch(huge, huge, tmp_path / "p")


def test_names_that_end_like_parts_are_told_apart(tmp_path):
    base = {name: torch.zeros(3) for name in ("x", "x.values", "x.indices")}
    for moved in (("x",), ("x.values",), ("x", "x.values", "x.indices")):
        tuned = Weights.of(base | {name: torch.tensor([0.0, n + 1, 0]) for n, name in enumerate(moved)})
        file = write_patch(tuned, Weights.of(base), tmp_path / "p")
        assert same(read_patch(file, Weights.of(base)), tuned)
