"""Heads and ties of written folders: what `AutoModelFor...` opens has every value, and nothing random."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from byom.__main__ import main
from tests.folders.architectures import LLAMA, TEXT, moved

DISTIL = {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16}
BERT = TEXT | {"num_hidden_layers": 1}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
TIED: dict[str, Any] = LLAMA | {"num_hidden_layers": 1, "tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(kind, config, folder, seed, **options):
    """Write a fine-tuned model whose body starts as the base beside it; return its class and state."""
    base = folder.parent / "base"
    module = getattr(transformers, kind)
    model = module.from_pretrained(base, **options) if base.is_dir() else module(config)
    moved(model, model.state_dict(), seed)
    model.save_pretrained(folder)
    return module, {name: value.clone() for name, value in model.state_dict().items()}


def opened(module, folder):
    model, info = module.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


CASES = {
    "distilbert": ("DistilBertConfig", DISTIL, "DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
    "distilbert_body": ("DistilBertConfig", DISTIL, "DistilBertModel", "DistilBertForSequenceClassification"),
    "bert": ("BertConfig", BERT, "BertForMaskedLM", "BertForSequenceClassification"),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration", "T5ForSequenceClassification"),
    "llama_tied": ("LlamaConfig", TIED, "LlamaForCausalLM", "LlamaForSequenceClassification"),
}


@pytest.mark.parametrize("name", CASES)
def test_classifiers_of_a_pre_trained_model_open_with_their_own_heads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, options, of_base, of_task = CASES[name]
    torch.manual_seed(0)
    base_class, base = saved(of_base, getattr(transformers, config)(**options), tmp_path / "base", 0)
    module, states = getattr(transformers, of_task), {}
    for seed, (task, labels) in enumerate({"a": 2, "b": 3}.items()):
        _, states[task] = saved(of_task, None, tmp_path / task, seed + 1, num_labels=labels)
    assert main(["merge", "out", "base=base", "experts=[a=a,b=b]"]) == 0
    out = opened(base_class, "out").state_dict()
    prefix = f"{module.base_model_prefix}."
    for task, state in states.items():
        head = opened(module, f"out/heads/{task}").state_dict()
        assert head.keys() == state.keys()
        for key, value in head.items():
            place = next((each for each in (key, key.removeprefix(prefix)) if each in base), None)
            if place is None:
                assert torch.equal(value, state[key]), key
            else:
                mean = (states["a"][key] + states["b"][key]) / 2
                assert torch.equal(value, mean) and torch.equal(out[place], mean), key
    assert any(not torch.equal(value, out[key]) for key, value in base.items())


@pytest.fixture
def tied(tmp_path, monkeypatch):
    """A tied base, an expert that is tied, and one that untied its output embedding."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for seed, name in enumerate(("base", "a")):
        saved("LlamaForCausalLM", transformers.LlamaConfig(**TIED), tmp_path / name, seed)
    shutil.copytree("a", "u")
    state = load_file("u/model.safetensors")
    save_file(state | {HEAD: state[EMBEDDING] + 1}, "u/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "u" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "u" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    module = transformers.LlamaForCausalLM
    return {name: module.from_pretrained(name).state_dict() for name in ("base", "a", "u")}


def of_out(*options, base="base", out="out"):
    assert main(["merge", out, f"base={base}", "experts=[a=a,u=u]", *options]) == 0
    return opened(transformers.LlamaForCausalLM, out).state_dict()


def test_an_untied_expert_unties_the_merged_model(tied):
    out = of_out()
    for name in (EMBEDDING, HEAD):
        assert torch.equal(out[name], (tied["a"][name] + tied["u"][name]) / 2)


def test_both_embeddings_that_are_kept_of_an_untied_expert_are_its_own(tied):
    out = of_out("keep=[lm_head=u,embed_tokens=u]")
    assert torch.equal(out[HEAD], tied["u"][HEAD]) and torch.equal(out[EMBEDDING], tied["u"][EMBEDDING])
    out = of_out("keep=[lm_head=u,embed_tokens=a]")
    assert torch.equal(out[HEAD], tied["u"][HEAD]) and torch.equal(out[EMBEDDING], tied["a"][EMBEDDING])


def test_whosever_configuration_is_copied_no_embedding_is_random_or_lost(tied):
    out = of_out("exclude=[lm_head,embed_tokens]", "files=u")
    assert torch.equal(out[HEAD], tied["base"][HEAD]) and torch.equal(out[EMBEDDING], out[HEAD])
    out = of_out("files=a", base="u", out="untied")
    assert torch.equal(out[HEAD], (tied["a"][HEAD] + tied["u"][HEAD]) / 2)
    assert torch.equal(out[EMBEDDING], (tied["a"][EMBEDDING] + tied["u"][EMBEDDING]) / 2)
    config = json.loads(Path("untied/config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False  # as versions of transformers that do not compare values need it


def test_a_head_of_a_tied_expert_holds_both_values_of_an_untied_merge(tied):
    of_out("heads=[model.norm]")
    head = opened(transformers.LlamaForCausalLM, "out/heads/a").state_dict()
    assert torch.equal(head["model.norm.weight"], tied["a"]["model.norm.weight"])
    for name in (EMBEDDING, HEAD):
        assert torch.equal(head[name], (tied["a"][name] + tied["u"][name]) / 2)


def test_a_bundle_of_tied_and_untied_experts_gives_both_back(tied):
    assert main(["pack", "bundle", "base=base", "experts=[a=a,u=u]", "byom=fft", "byom.density=1"]) == 0
    opened(transformers.LlamaForCausalLM, "bundle/reference")
    for task in ("a", "u"):
        assert main(["unpack", "bundle", f"task={task}", f"out_{task}"]) == 0
        state = opened(transformers.LlamaForCausalLM, f"out_{task}").state_dict()
        assert all(torch.equal(value, state[name]) for name, value in tied[task].items())


def test_one_tower_is_merged_and_the_other_stays_the_bases(tmp_path, monkeypatch):
    """Experts of one tower are found by their shapes where their names lack the tower's; two alike are refused."""
    monkeypatch.chdir(tmp_path)

    def state(value, **towers):
        return {f"{tower}.layer.weight": torch.full((2, width), value) for tower, width in towers.items()}

    for name, tensors in {
        "base": state(0.0, text=3, image=4) | {"scale": torch.zeros(())},
        "twins": state(0.0, text=4, image=4) | {"scale": torch.zeros(())},
        "a": {"layer.weight": torch.full((2, 4), 1.0)},
        "b": state(3.0, image=4),
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert main(["merge", "out", "base=base", "experts=[a=a,b=b]"]) == 0
    out = {name: float(value.flatten()[0]) for name, value in load_file("out/model.safetensors").items()}
    assert out == {"text.layer.weight": 0.0, "image.layer.weight": 2.0, "scale": 0.0}
    assert main(["merge", "other", "base=twins", "experts=[a=a]"]) == 1
    assert not (tmp_path / "other").exists()
