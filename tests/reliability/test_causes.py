"""A refusal names what is wrong, and a remedy that works."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from byom.checkpoint import read
from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import CheckpointError, WeightsMismatch
from byom.merge.base import Problem
from byom.weights import Weights

STATE = {"embed.weight": torch.ones(6, 4), "layer.0.q.weight": torch.ones(4, 4), "layer.0.q.bias": torch.ones(4)}
BASE = Weights.of(STATE, "base")
OPENERS = {"open": Weights.open, "read": lambda path: read(path, BASE)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "web page.*resolve"),
        (b"\n <html lang=en>", "web page"),
        (b"Entry not found", "server's answer.*address"),
        (b'{"error":"Access to model x is restricted"}', "server's answer"),
        (b"", "is empty.*fetch it again"),
        (b"GGUF\3\0\0\0" + bytes(40), "GGUF file.*gguf_file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5.*from_tf"),
        (b"\x1f\x8b\x08" + bytes(40), "archive. Unpack"),
    ],
)  # fmt: skip
def test_what_came_in_place_of_a_file(tmp_path, opener, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} .*{message}"):
        OPENERS[opener](tmp_path / name)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "GGUF"),
        ("flax_model.msgpack", "Flax.*from_flax"),
        ("tf_model.h5", "HDF5"),
        ("model.onnx", "ONNX.*exported from"),
        ("weights.npz", "NumPy"),
    ],
)
def test_files_of_other_libraries_alone_or_in_a_folder(tmp_path, opener, name, message):
    (tmp_path / name).write_bytes(bytes(range(64)))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=rf"{name} .*{message}"):
            OPENERS[opener](path)


@pytest.mark.parametrize("opener", OPENERS)
def test_what_is_not_there(tmp_path, opener, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at org/name.*id of a repository.*hf download org/name"):
        OPENERS[opener]("org/name")
    with pytest.raises(CheckpointError, match="no checkpoint at .*absent; check the path"):
        OPENERS[opener](str(tmp_path / "absent"))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match="link to a file that is not there"):
        OPENERS[opener](tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="links to files that are not there"):
        OPENERS[opener](tmp_path)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors", "trainer_state.json"],
         "folder of a training run.*checkpoint-1000"),
        (["unet/a.safetensors", "vae/a.safetensors"], "folders in it. Give one of unet, vae"),
        (["__0_0.distcp"], "partitioned training run"),
        (["global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "partitioned training run"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "scheduler.pt"], "partitioned training run"),
        (["config.json"], r"no file of weights \(config.json\)"),
    ],
)  # fmt: skip
def test_folders_of_something_else(tmp_path, opener, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"is not a checkpoint: .*{message}"):
        OPENERS[opener](tmp_path)


def adapter(folder, tensors, **settings):
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "x/y"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


Q = {"layer.0.q.lora_A.weight": torch.ones(1, 4), "layer.0.q.lora_B.weight": torch.ones(4, 1)}


def test_weights_open_says_what_reads_adapters_and_pickles(tmp_path):
    adapter(tmp_path, Q)
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*byom\.Adapter\.open\(folder\)\.on\(base\)"):
        Weights.open(tmp_path)
    (tmp_path / "p").mkdir()
    torch.save(STATE, tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"PyTorch's own files \(pytorch_model\.bin\).*byom\.read_checkpoint"):
        Weights.open(tmp_path / "p")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is PyTorch's own file.*byom\.read_checkpoint"):
        Weights.open(tmp_path / "p" / "pytorch_model.bin")


def test_arrays_of_numpy_are_no_files_of_torch(tmp_path):
    np.savez(tmp_path / "weights.npz", a=np.ones(2))
    for opener in OPENERS.values():
        with pytest.raises(CheckpointError, match=r"weights\.npz holds arrays of NumPy"):
            opener(tmp_path / "weights.npz")


def test_factors_are_no_weights(tmp_path):
    save_file(Q, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsMismatch, match=r"factors of an adapter.*byom\.Adapter\.open"):
        BASE + Weights.open(tmp_path)
    with pytest.raises(CheckpointError, match="adapter that was not merged"):
        read(tmp_path, BASE)


def test_a_file_is_read_by_what_it_holds(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(save(STATE))
    torch.save(STATE, tmp_path / "x.safetensors")
    for name in ("pytorch_model.bin", "x.safetensors"):
        assert torch.equal(read(tmp_path / name, BASE).weights["embed.weight"], STATE["embed.weight"])


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json"]
)
def test_pointers_in_place_of_what_describes_the_weights(tmp_path, name):
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=f"{name} is a pointer of Git LFS"):
        read(tmp_path, BASE)


# vocabularies, rows, partitioned weights


def test_resized_vocabularies(tmp_path):
    resized = STATE | {"embed.weight": torch.ones(8, 4)}
    with pytest.raises(
        WeightsMismatch, match=r"vocabularies of different size: 'embed.weight' \(6, 4\) and \(8, 4\).*resize"
    ):
        Problem(BASE, {"a": Weights.of(resized, "a")})
    torch.save(resized, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\[8, 4\] where the backbone has \[6, 4\].*vocabularies.*resize_token"):
        read(tmp_path / "x.pt", BASE)


def test_other_shapes_are_no_vocabulary(tmp_path):
    with pytest.raises(WeightsMismatch, match="numbers of positions.*context length"):
        require(STATE | {"wpe.weight": torch.ones(3, 4)}, STATE | {"wpe.weight": torch.ones(5, 4)})
    with pytest.raises(WeightsMismatch, match="different shape.*task heads"):
        require(STATE | {"head.weight": torch.ones(3, 4)}, STATE | {"head.weight": torch.ones(5, 4)})
    torch.save(STATE | {"embed.weight": torch.ones(6, 8)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="choose the backbone of the same size"):
        read(tmp_path / "x.pt", BASE)


def require(a, b):
    return Problem(Weights.of(a, "a"), {"t": Weights.of(b, "b")})


def test_extra_rows_of_an_adapter(tmp_path):
    whole = adapter(tmp_path, Q | {"embed.weight": torch.ones(8, 4)}, modules_to_save=["embed"])
    with pytest.raises(CheckpointError, match=r"'embed.weight' has shape \(8, 4\) and \(6, 4\) in base.*resize_token"):
        Adapter.open(whole).on(BASE)["embed.weight"]
    words = {"embed.lora_embedding_A": torch.ones(1, 8), "embed.lora_embedding_B": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"factors of 'embed'.*vocabulary of another size.*resize_token"):
        Adapter.open(adapter(tmp_path, words)).on(BASE)


@pytest.mark.parametrize("name", ["layer.0.norm.weight", "classifier.weight"])
def test_partitioned_weights_are_empty(tmp_path, name):
    empty = {name: torch.ones(0)}
    with pytest.raises(CheckpointError, match=rf"'{name}' is empty \(shape \[0\]\).*ZeRO-3.*Gather"):
        Adapter.open(adapter(tmp_path, Q | empty, modules_to_save=[name.removesuffix(".weight")]))
    torch.save(STATE | empty, tmp_path / "x.pt")
    base = Weights.of(STATE | ({} if "class" in name else {name: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=rf"'{name}' is empty"):
        read(tmp_path / "x.pt", base)
    if "class" not in name:
        with pytest.raises(WeightsMismatch, match=rf"'{name}' is empty"):
            require(base.state(), STATE | empty)


# names


WRAPPED = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "_fsdp_wrapped_module.": lambda name: (
        f"_fsdp_wrapped_module.{name.replace('layer.0.', 'layer.0._fsdp_wrapped_module.')}"
    ),
    "_checkpoint_wrapped_module.": lambda name: name.replace("layer.0.", "layer.0._checkpoint_wrapped_module."),
    "both": lambda name: f"module.{name.replace('.q.', '._orig_mod.q._checkpoint_wrapped_module.')}",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wrappers_put_into_names(tmp_path, kind):
    wrapped = {WRAPPED[kind](name): value + 1 for name, value in STATE.items()}
    save_file(wrapped, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors", BASE).weights
    assert found.keys() == BASE.keys() and torch.equal(found["layer.0.q.bias"], torch.full((4,), 2.0))
    with pytest.raises(WeightsMismatch, match=r"same tensors, but in wrapped .*wrapper.*Weights\.of\(") as error:
        BASE + Weights.of(wrapped, "wrapped")
    weights = Weights.of(wrapped)
    remedy = str(error.value)[str(error.value).index("Weights.of(") :]
    assert eval(remedy, {"Weights": Weights, "weights": weights}).keys() == BASE.keys()


@pytest.mark.parametrize(
    "name", ["module.base_model.model.X", "_orig_mod.base_model.model.X", "base_model.model._fsdp_wrapped_module.X"]
)
def test_wrappers_in_names_of_adapters(tmp_path, name):
    adapter(tmp_path, Q)
    expected = Adapter.open(tmp_path).on(BASE)["layer.0.q.weight"]
    inner = {key.replace(".q.", "._checkpoint_wrapped_module.q."): value for key, value in Q.items()}
    save_file({name.replace("X", key): v for key, v in inner.items()}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(Adapter.open(tmp_path).on(BASE)["layer.0.q.weight"], expected)


def test_a_tensor_with_and_without_a_wrapper(tmp_path):
    save_file(STATE | {"module.layer.0.q.bias": torch.zeros(4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="one tensor with and without a wrapper"):
        read(tmp_path / "x.safetensors", BASE)


@pytest.mark.parametrize("start", ["base_model.model.", "model.", "transformer.", "bert.encoder."])
@pytest.mark.parametrize("more", [{}, {"lm_head.weight": torch.ones(6, 4)}])
@pytest.mark.parametrize("turned", [False, True])
def test_names_that_start_differently(start, more, turned):
    longer = Weights.of({f"{start}{name}": value for name, value in STATE.items()} | more, "longer")
    pair = (longer, BASE) if turned else (BASE, longer)
    with pytest.raises(
        WeightsMismatch, match=rf"names that start differently: with '{start}' in longer.*removeprefix\('{start}'\)"
    ):
        pair[0] - pair[1]


def test_two_different_starts():
    a, b = (
        Weights.of({f"{start}{name}": v for name, v in STATE.items()}, start) for start in ("model.", "transformer.")
    )
    with pytest.raises(WeightsMismatch, match=r"'model\.' in model\. and with 'transformer\.' in transformer\."):
        a + b


def test_other_architectures_are_not_said_to_start_differently():
    with pytest.raises(WeightsMismatch, match="Merge checkpoints of one architecture"):
        BASE + Weights.of(
            {"conv.weight": torch.ones(1), "fc.bias": torch.ones(1), "embed.weight": STATE["embed.weight"]}
        )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({n.replace("q.weight", "q.base_layer.weight"): v for n, v in STATE.items()}, "not merged.*merge_and_unload"),
        ({"_flat_param": torch.ones(44)}, "flat parameters of FSDP"),
        (STATE | Q, "not merged"),
    ],
)  # fmt: skip
def test_what_was_saved_too_early(tmp_path, tensors, message):
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "x.pt", BASE)


def renamed(message, weights):
    """Carry out the remedy that a message prints."""
    remedy = message[message.index("Weights.of(") :]
    depth, end = 0, 0
    for end, sign in enumerate(remedy):  # noqa: B007 - the place is needed after the loop
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if sign == ")" and not depth:
            break
    return eval(remedy[: end + 1], {"Weights": Weights, "weights": weights})


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ("model.layers.0.q", "model.encoder.layers.0.q"),
        ("my_module.layers.0.q", "module.my_module.layers.0.q"),
        ("layers.0.q", "_orig_mod.module.layers.0.q"),
        ("layers.0.q", "module._orig_mod.layers.0._checkpoint_wrapped_module.q"),
    ],
)
def test_the_names_that_are_printed_fit(base, expert):
    """Names of which a part agrees already, and words that end like a wrapper's, are left alone."""
    same = "module.embed" if expert.startswith(("module.", "_")) else "model.embed"
    ours = {f"{base}.weight": STATE["layer.0.q.weight"], f"{same.removeprefix('module.')}.weight": torch.ones(3, 4)}
    theirs = {f"{expert}.weight": STATE["layer.0.q.weight"], f"{same}.weight": torch.ones(3, 4)}
    first, second = Weights.of(ours, "base"), Weights.of(theirs, "expert")
    with pytest.raises(WeightsMismatch) as caught:
        Problem(first, {"task": second})
    assert renamed(str(caught.value), second).keys() == first.keys()


