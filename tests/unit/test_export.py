"""Adapters as they are written: names, settings and refusals, read back without PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from byom.__main__ import main
from byom.checkpoint.adapters.export import adapters
from byom.errors import CheckpointError, OptionError
from byom.functional.heads import Head
from byom.storage import tensor_files as storage
from byom.variants.base import sparse
from byom.variants.base.delta import Delta, Served
from byom.variants.fft import ByomFft
from byom.variants.lora import ByomLora
from byom.variants.single_task import SingleTask
from byom.variants.tsv_compress import TaskSingularVectorsCompress
from byom.weights import Weights

ROOT = "base_model.model."
SHAPES = {
    "model.attn.in_proj_bias": (12,),
    "model.attn.in_proj_weight": (12, 4),
    "model.attn.out_proj.bias": (4,),
    "model.attn.out_proj.weight": (4, 4),
    "model.conv.weight": (6, 3, 2, 2),
    "model.norm.bias": (4,),
    "model.norm.weight": (4,),
    "model.token": (1, 4),
    "model.words.weight": (9, 4),
}


def reference(**changed):
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return Weights.of(state | changed, "reference")


def factors(name, rank, start=None, rows=None, singular=True):
    generator = torch.Generator().manual_seed(rank)
    height, width = rows or SHAPES[name][0], torch.Size(SHAPES[name][1:]).numel()
    mark = "" if start is None else f"@{start}"
    left, right = torch.randn(height, rank, generator=generator), torch.randn(rank, width, generator=generator)
    made = {f"left{mark}": left, f"right{mark}": right}
    return made | ({f"singular{mark}": torch.rand(rank, generator=generator) + 0.5} if singular else {})


def served(parts, base=None, variant=None):
    base = base or reference()
    marked = any("@" in part for stored in parts.values() for part in stored)
    return Served(base, {"task": Delta(variant or (ByomLora() if marked else TaskSingularVectorsCompress()), parts)})


def written(folder, parts, module=None, **options):
    (made,) = adapters(served(parts), folder / "out", base_model="base", prefix="model.", module=module, **options)
    config = json.loads((made / "adapter_config.json").read_text())
    return config, load_file(made / "adapter_model.safetensors")


def whole(name, base=None):
    value = (base or reference())[name]
    return sparse.whole(value + 1, value)


def test_factors_carry_the_singular_values_evenly_and_scale_by_one(tmp_path):
    parts = factors("model.attn.out_proj.weight", 3)
    config, tensors = written(tmp_path, {"model.attn.out_proj.weight": parts})
    a, b = (tensors[f"{ROOT}attn.out_proj.lora_{factor}.weight"] for factor in "AB")
    assert_close(b @ a, parts["left"] * parts["singular"] @ parts["right"])
    assert_close(a.norm(dim=1) / parts["right"].norm(dim=1), parts["singular"].sqrt())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    assert config["target_modules"] == ["attn.out_proj"] and config["base_model_name_or_path"] == "base"
    assert not config["rank_pattern"] and config["modules_to_save"] is None and config["bias"] == "none"


def test_rows_of_fused_attention_become_modules_of_their_own(tmp_path):
    name = "model.attn.in_proj_weight"
    parts = factors(name, 1, 0, 4) | factors(name, 2, 8, 4, singular=False)
    config, tensors = written(tmp_path, {name: parts})
    assert config["target_modules"] == ["attn.q_proj", "attn.v_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {"attn.q_proj": 1, "attn.v_proj": 2}
    product = tensors[f"{ROOT}attn.v_proj.lora_B.weight"] @ tensors[f"{ROOT}attn.v_proj.lora_A.weight"]
    assert_close(product, parts["left@8"] @ parts["right@8"])


def test_a_fused_matrix_compressed_as_one_is_cut_in_three(tmp_path):
    parts = factors("model.attn.in_proj_weight", 2)
    _, tensors = written(tmp_path, {"model.attn.in_proj_weight": parts})
    products = [
        tensors[f"{ROOT}attn.{part}.lora_B.weight"] @ tensors[f"{ROOT}attn.{part}.lora_A.weight"]
        for part in ("q_proj", "k_proj", "v_proj")
    ]
    assert_close(torch.cat(products), parts["left"] * parts["singular"] @ parts["right"])


def test_a_linear_qkv_stays_whole_unless_its_rows_were_adapted_apart(tmp_path):
    base = Weights.of({"a.qkv.weight": torch.zeros(6, 2), "a.qkv.bias": torch.zeros(6)})
    one = {"left": torch.ones(6, 1), "right": torch.ones(1, 2)}
    third = {"left@2": torch.ones(2, 1), "right@2": torch.ones(1, 2)}
    for number, (parts, targets, split) in enumerate([(one, ["a.qkv"], False), (third, ["a.qkv.k_proj"], True)]):
        (made,) = adapters(served({"a.qkv.weight": parts}, base), tmp_path / str(number), base_model="base")
        assert json.loads((made / "adapter_config.json").read_text())["target_modules"] == targets
        assert json.loads((made.parent / "export.json").read_text())["split"] is split


def test_convolutions_and_embeddings_have_factors_of_their_own_shapes(tmp_path):
    model = nn.ModuleDict({"model": nn.ModuleDict({"words": nn.Embedding(9, 4), "conv": nn.Conv2d(3, 6, 2)})})
    parts = {name: factors(name, 2, 0) for name in ("model.conv.weight", "model.words.weight")}
    _, tensors = written(tmp_path, parts, model)
    assert tensors[f"{ROOT}conv.lora_A.weight"].shape == (2, 3, 2, 2)
    assert tensors[f"{ROOT}conv.lora_B.weight"].shape == (6, 2, 1, 1)
    a, b = tensors[f"{ROOT}words.lora_embedding_A"], tensors[f"{ROOT}words.lora_embedding_B"]
    kept = parts["model.words.weight"]
    assert_close((b @ a).T, kept["left@0"] * kept["singular@0"] @ kept["right@0"])


def test_whole_tensors_are_biases_of_adapted_modules_or_modules_kept_whole(tmp_path):
    base = reference()
    names = ("model.attn.out_proj.bias", "model.norm.bias")
    parts = {name: whole(name) for name in names}
    parts["model.attn.out_proj.weight"] = factors("model.attn.out_proj.weight", 1)
    config, tensors = written(tmp_path, parts)
    assert config["bias"] == "lora_only" and config["modules_to_save"] == ["norm"]
    assert_close(tensors[f"{ROOT}attn.out_proj.base_layer.bias"], base[names[0]] + 1)
    assert_close(tensors[f"{ROOT}norm.bias"], base[names[1]] + 1)
    assert_close(tensors[f"{ROOT}norm.weight"], base["model.norm.weight"])


def test_of_a_fused_bias_only_the_thirds_that_moved_are_kept(tmp_path):
    bias = reference()["model.attn.in_proj_bias"]
    parts = {"model.attn.in_proj_bias": sparse.whole(torch.cat([bias[:8], bias[8:] + 1]), bias)}
    parts["model.attn.in_proj_weight"] = factors("model.attn.in_proj_weight", 1, 0, 4)
    config, tensors = written(tmp_path, parts)
    assert config["bias"] == "none" and config["modules_to_save"] == ["attn.v_proj"]
    assert_close(tensors[f"{ROOT}attn.v_proj.weight"], reference()["model.attn.in_proj_weight"][8:])


def test_a_task_without_difference_gets_an_adapter_that_changes_nothing(tmp_path):
    parts = {"model.attn.out_proj.weight": factors("model.attn.out_proj.weight", 2)}
    both = served(parts)
    both = Served(both.reference, {**both.deltas, "idle": Delta(TaskSingularVectorsCompress(), {})})
    _, idle = adapters(both, tmp_path / "out", base_model="base", prefix="model.")
    assert not any(t.any() for t in load_file(idle / "adapter_model.safetensors").values())
    assert json.loads((idle / "adapter_config.json").read_text())["target_modules"] == ["attn.out_proj"]


def test_the_head_and_what_was_exported_lie_beside_the_adapter(tmp_path):
    head = Head(torch.eye(4)[:2], 20.0)
    parts = {"model.attn.out_proj.weight": factors("model.attn.out_proj.weight", 2)}
    written(tmp_path, parts, heads={"task": (head, ("cat", "dog"))}, notes={"suite": "pets"})
    file = tmp_path / "out" / "task" / "head.safetensors"
    assert_close(load_file(file)["weight"], head.weight)
    assert storage.read_notes(file)["classes"] == ["cat", "dog"]
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["suite"] == "pets" and record["reference"] == reference().fingerprint()
    assert record["tasks"]["task"] == {"rank": [2, 2], "modules": 1, "parameters": 16, "bytes": 64}


UNHOLDABLE = {
    "sparse": ({"model.norm.bias": sparse.gather(torch.ones(4), torch.eye(4)[0].bool())}, "BYOM-FFT.*byom=lora"),
    "raw": ({"model.token": whole("model.token")}, "model.token.*byom.rest=drop"),
    "raw factors": ({"model.token": factors("model.token", 1)}, "model.token"),
    "loose rows": ({"model.attn.in_proj_weight": factors("model.attn.in_proj_weight", 1, 2, 4)}, "rows 2 to 6"),
    "masks": ({"model.norm.bias": {"bits": torch.zeros(1, dtype=torch.uint8)}}, "no low-rank difference"),
}


@pytest.mark.parametrize("what", UNHOLDABLE)
def test_what_an_adapter_cannot_hold_is_refused_and_nothing_is_written(what, tmp_path):
    parts, why = UNHOLDABLE[what]
    parts = parts | {"model.attn.out_proj.weight": factors("model.attn.out_proj.weight", 1)}
    variant = ByomFft() if what == "sparse" else None
    with pytest.raises(OptionError, match=why):
        adapters(served(parts, variant=variant), tmp_path / "out", base_model="base", prefix="model.")
    assert not list(tmp_path.iterdir())


def test_whole_models_are_no_adapters(tmp_path):
    base = reference()
    parts = {name: {"values": base[name] + 1} for name in base}
    with pytest.raises(OptionError, match="Single-task has no low-rank difference"):
        adapters(served(parts, variant=SingleTask()), tmp_path / "out", base_model="base", prefix="model.")


def test_ties_nan_and_names_that_cannot_be_used_are_refused(tmp_path):
    name = "model.attn.out_proj.weight"
    state = reference().state()
    tied = Weights.of(state | {"model.twin.weight": state[name]})
    parts = {name: factors(name, 1)}
    with pytest.raises(OptionError, match="tied"):
        adapters(served(parts, tied), tmp_path / "out", base_model="base", prefix="model.")
    with pytest.raises(CheckpointError, match="NaN"):
        broken = {name: factors(name, 1) | {"left": torch.full((4, 1), torch.nan)}}
        adapters(served(broken), tmp_path / "out", base_model="base", prefix="model.")
    with pytest.raises(OptionError, match="prefix 'visual.'"):
        adapters(served(parts), tmp_path / "out", base_model="base", prefix="visual.")
    with pytest.raises(OptionError, match="cannot name a folder"):
        adapters(Served(reference(), {"reference": served(parts).deltas["task"]}), tmp_path, base_model="base")


def test_an_embedding_that_may_be_a_linear_layer_is_asked_about(tmp_path):
    base = Weights.of({"embeddings.words.weight": torch.zeros(4, 2)})
    parts = {"embeddings.words.weight": {"left": torch.ones(4, 1), "right": torch.ones(1, 2)}}
    with pytest.raises(OptionError, match="module="):
        adapters(served(parts, base), tmp_path / "out", base_model="base")


def test_modules_that_peft_would_take_for_one_kept_whole_are_kept_with_it_or_refused(tmp_path):
    base = Weights.of({f"{p}.{k}": torch.ones(2, 2) for p in ("norm", "a.norm", "b.lin") for k in ("weight",)})
    parts = {"norm.weight": sparse.whole(torch.zeros(2, 2), torch.ones(2, 2))}
    factored = {"left": torch.ones(2, 1), "right": torch.ones(1, 2)}
    (made,) = adapters(served(parts | {"b.lin.weight": factored}, base), tmp_path / "out", base_model="base")
    assert json.loads((made / "adapter_config.json").read_text())["modules_to_save"] == ["a.norm", "norm"]
    assert f"{ROOT}a.norm.weight" in load_file(made / "adapter_model.safetensors")
    with pytest.raises(OptionError, match="'a.norm'"):
        adapters(served(parts | {"a.norm.weight": factored}, base), tmp_path / "other", base_model="base")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    parts = {"model.attn.out_proj.weight": factors("model.attn.out_proj.weight", 1)}
    with pytest.raises(CheckpointError, match="mine.txt"):
        adapters(served(parts), tmp_path, base_model="base", prefix="model.")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["export", "pack"])
def test_a_command_without_a_folder_says_so(command, capsys):
    assert main([command, "byom=fft"]) == 1
    assert f"byom {command} FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["server=tgi"], "server=tgi is not known; use vllm"),
        (["server=vllm", "embeddings=maybe"], "embeddings=maybe is not known; use true or false"),
        (["embeddings=true"], "embeddings=true is for a server"),
    ],
    ids=str,
)
def test_the_command_refuses_servers_that_it_does_not_know(given, said, tmp_path, capsys):
    assert main(["export", str(tmp_path / "out"), *given, "byom=lora"]) != 0
    assert said in capsys.readouterr().err


def test_the_command_takes_the_server_out_of_its_options():
    from byom.cli.serve import _server

    assert _server(["out", "server=vllm", "byom=lora"]) == (["out", "byom=lora"], "vllm", False)
    assert _server(["out", "embeddings=True", "server=vllm"]) == (["out"], "vllm", True)
    assert _server(["out", "byom=lora"]) == (["out", "byom=lora"], None, False)
