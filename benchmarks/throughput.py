"""Examples a second of byom's evaluation and fine-tuning, beside a plain loop that does the same.

    python -m benchmarks.throughput                                        # ViT-B/32 on this CPU, 1 to 2 minutes
    python -m benchmarks.throughput device=cuda precision=bf16 batch=256 examples=16384
    python -m benchmarks.throughput model=roberta-base length=128 batch=32

The encoder has random weights; examples lie in a file that is mapped into memory and is in the page cache. Both sides
have the same precision, threads, batch and optimizer, read the same file, and take turns in one process; medians are
compared. The plain loop is what one would write by hand: a `DataLoader` with a batch sampler (workers and pinned
memory on a GPU), autocast around the model, AdamW with gradient clipping, no progress bar and nothing kept on disk.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from byom.data.splits import Split
from byom.experts.finetune.full import Full
from byom.experts.finetune.loop import Lesson, finetune
from byom.functional.heads import Head
from byom.functional.precision import lowered, products, require_precision
from byom.pipeline.device import resolve
from byom.pipeline.evaluate import evaluate
from byom.pipeline.provenance import provenance
from byom.storage.atomic import write_json

SIDE, CLASSES = 224, 10
DEFAULTS: dict[str, Any] = {
    "device": "auto", "precision": "fp32", "model": "ViT-B-32", "batch": 32, "examples": 0, "rounds": 3, "length": 128,
    "out": "",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Measure, print a table, and write JSON where ``out=FILE`` says."""
    options = read(arguments)
    device = resolve(options["device"])
    require_precision(options["precision"], device)
    batch = options["batch"]
    examples = options["examples"] or (3 * batch if device.type == "cpu" else 64 * batch)
    with tempfile.TemporaryDirectory() as folder:
        split = images(Path(folder), examples) if "ViT" in options["model"] else texts(Path(folder), examples, options)
        encoder = built(options["model"]).to(device)
        head = Head(nn.functional.normalize(torch.randn(CLASSES, width(encoder, split, device)), dim=-1), 20.0)
        sides = Sides(encoder, head, split, batch, options["precision"], device, Path(folder))
        found = {
            "evaluation": compared(sides.evaluate, sides.evaluate_plainly, examples, options["rounds"], device),
            "fine-tuning": compared(sides.train, sides.train_plainly, examples, options["rounds"], device),
        }
    kept = {name: options[name] for name in ("precision", "model", "batch")}
    machine = provenance() | {"platform": platform.platform()}
    result = {**kept, "device": device.type, "examples": examples, "results": found, "machine": machine}
    for name, row in found.items():
        sys.stdout.write(
            f"{name:12s} byom {row['byom']:8.1f}/s  plain {row['plain']:8.1f}/s  ratio {100 * row['ratio']:.0f} %\n"
        )
    if options["out"]:
        write_json(Path(options["out"]), result)
    else:
        sys.stdout.write(json.dumps(result["machine"]["hardware"]) + "\n")
    return 0


def read(arguments: list[str]) -> dict[str, Any]:
    """Return the options."""
    options = dict(DEFAULTS)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in DEFAULTS:
            raise SystemExit(f"benchmarks.throughput knows no '{name}'; it has {', '.join(DEFAULTS)}")
        options[name] = type(DEFAULTS[name])(value)
    return options


def images(folder: Path, count: int) -> Split:
    """Return images in a mapped file, whose pages were just written and are in memory."""
    generator = np.random.default_rng(0)
    mapped = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (count, 3, SIDE, SIDE))
    for row in range(count):
        mapped[row] = generator.integers(0, 256, (3, SIDE, SIDE), np.uint8)
    return Split({"pixels": torch.from_numpy(mapped)}, torch.arange(count) % CLASSES, "benchmark")


