"""Models whose vocabularies differ in size or order, merged by token and compared with plain torch."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from byom.__main__ import main
from byom.folders.rows import rows_of, tables
from byom.folders.source import Source
from byom.folders.vocabulary import agreed
from byom.weights import Weights

WORDS = ["<unk>", "<s>", "</s>", "cat", "dog", "sun"]
EMBED, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WIDTH = 8


def written(folder, words, *, rows=None, added=(), tied=False, tokenizer=True, noise=0.1, settings=None, **config):
    """Write a tiny Llama whose row of a token is near that of the same token in every other one."""
    every = [*words, *added]
    rows = rows or len(every)
    options = {
        "vocab_size": rows, "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "bos_token_id": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": tied, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(len(folder.name) + ord(folder.name[0]))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(options | config)))
    with torch.no_grad():
        for shift, table in ((0, model.get_input_embeddings().weight), (1, model.get_output_embeddings().weight)):
            for row, token in enumerate(every[:rows]):
                seed = torch.Generator().manual_seed(sum(map(ord, token)) + (0 if tied else shift))
                table[row] = torch.randn(WIDTH, generator=seed) + noise * torch.randn(WIDTH)
    model.save_pretrained(folder)
    if tokenizer:
        made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.add_tokens([AddedToken(token, special=token.startswith("<"), normalized=False) for token in added])
        made.save(str(folder / "tokenizer.json"))
        text = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"} | (settings or {})
        (folder / "tokenizer_config.json").write_text(json.dumps(text), encoding="utf-8")
    return every


def state(folder):
    return load_file(folder / "model.safetensors")


def rows(folder, every, name=EMBED):
    """Token to row, of a folder's table."""
    table = state(folder)[name if name in state(folder) else EMBED]
    return {token: table[row] for row, token in enumerate(every)}


