"""What lies beside weights: configuration, tokenizer, processor, custom code, which are copied and never run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from byom.errors import CheckpointError
from byom.storage.declared import declared
from byom.storage.folder import parsed
from byom.weights import Weights

CONFIG = "config.json"
MANIFEST = "byom.json"
MODULES = "modules.json"
MOST = 100 << 20
"""Bytes of the largest file that is copied; a tokenizer of 250,000 tokens has 35 MB."""
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".ot",
    ".tflite", ".onnx_data", ".distcp", ".index.json",
)  # fmt: skip
LEFT = re.compile(
    r"(readme\.md|byom\.json|recipe\.yaml|trainer_state\.json|all_results\.json|\w*_results\.json|training_args\..*"
    r"|adapter_config\.json|bundle\.json|onnx|openvino|coreml|runs|logs|heads|reference|original|checkpoint-\d+|\..*"
    r"|quant(ize)?_config\.json|wandb|__pycache__|events\.out\..*|.*\.(png|jpe?g|gif|webp|svg|mp4))",
    re.IGNORECASE,
)
"""Files and folders that belong to how a model was made, not to the model."""


def beside(folder: Path | None) -> list[Path]:
    """Return what lies beside the weights in a folder and belongs to the model, relative to the folder.

    Args:
        folder: The folder; None has none.
    """
    return [] if folder is None else sorted(_beside(folder, folder, set(), _modules(folder)))


def _modules(folder: Path) -> set[Path]:
    """Return the folders of modules behind the model, such as a dense layer of sentence-transformers'."""
    try:
        listed = parsed((folder / MODULES).read_text(encoding="utf-8"))
        return {folder / module["path"] for module in listed if module["path"]}
    except (OSError, ValueError, TypeError, KeyError):  # none, or a file of another kind by that name
        return set()


def _beside(folder: Path, root: Path, seen: set[Path], modules: Collection[Path]) -> Iterator[Path]:
    """Yield the files of a folder, of modules with their weights.

    A link to a folder that was seen, or that the model lies in, is not followed.
    """
    seen.add(folder.resolve())
    for path in folder.iterdir():
        if LEFT.fullmatch(path.name):
            continue
        if path.is_dir():
            place = path.resolve()
            if place not in seen and not root.resolve().is_relative_to(place):
                yield from _beside(path, root, seen, modules)
        elif path.is_file() and (folder in modules or _is_small(path)):
            yield path.relative_to(root)


def _is_small(path: Path) -> bool:
    """Say whether a file belongs to a model and holds no weights."""
    return not path.name.endswith(WEIGHTS) and path.stat().st_size <= MOST


def copy(folder: Path | None, target: Path) -> list[Path]:
    """Copy what lies beside the weights of a folder, and return its names; a configuration is copied as it is."""
    files = beside(folder)
    for name in files:
        assert folder is not None
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return files


def agreed(weights: Weights, folder: Path | None) -> tuple[Weights, dict[str, Any]]:
    """Return weights, and what a configuration must say otherwise, so that both agree on which names are one tensor.

    Where a configuration ties names that have values of their own, or has none tied, it is made to tie none, and files
    hold every name: transformers fills a missing one with random values.

    Args:
        weights: What is going to be written.
        folder: The folder whose configuration is copied; None has none.
    """
    if folder is None or not (folder / CONFIG).is_file():
        return weights, {}
    tied = [{weights.ties.get(name, name) for name in group if name in weights} for group in declared(folder, weights)]
    is_apart = any(len(names) > 1 for names in tied)
    if not is_apart and configuration(folder / CONFIG).get("tie_word_embeddings") is not False:
        return weights, {}
    every = {*weights.ties, *weights.ties.values()}
    return weights.tied(weights.ties, doubled=every), {"tie_word_embeddings": False}


def configured(target: Path, weights: Weights, changes: Mapping[str, Any]) -> None:
    """Make a copied configuration true of the weights beside it.

    Args:
        target: The folder.
        weights: What was written there.
        changes: Further entries.

    Raises:
        CheckpointError: If the configuration is no JSON.
    """
    file = target / CONFIG
    if not file.is_file():
        return
    config = configuration(file) | dict(changes)
    config.pop("quantization_config", None)  # packed weights were unpacked when they were read
    types = {weights.dtype(name) for name in weights if weights.dtype(name).is_floating_point}
    if len(types) == 1:
        name = str(types.pop()).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = _typed(config, name) | {key: name}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _typed(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with every dtype in it, parts' own included, set to one."""
    found = {key: _typed(value, name) if isinstance(value, dict) else value for key, value in config.items()}
    return found | {key: name for key in ("dtype", "torch_dtype") if isinstance(found.get(key), str)}


def configuration(file: Path) -> dict[str, Any]:
    """Return a configuration.

    Raises:
        CheckpointError: If it is no JSON.
    """
    try:
        config = parsed(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}). Download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no table of settings. Download it again")
    return config
