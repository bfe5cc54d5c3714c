"""Bundles of folders, opened to be served: which models they become, and which are refused."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from byom import Bundle, Weights
from byom.__main__ import main
from byom.errors import CheckpointError
from byom.serving.open import open_bundle
from byom.serving.options import Options
from tests.serving import bundles
from tests.serving.bundles import LABELS, SIZES

OPTIONS = Options(device="cpu", max_new_tokens=4)


def test_text_is_generated_as_the_tasks_own_models_do_also_beside_longer_texts(tmp_path):
    models, tokenizer = bundles.language_models(tmp_path / "bundle")
    served = open_bundle(tmp_path / "bundle", OPTIONS)
    seen = set()
    for task in "aba":
        served.switch(task)
        answers = served.predict(texts := ["good", "the film is bad"])
        for text, answer in zip(texts, answers, strict=True):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            mask = torch.ones_like(ids)
            own = models[task].generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
            assert answer == {"text": tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True)}
            seen.add(answer["text"])
    assert len(seen) > 1 and seen != {""}
    served.switch("a")
    assert served.predict(["my " * 40])[0]["truncated"] is True


def test_numbers_and_independent_labels_are_read_as_the_configuration_says(tmp_path):
    models, tokenizer = bundles.bert_classifiers(tmp_path / "numbers", {"a": ["score"], "b": ["x"]})
    served = open_bundle(tmp_path / "numbers", OPTIONS)
    served.switch("b")
    with torch.no_grad():
        own = models["b"](**tokenizer(["good"], return_tensors="pt")).logits
    assert served.tasks["b"].kind == "regression" and served.predict(["good"])[0]["value"] == pytest.approx(own.item())
    several = {"problem_type": "multi_label_classification"}
    models, tokenizer = bundles.bert_classifiers(tmp_path / "several", {"a": LABELS["c"]}, **several)
    served = open_bundle(tmp_path / "several", OPTIONS)
    served.switch("a")
    with torch.no_grad():
        row = models["a"](**tokenizer(["good"], return_tensors="pt")).logits.sigmoid()[0]
    answer = served.predict(["good"])[0]
    assert answer["labels"] == [label for label, value in zip(LABELS["c"], row, strict=True) if value >= 0.5]
    assert list(answer["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)


def test_plain_encoders_answer_with_the_mean_of_the_tokens_states(tmp_path):
    config = BertConfig(vocab_size=len(bundles.VOCABULARY), max_position_embeddings=16, **SIZES)
    models = {task: BertModel(config, add_pooling_layer=False) for task in "ab"}
    tokenizer = bundles.tokenizer()
    bundles.folders(tmp_path / "bundle", models, lambda name: "pooler" in name, tokenizer)
    served = open_bundle(tmp_path / "bundle", OPTIONS)
    served.switch("b")
    with torch.no_grad():
        states = models["b"](**tokenizer("good film", return_tensors="pt")).last_hidden_state
    found = served.predict(["my", "good film"])[1]["features"]
    assert found == pytest.approx(states[0].mean(0).tolist(), abs=1e-5)


def test_tasks_without_heads_of_their_own_share_the_references(tmp_path):
    models, tokenizer = bundles.bert_classifiers(tmp_path / "own", {"a": ["x", "y"], "b": ["x", "y"]})
    bundles.folders(tmp_path / "shared", models, lambda name: False, tokenizer)
    served = open_bundle(tmp_path / "shared", OPTIONS)
    for task in "ba":
        served.switch(task)
        with torch.no_grad():
            own = models[task](**tokenizer(["good film"], return_tensors="pt")).logits.softmax(-1)[0]
        assert list(served.predict(["good film"])[0]["probabilities"].values()) == pytest.approx(own.tolist(), abs=1e-5)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    folder = tmp_path / "bundle"
    bundles.bert_classifiers(folder)

    def changed(place, **values):
        held = json.loads(place.read_text(encoding="utf-8"))
        place.write_text(json.dumps(held | values), encoding="utf-8")
        return held

    def refused(said):
        with pytest.raises(CheckpointError, match=said):
            open_bundle(folder, OPTIONS)

    config, reference = folder / "heads" / "b" / "config.json", folder / "reference" / "config.json"
    before = changed(config, architectures=["NoSuchModel"])
    refused("architecture 'NoSuchModel'")
    changed(config, architectures=["BertForMaskedLM"])
    refused("kind BertForMaskedLM are not served")
    changed(config, **before | {"id2label": {"0": "x", "1": "y"}})
    refused("the head of task 'b' has 'classifier.bias'")
    changed(config, **before | {"id2label": {"0": "x", "1": "y", "2": "x"}})
    refused("two classes of task 'b' have one name")
    changed(config, **before)
    (folder / "heads" / "b" / "head.safetensors").rename(tmp_path / "kept")
    refused("has no head.safetensors")
    Weights.open(tmp_path / "kept").select(lambda name: "bias" in name).save(tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").rename(folder / "heads" / "b" / "head.safetensors")
    refused("bert.pooler.dense.weight, classifier.weight, which neither")
    (tmp_path / "kept").replace(folder / "heads" / "b" / "head.safetensors")
    for file in (folder / "reference").glob("tokenizer*"):
        file.unlink()
    refused("has no tokenizer")
    reference.unlink()
    (folder / "heads" / "a" / "config.json").unlink()
    refused("has no config.json")


def test_a_bundle_of_nothing_is_refused(tmp_path):
    Bundle(Weights.of({"x": torch.zeros(2)}), {}).save(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="holds no task"):
        open_bundle(tmp_path / "bundle", OPTIONS)


def test_a_bundle_that_byom_pack_made_of_folders_answers_as_the_unpacked_folders_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": len(bundles.VOCABULARY), "max_position_embeddings": 16}
    config = BertConfig(**SIZES | sizes)
    torch.manual_seed(0)
    base, tokenizer = BertModel(config), bundles.tokenizer()
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    for task, labels in LABELS.items():
        model = BertForSequenceClassification.from_pretrained("base", id2label=dict(enumerate(labels)))
        model.load_state_dict(bundles.near(model, len(task + labels[0])))
        model.save_pretrained(task)
    experts = ",".join(f"{task}={task}" for task in LABELS)
    assert main(["pack", "bundle", "base=base", f"experts=[{experts}]", "byom=fft", "byom.density=0.2"]) == 0
    served = open_bundle(tmp_path / "bundle", OPTIONS)
    for task, labels in LABELS.items():
        assert main(["unpack", "bundle", f"task={task}", f"{task}_again"]) == 0
        own = BertForSequenceClassification.from_pretrained(f"{task}_again").eval()
        with torch.no_grad():
            logits = own(**tokenizer(["good"], return_tensors="pt")).logits[0]
        served.switch(task)
        answer = served.predict(["good"])[0]
        assert served.tasks[task].labels == tuple(labels)
        assert list(answer["probabilities"].values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
