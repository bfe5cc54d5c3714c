"""Exported adapters loaded by PEFT: a model with an adapter computes what byom's own weights compute.

PEFT adds the product in its own order of operations, so features agree to 1e-5 and not bit for bit. Trained biases of
adapted modules are written as ``bias="lora_only"``: PEFT puts them into the model itself and takes one such adapter.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.__main__ import main
from byom.backbone.split_attention import split
from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.adapters.export import adapters
from byom.cli import config
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.pipeline.labs import laboratory
from byom.variants.lora import ByomLora
from byom.variants.tsv_compress import TaskSingularVectorsCompress
from byom.weights import Weights
from tests.e2e.tiny import overrides

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]


class Wrapped(nn.Module):
    """A model inside another, as encoders hold it."""

    def __init__(self, model):
        super().__init__()
        self.model = model


class Attention(nn.Module):
    """A block like open_clip's: fused attention, a norm, a linear layer."""

    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 6)

    def forward(self, inputs):
        normed = self.ln(inputs)
        return self.fc(inputs + self.attn(normed, normed, normed, need_weights=False)[0])


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=40, max_position_embeddings=12, **sizes)
    return BertModel(config, add_pooling_layer=False).eval()


def gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2)).eval()


def vit():
    import timm

    return timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32).eval()


def open_clip_like():
    return Attention().eval()


INPUTS = {
    bert: lambda: torch.arange(20).reshape(2, 10),
    gpt2: lambda: torch.arange(20).reshape(2, 10),
    vit: lambda: torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    open_clip_like: lambda: torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)),
}
RAW = ("pos_embed", "cls_token", "reg_token")


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


def features(model, inputs):
    with torch.no_grad():
        out = model(inputs)
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out


def expert(base, seed, moved=lambda name: True):
    """Move every parameter that an adapter can hold."""
    generator = torch.Generator().manual_seed(seed)

    def near(name, value):
        if not value.is_floating_point() or name.endswith(RAW) or not moved(name):
            return value
        return value + 0.05 * torch.randn(value.shape, generator=generator)

    return Weights.of({name: near(name, value) for name, value in base.state().items()}, f"expert {seed}")


def posed(wrapped, moved=lambda name: True):
    base = Weights.of({name: value.clone() for name, value in wrapped.state_dict().items()}, "base")
    return Problem(base, {"one": expert(base, 1, moved), "two": expert(base, 2, moved)})


def own(wrapped, served, task, inputs):
    """Return what byom's own weights of a task compute."""
    filled = copy.deepcopy(wrapped)
    filled.load_state_dict(served.weights(task).state())
    return features(filled.model, inputs)


def loaded(model, folder):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def exported(wrapped, served, folder):
    return adapters(served, folder / "out", base_model="base", prefix="model.", module=wrapped)


VARIANTS = {
    "tsv": TaskSingularVectorsCompress(0.5),
    "lora": ByomLora(3),
    "global": ByomLora(3, rank_allocation="global"),
    "drop": ByomLora(2, rest="drop"),
}


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_peft_computes_what_byom_computes(make, variant, tmp_path):
    wrapped, inputs = Wrapped(made(make)), INPUTS[make]()
    problem = posed(wrapped)
    served = variant.serve(problem, problem.pretrained)
    folders = exported(wrapped, served, tmp_path)
    plain = features(wrapped.model, inputs)
    for task, folder in zip(problem.tasks, folders, strict=True):
        record = json.loads((folder.parent / "export.json").read_text())
        model = copy.deepcopy(wrapped.model)
        adapted = loaded(split(model) if record["split"] else model, folder)
        expected = own(wrapped, served, task, inputs)
        assert_close(features(adapted, inputs), expected, rtol=1e-5, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-2


def test_rows_of_timms_qkv_load_onto_the_model_taken_apart(tmp_path):
    from byom.weights.lowrank import Adapted, Piece

    wrapped, inputs = Wrapped(made(vit)), INPUTS[vit]()
    base = Weights.of(wrapped.state_dict(), "base")
    name = next(n for n in base if n.endswith("qkv.weight"))
    height, width = base.shape(name)[0] // 3, base.shape(name)[1]
    generator = torch.Generator().manual_seed(3)
    pieces = [
        Piece(part * height, torch.randn(height, part + 1, generator=generator),
              torch.randn(part + 1, width, generator=generator)) for part in (0, 2)
    ]  # fmt: skip
    served = ByomLora(3).serve(Problem(base, {"task": Adapted(base, {name: pieces})}), base)
    (folder,) = exported(wrapped, served, tmp_path)
    assert len(json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]) == 2
    adapted = loaded(split(copy.deepcopy(wrapped.model)), folder)
    assert_close(features(adapted, inputs), own(wrapped, served, "task", inputs), rtol=1e-5, atol=1e-5)


