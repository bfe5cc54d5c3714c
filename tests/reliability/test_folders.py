"""Folders that hold one model in one way are read, and those that could be read in two are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from byom.checkpoint import read
from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import CheckpointError
from byom.weights import Weights

ONE, TWO = {"a": torch.ones(2)}, {"b": torch.full((2,), 2.0)}
BASE = Weights.of({"a": torch.zeros(2), "b": torch.zeros(2)}, "base")
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
PLACES = {"a": FIRST, "b": SECOND}
FORMS = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json", save_file),
    "bin": ("pytorch_model.bin", "pytorch_model.bin.index.json", torch.save),
}


class Folder:
    """A sharded model in one format."""

    def __init__(self, path, form="safetensors"):
        self.path = path
        self.single, self.index, self.write = FORMS[form]
        self.stem, self.end = self.single.rsplit(".", 1)
        self.first, self.second = self.shard(1), self.shard(2)
        self.places = {"a": self.first, "b": self.second}

    def shard(self, number, total=2):
        return f"{self.stem}-{number:05d}-of-{total:05d}.{self.end}"

    def make(self, first=ONE, second=TWO, **change):
        self.write(first, self.path / self.first)
        self.write(second, self.path / self.second)
        self.name(self.places | change)
        return self

    def name(self, places, file=None):
        (self.path / (file or self.index)).write_text(json.dumps({"weight_map": places}))

    def read(self):
        return read(self.path, BASE).weights


@pytest.fixture(params=FORMS)
def folder(request, tmp_path):
    return Folder(tmp_path, request.param)


def test_a_sharded_folder_is_read(folder):
    assert folder.make().read()["b"].tolist() == [2, 2]


def test_an_index_and_a_single_file(folder):
    folder.make()
    folder.write(ONE | TWO, folder.path / folder.single)
    with pytest.raises(CheckpointError, match=f"twice, in {folder.single} and .*{folder.index} .*transformers.*Delete"):
        folder.read()


def test_an_index_that_names_the_single_file(folder):
    folder.write(ONE | TWO, folder.path / folder.single)
    folder.name({"a": folder.single, "b": folder.single})
    assert folder.read()["b"].tolist() == [2, 2]


@pytest.mark.parametrize("value", [1.0, 5.0])
def test_a_tensor_in_two_shards(folder, value):
    folder.make(second=TWO | {"a": torch.full((2,), value)})
    with pytest.raises(CheckpointError, match=f"tensor 'a' lies in {folder.first} and in {folder.second}"):
        folder.read()


def test_a_tensor_in_another_shard_than_the_index_says(folder):
    folder.make(a=folder.second)
    folder.write({"x": torch.ones(1)}, folder.path / folder.first)
    with pytest.raises(CheckpointError, match="is of different|names tensors that no shard holds|shards that"):
        folder.read()
    folder.make(a=folder.second, b=folder.first)
    with pytest.raises(CheckpointError, match=f"places 'a' in {folder.second}, and {folder.first} holds it"):
        folder.read()


def test_a_tensor_that_the_index_does_not_name(folder):
    """It is read, as by transformers: no other value of it is there."""
    del folder.make().places["b"]
    folder.name(folder.places)
    (folder.path / folder.second).unlink()
    folder.write(ONE | TWO, folder.path / folder.first)
    assert folder.read()["b"].tolist() == [2, 2]


@pytest.mark.parametrize("total", [2, 3])
def test_a_shard_that_the_index_does_not_name(folder, total):
    folder.make()
    folder.write({"c": torch.ones(1)}, folder.path / folder.shard(total + 1, total))
    with pytest.raises(CheckpointError, match=rf"shards that .* does not name: .*-of-0000{total}.*out of date"):
        folder.read()


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/x", "a/../../x", "..\\x", "C:\\x", ""])
def test_an_index_that_leads_out_of_its_folder(folder, outside):
    folder.write(ONE, folder.path.parent / "x.safetensors")
    folder.make(a=outside)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        folder.read()


@pytest.mark.parametrize(
    "text", ['{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', "[", "[" * 9999]
)
def test_a_damaged_index(folder, text):
    folder.make()
    (folder.path / folder.index).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        folder.read()


def test_an_index_with_a_name_twice(folder):
    folder.make()
    first, second = folder.first, folder.second
    text = f'{{"weight_map": {{"a": "{first}", "b": "{second}", "a": "{second}"}}}}'
    (folder.path / folder.index).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged.*'a' is there twice"):
        folder.read()


def test_two_indexes(folder):
    other = f"other.{folder.end}.index.json"
    folder.make().name(folder.places, other)
    assert folder.read()["a"].tolist() == [1, 1]
    folder.name({"a": folder.first}, other)
    with pytest.raises(CheckpointError, match=f"two indexes that differ, {folder.index} and {other}"):
        folder.read()


@pytest.mark.parametrize("present", [1, 2])
def test_shards_without_an_index(folder, present):
    folder.make()
    (folder.path / folder.index).unlink()
    if present == 1:
        (folder.path / folder.second).unlink()
    with pytest.raises(CheckpointError, match=r"holds shards .* and no index.*Fetch"):
        folder.read()


def test_one_shard_is_not_the_model(folder):
    folder.make()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 .*one of several shards: give their folder"):
        read(folder.path / folder.first, BASE)


@pytest.mark.parametrize("sharded", [(), ("bin",), ("safetensors",), ("bin", "safetensors")])
def test_safetensors_come_before_pickles(tmp_path, sharded):
    """As in transformers; both formats in one folder are common on the hub."""
    for form, shift in (("bin", 5), ("safetensors", 0)):
        folder = Folder(tmp_path, form)
        one, two = ({name: value + shift for name, value in part.items()} for part in (ONE, TWO))
        folder.make(one, two) if form in sharded else folder.write(one | two, tmp_path / folder.single)
    assert read(tmp_path, BASE).weights["b"].tolist() == [2, 2]


@pytest.mark.parametrize(
    "beside", ["model.fp16.safetensors", "consolidated.safetensors", "optimizer.bin", "flax_model.msgpack"]
)
def test_what_lies_beside_the_model_is_left_alone(folder, beside):
    folder.write(ONE | TWO, folder.path / folder.single)
    if folder.end == "safetensors" or not beside.endswith("safetensors"):
        folder.write({"c": torch.ones(1)}, folder.path / beside)
    assert folder.read()["b"].tolist() == [2, 2]


def test_a_variant_alone_is_the_model(tmp_path):
    save_file(ONE | TWO, tmp_path / "model.fp16.safetensors")
    assert Weights.open(tmp_path)["a"].tolist() == [1, 1]
    save_file(ONE, tmp_path / "model.fp32.safetensors")
    with pytest.raises(CheckpointError, match=r"2 files of weights \(model\.fp16.*model\.fp32.*Name one"):
        Weights.open(tmp_path)


def test_an_adapter_in_both_formats(tmp_path):
    factors = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 2),
        "base_model.model.a.lora_B.weight": torch.ones(2, 1),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    torch.save({name: value * 5 for name, value in factors.items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    base = Weights.of({"a.weight": torch.zeros(2, 2)})
    assert Adapter.open(tmp_path).on(base)["a.weight"].tolist() == [[1, 1], [1, 1]]  # as PEFT reads it


def test_a_header_with_a_name_twice(tmp_path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged.*'a' is there twice"):
        Weights.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "notes", ["[]", "{", '{"ties": 3}', '{"ties": {"b": 3}}', '{"ties": {"b": "x"}}', '{"crc32": [1]}']
)
def test_notes_that_are_damaged(tmp_path, notes):
    save_file(ONE, tmp_path / "x.safetensors", metadata={"byom": notes})
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged.*notes"):
        Weights.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("opener", [Weights.open, lambda path: read(path, BASE).weights])
@pytest.mark.parametrize(
    "index", ["model.safetensors.index.fp16.json", "diffusion_pytorch_model.safetensors.index.json"]
)
def test_an_index_of_another_name(tmp_path, opener, index):
    stem = "model.fp16" if "fp16" in index else "diffusion_pytorch_model"
    places = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
    for name, tensors in zip(places.values(), (ONE, TWO), strict=True):
        save_file(tensors, tmp_path / name)
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=f"named by {index}, and only model.safetensors.index.json.*Copy"):
        opener(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text((tmp_path / index).read_text())
    assert len(opener(tmp_path)) == 2


@pytest.mark.parametrize("opener", [Weights.open, lambda path: read(path, BASE).weights])
def test_a_model_of_pickles_beside_safetensors_of_another_name(tmp_path, opener):
    torch.save(ONE | TWO, tmp_path / "pytorch_model.bin")
    save_file(ONE | TWO, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors, pytorch_model.bin\), and nothing says which"
    ):
        opener(tmp_path)


def test_pickled_shards_are_not_called_without_an_index(tmp_path):
    folder = Folder(tmp_path, "bin").make()
    folder.name(folder.places)
    with pytest.raises(CheckpointError, match="PyTorch's own files.*read_checkpoint"):
        Weights.open(tmp_path)