def test_a_base_with_names_of_a_wrapper(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    wrapped = Weights.of({name.replace("layer.", "layer._orig_mod."): t for name, t in STATE.items()}, "base")
    with pytest.raises(CheckpointError, match="in base their names have _orig_mod. in them.*Remove it") as caught:
        read(tmp_path, wrapped)
    assert read(tmp_path, renamed(str(caught.value), wrapped)).weights.keys() == BASE.keys()


def test_a_vocabulary_that_was_resized_with_its_bias():
    one, other = ({"model.shared.weight": torch.ones(n, 3), "final_logits_bias": torch.ones(1, n)} for n in (5, 6))
    with pytest.raises(WeightsMismatch, match="vocabularies of different size.*resize_token_embeddings"):
        Problem(Weights.of(one), {"task": Weights.of(other)})


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors.index.json", "index of a model in shards. Give the folder"), ("config.json", "settings")],
)
def test_a_table_in_place_of_weights(tmp_path, opener, name, message):
    (tmp_path / name).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
        OPENERS[opener](tmp_path / name)


@pytest.mark.parametrize("opener", OPENERS)
def test_a_bundle_in_place_of_a_model(tmp_path, opener):
    (tmp_path / "bundle.json").write_text("{}")
    save_file({"embed.weight//values": torch.ones(2)}, tmp_path / "task.safetensors")
    with pytest.raises(CheckpointError, match="it is a bundle.*Bundle.open"):
        OPENERS[opener](tmp_path)
