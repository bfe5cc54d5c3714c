"""Safetensors on disk: complete or not there at all, and never trusted blindly."""

import json
import os
import re
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from byom.errors import CheckpointError
from byom.storage import streamed
from byom.storage import tensor_files as storage
from byom.storage.lock import owner
from byom.weights import Spec, Weights
from tests.problems import bits, counted, model, same


@pytest.fixture
def weights():
    return Weights.of(model(1))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "place" / "model"


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def failing(weights, after, error):
    """Weights whose reader fails after some tensors were read."""
    failing, reads = counted(weights)
    read = failing._read

    def broken(name):
        if len(reads) >= after:
            raise error
        return read(name)

    failing._read = broken
    return failing


def flip(file, where):
    raw = bytearray(file.read_bytes())
    raw[where] ^= 1
    file.write_bytes(raw)


# layout


def test_a_small_model_is_one_file_that_others_can_read(weights, folder):
    assert weights.save(folder) == folder
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    loaded = load_file(folder / "model.safetensors")
    assert sorted(loaded) == weights.canonical()
    assert all(bits(loaded[name]) == bits(weights[name]) for name in loaded)


def test_a_file_and_its_folder_open_alike(weights, folder):
    weights.save(folder)
    assert same(Weights.open(folder), Weights.open(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "another.safetensors")
    assert same(Weights.open(str(folder)), weights)


def test_shards_have_an_index_that_names_each_tensor_once(weights, folder):
    weights.save(folder, shard_bytes=100)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == weights.canonical()
    held = {file.name: set(load_file(file)) for file in folder.glob("*.safetensors")}
    assert all(name in held[shard] for name, shard in index["weight_map"].items())
    assert sum(map(len, held.values())) == len(weights.canonical())
    assert same(Weights.open(folder), weights)


@pytest.mark.parametrize("limit", [1, 24, 100, 140, 260, 10_000])
def test_shards_keep_to_the_limit_unless_one_tensor_is_larger(weights, folder, limit):
    weights.save(folder, shard_bytes=limit)
    for file in folder.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sizes and (sum(sizes) <= limit or sum(size > 0 for size in sizes) == 1)


def test_saving_is_never_more_than_a_few_tensors_ahead(folder, monkeypatch):
    """Each tensor is freed once it is written: what waits is bounded by bytes, whatever the size of a shard."""
    monkeypatch.setattr(streamed, "WAITING", 3000)
    alive: list[weakref.ref] = []
    most = []

    def read(name):
        tensor = torch.full((250,), float(name))
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))
        return tensor

    names = [f"{number:03}" for number in range(60)]
    saved = Weights({name: Spec((250,), torch.float32) for name in names}, read).save(folder)
    assert max(most) <= 3000 // 1000 + 2 and len(alive) == 60
    assert all(bool((Weights.open(saved)[name] == float(name)).all()) for name in names)


def test_what_is_written_is_told_by_the_byte(weights, folder):
    told = []
    weights.save(folder, shard_bytes=100, progress=told.append)
    assert sum(told) == sum(weights[name].nbytes for name in weights.canonical())
    assert len(told) == len(weights.canonical())
    cast: list[int] = []
    weights.save(folder, dtype=torch.float64, progress=cast.append)
    assert sum(cast) > sum(told)


def test_files_are_those_of_the_library_itself(tmp_path):
    """Every type, names in an order of their own, an empty tensor, one without axes, and names beyond ASCII."""
    state = {f"{'zyx'[i % 3]}.{i}": torch.arange(i % 4, 6).to(dtype) for i, dtype in enumerate(storage.DTYPES.values())}
    state |= {'\u00e9 "quoted"': torch.ones(2, 3), "empty": torch.ones(0, 4), "a scalar": torch.tensor(3.0)}
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    streamed.write_streamed(tmp_path / "ours", specs, state.__getitem__, {"format": 1})
    ours = (tmp_path / "ours").read_bytes()
    with safe_open(tmp_path / "ours", framework="pt") as file:
        metadata = file.metadata()
    theirs = save(state, metadata=metadata)
    tables = [raw[8 : 8 + int.from_bytes(raw[:8], "little")] for raw in (ours, theirs)]
    assert ours[8 + len(tables[0]) :] == theirs[8 + len(tables[1]) :] and len(tables[0]) % 8 == 0
    first, second = (json.loads(table) for table in tables)
    assert first == second and list(first) == list(second)
    assert json.loads(metadata["byom"])["crc32"] == {name: storage.crc32(tensor) for name, tensor in state.items()}
    streamed.write_streamed(tmp_path / "again", dict(reversed(specs.items())), state.__getitem__, {"format": 1})
    assert (tmp_path / "again").read_bytes() == ours


