"""Recipes of mergekit, converted: `byom merge` writes what mergekit's own ``run_merge`` writes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers import models as kinds

from byom.__main__ import main
from byom.errors import OptionError
from byom.folders.mergekit import converted
from byom.folders.mergekit_settings import reference

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
WEIGHED = [("a", {"weight": 0.7}), ("b", {"weight": 0.4})]
NONE = [("a", {}), ("b", {}), ("c", {})]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a base and three experts, of which every tensor moved alike in part."""
    root = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    common = {name: 0.01 * torch.randn(value.shape) for name, value in base.named_parameters()}
    state = {name: value.detach().clone() for name, value in base.named_parameters()}
    for number, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(number)
        with torch.no_grad():
            for key, value in base.named_parameters():
                value.copy_(state[key] + (0 if name == "base" else common[key] + 0.01 * torch.randn(value.shape)))
        base.save_pretrained(root / name)
    return root


def recipe(method, models=WEIGHED, base="base", **rest):
    """Return a recipe as mergekit has it."""
    entries = [{"model": name, **({"parameters": own} if own else {})} for name, own in models]
    return {"merge_method": method, "models": entries, **({"base_model": base} if base else {}), **rest}


def both(folder, content):
    """Return the tensors that mergekit writes of a recipe, and those of byom."""
    merging = pytest.importorskip("mergekit.merge")
    config = pytest.importorskip("mergekit.config").MergeConfiguration.model_validate(content)
    pytest.importorskip("mergekit.io.tasks").LoaderCache().loaders.clear()  # it knows models by relative paths
    merging.run_merge(config, str(folder / "theirs"), merging.MergeOptions(quiet=True, write_model_card=False))
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "recipe.yaml").unlink(missing_ok=True)
    assert main(["convert-recipe", "mergekit.yaml", "recipe.yaml"]) == 0
    assert main(["merge", "ours", "recipe=recipe.yaml"]) == 0
    return [load_file(folder / name / "model.safetensors") for name in ("theirs", "ours")]