def texts(folder: Path, count: int, options: dict[str, Any]) -> Split:
    """Return texts of one length in a mapped file."""
    generator = np.random.default_rng(0)
    mapped = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.int64, (count, options["length"]))
    mapped[:] = generator.integers(100, 30000, mapped.shape)
    ids = torch.from_numpy(mapped)
    return Split({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(count) % CLASSES, "benchmark")


def built(model: str) -> nn.Module:
    """Return an encoder with random weights: open_clip's image towers, or RoBERTa's base size."""
    torch.manual_seed(0)
    if "ViT" in model:
        from byom.backbone.clip import Clip

        return Clip(model, "random").load()
    from transformers import AutoModel, RobertaConfig

    from byom.backbone.encoder import PooledEncoder

    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return PooledEncoder(AutoModel.from_config(RobertaConfig(**sizes), add_pooling_layer=False), "cls")


@torch.no_grad()
def width(encoder: nn.Module, split: Split, device: torch.device) -> int:
    """Return the size of a feature."""
    return encoder.eval()(**{name: value[:1].to(device) for name, value in split.inputs.items()}).shape[1]


class Rows(Dataset):
    """A split by batches of places."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, places: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        index = torch.tensor(places)
        return {n: v.index_select(0, index) for n, v in self.split.inputs.items()}, self.split.labels[index]


class Sides:
    """The same work by byom and by hand.

    Args:
        encoder: The model; its weights change, which costs no time.
        head: Its head.
        split: The examples.
        batch: Examples a step.
        precision: Of both sides.
        device: Of both sides.
        folder: Where byom keeps the state of training, of which one epoch leaves none.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        split: Split,
        batch: int,
        precision: str,
        device: torch.device,
        folder: Path,
    ) -> None:
        self.encoder, self.head, self.split, self.batch = encoder, head, split, batch
        self.precision, self.device, self.folder = precision, device, folder
        self.recipe = Full(epochs=1, batch_size=batch)

    def evaluate(self) -> None:
        """Score the split by byom."""
        evaluate(self.encoder, self.head, self.split, self.batch, precision=self.precision)

    def train(self) -> None:
        """Train an epoch by byom."""
        self.encoder.requires_grad_(True)
        lessons = [Lesson(self.head, self.split)]
        finetune(self.encoder, lessons, self.recipe, 1e-6, 0, self.folder / "state", "byom", self.precision)

    def evaluate_plainly(self) -> float:
        """Score the split by hand."""
        self.encoder.eval()
        right = torch.zeros((), device=self.device)
        with torch.inference_mode(), products(self.precision, self.device):
            for inputs, labels in self._loader(SequentialSampler(Rows(self.split))):
                with lowered(self.precision, self.device):
                    features = self.encoder(**self._moved(inputs))
                right += (self.head(features.float()).argmax(-1) == labels.to(self.device)).sum()
        return float(right) / len(self.split)

    def train_plainly(self) -> None:
        """Train an epoch by hand."""
        self.encoder.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        with products(self.precision, self.device):
            for inputs, labels in self._loader(RandomSampler(Rows(self.split))):
                with lowered(self.precision, self.device):
                    features = self.encoder(**self._moved(inputs))
                loss = cross_entropy(self.head(features.float()), labels.to(self.device, non_blocking=True))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()

    def _loader(self, sampler: Any) -> DataLoader:
        gpu = self.device.type == "cuda"
        batches = BatchSampler(sampler, self.batch, drop_last=False)
        return DataLoader(Rows(self.split), None, sampler=batches, num_workers=4 if gpu else 0, pin_memory=gpu)

    def _moved(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}


def compared(
    ours: Callable[[], object], plain: Callable[[], object], examples: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Return examples a second of two sides that take turns, and the median of the ratios of neighbours."""
    taken: dict[str, list[float]] = {"byom": [], "plain": []}
    for number in range(rounds + 1):
        order = [("byom", ours), ("plain", plain)]
        for name, work in order if number % 2 else reversed(order):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - start)
    ratios = [theirs / own for own, theirs in zip(taken["byom"], taken["plain"], strict=True)]
    rates = {name: round(examples / statistics.median(values), 2) for name, values in taken.items()}
    return {
        **rates,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "seconds": {name: [round(v, 3) for v in values] for name, values in taken.items()},
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