def test_a_tensor_that_is_not_what_was_announced_is_refused(folder):
    odd = Weights({"a": Spec((2, 3), torch.float32)}, lambda _: torch.zeros(3, 2), origin="merged")
    with pytest.raises(CheckpointError, match=r"'a' came out as \(3, 2\).*\(2, 3\).*announced"):
        odd.save(folder)
    assert not folder.exists()


def test_no_tensor_at_all_survives(folder):
    assert Weights.open(Weights.of({}).save(folder)).keys() == []


def test_views_of_one_storage_are_saved_as_what_they_show(folder):
    storage = torch.arange(12.0)
    state = {"a": storage, "b": storage[:5], "c": storage.view(3, 4), "d": storage.view(3, 4).t(), "e": storage[::2]}
    state |= {"y": storage[:2], "z": storage[8:10]}  # behind a short view, yet still inside the long one
    saved = Weights.open(Weights.of(state).save(folder))
    assert all(bits(saved[name]) == bits(tensor) for name, tensor in state.items())


def test_aliases_of_a_dropped_tensor_are_saved(folder):
    tensor = torch.arange(3.0)
    kept = Weights.of({"a": tensor, "b": tensor, "c": tensor}).select(lambda name: name != "a")
    assert same(Weights.open(kept.save(folder)), kept)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16,
              torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)  # fmt: skip
def test_every_dtype_comes_back(folder, dtype):
    state = {"a": torch.tensor([[0, 1], [1, 0]]).to(dtype), "b": torch.tensor(1).to(dtype)}
    saved = Weights.open(Weights.of(state).save(folder))
    assert same(saved, state) and saved.fingerprint() == Weights.of(state).fingerprint()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(weights, folder, umask, mode):
    before = os.umask(umask)
    try:
        weights.save(folder, shard_bytes=100)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.glob("*.safetensors")} == {mode}
    assert folder.stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


# replacing


@pytest.mark.parametrize(("first", "second"), [(60, 10_000), (10_000, 60), (60, 200), (200, 60)])
def test_nothing_stale_is_left_of_an_earlier_result(weights, folder, tmp_path, first, second):
    Weights.of(model(2)).save(folder, shard_bytes=first)
    weights.save(folder, shard_bytes=second)
    weights.save(tmp_path / "fresh", shard_bytes=second)
    assert contents(folder).keys() == contents(tmp_path / "fresh").keys()
    assert same(Weights.open(folder), weights)


def test_weights_can_replace_the_folder_they_are_read_from(weights, folder):
    opened = Weights.open(weights.save(folder, shard_bytes=100))
    (2 * opened).save(folder, shard_bytes=60)
    assert same(Weights.open(folder), 2 * weights)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_changes_nothing(weights, folder, error, after, existing):
    folder.parent.mkdir()
    if existing:
        Weights.of(model(2)).save(folder, shard_bytes=60)
    before = contents(folder.parent)
    with pytest.raises(type(error) if not isinstance(error, OSError) else CheckpointError):
        failing(weights, after, error).save(folder, shard_bytes=60)
    assert contents(folder.parent) == before
    assert [place.name for place in folder.parent.iterdir()] == ["model"] * existing


def test_a_full_disk_is_named_with_a_remedy(weights, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed, "crc32", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*model.*No space left.*Free space"):
        weights.save(folder)
    assert list(folder.parent.iterdir()) == []


def test_a_failure_while_swapping_puts_the_old_folder_back(weights, folder, monkeypatch):
    before = contents(Weights.of(model(2)).save(folder))
    replace = Path.replace

    def broken(source, target):
        if Path(target) == folder and "partial" in source.name:
            raise OSError("stale file handle")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", broken)
    monkeypatch.setattr("byom.storage.atomic._exchanged", lambda *_: False)  # as on a system that cannot
    with pytest.raises(CheckpointError, match=r"cannot write .*model.*stale file handle"):
        weights.save(folder)
    assert contents(folder) == before
    assert [place.name for place in folder.parent.iterdir()] == ["model"]


def test_leftovers_of_a_killed_process_do_not_get_in(weights, folder):
    for leftover in (f".model.partial-{owner()}", f".model.old-{owner()}"):
        place = folder.parent / leftover
        place.mkdir(parents=True)
        (place / "model-00009-of-00009.safetensors").write_bytes(b"half")
    Weights.of(model(2)).save(folder)
    weights.save(folder)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    assert [place.name for place in folder.parent.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_a_link(weights, folder, tmp_path):
    Weights.of(model(2)).save(tmp_path / "large disk" / "model")
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "large disk" / "model")
    weights.save(folder)
    assert folder.is_symlink() and same(Weights.open(folder), weights)
    assert [place.name for place in (*folder.parent.iterdir(), *(tmp_path / "large disk").iterdir())] == ["model"] * 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "deep/notes.txt", "pytorch_model.bin"])
