"""Whatever a run reads is part of its record's name: other bytes under the same name are another run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byom.backbone.clip import Clip
from byom.backbone.encoder import Encoder
from byom.backbone.seq2seq import Seq2Seq
from byom.backbone.vit import Vit
from byom.cli import config
from byom.data.source.hub import Hub as HubData
from byom.data.source.images import ImageFolder
from byom.data.source.package import Package
from byom.data.source.table import Table
from byom.data.suite import Suite, Task
from byom.errors import ByomError, DataError
from byom.experts.files import Files
from byom.experts.finetune.full import Full
from byom.experts.hub import Hub
from byom.experts.trained import Trained
from byom.pipeline.inputs import Names
from byom.pipeline.labs import Labs
from byom.pipeline.preview import Preview, _place
from byom.report.comparable import check_comparable
from byom.storage import contents, repository
from byom.storage.contents import content_digest
from tests.unit.synthetic_runs import lift, record


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def swapped(path: Path, text: str) -> None:
    """Replace a file by one of the same size and time, as ``cp -p`` and ``rsync -a`` do."""
    stat = path.stat()
    assert len(text) == stat.st_size
    other = put(path.with_name("on_its_way"), text)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def overwritten(path: Path, text: str) -> None:
    """Write other bytes into the same file and put its time back."""
    stat = path.stat()
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def copied(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


@pytest.fixture
def remembering(monkeypatch):
    """Remember digests at once, not only those of files that have been left alone for a while."""
    monkeypatch.setattr(contents, "SETTLED", -(10**12))


@pytest.mark.usefixtures("remembering")
def test_a_remembered_digest_is_not_that_of_other_bytes_with_the_same_size_and_time(tmp_path):
    file = put(tmp_path / "a", "one")
    first = content_digest(tmp_path, ["a"], tmp_path / "cache")
    swapped(file, "two")
    assert content_digest(tmp_path, ["a"], tmp_path / "cache") == content_digest(tmp_path, ["a"]) != first
    link = tmp_path / "link"
    link.symlink_to(file)
    before = content_digest(tmp_path, ["link"], tmp_path / "cache")
    other = put(tmp_path / "other", "six")
    os.utime(other, ns=(1, file.stat().st_mtime_ns))
    link.unlink()
    link.symlink_to(other)
    assert content_digest(tmp_path, ["link"], tmp_path / "cache") != before


def test_a_file_written_a_moment_ago_is_read_again_for_its_time_may_not_change(tmp_path):
    file = put(tmp_path / "a", "one")
    first = content_digest(tmp_path, ["a"], tmp_path / "cache")
    overwritten(file, "two")
    assert content_digest(tmp_path, ["a"], tmp_path / "cache") != first


TASK = SimpleNamespace(name="cars")


def on_disk(folder, kind):
    """Return experts and the file of theirs that is replaced."""
    options = {"heads": "checkpoint"} if kind == "config" else {}
    if kind in ("file", "config"):
        file, path = put(folder / "cars.pt", "one"), "{task}.pt"
        file = put(folder / "config.json", "one") if kind == "config" else file
    else:
        path, name = "{task}", {"folder": "model.safetensors", "adapter": "adapter_config.json"}.get(kind, "deep/1.bin")
        file = put(folder / "cars" / name, "one")
        put(folder / "cars" / "adapter_model.safetensors", "factors")
        if kind == "shard":
            put(folder / "cars" / "pytorch_model.bin.index.json", json.dumps({"weight_map": {"w": "deep/1.bin"}}))
    return Files("mine", f"{folder}/{path}", **options), file


@pytest.mark.parametrize("kind", ["file", "folder", "adapter", "shard", "config"])
@pytest.mark.usefixtures("remembering")
def test_an_expert_replaced_in_place_is_another_and_a_touched_or_copied_one_is_not(tmp_path, kind):
    experts, file = on_disk(tmp_path / "x", kind)
    key = experts.key(TASK, Full(), tmp_path)
    for same in (touched, copied):
        same(file)
        assert experts.key(TASK, Full(), tmp_path) == key
    swapped(file, "two")
    assert experts.key(TASK, Full(), tmp_path) != key


def test_what_a_trainer_leaves_beside_an_expert_is_not_part_of_it(tmp_path):
    experts, _ = on_disk(tmp_path, "folder")
    key = experts.key(TASK, Full())
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", ".DS_Store", "checkpoint-5/model.safetensors"):
        put(tmp_path / "cars" / name, "more")
    assert experts.key(TASK, Full()) == key


BACKBONES = {
    "vit.pt": lambda path: Vit(checkpoint=str(path)),
    "clip.pt": lambda path: Clip(pretrained=str(path)),
    "bert/model.safetensors": lambda path: Encoder(str(path.parent)),
    "bert/vocab.txt": lambda path: Encoder(str(path.parent)),
    "t5/model.safetensors": lambda path: Seq2Seq(str(path.parent)),
}


def data(root):
    return Task("a", Table(str(root), {"train": "x.csv"}), "text", ("n", "y"))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.usefixtures("remembering")
def test_a_backbone_replaced_in_place_gives_other_experts_and_heads(tmp_path, name):
    backbone, task = BACKBONES[name](file := put(tmp_path / "models" / name, "one")), data(tmp_path)
    put(tmp_path / "x.csv", "text,label\n")

    def names():
        made = Names(backbone, Trained(), Full(), 0, tmp_path)
        return made.expert(task), made.expert(task, 1), made.head(task)

    before = names()
    copied(file)
    touched(file)
    assert names() == before
    swapped(file, "two")
    assert not set(names()) & set(before)


@pytest.mark.parametrize("make", [Encoder, Seq2Seq])
def test_inputs_encoded_by_a_replaced_tokenizer_are_encoded_again(tmp_path, make):
    put(tmp_path / "model.safetensors", "big")
    file = put(tmp_path / "tokenizer.json", "one")
    before = make(str(tmp_path)).encoding_for(data(tmp_path))
    swapped(tmp_path / "model.safetensors", "gib")
    assert make(str(tmp_path)).encoding_for(data(tmp_path)) == before
    swapped(file, "two")
    assert make(str(tmp_path)).encoding_for(data(tmp_path)) != before


@pytest.mark.parametrize("kind", ["table", "images", "package", "folder of the hub's kind", "builder"])
@pytest.mark.usefixtures("remembering")
def test_data_replaced_in_place_is_other_data(tmp_path, kind, monkeypatch):
    file = put(tmp_path / "set" / "ant" / "x.png", "one")
    monkeypatch.setattr(Package, "folder", lambda root: tmp_path / "set")
    source = {
        "table": lambda: Table(str(file.parent), {"train": "x.png"}),
        "images": lambda: ImageFolder(str(tmp_path / "set"), {"train": "*/*"}),
        "package": lambda: Table(Package("p"), {"train": "ant/x.png"}),
        "folder of the hub's kind": lambda: HubData(str(tmp_path / "set")),
        "builder": lambda: HubData("parquet", options={"data_files": {"train": [f"{tmp_path}/set/*/x.png"]}}),
    }[kind]()
    before = source.contents(tmp_path / "cache")
    touched(file)
    copied(file)
    assert source.contents(tmp_path / "cache") == before
    swapped(file, "two")
    assert source.contents(tmp_path / "cache") != before


def test_data_that_its_options_tell_need_not_be_read(tmp_path):
    assert Table(Package("p", "1", sha256="0" * 64), {"train": "x.csv"}).contents() is None
    assert HubData("a/b", revision="1" * 40).contents() is None
    with pytest.raises(DataError, match=r"x\.csv cannot be read"):
        data(tmp_path).source.contents()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache in a folder, without a network; ``point`` lets a branch point to a commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def point(kind, digit):
        monkeypatch.setattr(repository, "_commits", {})
        place = tmp_path / "hub" / f"{kind}s--me--it"
        (place / "snapshots" / (digit * 40)).mkdir(parents=True, exist_ok=True)
        put(place / "refs" / "main", digit * 40)

    return point


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_branch_that_moved_is_something_else_and_a_commit_is_not_looked_up(hub, kind):
    experts, source = Hub("mine", {"*": "me/it"}), HubData("me/it")
    users = {"model": [lambda: experts.contents(TASK), Encoder("me/it").contents], "dataset": [source.contents]}[kind]
    assert [user() for user in users] == [None] * len(users)
    for digit in "12":
        hub(kind, digit)
        assert [user() for user in users] == [digit * 40] * len(users)
    assert Hub("mine", {"*": "me/it"}, revisions={"*": "3" * 40}).contents(TASK) is None
    assert Hub("mine", {"*": "me/it"}, revisions={"*": "3" * 40}, heads="checkpoint").contents(TASK) == "3" * 40
    assert Encoder("me/it", revision="3" * 40).contents() is None


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings of a run over two tasks of the user's own, with experts in files."""
    monkeypatch.setattr(Suite, "available", lambda suite: suite)
    put(tmp_path / "x.csv", "text,label\n")
    for task in "ab":
        put(tmp_path / f"{task}.pt", "one")
    suite = Suite("mine", tuple(replace(data(tmp_path), name=task, modality="image") for task in "ab"))
    base = config.settings(["merge=average", f"results={tmp_path}/results/scratch", f"cache={tmp_path}/cache"])
    vit = Vit(checkpoint=str(put(tmp_path / "vit.pt", "one")))
    return lambda: replace(base, suite=suite, backbone=vit, experts=Files("mine", f"{tmp_path}/{{task}}.pt"))


