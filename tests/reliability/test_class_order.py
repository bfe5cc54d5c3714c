"""Rows of a checkpoint's own classifier are the task's classes by their names, never by their place alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from byom.backbone.encoder import Encoder
from byom.checkpoint import read
from byom.data.source.table import Table
from byom.data.suite import Task
from byom.errors import CheckpointError
from byom.experts.files import Files
from byom.functional.heads import Classifier, Head, reordered
from byom.weights import Weights

BASE = {"model.w": torch.arange(6.0).reshape(2, 3)}
CLASSES = {"neg": "negative", "neu": "neutral opinion", "pos": "positive"}


def task(classes=CLASSES, metric="accuracy"):
    return Task("mood", Table("x", {"train": "x.csv"}), "text", classes, metric=metric)


def host(of=None):
    base = Weights.of(BASE, origin="base")
    return SimpleNamespace(
        backbone=Encoder("x", pooling="cls"),
        pretrained=base,
        tasks={"mood": of or task()},
        checkpoint=lambda path: read(path, base),
    )


def expert(folder, config, file="mood.pt", outputs=3):
    """Write a checkpoint whose row r answers with bias r, and return experts that read it."""
    folder.mkdir(parents=True, exist_ok=True)
    classifier = {"dense.weight": torch.eye(2), "dense.bias": torch.zeros(2)}
    classifier |= {"out_proj.weight": torch.arange(2.0 * outputs).reshape(outputs, 2)}
    classifier |= {"out_proj.bias": torch.arange(float(outputs))}
    torch.save(BASE | {f"classifier.{name}": value for name, value in classifier.items()}, folder / file)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return Files("mine", f"{folder}/{file}".replace("mood", "{task}"), heads="checkpoint")


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"0": "positive", "1": "negative", "2": "neutral opinion"}},
        {"id2label": {"2": "Neutral_Opinion", "0": " POSITIVE", "1": "Negative"}},
        {"id2label": ["positive", "negative", "neutral-opinion"]},
        {"id2label": {"0": "pos", "1": "neg", "2": "neu"}},
        {"label2id": {"positive": 0, "negative": 1, "NEUTRAL OPINION": 2}},
        {"label2id": {"pos": "0", "neg": "1", "neu": "2"}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "label2id": {"pos": 0, "neg": 1, "neu": 2}},
        {"id2label": {"0": "pos", "1": "neg", "2": "neu"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}},
    ],
)
def test_rows_go_by_the_names_of_classes_in_any_order_and_spelling(tmp_path, config, capsys):
    experts = expert(tmp_path, config)
    head = experts.head(host(), "mood")
    assert head.bias.tolist() == [1, 2, 0]
    assert torch.equal(head.weight, torch.tensor([[2.0, 3], [4, 5], [0, 1]]))
    assert experts.notes(host())["rows"] == {"mood": "by the names in config.json"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json names them"),
        ({"id2label": None}, "no config.json names them"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, "calls them LABEL_0, LABEL_1, LABEL_2"),
        ({"id2label": {"0": "1", "1": "2", "2": "3"}}, "calls them 1, 2, 3"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "calls them LABEL_0, LABEL_1"),
    ],
)
def test_rows_without_names_are_taken_in_order_and_that_is_said(tmp_path, config, said, capsys):
    experts = expert(tmp_path, config)
    assert experts.head(host(), "mood").bias.tolist() == [0, 1, 2]
    assert said in experts.notes(host())["rows"]["mood"]
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"id2label": {"0": "joy", "1": "negative", "2": "neutral opinion"}}, r"joy, .* negative, .*\(joy cannot"),
        ({"id2label": {"0": "positive", "1": "negative", "2": "positive"}}, "positive, negative, positive, and task"),
        ({"id2label": {"0": "positive", "1": "negative"}}, "rows of the classifier positive, negative, and task mood"),
        ({"id2label": {"0": "LABEL_2", "1": "LABEL_1", "2": "LABEL_0"}}, "LABEL_2, LABEL_1, LABEL_0, and task mood"),
        ({"id2label": {"1": "negative", "2": "positive", "3": "neutral opinion"}}, "numbers its classes 1, 2, 3"),
        ({"id2label": {"a": "negative", "b": "positive", "c": "neutral opinion"}}, "numbers its classes a, b, c"),
        ({"label2id": {"negative": 0, "positive": 0, "neutral opinion": 2}}, "two classes of label2id one row"),
        (
            {"id2label": {"0": "neg", "1": "neu", "2": "pos"}, "label2id": {"pos": 0, "neu": 1, "neg": 2}},
            "contradicts itself",
        ),
        ("{", "is not JSON"),
    ],
)
def test_names_that_are_not_the_tasks_classes_are_refused(tmp_path, config, said):
    with pytest.raises(CheckpointError, match=said) as error:
        expert(tmp_path, config).head(host(), "mood")
    assert "config.json" in str(error.value)


def test_classes_that_only_case_tells_apart_are_matched_exactly_or_not_at_all(tmp_path):
    of = host(task(("us", "US", "other")))
    head = expert(tmp_path / "a", {"id2label": {"0": "US", "1": "us", "2": "Other"}}).head(of, "mood")
    assert head.bias.tolist() == [1, 0, 2]
    with pytest.raises(CheckpointError, match="Us, us, other, and task mood"):
        expert(tmp_path / "b", {"id2label": {"0": "Us", "1": "us", "2": "other"}}).head(of, "mood")


def test_a_configuration_shared_by_several_checkpoints_maps_what_it_names_and_refuses_none(tmp_path, capsys):
    named = {"id2label": {"0": "positive", "1": "negative", "2": "neutral opinion"}}
    experts = expert(tmp_path, named)
    torch.save(BASE, tmp_path / "other.pt")
    assert experts.head(host(), "mood").bias.tolist() == [1, 2, 0]
    experts = expert(tmp_path, {"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}})
    assert experts.head(host(), "mood").bias.tolist() == [0, 1, 2]
    assert "names classes of another task" in capsys.readouterr().err
    alone = expert(tmp_path / "mood", {"id2label": {"0": "x", "1": "y", "2": "z"}}, "model.pt")
    torch.save(BASE, tmp_path / "mood" / "other.pt")
    with pytest.raises(CheckpointError, match="x, y, z"):
        alone.head(host(), "mood")


def test_a_number_has_no_classes_and_other_counts_are_refused(tmp_path):
    numbers = host(task(("0", "1"), metric="spearman"))
    experts = expert(tmp_path / "a", {"id2label": {"0": "similarity"}}, outputs=1)
    assert experts.head(numbers, "mood").bias.tolist() == [0]
    assert "no classes" in experts.notes(numbers)["rows"]["mood"]
    with pytest.raises(CheckpointError, match="has 1 outputs where the task has 3"):
        experts = expert(tmp_path / "b", {"id2label": {"0": "LABEL_0"}}, outputs=1)
        experts.head(host(), "mood")


def test_heads_of_every_kind_change_the_order_of_their_rows():
    head = Head(torch.eye(3), 2.0)
    assert torch.equal(reordered(head, (2, 0, 1)).weight, torch.eye(3)[[2, 0, 1]])
    assert reordered(head, None) is head
    own = Classifier(torch.eye(2), torch.zeros(2), torch.arange(4.0).reshape(2, 2), torch.arange(2.0))
    features = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reordered(own, (1, 0))(features), own(features).flip(1))