def test_a_folder_with_foreign_files_is_refused(weights, folder, name):
    weights.save(folder, shard_bytes=100)
    foreign = folder / name
    foreign.parent.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(1)}, foreign)
    before = contents(folder)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(folder))} holds files.*{foreign.name}.*choose a new folder"
    ):
        weights.save(folder)
    assert contents(folder) == before


def test_a_file_in_the_place_of_a_folder_is_refused(weights, folder):
    folder.parent.mkdir()
    folder.write_text("precious")
    with pytest.raises(CheckpointError, match=r"it is a file.*choose a new folder"):
        weights.save(folder)
    assert folder.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(weights, folder):
    folder.parent.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*model.*another folder"):
        weights.save(folder)


# damage


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_when_it_is_opened(weights, folder, keep):
    file = weights.save(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*fetch it again"):
        Weights.open(folder)


@pytest.mark.parametrize("name", ["layer.weight", "counter", "flags", "scale", "head"])
def test_a_flipped_bit_is_found_when_its_tensor_is_read(weights, folder, name):
    file = weights.save(folder) / "model.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    stored = weights.ties.get(name, name)
    start = json.loads(raw[8 : 8 + size])[stored]["data_offsets"][0]
    flip(file, 8 + size + start)
    opened = Weights.open(folder)
    with pytest.raises(CheckpointError, match=rf"model.*damaged.*'{stored}' does not match its checksum.*again"):
        opened[name]
    assert all(bits(opened[n]) == bits(weights[n]) for n in opened if opened.ties.get(n, n) != stored)


def test_a_checksum_is_verified_once(weights, folder, monkeypatch):
    calls = []
    opened = Weights.open(weights.save(folder))
    compute = storage.crc32
    monkeypatch.setattr(storage, "crc32", lambda tensor: calls.append(0) or compute(tensor))
    for _ in range(3):
        opened["embed"]
    assert len(calls) == 1


def test_files_of_others_open_without_checksums(folder):
    folder.mkdir(parents=True)
    save_file({"a": torch.arange(3.0)}, folder / "model.safetensors")
    opened = Weights.open(folder)
    assert opened["a"].tolist() == [0, 1, 2]
    assert opened.fingerprint() == Weights.of({"a": torch.arange(3.0)}).fingerprint()


def test_a_missing_shard_is_named(weights, folder):
    weights.save(folder, shard_bytes=100)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names shards that are missing: \['{lost.name}'\].*again"):
        Weights.open(folder)


def test_a_tensor_that_its_shard_lacks_is_named(weights, folder):
    weights.save(folder, shard_bytes=100)
    index = folder / "model.safetensors.index.json"
    notes = json.loads(index.read_text())
    notes["weight_map"]["ghost"] = notes["weight_map"]["embed"]
    index.write_text(json.dumps(notes))
    with pytest.raises(CheckpointError, match=r"index\.json.*ghost.*again"):
        Weights.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_named(weights, folder, text):
    weights.save(folder, shard_bytes=100)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged.*again"):
        Weights.open(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no checkpoint at .*model; check the path"),
        ([], r"model is not a checkpoint: it holds no file of weights \(it is empty\)"),
        (["pytorch_model.bin"], r"PyTorch's own files \(pytorch_model.bin\).*byom.read_checkpoint"),
        (["a.safetensors", "b.safetensors"], r"2 files of weights \(a.safetensors, b.safetensors\).*Name one"),
    ],
)
def test_what_is_no_checkpoint_is_named(folder, files, message):
    if files is not None:
        folder.mkdir(parents=True)
    for name in files or []:
        save_file({"a": torch.zeros(1)}, folder / name)
    with pytest.raises(CheckpointError, match=message):
        Weights.open(folder)


def test_a_file_that_is_not_safetensors_is_named(folder):
    folder.parent.mkdir()
    folder.write_text("hello, this is no tensor")
    with pytest.raises(CheckpointError, match=r"model is damaged or not a safetensors file"):
        Weights.open(folder)


def test_one_file_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch):
    file = tmp_path / "delta.safetensors"
    storage.write_file(file, {"a": torch.zeros(3)}, {"format": 1, "task": "x"})
    assert storage.read_notes(file)["task"] == "x"
    before = file.read_bytes()
    monkeypatch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(OSError("read-only file system")))
    with pytest.raises(CheckpointError, match=r"cannot write .*delta\.safetensors.*Free space"):
        storage.write_file(file, {"a": torch.ones(3)}, {})
    assert file.read_bytes() == before and [place.name for place in tmp_path.iterdir()] == ["delta.safetensors"]
