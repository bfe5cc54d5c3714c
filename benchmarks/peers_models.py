"""The models of `benchmarks.peers`: the image tower of ViT-B/32 as transformers writes it, experts, and adapters."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.true_models import expert
from byom.functional.seeding import keyed
from byom.weights import Weights

RANK = 16
ADAPTED = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 96,
}


def make(folder: Path, small: bool, tasks: int, adapters: bool) -> None:
    """Write the base, the experts and the adapters, unless they are there.

    Experts are written as transformers writes them, without checksums.

    Args:
        folder: Where their folders are made.
        small: Whether the tower is a small one for a trial.
        tasks: Experts, and adapters.
        adapters: Whether there are any, for which PEFT is needed.
    """
    base = folder / "base"
    _require_room(folder, 0 if small else tasks)
    if not base.is_dir():
        _base(base, SMALL if small else {})
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda task: _expert(base, folder / f"expert{task}", task), range(tasks)))
    lost = [task for task in range(tasks) if not (folder / f"adapter{task}" / "adapter_config.json").is_file()]
    if adapters and lost:
        _adapters(folder, lost)


def _require_room(folder: Path, tasks: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, (tasks + 6) * 360_000_000 if tasks else 0
    if free < needed:
        sys.exit(f"{folder} has {free / 1e9:.0f} GB free of the {needed / 1e9:.0f} needed; choose another --folder")


def _base(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write a tower with random weights; that of ViT-B/32 is transformers' default."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(partial)
    partial.rename(folder)


def _expert(base: Path, folder: Path, task: int) -> None:
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(expert(Weights.open(base), task).state(), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", folder)


def _adapters(folder: Path, tasks: list[int]) -> None:
    """Write adapters of rank `RANK` on all linear layers, by PEFT, B being random as after training."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionModel

    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(CLIPVisionModel.from_pretrained(folder / "base"), settings)
    for task in tasks:
        for name, value in model.named_parameters():
            if ".lora_" in name:
                draw = torch.Generator().manual_seed(keyed("adapter", str(task), name))
                size = 1e-2 if ".lora_B." in name else value.shape[1] ** -0.5
                value.data = size * torch.randn(value.shape, generator=draw)
        model.save_pretrained(str(folder / f"adapter{task}"))


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a folder's safetensors files, one after the other."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)


def warm(folder: Path) -> None:
    """Read every file, so that all stages find them in the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def facts(folder: Path) -> dict[str, int]:
    """Return parameters and bytes of one model."""
    base = Weights.open(folder / "base")
    nbytes = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    return {"parameters": base.numel, "bytes": nbytes}