@pytest.mark.parametrize("file", ["a.pt", "b.pt", "vit.pt", "x.csv"])
def test_a_finished_record_is_found_again_only_where_what_it_read_is_the_same(tmp_path, settings, file):
    settings().place().write({"status": "done"})
    preview = Preview(joint=0)
    pairs = [settings().place(), _place(preview, {"average": settings()})]
    touched(tmp_path / file)
    copied(tmp_path / file)
    assert settings().place().finished() == {"status": "done"}
    assert [settings().place(), _place(preview, {"average": settings()})] == pairs
    swapped(tmp_path / file, (tmp_path / file).read_text()[::-1])
    assert settings().place().finished() is None
    assert _place(preview, {"average": settings()}) != pairs[1]


def test_a_lab_in_memory_ends_when_a_file_of_its_own_is_replaced(tmp_path, settings):
    with Labs() as labs:
        lab = labs.of(settings())
        assert labs.of(settings()) is lab
        overwritten(tmp_path / "a.pt", "two")
        assert labs.of(settings()) is not lab


def test_missing_files_are_said_by_the_run_and_keep_no_plan_from_being_made(tmp_path, settings):
    signature = settings().signature()
    (tmp_path / "a.pt").unlink()
    assert settings().contents["expert a"] == "missing"
    assert settings().signature() != signature