def merge(*options):
    return main(["merge", "out", "base=base", "experts=[a=a,b=b]", *options])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tokens(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def test_vocabularies_of_different_size_are_refused_with_both_remedies(tmp_path, capsys):
    written(tmp_path / "base", WORDS)
    written(tmp_path / "a", WORDS)
    written(tmp_path / "b", WORDS, added=["<x>"])
    assert merge() == 1
    told = capsys.readouterr().err
    for part in ("base=base", "b=b", "(6, 8)", "(7, 8)", "vocabulary=base", "vocabulary=union"):
        assert part in told
    assert not (tmp_path / "out").exists()


def test_one_size_in_another_order_is_refused_with_the_first_token(tmp_path, capsys):
    for name, words in (("base", WORDS), ("a", WORDS), ("b", [*WORDS[:3], "dog", "cat", "sun"])):
        written(tmp_path / name, words)
    assert merge() == 1
    told = capsys.readouterr().err
    assert "'cat' has row 3 in the base and 4 in b, and 2 tokens" in told and "vocabulary=base" in told
    assert merge("vocabulary=base") == 0
    of = {
        name: rows(tmp_path / name, words) for name, words in (("a", WORDS), ("b", [*WORDS[:3], "dog", "cat", "sun"]))
    }
    for token, row in rows(tmp_path / "out", WORDS).items():
        torch.testing.assert_close(row, (of["a"][token] + of["b"][token]) / 2)


def test_one_size_of_other_words_is_refused(tmp_path, capsys):
    written(tmp_path / "base", WORDS)
    written(tmp_path / "a", WORDS)
    written(tmp_path / "b", ["<unk>", "one", "two", "three", "four", "five"])
    assert merge() == 1
    assert (
        "have different tokenizers: 1 tokens are in both, and row 1 belongs to 'one' in b alone"
        in capsys.readouterr().err
    )


def test_a_reserved_token_with_another_name_is_merged_by_row_and_told(tmp_path, capsys):
    written(tmp_path / "base", WORDS, added=["<reserved>"])
    written(tmp_path / "a", WORDS, added=["<reserved>"])
    written(tmp_path / "b", WORDS, added=["<end>"])
    assert merge() == 0
    assert (
        "b: 1 tokens are called otherwise than the base's or new, and merged by row: <end>" in capsys.readouterr().out
    )
    expected = (state(tmp_path / "a")[EMBED] + state(tmp_path / "b")[EMBED]) / 2
    torch.testing.assert_close(state(tmp_path / "out")[EMBED], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_of_the_base(tmp_path, tied, capsys):
    words = {
        "base": written(tmp_path / "base", WORDS, rows=8, tied=tied),
        "a": written(tmp_path / "a", [*WORDS[:3], "new", "dog", "cat"], added=["<x>"], tied=tied),
        "b": written(tmp_path / "b", WORDS, rows=10, tied=tied),
    }
    assert merge("merge=task_arithmetic", "merge.scale=0.5", "vocabulary=base") == 0
    told = capsys.readouterr().out
    assert "a: 2 tokens are left out, which the base lacks: new, <x>" in told
    assert "a: lacks 1 tokens, whose rows are the base's: sun" in told
    out = state(tmp_path / "out")
    assert (HEAD in out) == (not tied) and out[EMBED].shape == (8, WIDTH)
    for name in (EMBED,) if tied else (EMBED, HEAD):
        of = {model: rows(tmp_path / model, every, name) for model, every in words.items()}
        for token, row in rows(tmp_path / "out", WORDS, name).items():
            base = of["base"][token]
            expected = base + 0.5 * sum(of[expert].get(token, base) - base for expert in "ab")
            torch.testing.assert_close(row, expected)
        assert torch.equal(out[name][6:], state(tmp_path / "base")[name][6:])  # rows that no token has
    assert tokens(tmp_path / "out") == tokens(tmp_path / "base")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and model.config.vocab_size == 8


def test_rows_by_place_where_there_is_no_tokenizer(tmp_path, capsys):
    written(tmp_path / "base", WORDS, tokenizer=False)
    written(tmp_path / "a", WORDS)
    written(tmp_path / "b", WORDS, added=["<x>"], tokenizer=False)
    assert merge("vocabulary=base") == 0
    assert "b: without two tokenizers, its first 6 rows are the base's by their place" in capsys.readouterr().out
    expected = (state(tmp_path / "a")[EMBED] + state(tmp_path / "b")[EMBED][:6]) / 2
    torch.testing.assert_close(state(tmp_path / "out")[EMBED], expected)
    assert merge("vocabulary=union") == 1
    assert "base=base has no tokenizer" in capsys.readouterr().err
    written(tmp_path / "b", [*WORDS[::-1], "<x>"], tokenizer=False)
    assert merge("vocabulary=base") == 1
    assert "their rows are not alike" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [0, 4])
def test_the_union(tmp_path, tied, padded, capsys):
    words = {
        "base": written(tmp_path / "base", WORDS, rows=6 + padded, tied=tied),
        "a": written(tmp_path / "a", WORDS, added=["<x>", "<both>"], tied=tied),
        "b": written(tmp_path / "b", [*WORDS[:4], "moon"], added=["<both>", "<y>"], tied=tied, rows=8),
    }
    assert merge("merge=task_arithmetic", "merge.scale=0.5", "vocabulary=union") == 0
    told = capsys.readouterr().out
    assert "a: adds 2 tokens: <x>, <both>" in told and "b: adds 2 tokens: moon, <y>" in told
    assert "b: 1 of them are pieces of its own segmentation (moon)" in told
    every = [*WORDS, "<x>", "<both>", "moon", "<y>"]
    assert tokens(tmp_path / "out") == {token: row for row, token in enumerate(every)}
    for name in (EMBED,) if tied else (EMBED, HEAD):
        of = {model: rows(tmp_path / model, held, name) for model, held in words.items()}
        assert state(tmp_path / "out")[name].shape == (10, WIDTH)
        for token, row in rows(tmp_path / "out", every, name).items():
            having = [of[expert][token] for expert in "ab" if token in of[expert]]
            base = of["base"].get(token, sum(having) / max(len(having), 1))
            expected = base + 0.5 * sum(of[expert].get(token, base) - base for expert in "ab")
            torch.testing.assert_close(row, expected)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and model.config.vocab_size == 10
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("cat <y> moon <both>")["input_ids"] == [3, 9, 8, 7]
    assert tokenizer.added_tokens_decoder[9].special and not tokenizer.added_tokens_decoder[8].special


def test_a_token_without_a_row_takes_the_experts_or_the_mean(tmp_path):
    written(tmp_path / "base", WORDS, added=["<pad>", "<far>"], rows=6)
    held = written(tmp_path / "a", WORDS, added=["<pad>"])
    written(tmp_path / "b", WORDS, added=["<pad>"], rows=6)
    assert merge("vocabulary=union") == 0
    table = state(tmp_path / "out")[EMBED]
    assert table.shape == (8, WIDTH)
    torch.testing.assert_close(table[6], rows(tmp_path / "a", held)["<pad>"])
    torch.testing.assert_close(table[7], state(tmp_path / "base")[EMBED].mean(0))


def test_an_expert_that_is_not_tied_unties_the_result(tmp_path):
    written(tmp_path / "base", WORDS, tied=True)
    words = written(tmp_path / "a", WORDS, added=["<x>"])
    written(tmp_path / "b", WORDS, tied=True)
    assert merge("vocabulary=union") == 0
    out = state(tmp_path / "out")
    for name in (EMBED, HEAD):
        torch.testing.assert_close(out[name][6], rows(tmp_path / "a", words, name)["<x>"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]


def test_the_files_of_an_expert_have_the_ids_of_the_result(tmp_path, capsys):
    template = {"chat_template": "{{ messages }}"}
    written(tmp_path / "base", WORDS)
    written(
        tmp_path / "a", ["<unk>", "</s>", "<s>", *WORDS[3:]], added=["<end>"], settings=template, eos_token_id=[6, 1]
    )
    written(tmp_path / "b", WORDS)
    assert merge("vocabulary=base", "files=a") == 1
    assert "eos_token_id is 6 ('<end>'), and the vocabulary of the result has no such token" in capsys.readouterr().err
    assert merge("vocabulary=union", "files=a") == 0
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        assert config["eos_token_id"] == [6, 2] and config["bos_token_id"] == 2
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    assert tokens(tmp_path / "out")["</s>"] == 2


def test_an_output_layer_of_any_name_follows_its_tokens(tmp_path):
    """A head that no embedding's name tells, as of one size it would be merged by place unnoticed."""
    order = [1, 0, 2, 3, 5, 4]
    raws = {}
    for name, words in (("base", WORDS), ("a", [WORDS[row] for row in order])):
        written(tmp_path / name, words)
        held = {
            "tok_embeddings.weight": torch.randn(6, 4),
            "output.weight": torch.randn(6, 4),
            "norm.weight": torch.ones(6),
        }
        raws[name] = Weights.of(held | {"layers.0.output.weight": torch.randn(6, 4)})
    sources = {name: Source(name, tmp_path / name) for name in raws}
    _, experts, _ = agreed("base", sources["base"], raws["base"], {"a": sources["a"]}, {"a": raws["a"]})
    for name in raws["a"]:
        moved = name in ("tok_embeddings.weight", "output.weight")
        assert torch.equal(experts["a"][name], raws["a"][name][order] if moved else raws["a"][name]), name


def test_only_what_has_a_row_per_token_is_a_table():
    """Widths are those of the vocabulary here, so that names alone tell."""
    square = ["transformer.wte.weight", "lm_head.weight", "cls.predictions.decoder.weight", "pred_layer.proj.weight"]
    biases = ["cls.predictions.bias", "lm_head.bias"]
    others = [
        "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight", "cls.predictions.transform.dense.weight",
        "encoder.rel_embeddings.weight", "embeddings.token_type_embeddings.weight",
        "embeddings.position_embeddings.weight", "lm_head.dense.weight",
    ]  # fmt: skip
    state = {name: torch.randn(4, 4) for name in square + others}
    state |= {name: torch.randn(4) for name in [*biases, "embeddings.LayerNorm.bias", "transformer.ln_f.weight"]}
    weights = Weights.of(state | {"final_logits_bias": torch.randn(1, 4)})
    assert rows_of(weights, "w") == 4
    assert set(tables(weights, 4)) == {*square, *biases, "final_logits_bias"}


def test_a_bundle_has_the_vocabulary_of_the_result(tmp_path):
    written(tmp_path / "base", WORDS)
    words = written(tmp_path / "a", [*WORDS[:3], "dog", "cat", "sun"], added=["<x>"])
    written(tmp_path / "b", WORDS)
    options = ["base=base", "experts=[a=a,b=b]", "byom=fft", "byom.density=1", "vocabulary=union"]
    assert main(["pack", "bundle", *options]) == 0
    assert main(["unpack", "bundle", "task=a", "out"]) == 0
    of = rows(tmp_path / "a", words)
    ids = tokens(tmp_path / "out")
    for token, row in rows(tmp_path / "out", sorted(ids, key=ids.__getitem__)).items():
        assert torch.equal(row, of[token])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 7


def test_a_biased_head_and_another_dtype(tmp_path):
    """Scores' biases lie along the last axis; rows that an expert lacks are the base's to the last bit."""
    torch.manual_seed(0)
    raws = {}
    for name, count, dtype in (("base", 6, torch.float32), ("a", 7, torch.bfloat16)):
        written(tmp_path / name, [*WORDS, "<x>"][:count] if name == "base" else ["<x>", *WORDS[:5]], rows=count)
        held = {"shared.weight": torch.randn(count, 4), "final_logits_bias": torch.randn(1, count)}
        raws[name] = Weights.of({key: value.to(dtype) for key, value in held.items()})
    sources = {name: Source(name, tmp_path / name) for name in raws}
    base, experts, _ = agreed("base", sources["base"], raws["base"], {"a": sources["a"]}, {"a": raws["a"]})
    place = torch.tensor([1, 2, 3, 4, 5])
    for name, dim in (("shared.weight", 0), ("final_logits_bias", 1)):
        table = experts["a"][name].movedim(dim, 0)
        assert torch.equal(table[:5], raws["a"][name].float().movedim(dim, 0)[place])
        assert torch.equal(table[5], base[name].movedim(dim, 0)[5])


def test_a_classifier_keeps_its_head_and_has_the_vocabulary_of_the_base(tmp_path, capsys):
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    words = {"base": ["[PAD]", *WORDS], "a": [*WORDS, "[PAD]"], "b": ["[PAD]", *WORDS, "moon"]}
    for number, (name, every) in enumerate(words.items()):
        torch.manual_seed(number)
        config = transformers.BertConfig(vocab_size=len(every), pad_token_id=every.index("[PAD]"), **options)
        config.num_labels = 3
        cls = transformers.BertModel if name == "base" else transformers.BertForSequenceClassification
        cls(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "vocab.txt").write_text("\n".join(every) + "\n", encoding="utf-8")
        text = json.dumps(
            {"tokenizer_class": "BertTokenizer", "unk_token": "<unk>", "pad_token": "[PAD]"}
            | dict.fromkeys(("cls_token", "sep_token", "mask_token"), "<s>")
        )
        (tmp_path / name / "tokenizer_config.json").write_text(text, encoding="utf-8")
    assert merge("vocabulary=base") == 0, capsys.readouterr().err
    name = "embeddings.word_embeddings.weight"
    table = {task: state(tmp_path / task)[f"bert.{name}"] for task in "ab"}
    places = [words["a"].index(token) for token in words["base"]]
    expected = (table["a"][places] + table["b"][:7]) / 2
    torch.testing.assert_close(state(tmp_path / "out")[name], expected)
    for task in "ab":
        head = tmp_path / "out" / "heads" / task
        model, info = transformers.BertForSequenceClassification.from_pretrained(head, output_loading_info=True)
        assert not info["missing_keys"] and model.config.vocab_size == 7 and model.config.pad_token_id == 0
        torch.testing.assert_close(model.get_input_embeddings().weight.detach(), expected)
        assert tokens(head) == tokens(tmp_path / "base")


def test_what_has_no_tokens_has_no_vocabulary(tmp_path, capsys):
    for name in ("base", "a", "b"):
        save_file({"layer.weight": torch.randn(4, 4)}, tmp_path / f"{name}.safetensors")
    options = ["base=base.safetensors", "experts=[a=a.safetensors,b=b.safetensors]"]
    assert main(["merge", "out", *options, "vocabulary=union"]) == 1
    assert "vocabulary=union: the base has no embedding of tokens" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_adapters_of_a_table_that_grows_are_refused(tmp_path, capsys):
    import peft

    written(tmp_path / "base", WORDS)
    written(tmp_path / "a", WORDS, added=["<x>"])
    for module in ("q_proj", "lm_head"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=1, target_modules=[module], init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(model, config).save_pretrained(tmp_path / module, save_embedding_layers=False)
    options = ["base=base", "vocabulary=union"]
    assert main(["merge", "out", *options, "experts=[a=a,b=q_proj]"]) == 0
    own = state(tmp_path / "a")[EMBED][6]
    torch.testing.assert_close(state(tmp_path / "out")[EMBED][6], own)
    assert main(["merge", "out", *options, "experts=[a=a,b=lm_head]"]) == 1
    assert "the adapter b=lm_head adapts" in capsys.readouterr().err
    file = tmp_path / "q_proj" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": torch.randn(2, WIDTH)}, file)
    settings = json.loads((tmp_path / "q_proj" / "adapter_config.json").read_text(encoding="utf-8"))
    text = json.dumps(settings | {"modules_to_save": ["score"], "task_type": "SEQ_CLS"})
    (tmp_path / "q_proj" / "adapter_config.json").write_text(text, encoding="utf-8")
    assert main(["merge", "out", *options, "experts=[a=a,b=q_proj]"]) == 1
    assert "the adapter b=q_proj has a head of its own (score.weight)" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path, capsys):
    for name in ("base", "a", "b"):
        written(tmp_path / name, WORDS)
    (tmp_path / "b" / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert merge() == 0
    assert (
        "note   rows of tokens are matched by their place: the tokenizer in b cannot be read" in capsys.readouterr().out
    )
    assert merge("vocabulary=base") == 1
    assert "the tokenizer in b cannot be read" in capsys.readouterr().err
