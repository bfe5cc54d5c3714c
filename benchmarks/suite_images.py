"""Image suites of the published tables in the hub's own files, with synthetic images: names, schemas, sizes as theirs.

`build` writes, for each task of ``suite=vision8`` or ``vision20``, the parquet files that the hub has under the same
name, in the layout of a Hugging Face cache: ``HF_HOME=folder HF_HUB_OFFLINE=1`` makes byom find them. An image is a
crop of a smooth random field with noise, shifted and coloured for each example, so that contents differ and compress
about as photographs do; nothing can be learnt from them but a tint. Examples are written in a stream by several
processes, shard by shard; a shard that is there is not written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from byom.cli import config
from byom.data.suite import Task

ROWS = 100  # of a row group, as `datasets` writes images
POOL = 16  # base images of a task
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Kind:
    """What a data set's images are like, and how many it has.

    Args:
        width: Median width in pixels.
        height: Median height in pixels.
        train: Training images.
        test: Images of the split that is reported.
        format: ``JPEG`` or ``PNG``.
        grey: Whether they have one channel.
        spread: Sides vary by up to this share around the median; 0 where all have one size.
        drawn: Whether they are drawings of two tones, not photographs.
    """

    width: int
    height: int
    train: int
    test: int
    format: str = "JPEG"
    grey: bool = False
    spread: float = 0.0
    drawn: bool = False


KINDS: Mapping[str, Kind] = {
    "sun397": Kind(500, 375, 19850, 19850, spread=0.2),
    "stanford_cars": Kind(600, 400, 8144, 8041, spread=0.3),
    "resisc45": Kind(256, 256, 18900, 6300),
    "eurosat": Kind(64, 64, 21600, 2700),
    "svhn": Kind(32, 32, 73257, 26032, "PNG"),
    "gtsrb": Kind(60, 60, 26640, 12630, "PNG", spread=0.5),
    "mnist": Kind(28, 28, 60000, 10000, "PNG", grey=True),
    "dtd": Kind(500, 450, 3760, 1880, spread=0.2),
    "flowers102": Kind(600, 500, 1020, 6149, spread=0.2),
    "pcam": Kind(96, 96, 262144, 32768, "PNG"),
    "fer2013": Kind(48, 48, 28709, 7178, grey=True),
    "oxford_iiit_pet": Kind(400, 380, 3680, 3669, spread=0.3),
    "stl10": Kind(96, 96, 5000, 8000, "PNG"),
    "cifar100": Kind(32, 32, 50000, 10000, "PNG"),
    "cifar10": Kind(32, 32, 50000, 10000, "PNG"),
    "food101": Kind(512, 490, 75750, 25250, spread=0.05),
    "fashion_mnist": Kind(28, 28, 60000, 10000, "PNG", grey=True),
    "emnist_letters": Kind(28, 28, 88800, 14800, "PNG", grey=True),
    "kmnist": Kind(28, 28, 60000, 10000, "PNG", grey=True),
    "rendered_sst2": Kind(448, 448, 6920, 1821, "PNG", drawn=True),
}
"""Task to what its data set is like.

Counts are those that the data sets' own pages state (``homepage`` in ``conf/task/hub``). SUN397, RESISC45, EuroSAT and
DTD are cut as the task vectors' code and FusionBench cut them, which leaves a part of RESISC45 and EuroSAT out; GTSRB
as in CLIP's evaluation; Flowers has no validation images here, FER2013 both of its test sets, and EMNIST the letters of
arXiv 1702.05373, table II. Of vision8 without SVHN these counts add up to the rows that the hub states, where seven
corrupted copies of some test sets count too. Resolutions are typical ones in round numbers.
"""


def sizes(suite: str, images: int | None, train: float = 1.0) -> dict[str, dict[str, int]]:
    """Return how many images each task has of each split.

    Args:
        suite: ``vision8`` or ``vision20``.
        images: Images of all tasks and splits together, in the proportions of the real suite; None takes as many as it
            has.
        train: Share of every training set that is made beside the test set; 0 leaves the least that a task needs, which
            is one image a class.

    Returns:
        Task to split to count.
    """
    real = {t.name: (train * KINDS[t.name].train, KINDS[t.name].test, len(t.classes)) for t in tasks(suite)}
    scale = 1.0 if images is None else images / sum(trained + tested for trained, tested, _ in real.values())
    return {
        name: {"train": max(classes, round(scale * trained)), "test": max(1, round(scale * tested))}
        for name, (trained, tested, classes) in real.items()
    }


def tasks(suite: str) -> tuple[Task, ...]:
    """Return a suite's tasks as its yaml has them."""
    return config.option("suite", suite).tasks


@dataclass(frozen=True)
class Shard:
    """One parquet file of a split.

    Args:
        file: Where it belongs.
        task: The task.
        split: The split, as the hub calls it.
        first: Number of its first example within the split.
        count: Its examples.
        total: Examples of the split.
        input: Column of images.
        label: Column of labels.
        names: Names of the classes.
    """

    file: Path
    task: str
    split: str
    first: int
    count: int
    total: int
    input: str
    label: str
    names: tuple[str, ...]


def build(home: Path, suite: str, counts: Mapping[str, Mapping[str, int]], workers: int = 2) -> int:
    """Write the data sets of a suite that are not there yet.

    Args:
        home: The folder that HF_HOME will name.
        suite: ``vision8`` or ``vision20``.
        counts: Task to split to the number of images; see `sizes`.
        workers: Processes; 0 works in this one.

    Returns:
        How many shards were written.
    """
    every = [shard for task in tasks(suite) for shard in _shards(home, task, counts[task.name])]
    missing = [shard for shard in every if not shard.file.is_file()]
    if workers == 0:
        return sum(map(write, missing))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        return sum(pool.map(write, sorted(missing, key=_cost, reverse=True)))


