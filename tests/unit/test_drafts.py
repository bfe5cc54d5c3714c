"""Large splits are encoded by chunks, in processes that may be killed, to the bits of small ones."""

import io
import json
import pickle
import subprocess
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from byom.data import draft, encode, making, split, splits, worker, workers
from byom.data.draft import work_folder
from byom.data.encode import Examples, Filling
from byom.data.source.hub import Column
from byom.data.source.images import Images
from byom.data.source.pixels import Arrays
from byom.data.source.table import Table
from byom.data.split import Split, open_split
from byom.data.splits import load
from byom.data.suite import Task
from byom.data.workers import NoWorkers, filled
from byom.errors import CheckpointError, DataError
from byom.storage import contents

LENGTH = 6


class Words:
    """A backbone that counts letters, notes what it encodes, and can be told to fail."""

    def __init__(self, fails=()):
        self.fails, self.seen = fails, []

    def encoding_for(self, task):
        return "letters"

    def encode(self, inputs, task=None):
        self.seen += inputs
        if bad := [text for text in inputs if text in self.fails]:
            raise ValueError(f"no letters in {bad}")
        ids = torch.tensor([[ord(letter) for letter in text.ljust(LENGTH)][:LENGTH] for text in inputs])
        return {"input_ids": ids, "attention_mask": (ids > 32).long()}


