"""Answers in words, on a tiny T5 in the hub's format, against transformers' own loss and generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from byom.backbone import seq2seq
from byom.backbone.seq2seq import Seq2Seq
from byom.checkpoint import read
from byom.data.source.table import Table
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError, OptionError
from byom.functional.tensors import copied
from byom.pipeline.evaluate import evaluate
from byom.weights import Weights
from tests.tiny_t5 import tiny_t5

ROWS = [
    {"film": "it was a good film", "day": "not bad"},
    {"film": "poor", "day": "a fine day and a good mood"},
    {"film": "how is it", "day": "other"},
]
CLASSES = ("good", "not good", "was a bad day")


def task(**changes):
    source = Table("x", {"train": "x.csv"})
    return replace(Task("mood", source, "text", CLASSES, prompt="how is {film} and {day} ?"), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def scored(folder):
    backbone = Seq2Seq(str(folder), max_length=20, answer="scored")
    return backbone, backbone.load(), backbone.encode(ROWS, task())


def by_hand(model, tokenizer, prompt, answer):
    wanted = tokenizer(answer, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(-model(**tokenizer(prompt, return_tensors="pt"), labels=wanted).loss) * wanted.shape[1]


@pytest.mark.parametrize("budget", [1, 1 << 26])
def test_scores_are_log_likelihoods_of_whole_answers(scored, monkeypatch, budget):
    monkeypatch.setattr(seq2seq, "BUDGET", budget)
    _, module, encoded = scored
    prompts = [f"how is {row['film']} and {row['day']} ?" for row in ROWS]
    expected = [[by_hand(module.model, module.tokenizer, p, c) for c in CLASSES] for p in prompts]
    assert torch.allclose(module(**encoded), torch.tensor(expected), atol=1e-4)


def test_scores_do_not_depend_on_padding_and_reach_every_parameter(scored):
    _, module, encoded = scored
    padded = module(**encoded)
    for inputs, _, index in Split(encoded, torch.arange(3)).batches(1):
        assert inputs["input_ids"].shape[1] < 20
        assert torch.allclose(module(**inputs), padded[index], atol=1e-5)
    padded.sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in module.parameters())
    module.zero_grad()


def greedy(module, ids):
    with torch.no_grad():
        tokens = module.model.generate(ids[None], max_new_tokens=5, do_sample=False)
    return module.tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_generation_is_right_only_to_the_letter(folder, scored):
    backbone = Seq2Seq(str(folder), max_length=20, max_new_tokens=5)
    module, encoded = backbone.load(), scored[2]
    texts = [greedy(module, ids[mask.bool()]) for ids, mask in zip(*list(encoded.values())[:2], strict=True)]
    assert len(set(texts)) == 3 and not set(texts) & set(CLASSES)
    known = task(classes=(texts[0].rsplit(" ", 1)[0], texts[0], texts[2]), labels={})
    answers = backbone.encode(ROWS, known)
    score = evaluate(module, backbone.head(module, known, None), Split(answers, torch.tensor([1, 0, 2])))
    assert score.predictions.tolist() == [1, 3, 2]
    assert module(**answers).shape == (3, 3), "what is differentiated is scored"


def test_generated_numbers_are_read_and_anything_else_is_zero(folder, monkeypatch):
    stars = task(classes=("1.0", "2.0", "3.5"), labels={}, metric="spearman")
    backbone = Seq2Seq(str(folder), max_length=20)
    module, split = backbone.load(), Split(backbone.encode(ROWS, stars), torch.tensor([1.0, 2.0, 3.0]))
    said = module.tokenizer(["3.5", "good", "nan"], return_tensors="pt").input_ids
    monkeypatch.setattr(module.model, "generate", lambda **_: said)
    head = backbone.head(module, stars, None)
    order = split.inputs["attention_mask"].sum(1).argsort(descending=True, stable=True)
    assert evaluate(module, head, split).predictions[order].tolist() == [3.5, 0.0, 0.0]
    assert seq2seq._number("nan") == seq2seq._number("1 2") == 0 and seq2seq._number("2.25") == 2.25


def test_the_loss_is_that_of_a_language_model_and_numbers_take_the_nearest_answer(scored):
    backbone, module, _ = scored
    logits = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -0.5, -9.0]])
    names = backbone.head(module, task(), None)
    assert float(names.loss(logits, torch.tensor([2, 1]))) == pytest.approx((4 + 0.5) / 2)
    stars = backbone.head(module, task(classes=("1.0", "2.0", "3.5"), labels={}, metric="spearman"), None)
    assert float(stars.loss(logits, torch.tensor([3.2, 0.2]))) == pytest.approx((4 + 3) / 2)
    assert stars.predict(logits).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_is_that_of_the_file_and_tied_tensors_count_once(tmp_path, tied):
    module = Seq2Seq(str(tiny_t5(tmp_path, tied)), answer="scored").load()
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(module.model.lm_head.weight, stored["shared.weight" if tied else "lm_head.weight"])
    weights = Weights.of(copied(module.state_dict()))
    assert weights.numel == sum(value.numel() for value in stored.values())
    assert len(weights.ties) == 3 if tied else len(weights.ties) == 2
    module.load_state_dict((2.0 * weights).state())
    assert torch.equal(module.model.lm_head.weight, 2 * stored["shared.weight" if tied else "lm_head.weight"])
    assert module.model.config.scale_decoder_outputs is tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_fine_tuned_checkpoint_is_read_into_the_backbones_names(tmp_path, tied):
    base = Seq2Seq(str(tiny_t5(tmp_path / "base", tied)), answer="scored")
    module = base.load()
    pretrained = Weights.of(copied(module.state_dict()))
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.01 * torch.randn_like(value))
    module.model.save_pretrained(tmp_path / "tuned")
    expert = read(tmp_path / "tuned", pretrained)
    assert not expert.extra and expert.weights.ties == pretrained.ties
    assert all(torch.equal(expert.weights[name], value) for name, value in module.state_dict().items())


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    state = load_file(tiny_t5(tmp_path) / "model.safetensors")
    save_file({k: v for k, v in state.items() if "wo" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 2 tensors"):
        Seq2Seq(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "task mood has no prompt"),
        ({"prompt": "how is it ?"}, "no column in braces"),
        ({"prompt": "how is {movie} ?"}, "asks for 'movie'"),
        ({"classes": ("good", "good ", "bad"), "labels": {}}, "have the same tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(scored, changes, message):
    with pytest.raises(DataError, match=message):
        scored[0].encode(ROWS, task(**changes))


def test_strings_fill_the_one_place_and_nothing_is_encoded_to_nothing(scored):
    backbone, _, encoded = scored
    for prompt in ("how is {} ?", "how is {text} ?"):
        ids = backbone.encode(["it"], task(prompt=prompt))["input_ids"]
        assert torch.equal(ids, backbone.encode([{"film": "it"}], task(prompt="how is {film} ?"))["input_ids"])
    nothing = backbone.encode([], task())
    assert {k: v.shape for k, v in nothing.items()} == {k: v[:0].shape for k, v in encoded.items()}
    other = task(prompt="{film} {day}")
    assert (
        backbone.encoding_for(task())
        != backbone.encoding_for(other)
        != backbone.encoding_for(replace(other, classes=("a", "b"), labels={}))
    )


def test_options_and_classes_that_mean_nothing_are_refused(scored):
    with pytest.raises(OptionError, match="generated"):
        Seq2Seq(answer="generate")
    with pytest.raises(DataError, match="must be the numbers"):
        scored[0].head(None, task(metric="spearman"), None)
