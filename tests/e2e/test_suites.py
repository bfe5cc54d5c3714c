"""Every published suite reads tiny data in its hub's own schema, offline: labels, sizes, held-out examples, prompts."""

import pytest
import torch

from byom.cli import config
from byom.data import splits as data
from byom.data.draw import Draws
from tests.hub import SIZES, build, tasks, visit
from tests.problems import slow

WORDS = {
    "yes", "no", "entailment", "neutral", "contradiction", "acceptable", "unacceptable", "positive", "negative",
}  # fmt: skip
SUITES = ("vision8", "vision14", "vision20", "glue8", "glue8_text", "flan4")
PARTS = ("vision8", "vision14")
"""Suites whose tasks are among another's."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder, ["vision20", "glue8"])
    return folder


class Plain:
    """Encodes an input as its length."""

    def encoding_for(self, task):
        return "plain"

    def encode(self, inputs, task=None):
        return {
            "x": torch.tensor(
                [len(i["pair"] if "pair" in i else str(i)) if isinstance(i, dict) else i.size[0] for i in inputs]
            )
        }


@pytest.mark.parametrize("suite", [*(suite for suite in SUITES if suite not in PARTS), *slow(*PARTS)])
def test_every_task_of_a_suite_is_read_as_published(home, monkeypatch, tmp_path, suite):
    with visit(home, monkeypatch):
        for task in tasks(suite):
            splits = data.load(task, Plain(), 0, tmp_path)
            held = task.holdout == "task_vectors"
            assert len(splits["test"]) == SIZES[task.source.splits["test"]], task.name
            labels = splits["test"].labels
            assert labels.is_floating_point() == task.regression
            assert labels.max() < len(task.classes) or task.regression
            if held:  # every image of the training set is either trained on or held out
                assert len(splits["train"]) + len(splits["validation"]) == SIZES["train"]
                assert len(splits["validation"]) == SIZES["train"] // 10


def test_held_out_images_are_those_of_the_task_vectors_code(home, monkeypatch):
    with visit(home, monkeypatch):
        task = tasks("vision8")[0]
        draws = Draws(task, task.source.pools(), 0)
    generator = torch.Generator().manual_seed(0)
    pool = range(SIZES["train"])
    train, held = torch.utils.data.random_split(pool, [SIZES["train"] - 3, 3], generator=generator)
    assert set(draws["validation"][1]) == set(held.indices)
    assert set(draws["train"][1]) == set(train.indices)


def test_suites_hold_what_papers_say():
    names = {suite: [task.name for task in tasks(suite)] for suite in SUITES}
    assert [len(names[s]) for s in SUITES] == [8, 14, 20, 8, 8, 4]
    assert set(names["vision8"]) < set(names["vision14"]) < set(names["vision20"])
    assert names["vision8"] == ["sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
    counts = {task.name: len(task.classes) for task in tasks("vision8")}
    assert list(counts.values()) == [397, 196, 45, 10, 10, 43, 10, 47]
    templates = {task.name: len(task.templates) for task in tasks("vision8")}
    assert list(templates.values()) == [2, 8, 18, 3, 1, 3, 1, 8]
    metrics = {task.name: task.metric for task in tasks("glue8")}
    assert (metrics["cola"], metrics["stsb"]) == ("matthews", "pearson_spearman")
    assert {task.metric for task in tasks("glue8_text")} == {"exact_match", "spearman"}


@pytest.mark.parametrize("task", tasks("glue8_text"), ids=lambda task: task.name)
def test_prompts_use_the_columns_that_are_read_and_answers_are_their_words(task):
    from string import Formatter

    columns = {name for _, name, _, _ in Formatter().parse(task.prompt) if name}
    assert columns == set(task.source.input)
    if not task.regression:
        assert set(task.classes) <= WORDS
        assert task.name in ("qnli", "rte") or all(word in task.prompt for word in task.classes) or task.name == "sst2"


def test_a_task_of_the_benchmark_can_come_from_image_folders(home, monkeypatch, tmp_path):
    """The same images, saved a folder a class, give the same pixels and labels."""
    with visit(home, monkeypatch):
        task = next(task for task in tasks("vision8") if task.name == "eurosat")
        pools = task.source.pools()
    for split, pool in pools.items():
        for i, label in enumerate(pool.labels):
            folder = tmp_path / split / f"{int(label):03}"
            folder.mkdir(parents=True, exist_ok=True)
            pool.inputs[i].save(folder / f"{i:04}.png")
    source = {
        "_target_": "byom.data.source.images.ImageFolder",
        "root": str(tmp_path),
        "splits": {"train": "train/*/*", "test": "test/*/*"},
    }
    overrides = [f"suite.tasks.eurosat.source={{{','.join(f'{k}: {v}' for k, v in flat(source))}}}"]
    built = config.settings(["suite=vision8", "~suite.tasks.eurosat.source", f"+{overrides[0]}"])
    folders = next(t for t in built.suite.tasks if t.name == "eurosat").source.pools()
    assert sorted(map(int, folders["test"].labels)) == sorted(map(int, pools["test"].labels))


def flat(tree):
    for key, value in tree.items():
        yield (
            key,
            value if not isinstance(value, dict) else "{" + ",".join(f"{k}: '{v}'" for k, v in value.items()) + "}",
        )
