"""PyTorch's own files: what two readers would take differently, and what only looks like a checkpoint, is refused."""

import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from byom.checkpoint import read
from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import CheckpointError
from byom.weights import Weights

STATE = {"weight": torch.arange(6.0), "bias": torch.ones(2)}
BASE = Weights.of(STATE, "base")


def entries(value):
    made = io.BytesIO()
    torch.save(value, made)
    with zipfile.ZipFile(made) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write(path, parts, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in parts:
            archive.writestr(name, content)


@pytest.mark.parametrize("name", ["x.pt", "pytorch_model.bin", "adapter_model.bin"])
def test_a_file_that_was_compressed(tmp_path, name):
    """Mapped into memory, the compressed bytes were taken for the values."""
    write(tmp_path / name, entries(STATE), zipfile.ZIP_DEFLATED)
    if name.startswith("adapter"):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=rf"{name}.*it is compressed"):
        read(tmp_path / name, BASE)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("value", [STATE, torch.nn.Linear(3, 2)], ids=["state", "module"])
def test_an_entry_that_is_there_twice(tmp_path, value):
    parts = entries(value)
    write(tmp_path / "x.pt", [*parts, next((n, b"\1" * len(c)) for n, c in parts if n.endswith("data/0"))])
    with pytest.raises(CheckpointError, match=r"x\.pt: it has an entry twice"):
        read(tmp_path / "x.pt", BASE)


def test_a_file_that_was_repacked_is_read(tmp_path):
    write(tmp_path / "x.pt", entries(STATE))
    assert read(tmp_path / "x.pt", BASE).weights["weight"].tolist() == list(range(6))


@pytest.mark.parametrize("place", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("name", ["a" * 300, "x\0y"])
def test_names_that_no_file_has(tmp_path, place, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a" * 300}}))
    (tmp_path / place).write_text(json.dumps({"weight_map": {"a": name}}))
    save_file(STATE, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json names"):
        read(tmp_path, BASE)


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, '{"peft_type": "LORA", "modules_to_save": 1.5}', '{"peft_type": "LORA", "r": 2, "r": 4}', "\udcff"],
)
def test_configurations_of_adapters_that_are_broken(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is broken"):
        Adapter.open(tmp_path)


@pytest.mark.parametrize(
    "stray", [b"K\5Q.", b"\x80\2}q\0h\1.", b"\x80\2J\xff\xff\xff\x7fQ.", b"\x80\2ctorch\nFloatStorage\n)R."]
)
@pytest.mark.parametrize("name", ["x.pt", "adapter_model.bin"])
def test_pickles_that_mislead_their_reader(tmp_path, stray, name):
    write(tmp_path / name, [(n, stray if n.endswith("data.pkl") else c) for n, c in entries(STATE)])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=name):
        read(tmp_path / name, BASE)