@pytest.fixture
def folder(tmp_path):
    rows = [f"word{i},{'b' if i % 3 == 0 else 'a'}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return tmp_path


@pytest.fixture
def chunks(monkeypatch):
    """Let three rows be a chunk, so that the test split has four."""
    for module in (draft, making, splits):
        monkeypatch.setattr(module, "ROWS", 3)


def opened(folder, backbone=None, name="cache"):
    task = Task("toy", Table(folder, {"train": "train.csv"}), "text", ("a", "b"), train=9, validation=3, test=10)
    return load(task, backbone or Words(), 0, folder / name)


def test_chunks_give_the_file_that_memory_gives(folder, monkeypatch):
    small = opened(folder, name="small")
    whole = small["test"]
    for module in (draft, making, splits):
        monkeypatch.setattr(module, "ROWS", 3)
    large = opened(folder)
    assert large["test"].fingerprint == whole.fingerprint == Split(whole.inputs, whole.labels).fingerprint
    assert torch.equal(large["test"].inputs["input_ids"], whole.inputs["input_ids"])
    assert large.path("test").read_bytes() == small.path("test").read_bytes()
    assert not work_folder(large.path("test")).exists()


def fail_at(folder, number):
    """Encode until an example of the test split fails, and return the splits and the texts in order."""
    places = opened(folder).draws["test"][1]
    texts = [f"word{i}" for i in places]
    broken = opened(folder, Words(fails=[texts[number]]))
    with pytest.raises(
        DataError, match=rf"example {places[number]} of the train examples of task toy \(Table .*cannot"
    ):
        broken["test"]
    return texts


def test_what_a_failure_leaves_is_gone_on_with(folder, chunks):
    texts = fail_at(folder, 7)
    backbone = Words()
    again = opened(folder, backbone)
    assert len(again["test"]) == 10 and backbone.seen == texts[:1] + texts[6:]  # the first example says what a row is
    assert again["test"].fingerprint == opened(folder, name="other")["test"].fingerprint


@pytest.mark.parametrize("damage", ["rows", "journal", "key", "shape", "type", "junk"])
def test_what_is_left_counts_only_where_it_is_whole(folder, chunks, damage):
    texts = fail_at(folder, 7)
    left = work_folder(opened(folder).path("test"))
    rows, journal = left / "rows.safetensors", left / "journal.jsonl"
    lines = journal.read_text().splitlines()
    assert [json.loads(line)["chunk"] for line in lines[1:]] == [0, 1]
    if damage == "rows":  # the last row of the second chunk
        content, word = rows.read_bytes(), torch.tensor([ord(c) for c in texts[5].ljust(LENGTH)])
        at = content.index(word.numpy().tobytes())
        rows.write_bytes(content[:at] + b"\1" + content[at + 1 :])
        expected = texts[:1] + texts[3:6] + texts[6:]
    elif damage == "journal":  # a crash cut its last line
        journal.write_text("\n".join(lines)[:-9])
        expected = texts[:1] + texts[3:]
    elif damage in ("key", "shape", "type"):
        value = json.loads(lines[0])
        wrong = {"key": {"key": "another"}, "shape": {"rows": value["rows"] | {"inputs/input_ids": [[7], "I64"]}}}
        wrong["type"] = {"rows": value["rows"] | {"inputs/input_ids": [[6], "Q64"]}}
        journal.write_text("\n".join([json.dumps(value | wrong[damage]), *lines[1:]]))
        expected = texts[:1] + texts
    else:
        journal.write_bytes(b"\xff\0junk")
        expected = texts[:1] + texts
    backbone = Words()
    again = opened(folder, backbone)
    assert again["test"].fingerprint == opened(folder, name="other")["test"].fingerprint
    assert backbone.seen == expected


def test_a_disk_without_room_is_refused_before_the_work(folder, chunks, monkeypatch):
    monkeypatch.setattr(draft.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    backbone = Words()
    with pytest.raises(CheckpointError, match=r"cannot write .*-test\.safetensors: .*GB are free\. Free space"):
        opened(folder, backbone)["test"]
    assert len(backbone.seen) == 1


def test_a_fingerprint_of_a_large_file_is_remembered_until_the_file_changes(folder, monkeypatch):
    monkeypatch.setattr(split, "LARGE", 0)
    monkeypatch.setattr(contents, "SETTLED", -1)
    held = opened(folder)
    path, found = held.path("test"), held["test"].fingerprint

    def again(cache=None):
        opened = open_split(path, cache)
        assert opened is not None
        return opened.fingerprint

    assert again(held.cache) == found
    read = []
    monkeypatch.setattr(split, "digest_of", lambda tensors: read.append(tensors) or found)
    assert again(held.cache) == found and not read
    assert again() == found and len(read) == 1
    path.write_bytes(path.read_bytes())
    assert again(held.cache) == found and len(read) == 2


def test_some_examples_of_a_split(folder):
    whole = opened(folder)["test"]
    places = torch.tensor([7, 2, 5])
    part = whole.at(places)
    assert len(part) == 3 and part.fingerprint == whole.fingerprint
    assert torch.equal(part.labels, whole.labels[places])
    assert torch.equal(part.inputs["input_ids"], whole.inputs["input_ids"][places])
    pairs = (zip(index.tolist(), inputs["input_ids"].tolist(), strict=True) for inputs, _, index in part.batches(2))
    found = dict(pair for batch in pairs for pair in batch)
    for number, place in enumerate(places):
        row = whole.inputs["input_ids"][place]
        assert found[number] == row[: len(found[number])].tolist()
    assert sorted(found) == [0, 1, 2]


# ---- processes


@pytest.fixture
def busy(monkeypatch, chunks):
    """Let every split be work for two processes."""
    monkeypatch.setattr(making, "PATIENCE", -1.0)
    monkeypatch.setattr(making, "usable", lambda: 2)
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    return started


@pytest.mark.slow
def test_processes_fill_what_one_would(folder, busy, monkeypatch):
    for module in (draft, making, splits):
        monkeypatch.setattr(module, "ROWS", 5)  # two chunks: the second is a process's
    backbone = Words()
    found = opened(folder, backbone)["test"]
    assert len(backbone.seen) == 1 + 5 and len(busy) == 1  # the first example says what a row is
    assert busy[0].returncode is not None
    monkeypatch.setattr(making, "usable", lambda: 1)
    assert found.fingerprint == opened(folder, name="other")["test"].fingerprint and len(busy) == 1


HEAR = "import os, pickle, sys, time; hear = lambda: pickle.load(sys.stdin.buffer); hear(); "
SAY = "print('of a library\\nbyom answers', flush=True); "
SAY += "say = lambda *what: (pickle.dump(what, sys.stdout.buffer), sys.stdout.buffer.flush()); "


def test_work_that_no_process_can_have_is_done_here(folder, busy, monkeypatch, capsys):
    monkeypatch.setattr(workers, "START", "raise SystemExit(3)")
    backbone = Words()
    found = opened(folder, backbone)["test"]
    assert len(backbone.seen) == 1 + 10 and busy
    assert "byom: encoding in this process alone (a process ended with status 3)" in capsys.readouterr().err
    monkeypatch.setattr(making, "usable", lambda: 1)
    assert found.fingerprint == opened(folder, name="other")["test"].fingerprint


def test_where_no_process_can_be_started_there_is_this_one(folder, busy, monkeypatch, capsys):
    monkeypatch.setattr(workers.sys, "executable", str(folder / "python"))
    assert len(opened(folder)["test"]) == 10
    assert "encoding in this process alone (no process can be started: " in capsys.readouterr().err


def test_examples_that_cannot_travel_are_encoded_here(folder, busy, monkeypatch, capsys):
    class Word(str):
        def __reduce__(self):
            raise TypeError("it is bound to this process")

    pools = Table(folder, {"train": "train.csv"}).pools()
    held = opened(folder, Words())
    held.backbone.seen = deque(maxlen=0)  # or they would travel with the backbone
    monkeypatch.setattr(workers, "START", HEAR + SAY + "hear(); say(True, None); hear()")
    held.draws.pools["train"] = replace(pools["train"], inputs=[Word(text) for text in pools["train"].inputs])
    assert len(held["test"]) == 10 and busy
    assert "encoding in this process alone (TypeError: it is bound to this process)" in capsys.readouterr().err


def test_what_cannot_be_pickled_is_encoded_here(folder, busy, capsys):
    backbone = Words(fails=(lambda: None,))
    assert len(opened(folder, backbone)["test"]) == 10
    assert not busy and "encoding in this process alone (" in capsys.readouterr().err


def test_a_killed_process_is_said_and_does_not_hang(folder, busy, monkeypatch):
    monkeypatch.setattr(workers, "START", HEAR + SAY + "hear(); say(True, None); hear(); os.kill(os.getpid(), 9)")
    with pytest.raises(DataError, match="-test.safetensors was killed by signal 9, most often because memory ran out"):
        opened(folder)["test"]
    assert busy and all(process.returncode is not None for process in busy)


def test_an_interrupt_leaves_no_process(folder, busy, monkeypatch):
    said = "hear(); say(True, None); hear(); say(True, {'inputs/input_ids': '0'}); time.sleep(99)"
    monkeypatch.setattr(workers, "START", HEAR + SAY + said)
    nothing = Filling(None, opened(folder).task, folder / "x", folder / "rows", {})
    making_of = filled(nothing, [0, 1, 2], lambda chunk: (chunk, 0, Examples([], [], "")), 1)
    assert next(making_of) == (0, {"inputs/input_ids": "0"})
    making_of.close()  # as an interrupt unwinds it
    assert [process.returncode for process in busy] == [-9]


def test_a_process_says_what_failed(folder, chunks):
    held = opened(folder, Words(fails=["word1"]))
    task, (pickled, answers) = held.task, (io.BytesIO(), io.BytesIO())
    filling = Filling(held.backbone, task, folder / "x", folder / "rows", {})
    chunk = (0, Examples(["word0", "word1"], [4, 9], "the train examples of task toy"))
    for content in (filling, chunk):
        pickle.dump(pickle.dumps(content), pickled)
    pickled.seek(0)
    worker.serve(pickled, answers)
    answers.seek(0)
    assert pickle.load(answers) == (True, None)
    found, error = pickle.load(answers)
    assert not found and isinstance(error, DataError)
    assert "example 9 of the train examples of task toy cannot be encoded (ValueError: no letters in" in str(error)


def test_a_process_that_cannot_read_its_examples_leaves_them_to_others(folder):
    pickled, answers = io.BytesIO(), io.BytesIO()
    nothing = Filling(Words(), opened(folder).task, folder / "x", folder / "rows", {})
    pickle.dump(pickle.dumps(nothing), pickled)
    pickle.dump(b"cno_such_module\nWord\n.", pickled)
    pickled.seek(0)
    worker.serve(pickled, answers)
    answers.seek(0)
    assert pickle.load(answers) == (True, None)
    found, error = pickle.load(answers)
    assert not found and isinstance(error, NoWorkers) and "no_such_module" in str(error)


def test_an_example_that_cannot_be_read_is_named():
    class Torn(list):
        def __getitem__(self, number):
            raise OSError("image file is truncated")

    with pytest.raises(
        DataError, match=r"example 7 of the test examples cannot be read \(OSError: image file is trunc"
    ):
        list(Examples(Torn(), [7], "the test examples").batches())


def test_images_are_encoded_by_few(monkeypatch):
    monkeypatch.setattr(encode, "BYTES", 3 * 8 * 8 * 2)
    images = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(5)]
    batches = list(Examples(images, range(5), "").batches())
    assert [(first, len(batch)) for first, batch in batches] == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("kind", ["files", "arrays", "table"])
def test_examples_travel_alone(kind, tmp_path):
    arrays = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
    if kind == "arrays":
        inputs = Arrays(arrays)
    elif kind == "files":
        paths = [tmp_path / f"{i}.png" for i in range(6)]
        for path, values in zip(paths, arrays, strict=True):
            Image.fromarray(values).save(path)
        inputs = Images(paths)
    else:
        table = SimpleNamespace(cache_files=[], select_columns=lambda names: table)
        assert Column(table, "image").take([1]) is None  # in memory: all of it would travel
        return
    part = pickle.loads(pickle.dumps(inputs.take([4, 1])))
    assert len(part) == 2
    assert [np.asarray(part[i]).tolist() for i in range(2)] == [arrays[4].tolist(), arrays[1].tolist()]