def snapshot(home: Path, kind: str, name: str) -> Path:
    """Return the folder of a repository's files in a Hugging Face cache, made with all that names it.

    Args:
        home: The folder that HF_HOME will name.
        kind: ``datasets`` or ``models``.
        name: The repository, ``owner/name``.
    """
    place = home / "hub" / f"{kind}--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    (place / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit, encoding="utf-8")
    return place / "snapshots" / commit


def _shards(home: Path, task: Task, counts: Mapping[str, int]) -> Iterator[Shard]:
    """Yield a task's shards, and write the page that tells `datasets` which of them are which split."""
    source, kind = task.source, KINDS[task.name]
    folder = snapshot(home, "datasets", source.path)
    inner = source.name or "data"
    rows = 2000 if kind.width * kind.height > 1 << 15 else 20000
    page = f"---\nconfigs:\n- config_name: {source.name or 'default'}\n  data_files:\n"
    for ours in SPLITS:
        split, total = source.splits[ours], counts[ours]
        number = -(-total // rows)
        for place in range(number):
            file = folder / inner / f"{split}-{place:05d}-of-{number:05d}.parquet"
            count = min(rows, total - place * rows)
            names = tuple(task.classes)
            names = names if len(set(names)) == len(names) else tuple(map(str, range(len(names))))
            yield Shard(file, task.name, split, place * rows, count, total, source.input, source.label, names)
        page += f"  - split: {split}\n    path: {inner}/{split}-*\n"
    (folder / "README.md").write_text(page + "---\n", encoding="utf-8")


def _cost(shard: Shard) -> int:
    kind = KINDS[shard.task]
    return shard.count * (kind.width * kind.height + 2000)


def write(shard: Shard) -> int:
    """Write a shard, a row group at a time; return 1."""
    shard.file.parent.mkdir(parents=True, exist_ok=True)
    labels = _labels(shard)
    schema = _schema(shard)
    part = shard.file.with_suffix(".part")
    with pq.ParquetWriter(part, schema) as out:
        for start in range(0, shard.count, ROWS):
            places = range(start, min(start + ROWS, shard.count))
            images = [picture(shard.task, shard.split, shard.first + n, labels[n]) for n in places]
            paths = [f"{shard.split}_{shard.first + n}.{KINDS[shard.task].format.lower()}" for n in places]
            cells = [{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)]
            out.write_table(pa.table([pa.array(cells, schema.field(0).type), labels[list(places)]], schema))
    part.replace(shard.file)
    return 1


def _schema(shard: Shard) -> pa.Schema:
    """Return the columns of a shard, with what `datasets` writes about them."""
    label = {"names": list(shard.names), "_type": "ClassLabel"}
    features = {shard.input: {"_type": "Image"}, shard.label: label}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([(shard.input, image), (shard.label, pa.int64())], notes)


def _labels(shard: Shard) -> np.ndarray:
    """Return the labels of a shard: every class about equally often in its split, in a random order."""
    order = _random(shard.task, shard.split, "labels").permutation(shard.total)
    return (order[shard.first : shard.first + shard.count] % len(shard.names)).astype(np.int64)


def picture(task: str, split: str, number: int, label: int) -> bytes:
    """Return an image file.

    Args:
        task: The task, which says how large it is.
        split: The split.
        number: The example's number within the split; with the others it determines the image.
        label: Its class, which tints it.
    """
    kind, rng = KINDS[task], _random(task, split, number)
    side = 1 + kind.spread * (2 * rng.random() - 1)
    width, height = max(8, round(side * kind.width)), max(8, round(side * kind.height))
    base = _pool(task)[rng.integers(POOL)]
    top, left = (int(rng.integers(have - want + 1)) for have, want in zip(base.shape, (height, width), strict=False))
    crop = base[top : top + height, left : left + width]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    tint = np.array([40 * (label % 3), 24 * (label // 3 % 4), 16 * (label % 7)], np.float32)[: crop.shape[2]]
    gain = (0.6 + 0.5 * rng.random(crop.shape[2])).astype(np.float32)
    pixels = np.clip(crop * gain + (tint - 40), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    options = {"quality": 90} if kind.format == "JPEG" else {"compress_level": 1}
    Image.fromarray(pixels[..., 0] if kind.grey else pixels).save(out, kind.format, **options)
    return out.getvalue()


@lru_cache(maxsize=2)
def _pool(task: str) -> list[np.ndarray]:
    """Return a task's base images, fp32 ``[H, W, C]``, larger than its images: fields of four scales, and noise."""
    kind, rng = KINDS[task], _random(task, "pool")
    scale = 1.1 * (1 + kind.spread)
    width, height = round(scale * kind.width) + 16, round(scale * kind.height) + 16
    found = []
    for _ in range(POOL):
        field = rng.normal(128, 0 if kind.drawn else 5, (height, width, 1 if kind.grey else 3)).astype(np.float32)
        for cells, weight in ((3, 50), (8, 25), (24, 12), (80, 6)):
            coarse = rng.normal(0, weight, (cells, cells, field.shape[2])).astype(np.float32)
            layers = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC) for layer in coarse.T]
            field += np.stack([np.asarray(layer) for layer in layers], -1)
        found.append(np.where(field > 128, 255, 40).astype(np.float32) if kind.drawn else field)
    return found


def _random(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