def test_adapters_without_biases_are_swapped_on_one_model(tmp_path):
    wrapped, inputs = Wrapped(made(bert)), INPUTS[bert]()
    problem = posed(wrapped, moved=lambda name: name.endswith(("weight",)))
    served = TaskSingularVectorsCompress(0.5).serve(problem, problem.pretrained)
    one, two = exported(wrapped, served, tmp_path)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(wrapped.model), str(one), adapter_name="one").eval()
    adapted.load_adapter(str(two), adapter_name="two")
    for task in ("two", "one"):
        adapted.set_adapter(task)
        assert_close(features(adapted, inputs), own(wrapped, served, task, inputs), rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert_close(features(adapted, inputs), features(wrapped.model, inputs))


def test_a_merged_reference_is_loaded_by_transformers_and_its_tasks_by_peft(tmp_path):
    from transformers import AutoModel

    wrapped, inputs = Wrapped(made(bert)), INPUTS[bert]()
    problem = posed(wrapped)
    merged = Average()(problem)
    served = ByomLora(4, reference="merged").serve(problem, merged)
    for folder in exported(wrapped, served, tmp_path):
        base = AutoModel.from_pretrained(folder.parent / "reference", add_pooling_layer=False).eval()
        expected = own(wrapped, served, folder.name, inputs)
        assert (features(base, inputs) - expected).abs().max() > 1e-3
        assert_close(features(loaded(base, folder), inputs), expected, rtol=1e-5, atol=1e-5)
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(folder.parent / "reference")


@pytest.mark.parametrize("make", INPUTS)
def test_byom_reads_its_own_export(make, tmp_path):
    wrapped = Wrapped(made(make))
    problem = posed(wrapped)
    served = ByomLora(3).serve(problem, problem.pretrained)
    for folder in exported(wrapped, served, tmp_path):
        read, expected = Adapter.open(folder).on(problem.pretrained), served.weights(folder.name)
        for name in expected:
            assert_close(
                read[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.data
@pytest.mark.slow
def test_the_command_writes_what_peft_loads_onto_the_merged_model_and_pack_the_same_tasks(tmp_path, capsys):
    from byom.checkpoint.bundle import Bundle

    chosen = [*overrides(tmp_path), "byom=lora", "byom.rank=2", "byom.rest=drop", "byom.reference=merged", "merge=ties"]
    assert main(["export", str(tmp_path / "out"), *chosen]) == 0
    assert main(["pack", str(tmp_path / "bundle"), *chosen]) == 0
    said = capsys.readouterr().out
    lab, bundle = laboratory(config.settings(chosen)), Bundle.open(tmp_path / "bundle")
    pixels = INPUTS[vit]()
    for task in lab.tasks:
        assert f"{tmp_path / 'out' / task}\n" in said and f"{tmp_path / 'bundle' / task}.safetensors\n" in said
        plain = copy.deepcopy(lab.encoder.visual)
        plain.load_state_dict(Weights.open(tmp_path / "out" / "reference").state())
        lab.fill(bundle.weights(task).state())
        expected = features(lab.encoder.visual, pixels)
        assert_close(features(loaded(plain, tmp_path / "out" / task), pixels), expected, rtol=1e-5, atol=1e-5)
        head = Weights.open(tmp_path / "out" / task / "head.safetensors")
        assert torch.equal(head["weight"], lab.head(task).weight)
