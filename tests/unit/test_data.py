"""Splits are drawn without leaks, are the same wherever they are drawn, and survive a damaged cache."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from byom.data import splits as data
from byom.data.draw import SPLITS, content, draw
from byom.data.source.base import Pool
from byom.data.source.images import ImageFolder
from byom.data.source.table import Table
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import DataError
from byom.pipeline import encoded

LENGTH = 12


class Words:
    """A backbone that counts letters; it notes what it was asked to encode."""

    def __init__(self):
        self.encoding = {"kind": "letters", "length": LENGTH}
        self.seen = []

    def encoding_for(self, task):
        return self.encoding

    def encode(self, inputs, task=None):
        self.seen += inputs
        ids = torch.zeros(len(inputs), LENGTH, dtype=torch.int64)
        for row, text in enumerate(inputs):
            codes = [ord(letter) for letter in text][:LENGTH]
            ids[row, : len(codes)] = torch.tensor(codes)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Squares:
    def encoding_for(self, task):
        return "squares"

    def encode(self, inputs, task=None):
        arrays = [np.asarray(image.convert("RGB").resize((4, 4))) for image in inputs]
        return {"pixels": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}


def load(*arguments):
    """Encode every split at once; the lab reads them one by one."""
    splits = data.load(*arguments)
    assert set(dict(splits)) == set(SPLITS)
    return splits


def texts(path, count, prefix=""):
    """Write a table of distinct texts, of which every third is of class b."""
    rows = [f"{prefix}{'x' * (i % 5)}{i},{'b' if i % 3 == 0 else 'a'}" for i in range(count)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")


def task(folder, splits=("train",), **sizes):
    source = Table(folder, {split: f"{split}.csv" for split in splits})
    sizes = {"train": 20, "validation": 8, "test": 10, "shots": 2} | sizes
    return Task("toy", source, "text", ("a", "b"), **sizes)


@pytest.fixture
def folder(tmp_path):
    texts(tmp_path / "train.csv", 60)
    return tmp_path


def rows(split):
    return {bytes(row.tolist()) for row in split.inputs["input_ids"]}


def test_sizes_labels_and_shots(folder):
    splits = load(task(folder), Words(), 0, folder / "cache")
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 20,
        "validation": 8,
        "test": 10,
        "shots": 4,
    }
    assert splits["shots"].labels.tolist() == [0, 0, 1, 1]
    for split in splits.values():
        numbers = [int(bytes(row[row > 0].tolist()).decode().lstrip("x")) for row in split.inputs["input_ids"]]
        assert split.labels.tolist() == [int(number % 3 == 0) for number in numbers]
        assert split.labels.dtype == torch.int64


@pytest.mark.parametrize("official", [("train",), ("train", "test"), ("train", "validation", "test")])
def test_no_content_is_in_two_of_test_validation_and_train(folder, official):
    for split in official[1:]:  # the official pools repeat the training texts, as published data sets do
        texts(folder / f"{split}.csv", 30)
    splits = load(task(folder, official, train=15), Words(), 0, folder / "cache")
    test, validation, train, shots = (rows(splits[name]) for name in ("test", "validation", "train", "shots"))
    assert not test & (validation | train | shots)
    assert not validation & (train | shots)


def test_repeated_texts_do_not_leak(tmp_path):
    texts(tmp_path / "once.csv", 40)
    head, *lines = (tmp_path / "once.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([head, *lines * 3]) + "\n")
    splits = load(task(tmp_path), Words(), 3, tmp_path / "cache")
    assert not rows(splits["test"]) & (rows(splits["train"]) | rows(splits["validation"]) | rows(splits["shots"]))


def test_test_split_knows_no_seed_and_the_others_do(folder):
    one, two = (load(task(folder), Words(), seed, folder / f"cache{seed}") for seed in (0, 1))
    assert one["test"].fingerprint == two["test"].fingerprint
    for name in ("train", "validation", "shots"):
        assert one[name].fingerprint != two[name].fingerprint


def test_test_split_is_encoded_once_for_all_seeds(folder):
    one, two = (load(task(folder), Words(), seed, folder / "cache") for seed in (0, 1))
    assert one["test"].fingerprint == two["test"].fingerprint and one.path("test") == two.path("test")
    assert len(list((folder / "cache/data").glob("*-test.safetensors"))) == 1
    assert one.path("train") != two.path("train")
    earlier = folder / "cache/data" / two.path("train").name.replace("-train", "-test")
    earlier.write_bytes(one.path("test").read_bytes())
    assert two.path("test") == earlier  # of an earlier version, which kept one for every seed


def test_draws_differ_between_tasks(folder):
    pools = task(folder).source.pools()
    other = Task("other", task(folder).source, "text", ("a", "b"), train=20, validation=8, test=10, shots=2)
    assert draw(task(folder), pools, 0) != draw(other, pools, 0)


def test_draw_is_pinned():
    # another NumPy, machine or refactoring must not move a published split
    pool = Pool([str(i) for i in range(40)], ["a", "b"] * 20)
    drawn = draw(task("/nowhere", train=4, validation=3, test=3, shots=1), {"train": pool}, 7)
    assert drawn == PINNED


PINNED = {
    "train": ("train", [16, 29, 38, 18]),
    "validation": ("train", [35, 5, 11]),
    "test": ("train", [20, 23, 4]),
    "shots": ("train", [18, 15]),
}


def test_larger_training_split_extends_the_smaller(folder):
    pools = task(folder).source.pools()
    small, large = (draw(task(folder, train=size), pools, 0) for size in (10, 20))
    assert large["train"][1][:10] == small["train"][1]
    assert {k: v for k, v in large.items() if k != "train"} == {k: v for k, v in small.items() if k != "train"}


def test_validation_comes_from_the_official_pool(folder):
    texts(folder / "validation.csv", 20, prefix="v")
    splits = load(task(folder, ("train", "validation")), Words(), 0, folder / "cache")
    assert all(row.startswith(b"v") for row in rows(splits["validation"]))


def test_only_drawn_examples_are_encoded(folder):
    backbone = Words()
    load(task(folder, train=5, validation=2, test=3, shots=1), backbone, 0, folder / "cache")
    assert len(backbone.seen) == 5 + 2 + 3 + 2


def test_a_split_is_encoded_when_it_is_asked_for(folder):
    backbone = Words()
    splits = data.load(task(folder, train=5, validation=2, test=3, shots=1), backbone, 0, folder / "cache")
    assert not backbone.seen
    assert len(splits["test"]) == len(backbone.seen) == 3
    assert [path.stem.rpartition("-")[2] for path in folder.glob("cache/data/*.safetensors")] == ["test"]


def test_sizes_may_take_all_there_is(folder):
    texts(folder / "test.csv", 12, prefix="t")
    splits = load(
        task(folder, ("train", "test"), train=None, validation=None, test=None, holdout="task_vectors"),
        Words(),
        0,
        folder / "cache",
    )
    assert {name: len(splits[name]) for name in ("train", "validation", "test")} == {
        "train": 54,
        "validation": 6,
        "test": 12,
    }
    lines = (folder / "train.csv").read_text().splitlines()[1:]
    held = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()[54:]
    assert {row.rstrip(b"\0") for row in rows(splits["validation"])} == {lines[i].split(",")[0].encode() for i in held}


def test_rows_of_several_columns_differ_where_their_texts_do():
    assert content({"a": "x", "b": "y"}) == content({"a": "x", "b": "y"})
    assert len({content(row) for row in ({"a": "x", "b": "y"}, {"a": "xy", "b": ""}, {"a": "y", "b": "x"})}) == 3


def test_images_that_are_not_drawn_are_not_decoded(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i in range(40):
        Image.new("L", (2, 2), i).save(tmp_path / "ab"[i % 2] / f"{i:02}.png")
    sizes = {"train": 4, "validation": 2, "test": 3, "shots": 1}
    images = Task("toy", ImageFolder(tmp_path, {"train": "*/*"}), "image", ("a", "b"), **sizes)
    drawn = draw(images, images.source.pools(), 0)
    paths = sorted(tmp_path.glob("*/*.png"))
    for i in set(range(40)) - {i for _, index in drawn.values() for i in index}:
        paths[i].write_bytes(b"no image")
    splits = load(images, Squares(), 0, tmp_path / "cache")
    assert splits["train"].inputs["pixels"].shape == (4, 3, 4, 4)
    assert splits["train"].inputs["pixels"].dtype == torch.uint8


def test_equal_pixels_are_equal_content_whatever_the_file(tmp_path):
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.bmp")
    one, two = (Image.open(tmp_path / name) for name in ("a.png", "a.bmp"))
    assert content(one) == content(two)
    assert content(one) != content(Image.new("RGB", (1, 4), (1, 2, 3)))
    assert content("a") != content("b")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test": 100}, "asks for 100 test examples, but only 60 are left"),
        ({"validation": 55}, "asks for 55 validation examples, but only 50 are left"),
        ({"train": 43}, "asks for 43 train examples, but only 42 are left for it; lower train"),
    ],
)
def test_too_few_examples_are_refused(folder, sizes, message):
    with pytest.raises(DataError, match=message):
        load(task(folder, **sizes), Words(), 0, folder / "cache")


def test_unknown_label_is_refused_even_if_it_would_not_be_drawn(folder):
    with (folder / "train.csv").open("a") as file:
        file.write("stray,bb\n")
    with pytest.raises(DataError, match="label 'bb', which is not one of its classes: did you mean 'b'"):
        load(task(folder, train=1, validation=1, test=1, shots=1), Words(), 0, folder / "cache")


def test_class_without_examples_is_refused(folder):
    lacking = Task("toy", task(folder).source, "text", ("a", "b", "c"), train=5, validation=2, test=2)
    with pytest.raises(DataError, match=r"class 'c' of task toy has no training example \(1 such"):
        load(lacking, Words(), 0, folder / "cache")


def test_rare_class_gives_the_shots_it_has(folder):
    with (folder / "train.csv").open("a") as file:
        file.write("rare,c\n")
    rare = Task("toy", task(folder).source, "text", ("a", "b", "c"), train=5, validation=1, test=1, shots=3)
    assert load(rare, Words(), 0, folder / "cache")["shots"].labels.bincount().tolist() == [3, 3, 1]


def test_second_load_reads_the_cache(folder):
    backbone = Words()
    first = load(task(folder), backbone, 0, folder / "cache")
    backbone.seen.clear()
    again = load(task(folder), backbone, 0, folder / "cache")
    assert not backbone.seen
    assert {name: split.fingerprint for name, split in again.items()} == {n: s.fingerprint for n, s in first.items()}
    assert torch.equal(again["train"].inputs["input_ids"], first["train"].inputs["input_ids"])


def damage_middle(content):
    return content[:-40] + bytes(byte ^ 1 for byte in content[-40:])


@pytest.mark.parametrize(
    "damage",
    [damage_middle, lambda c: c[: len(c) // 2], lambda _: b"", lambda _: b"junk" * 9],
    ids=["bits", "cut", "empty", "junk"],
)
def test_damaged_cache_is_made_again(folder, damage):
    first = load(task(folder), Words(), 0, folder / "cache")
    (path,) = folder.glob("cache/data/*-train.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = load(task(folder), Words(), 0, folder / "cache")
    assert again["train"].fingerprint == first["train"].fingerprint
    assert path.read_bytes() == whole


def test_cache_without_labels_is_made_again(folder):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    load(task(folder), Words(), 0, folder / "cache")
    (path,) = folder.glob("cache/data/*-train.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value.clone() for name, value in load_file(path).items() if name != "labels"}
    path.unlink()
    save_file(tensors, path, metadata)
    assert len(load(task(folder), Words(), 0, folder / "cache")["train"].labels) == 20


def test_changed_data_sizes_encoding_and_classes_miss_the_cache(folder):
    def count():
        return len(list(folder.glob("cache/data/*-train.safetensors")))

    load(task(folder), Words(), 0, folder / "cache")
    longer = Words()
    longer.encoding = {"length": 99}
    load(task(folder), longer, 0, folder / "cache")
    assert count() == 2
    load(task(folder, train=21), Words(), 0, folder / "cache")
    load(
        Task("toy", task(folder).source, "text", ("b", "a"), train=20, validation=8, test=10),
        Words(),
        0,
        folder / "cache",
    )
    assert count() == 4
    texts(folder / "train.csv", 61)
    load(task(folder), Words(), 0, folder / "cache")
    assert count() == 5


def test_cache_file_follows_the_umask(folder):
    load(task(folder), Words(), 0, folder / "cache")
    path = next(folder.glob("cache/data/*.safetensors"))
    assert path.stat().st_mode == (folder / "train.csv").stat().st_mode


# ---- batches


def text_split(lengths, left=False):
    ids = torch.zeros(len(lengths), LENGTH, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, LENGTH - length :] = row + 1 if left else 0
        ids[row, :length] = row + 1 if not left else ids[row, :length]
    return Split({"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.arange(len(lengths)))


def test_text_batches_go_by_length_and_index_restores_the_order():
    split = text_split([3, 9, 1, 5, 5])
    found = torch.full((5,), -1)
    widths = []
    for inputs, labels, index in split.batches(2):
        widths.append(inputs["input_ids"].shape[1])
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape
        assert inputs["input_ids"].max(1).values.tolist() == (index + 1).tolist()
        found[index] = labels
    assert widths == [9, 5, 1]
    assert torch.equal(found, split.labels)


def test_left_padding_is_trimmed_too():
    (inputs, *_), *_ = text_split([2, 4], left=True).batches(2)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_given_order_is_kept():
    orders = [index.tolist() for _, _, index in text_split([3, 9, 1, 5]).batches(3, torch.tensor([2, 0, 1]))]
    assert orders == [[2, 0, 1]]


def test_image_batches_keep_their_order():
    split = Split({"pixels": torch.arange(5).view(5, 1, 1, 1)}, torch.arange(5))
    assert [index.tolist() for _, _, index in split.batches(2)] == [[0, 1], [2, 3], [4]]


def test_inputs_without_padding_names_are_left_whole():
    split = text_split([2, 3])
    whole = Split(split.inputs | {"targets": torch.zeros(2, LENGTH)}, split.labels)
    (inputs, *_), *_ = whole.batches(2)
    assert inputs["targets"].shape == (2, LENGTH)


def test_fingerprint_sees_bytes_labels_types_and_shapes():
    base = text_split([1, 2])
    other_label = Split(base.inputs, base.labels.flip(0))
    other_type = Split({k: v.int() for k, v in base.inputs.items()}, base.labels)
    other_shape = Split({k: v.view(2, 2, -1) for k, v in base.inputs.items()}, base.labels)
    prints = {split.fingerprint for split in (base, other_label, other_type, other_shape)}
    assert len(prints) == 4
    assert all(len(value) == 16 for value in prints)
    assert base.fingerprint == text_split([1, 2]).fingerprint


def test_shots_of_numbers_are_counted_as_the_training_examples(folder):
    scores = task(folder, metric="spearman", train=17)
    cell = SimpleNamespace(backbone=Counting(), seed=0, cache=folder / "cache")
    assert [encoded._size(cell, scores, split) for split in ("train", "shots")] == [(17 * 2 * LENGTH * 8, False)] * 2


class Counting(Words):
    def downloads(self):
        return []