GLOBAL = {"lambda": 0.5}
DENSE = [("a", {"weight": 0.7, "density": 0.6}), ("b", {"weight": 0.4, "density": 0.6})]
RECIPES = {
    "linear": recipe("linear", [*WEIGHED, ("c", {"weight": 1.0})], base=None),
    "linear with its base": recipe("linear", base="base", parameters={"weight": 0.5}),
    "linear adding to 1": recipe(
        "linear", [("a", {"weight": 0.7}), ("b", {"weight": 0.3})], None, parameters={"normalize": False}
    ),
    "task_arithmetic": recipe("task_arithmetic", [("b", {"weight": 0.7}), ("a", {"weight": -0.4})], parameters=GLOBAL),
    "task_arithmetic normalised": recipe("task_arithmetic", parameters={"normalize": True, "int8_mask": True}),
    "task_arithmetic by names": recipe(
        "task_arithmetic", parameters={
            "lambda": [{"filter": "mlp", "value": 0.5}, {"filter": "self_attn", "value": 0}, {"value": 2}]
        }
    ),
    "task_arithmetic weighed by names": recipe(
        "task_arithmetic", [("base", {}), ("a", {}), ("b", {})],
        parameters={"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
    ),
    "ties": recipe("ties", DENSE, parameters=GLOBAL),
    "ties of densities": recipe("ties", [("a", {"weight": 1, "density": 0.3}), ("b", {"weight": 0.5, "density": 1.0})]),
    "ties summed": recipe("ties", DENSE, parameters={"normalize": False}),
    "ties by names": recipe("ties", [(name, {"density": 0.5}) for name in "abc"],
                            parameters={"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]}),
    "breadcrumbs": recipe("breadcrumbs", DENSE, parameters={"gamma": 0.05}),
    "breadcrumbs_ties": recipe("breadcrumbs_ties", DENSE, parameters={"gamma": 0}),
    "dare_linear": recipe("dare_linear", parameters={"density": 1.0, "lambda": 0.3}),
    "dare_ties": recipe("dare_ties", parameters={"density": 1, "normalize": True}),
    "model_stock": recipe("model_stock", NONE),
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("name", RECIPES)
def test_byom_writes_what_mergekit_writes(name, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    theirs, ours = both(folders, RECIPES[name] | {"dtype": "float32"})
    assert theirs.keys() == ours.keys()
    base = load_file(folders / "base" / "model.safetensors")
    moved = 0.0
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
        moved += float((value - base[key]).abs().sum())
    assert moved > 1


@pytest.mark.peer
@pytest.mark.parametrize("source", ["union", "base"])
def test_byom_gives_tokens_the_rows_that_mergekit_gives(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"w{number}" for number in range(8)]
    held = {"base": words, "a": [*words[:6], "w7", "w6", "<x>", "<both>"], "b": [*words, "<both>"]}
    for number, (name, every) in enumerate(held.items()):
        torch.manual_seed(number)
        sizes = SIZES | {"vocab_size": len(every), "num_hidden_layers": 1}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / name)
        plain = [word for word in every if word[0] != "<"]
        made = Tokenizer(kinds.WordLevel({word: row for row, word in enumerate(plain)}, unk_token="w0"))
        made.add_tokens([AddedToken(word, special=True) for word in every[len(plain) :]])
        made.save(str(tmp_path / name / "tokenizer.json"))
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"})
        (tmp_path / name / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    theirs, ours = both(tmp_path, recipe("task_arithmetic", tokenizer_source=source, dtype="float32"))
    ids = [transformers.AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("theirs", "ours")]
    assert ids[0].keys() == ids[1].keys() and len(ids[0]) == (10 if source == "union" else 8)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token in ids[0]:
            torch.testing.assert_close(ours[name][ids[1][token]], theirs[name][ids[0][token]])


REFUSED = {
    "slerp": (recipe("slerp"), "byom has no method 'slerp' of mergekit's; the nearest is merge=average"),
    "della": (recipe("della"), "the nearest is merge=dare merge@merge.then=ties"),
    "unknown": (recipe("tis"), "did you mean 'ties'"),
    "passthrough": (recipe("passthrough"), "passthrough stacks layers"),
    "lambda of one": (
        recipe("ties", [("a", {"weight": 1, "lambda": 0.5})]), "lambda of a has no effect in mergekit; write it under",
    ),
    "layers of lambda": (recipe("ties", WEIGHED, parameters={"lambda": [0, 1]}), "name layers in filters"),
    "slerp of layers": ({"merge_method": "slerp", "slices": [{}]}, "byom has no method 'slerp'"),
    "slices": ({"merge_method": "linear", "slices": [{}]}, "no option for layer ranges"),
    "no base": (recipe("ties", base=None), "ties needs base_model"),
    "no weight": (recipe("ties", NONE), "weight of a is not given; mergekit demands it"),
    "weight of some": (
        recipe("linear", NONE, parameters={"weight": {"filter": "mlp", "value": 1}}),
        "weight of a is not given for all tensors",
    ),
    "layers": (recipe("ties", [("a", {"weight": [0, 0.3, 1]})]), "a value for each layer"),
    "names": (
        recipe("ties", [("a", {"weight": 1}), ("b", {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]})]),
        "weight has filters that weigh models otherwise",
    ),
    "densities": (recipe("dare_ties", [("a", {"weight": 1, "density": 0.5}), ("b", {"weight": 1})]), "density differs"),
    "negative": (recipe("ties", [("a", {"weight": 1}), ("b", {"weight": -1})]), "Write normalize: false"),
    "sum of 0": (
        recipe("task_arithmetic", [("a", {"weight": 1}), ("b", {"weight": -1})], parameters={"normalize": True}),
        "divides by the sum of the weights, 0 here",
    ),
    "sum": (recipe("linear", parameters={"normalize": False, "weight": 1}), "whose sum is not 1"),
    "rescaled": (recipe("ties", parameters={"rescale": True}), "rescale with ties"),
    "outliers": (recipe("breadcrumbs", parameters={"density": 0.99, "gamma": 0.1}), "Write gamma: 0.01"),
    "outliers and signs": (recipe("breadcrumbs_ties", parameters={"density": 0.9}), "no method for both"),
    "all dropped": (recipe("dare_linear", parameters={"density": 0}), "drops everything"),
    "rows": (recipe("model_stock", NONE, parameters={"filter_wise": True}), "filter_wise"),
    "one model": (recipe("model_stock", [("a", {})]), "two models or more"),
    "padding": (recipe("ties", tokenizer={"source": "union", "pad_to_multiple_of": 8}), "tokenizer.pad_to_multiple_of"),
    "another tokenizer": (recipe("ties", tokenizer_source="d"), "is none of the models"),
    "template": (recipe("ties", chat_template="chatml"), "chat_template has no option"),
    "an adapter": (
        recipe("ties", [("a+lora", {"weight": 1})]), "the adapter is on a, and byom merges adapters of the base",
    ),
    "unknown key": (recipe("ties", baze=1), "no 'baze'"),
    "no number": (recipe("ties", [("a", {"weight": "much"})]), "'much' is no number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_option_is_refused_by_name(name):
    content, told = REFUSED[name]
    with pytest.raises(OptionError) as error:
        converted(content)
    assert told in str(error.value)


def test_where_models_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert reference("here/model", "") == "here/model"
    assert reference("some/model", "") == "hf://some/model"
    assert (
        reference("some/model@v1", "")
        == reference({"path": "some/model", "revision": "v1"}, "")
        == "hf://some/model@v1"
    )
    assert reference("here/model+some/lora@v2", "here/model") == "hf://some/lora@v2"
    both_parts = {"model": {"path": "here/model"}, "lora": {"path": "a"}}
    assert reference(both_parts, "here/model") == "a"
    made = converted(
        recipe("linear", [("x/m", {"weight": 1}), ("y/m@1", {"weight": 1}), ("base", {"weight": 1})], None)
    )
    assert made.options["base"] == "hf://x/m"
    assert made.options["experts"] == {"m": "hf://x/m", "m_2": "hf://y/m@1", "base-model": "base"}


def test_what_is_written_says_where_results_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = recipe("dare_ties", [("a", {"weight": 1}), ("b", {"weight": 1})], parameters={"density": 0.3, "gamma": 1})
    content |= {"dtype": "bfloat16", "out_dtype": "float16", "tokenizer": {"source": "a"}}
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["convert-recipe", "in.yaml"]) == 0
    text = capsys.readouterr().out
    for told in ("both draw them at random", "L1 norm", "elects +", "computes in bfloat16", "gamma has no effect"):
        assert told in text
    options = yaml.safe_load(text)
    assert math.isclose(options["merge.drop"], 0.7) and options["merge@merge.then"] == "ties"
    assert options["dtype"] == "float16" and options["files"] == "a"
    assert main(["convert-recipe", "in.yaml", "in.yaml"]) == 1
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "in.yaml").write_text("merge_method: [", encoding="utf-8")
    assert main(["convert-recipe", "in.yaml"]) == 1
    assert "cannot be read" in capsys.readouterr().err