def test_committed_names_do_not_know_of_contents(monkeypatch, tmp_path):
    monkeypatch.setattr(Suite, "available", lambda suite: suite)
    for suite in ("vision8_offline", "text8_offline"):
        assert config.settings([f"suite={suite}", f"cache={tmp_path}"]).contents == {}


def test_records_of_replaced_checkpoints_do_not_share_a_table():
    made = lift([record("average", "none", 0), record("ties", "none", 0), record("ties", "fft", 0, 0.1)])
    records = [replace(one, contents={"expert a": "x", "data a": one.signature}) for one in made[:2]]
    check_comparable([*records, made[2]])
    with pytest.raises(ByomError, match=r"checkpoints, which were replaced .* older ones again"):
        check_comparable([*records, replace(made[2], contents={"expert a": "y"})])


def test_the_configuration_of_an_adapter_counts_when_its_file_is_given(tmp_path):
    file = put(tmp_path / "mnist" / "adapter_model.safetensors", "factors")
    settings = put(tmp_path / "mnist" / "adapter_config.json", '{"lora_alpha": 2}')
    experts = Files("mine", f"{tmp_path}/{{task}}/{file.name}")
    task: Any = SimpleNamespace(name="mnist")
    before = experts.contents(task)
    assert before == Files("mine", f"{tmp_path}/{{task}}").contents(task)
    swapped(settings, '{"lora_alpha": 4}')
    assert experts.contents(task) != before
