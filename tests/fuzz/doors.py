"""The two doors through which files come in, with small valid files for each and another way to read them."""

from __future__ import annotations

import io
import json
import math
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from byom.checkpoint import read
from byom.checkpoint.files import open_raw
from byom.errors import ByomError
from byom.weights import Weights
from tests.fuzz.mutations import Files
from tests.problems import bits

SAFE = [nn.Sequential, nn.Linear, nn.LayerNorm]
STATE = {
    "0.weight": torch.arange(12.0).reshape(4, 3), "0.bias": torch.arange(4.0), "1.weight": torch.ones(4),
    "1.bias": torch.zeros(4),
}  # fmt: skip
BASE = Weights.of(STATE, "base")
MORE = STATE | {
    "position_ids": torch.arange(4)[None], "half": torch.ones(2, 2).half(), "brain": torch.ones(3).bfloat16(),
    "flag": torch.tensor([True, False]), "n": torch.tensor(3), "none": torch.ones(0, 2),
}  # fmt: skip


class Door(NamedTuple):
    """A way in.

    Args:
        valid: Folders of files that are read as they are.
        enter: Reads a folder, and returns what it holds by road; raises what byom raises.
        expected: Reads the same without byom; for each road None where that says nothing.
    """

    valid: list[Files]
    enter: Callable[[Path], dict[str, Mapping[str, Tensor]]]
    expected: Callable[[Path, str], Mapping[str, Tensor] | None]


def saved(value: Any, **options: Any) -> bytes:
    """Return what `torch.save` writes."""
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, made, **options)
    return made.getvalue()


def _index(shards: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    places = {name: shard for shard, state in shards.items() for name in state}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()


def _halves(stem: str, end: str) -> dict[str, dict[str, Tensor]]:
    names = sorted(MORE)
    parts = (names[::2], names[1::2])
    return {f"{stem}-0000{i + 1}-of-00002.{end}": {n: MORE[n] for n in part} for i, part in enumerate(parts)}


def _module() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module.load_state_dict(STATE)
    return module


# safetensors


def _safetensors() -> list[Files]:
    config = json.dumps({"model_type": "x", "quantization_config": None, "text_config": {"hidden_size": 4}}).encode()
    shards = _halves("model", "safetensors")
    with tempfile.TemporaryDirectory() as folder:
        tied = {**STATE, "head": STATE["0.weight"]}
        ours = {f.name: f.read_bytes() for f in sorted(Weights.of(tied).save(f"{folder}/a").iterdir())}
        cut = {f.name: f.read_bytes() for f in sorted(Weights.of(tied).save(f"{folder}/b", 60).iterdir())}
    sharded = {name: safetensors.torch.save(state) for name, state in shards.items()}
    return [
        {"model.safetensors": safetensors.torch.save(MORE), "config.json": config},
        {**sharded, "model.safetensors.index.json": _index(shards), "config.json": config},
        ours,
        cut,
    ]


def _enter_safetensors(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    opened = Weights.open(folder)
    return {"open": {name: opened[name] for name in opened}}


def _expect_safetensors(folder: Path, road: str) -> Mapping[str, Tensor]:
    del road
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / shard for shard in json.loads(index.read_text())["weight_map"].values()})
    else:
        single = folder / "model.safetensors"
        files = [single if single.is_file() else next(iter(folder.glob("*.safetensors")))]
    tensors, ties = {}, {}
    for file in files:
        tensors |= safetensors.torch.load_file(file)
        with safetensors.safe_open(file, framework="pt") as handle:
            ties |= json.loads((handle.metadata() or {}).get("byom", "{}")).get("ties", {})
    return tensors | {alias: tensors[name] for alias, name in ties.items()}


# pickles and adapters


def _pickles() -> list[Files]:
    shards = _halves("pytorch_model", "bin")
    whole = {"base_model.model.0.lora_A.weight": torch.ones(2, 3), "base_model.model.0.lora_B.weight": torch.ones(4, 2)}
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "bias": "none", "modules_to_save": None, "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    config = json.dumps(settings).encode()
    return [
        {"pytorch_model.bin": saved(STATE)},
        {"model.pt": saved({"state_dict": STATE, "epoch": 3})},
        {"model.pt": saved(STATE, _use_new_zipfile_serialization=False)},
        {"model.pt": saved(_module())},
        {"model.pt": saved(_module(), _use_new_zipfile_serialization=False)},
        {"model.pkl": pickle.dumps(_module())},
        {"pytorch_model.bin.index.json": _index(shards)} | {name: saved(state) for name, state in shards.items()},
        {"adapter_config.json": config, "adapter_model.safetensors": safetensors.torch.save(whole)},
        {"adapter_config.json": config, "adapter_model.bin": saved(whole)},
    ]


def _enter_pickles(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    if (folder / "adapter_config.json").is_file():
        return {"adapter": read(folder, BASE).weights.state()}
    raw = open_raw(folder)[0]
    names = raw.canonical() if list(folder.glob("*.safetensors")) else raw.keys()  # our notes may name more
    with suppress(ByomError):  # not every model here is the base's
        read(folder, BASE).weights.state()
    return {"raw": {name: raw[name] for name in names}}


def _expect_pickles(folder: Path, road: str) -> Mapping[str, Tensor] | None:
    if road == "adapter":
        return _adapted(folder)
    index = folder / "pytorch_model.bin.index.json"
    if list(folder.glob("*.safetensors")):
        return _expect_safetensors(folder, road)
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        shards = {shard: _loaded(folder / shard) for shard in set(places.values())}
        if any(state is None for state in shards.values()):
            return None
        return {name: tensor for state in shards.values() if state for name, tensor in state.items()}
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pkl")]
    main = [file for file in files if file.name == "pytorch_model.bin"] or files
    return _loaded(main[0]) if main else None


def _loaded(file: Path) -> dict[str, Tensor] | None:
    """Return what PyTorch's own restricted reader finds; None if it finds nothing that has names.

    Where sizes are damaged it may give memory that was never written, other values each time: that says nothing.
    """
    first, second = _once(file), _once(file)
    if first is None or second is None or first.keys() != second.keys():
        return None
    return first if all(bits(first[name]) == bits(second[name]) for name in first) else None


def _once(file: Path) -> dict[str, Tensor] | None:
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
        content = content.state_dict() if isinstance(content, nn.Module) else content
        holders = ("state_dict", "model_state_dict", "model")
        inner = next((content[name] for name in holders if isinstance(content.get(name), Mapping)), content)
        return {str(name): value.detach() for name, value in inner.items() if isinstance(value, Tensor)}
    except Exception:
        return None


def _adapted(folder: Path) -> dict[str, Tensor] | None:
    """Return the base with the scaled product added, where the configuration asks for no more than that."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    if any(settings.get(name) for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")):
        return None
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file) if file.is_file() else _loaded(folder / "adapter_model.bin")
    names = [f"base_model.model.0.lora_{side}.weight" for side in "AB"]
    if tensors is None or set(tensors) != set(names):
        return None
    rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    down, up = (tensors[name].to(torch.promote_types(tensors[name].dtype, torch.float32)) for name in names)
    return STATE | {"0.weight": STATE["0.weight"] + ((up * scale) @ down).float()}


def doors() -> dict[str, Door]:
    """Return both doors by name."""
    return {
        "safetensors": Door(_safetensors(), _enter_safetensors, _expect_safetensors),
        "pickles": Door(_pickles(), _enter_pickles, _expect_pickles),
    }
