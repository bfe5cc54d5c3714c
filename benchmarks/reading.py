"""Batches of encoded images from disk: the flat file that byom writes, and Arrow through `datasets`.

    python -m benchmarks.reading --json benchmarks/reading.json

Makes random images of 224 px once as a split of byom's (one safetensors file, mapped) and once as each of two Arrow
tables (a column of arrays, and a column of bytes), then reads batches of 128 in random order, and in order, in a fresh
process for each way. What was just written is in the page cache, so that the ways are compared and not the disk.
Seconds are the processor's, which others' work changes least, without imports and opening; memory is anonymous memory
at its highest (`benchmarks.peak`), less that of an interpreter with torch. `--check` fails where the flat file is not
the fastest in every order.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.options import conclude, parser
from benchmarks.peak import Report, measured

SHAPE = (3, 224, 224)
BATCH = 128
LIMIT = 600.0
WAYS = ("flat file", "Arrow arrays, torch format", "Arrow arrays, numpy format", "Arrow bytes")
ORDERS = ("random", "in order")


def images(count: int) -> Iterator[np.ndarray]:
    """Yield random images."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield generator.integers(0, 256, SHAPE, dtype=np.uint8)


def write(folder: Path, count: int) -> None:
    """Write the images once for every way."""
    import datasets

    from byom.data.draft import ROWS, Draft, put

    labels = torch.arange(count)
    draft = Draft(folder / "flat.safetensors", "", labels, lambda: {"inputs/pixels": (SHAPE, torch.uint8)})
    with draft.file.open("r+b") as file:
        for place, image in enumerate(images(count)):
            put(file, draft.columns, place, {"inputs/pixels": torch.from_numpy(image)[None]})
    for chunk in range(-(-count // ROWS)):
        draft.note(chunk, {})
    draft.finish()
    arrays = datasets.Features({"pixels": datasets.Array3D(SHAPE, "uint8")})
    raw = datasets.Features({"pixels": datasets.Value("binary")})
    tables: dict[str, tuple[Any, Callable[[np.ndarray], Any]]] = {
        "arrays": (arrays, lambda image: image),
        "bytes": (raw, lambda image: image.tobytes()),
    }
    for name, (features, cast) in tables.items():
        datasets.Dataset.from_generator(
            lambda cast=cast: ({"pixels": cast(image)} for image in images(count)),
            features=features,
            cache_dir=str(folder / "generated"),
        ).save_to_disk(str(folder / name), num_shards=1)


def opened(folder: Path, way: str) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the number of images, and what gives a batch by places."""
    if way == "flat file":
        from byom.data.split import open_split

        split = open_split(folder / "flat.safetensors")
        assert split is not None
        pixels = split.inputs["pixels"]
        return len(split), lambda places: pixels[places]
    import datasets

    table: Any = datasets.load_from_disk(str(folder / ("bytes" if way == "Arrow bytes" else "arrays")))
    if way == "Arrow bytes":
        return len(table), lambda places: torch.stack(
            [
                torch.from_numpy(np.frombuffer(row, np.uint8).reshape(SHAPE).copy())
                for row in table[places.tolist()]["pixels"]
            ]
        )
    formatted = table.with_format("torch" if "torch" in way else "numpy")
    return len(table), lambda places: torch.as_tensor(formatted[places.tolist()]["pixels"])


def read(folder: str, way: str, order: str, report: Report) -> Mapping[str, Any]:
    """Read every image once, in batches; return seconds and a checksum."""
    count, batch = opened(Path(folder), way)
    random = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    places = (random if order == "random" else torch.arange(count)).split(BATCH)
    total, start = 0, time.process_time()
    for number, some in enumerate(places):
        total += int(batch(some)[:, :, ::16, ::16].sum())
        report(number / len(places))
    return {"seconds": time.process_time() - start, "total": total}


def table(result: dict) -> str:
    """Return images per second and memory of each way."""
    lines = ["| way | order | images/s | memory |", "|---|---|--:|--:|"]
    lines += [
        f"| {way} | {order} | {row['images_per_second']:,.0f} | {row['peak'] / 1e6:.0f} MB |"
        for way, orders in result["ways"].items()
        for order, row in orders.items()
    ]
    return "\n".join(lines)


def missed(result: dict) -> str:
    """Return the orders in which another way than the flat file is the fastest."""
    speeds = {
        order: {way: rows[order]["images_per_second"] for way, rows in result["ways"].items()} for order in ORDERS
    }
    return "\n".join(
        f"{order}: {best} is the fastest"
        for order, of in speeds.items()
        if (best := max(of, key=of.__getitem__)) != "flat file"
    )


def main() -> None:
    """Measure every way in every order."""
    made = parser(__doc__ or "", repeats=3)
    made.add_argument("--images", type=int, default=1500)
    options = made.parse_args()
    result: dict = {
        "machine": platform.machine(), "processors": os.cpu_count(), "images": options.images, "batch": BATCH,
        "ways": {way: {} for way in WAYS},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.images)
        totals = set()
        for order in ORDERS:
            best: dict[str, Any] = {}
            for _ in range(options.repeats):  # in turns, so that a change of the machine is in all of them
                for way in WAYS:
                    taken = measured(read, folder, way, order, threads=1, limit=LIMIT)
                    sys.stderr.write(f"{way}, {order}: {options.images / taken.said['seconds']:.0f} images/s\n")
                    totals.add(taken.said["total"])
                    if way not in best or taken.said["seconds"] < best[way].said["seconds"]:
                        best[way] = taken
            for way, taken in best.items():
                speed = options.images / taken.said["seconds"]
                result["ways"][way][order] = {"images_per_second": round(speed), "peak": taken.peak}
    if len(totals) > 1:
        sys.exit(f"the ways do not read the same images: {totals}")
    conclude(result, table(result), missed(result), options)


if __name__ == "__main__":
    main()
