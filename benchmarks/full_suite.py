"""A published table at its size: a stand-in for the hub, ``byom plan`` and ``byom table`` with kills, and their cost.

    python -m benchmarks.full_suite --folder /tmp/suite --images 9000 --check --json benchmarks/full_suite.json
    python -m benchmarks.full_suite --folder FOLDER --images 90000 --train 0 --device cuda
    python -m benchmarks.full_suite --folder FOLDER --vision20

The stand-in is a Hugging Face cache in a folder: the data sets of vision8 (or vision20) under their own names, in their
own schema and resolutions (`benchmarks.suite_images`), a CLIP ViT-B/32 with random weights where open_clip looks for
OpenAI's, and synthetic fine-tunes of it (`benchmarks.true_models`) where ``experts=clip_hf_b32`` looks for those of
FusionBench. So the experiment ``vision8_vitb32_fft`` runs as it stands, cut to three of its cells; nothing but the
note, the places of results and cache, and what ``--set`` says is overridden. Scores mean nothing.

``--images`` counts training and test images together, in the real proportions; a cell evaluates the test images alone
(``evaluate=test``), and no training image is decoded. ``--train`` makes smaller training sets: with ``--images 90000
--train 0`` a cell evaluates about as many images as the real table. With three cells every test image is encoded once
and passes through a model four times: once for its task's own expert, whose scores all cells share, and once a cell.

The table is killed (SIGKILL, with its children) when two splits are encoded, and again in the middle of its second
cell, and then runs to its end; whatever was finished must still be there and must not have been made again. Memory is
the anonymous memory of a command and all its children together, sampled; pages that forked processes share count once
in each. ``--check`` runs a third of the images first, and fails if the whole takes more than `MORE` above that, or if
something was made again after a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import suite_images
from benchmarks.options import conclude, fill, parser
from benchmarks.peak import anonymous
from benchmarks.suite_images import snapshot
from benchmarks.true_models import SHARD, expert
from byom.checkpoint.clip import PROJECTION, to_hugging_face
from byom.cli import config
from byom.pipeline.cell import STAGES
from byom.pipeline.provenance import provenance
from byom.weights import Weights

ROOT = Path(__file__).parents[1]
EXPERIMENT = "vision8_vitb32_fft"
CELLS = (
    "merge=average byom=none",
    "merge=ties merge.scale=0.3 merge.combine=sum byom=none",
    "merge=task_arithmetic merge.scale=0.3 byom=fft byom.density=0.1",
)
"""Three of the experiment's cells: one that reads models once, one that selects, one that packs every task."""
NOTE = "NOT A RESULT: synthetic images, random weights"
INTERVAL = 0.05  # seconds between samples of memory
MORE = 150e6  # bytes that the whole may take above its third
LIMIT = 900.0  # seconds for the whole
Watched = Callable[[], bool]


@dataclass(frozen=True)
class Bench:
    """One stand-in, and a table made from it.

    Args:
        folder: Where models stay from one stand-in to the next.
        suite: ``vision8`` or ``vision20``.
        images: Images of all tasks, training and test; None takes the real counts.
        train: Share of the real training sets.
        device: Of ``byom``'s option.
        overrides: More options of every cell.
        workers: Processes that write images.
    """

    folder: Path
    suite: str
    images: int | None
    train: float
    device: str
    overrides: tuple[str, ...] = ()
    workers: int = 2
    commands: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> Path:
        """The folder of this size."""
        return self.folder / f"{self.suite}-{self.images or 'whole'}-{self.train:g}"

    @property
    def home(self) -> Path:
        """What HF_HOME names."""
        return self.place / "home"

    def run(self) -> dict[str, Any]:
        """Make what is missing, run the commands, and return all that was measured."""
        counts = suite_images.sizes(self.suite, self.images, self.train)
        seconds = {"images": timed(lambda: suite_images.build(self.home, self.suite, counts, self.workers))}
        seconds["models"] = timed(lambda: models(self.folder / "models", self.home, self.suite))
        tree(self.place / "tree", CELLS, self.suite)
        for part in ("results", "cache", "home/datasets"):
            shutil.rmtree(self.place / part, ignore_errors=True)
        self._command("plan", "plan")
        self._command("table, killed while it encodes", "table", self._encoding)
        encoded = self._stamps("data/*-test*.safetensors")
        self._command("table, killed in its second cell", "table", self._within_the_second)
        kept = self._stamps("hits/*/*.json") | self._stamps("scores/*.json") | self._records()
        self._command("table", "table")
        again = [name for name, stamp in (encoded | kept).items() if not self._is(name, stamp)]
        return {
            "suite": self.suite,
            "train": self.train,
            "counts": counts,
            "made": seconds,
            "commands": self.commands,
            "cells": self._cells(),
            "made_again": again,
            "disk": self._disk(),
        }

    def _command(self, name: str, command: str, kill: Watched | None = None) -> None:
        """Run a command to its end, or until it is to be killed, and note seconds, memory and status."""
        row = {"name": name, **watched(self._arguments(command), self._environment(), self.place / "log.txt", kill)}
        self.commands.append(row)
        sys.stderr.write(f"{name}: {row['seconds']:.0f} s, {row['peak_bytes'] / 1e6:,.0f} MB, {row['status']}\n")
        if row["status"] != (-signal.SIGKILL if kill else 0):
            log = (self.place / "log.txt").read_text(encoding="utf-8", errors="replace")
            sys.exit(f"`{name}` ended with status {row['status']}; the end of {self.place / 'log.txt'}:\n{log[-3000:]}")

    def _arguments(self, command: str) -> list[str]:
        places = [f"results={self.place / 'results'}", f"cache={self.place / 'cache'}", f'note="{NOTE}"']
        device = [f"device={self.device}"] if self.device != "auto" else []
        return [sys.executable, "-m", "byom", command, EXPERIMENT, *places, *device, *self.overrides]

    def _environment(self) -> dict[str, str]:
        """Return the variables of a machine whose hub is the stand-in, and whose byom has the experiment's cut."""
        mine = {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.place / "tree")}
        return (
            {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BYOM_"))} | mine | {"TQDM_DISABLE": "1"}
        )

    def _encoding(self) -> bool:
        """Return whether some splits are encoded."""
        return len(self._files("data/*-test.safetensors")) >= 2

    def _within_the_second(self) -> bool:
        """Return whether one cell is finished, and some tasks of the next one are scored."""
        each, hits = len(self._files("scores/*.json")), len(self._files("hits/*/*.json"))
        return len(self._records()) == 1 and hits >= each * 3 // 2

    def _records(self) -> dict[str, int]:
        files = [f for f in self.place.glob("results/**/runs/**/*.json") if not f.name.startswith(".")]
        done = [f for f in files if json.loads(f.read_text(encoding="utf-8")).get("status") == "done"]
        return {str(file): file.stat().st_mtime_ns for file in done}

    def _files(self, pattern: str) -> list[Path]:
        """Return finished files of the cache: neither hidden ones nor those of work under way."""
        return [f for f in (self.place / "cache").glob(pattern) if f.is_file() and not f.name.startswith(".")]

    def _stamps(self, pattern: str) -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in self._files(pattern)}

    def _is(self, name: str, stamp: int) -> bool:
        return Path(name).is_file() and Path(name).stat().st_mtime_ns == stamp

    def _cells(self) -> list[dict[str, Any]]:
        """Return what each record says of its stages."""
        records = [json.loads(Path(name).read_text(encoding="utf-8")) for name in self._records()]
        return [
            {"cell": f"{r['choices']['merge']} {r['choices']['byom']}", "stages": r["stages"]}
            for r in sorted(records, key=lambda record: record["created"])
        ]

    def _disk(self) -> dict[str, int]:
        """Return bytes on the disk by what they are."""
        cache = {f"cache/{each.name}": size(each) for each in sorted((self.place / "cache").iterdir())}
        data = sum(size(each) for each in (self.home / "hub").glob("datasets--*"))
        rest = {"datasets' own tables": size(self.home / "datasets"), "results": size(self.place / "results")}
        return {"data, as from the hub": data, "models": size(self.folder / "models"), **rest, **cache}


def models(folder: Path, home: Path, suite: str) -> None:
    """Write a random CLIP and an expert for each task where the hub's would be; those that are there stay.

    Args:
        folder: Where the repositories are kept, for stand-ins of several sizes.
        home: The folder that HF_HOME will name.
        suite: Whose tasks have experts.
    """
    import open_clip
    import torch
    from open_clip.pretrained import get_pretrained_cfg
    from safetensors.torch import save_file

    backbone, experts = config.option("backbone", "clip_vit_b32"), config.option("experts", "clip_hf_b32")
    name = get_pretrained_cfg(backbone.model, backbone.pretrained)["hf_hub"].rstrip("/")
    file = snapshot(folder, "models", name) / "open_clip_model.safetensors"
    if not file.is_file():
        torch.manual_seed(0)
        whole = open_clip.create_model(backbone.model, pretrained=None, force_quick_gelu=backbone.quick_gelu)
        save_file({n: t.contiguous() for n, t in whole.state_dict().items()}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    base = Weights.open(file).select(lambda name: name.startswith("visual."))
    for number, task in enumerate(suite_images.tasks(suite)):
        place = snapshot(folder, "models", experts.repository(task.name).name)
        if not (place / "config.json").is_file():
            vision = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
            _published(expert(base, number)).save(place / "made", SHARD if number % 2 else 1 << 40)
            for made in sorted((place / "made").iterdir()):
                made.replace(place / made.name)
            (place / "made").rmdir()
            (place / "config.json").write_text(json.dumps(vision), encoding="utf-8")
    (home / "hub").mkdir(parents=True, exist_ok=True)
    for repository in (folder / "hub").iterdir():
        link = home / "hub" / repository.name
        if not link.is_symlink():
            link.symlink_to(repository.resolve(), target_is_directory=True)


def _published(tower: Weights) -> Weights:
    """Return an image tower as FusionBench publishes fine-tunes: transformers' names, without the projection."""
    return to_hugging_face(tower).select(lambda name: name != PROJECTION)


def tree(folder: Path, cells: tuple[str, ...], suite: str) -> None:
    """Make a source tree of byom, by links, whose experiment has some of its cells.

    Args:
        folder: Where PYTHONPATH will point.
        cells: Its rows.
        suite: Whose tasks it is on.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "byom").symlink_to(ROOT / "byom", target_is_directory=True)
    for each in (ROOT / "conf").iterdir():
        if each.name != "experiment":
            (folder / "conf" / each.name).symlink_to(each)
    whole = yaml.safe_load((ROOT / "conf" / "experiment" / f"{EXPERIMENT}.yaml").read_text(encoding="utf-8"))
    common = [o if not o.startswith("suite=") else f"suite={suite}" for o in whole["common"]]
    published = whole["published"] if f"suite={suite}" in whole["common"] else []
    text = yaml.safe_dump({"common": common, "rows": list(cells), "published": published})
    (folder / "conf" / "experiment" / f"{EXPERIMENT}.yaml").write_text(text, encoding="utf-8")


def watched(
    arguments: list[str], environment: Mapping[str, str], log: Path, kill: Watched | None = None
) -> dict[str, Any]:
    """Run a command and sample the memory of its processes.

    Args:
        arguments: The command.
        environment: Its variables.
        log: What it says goes to the end of this file.
        kill: Asked after each sample; the command and its children are killed as soon as it says yes.

    Returns:
        Seconds, peak memory in bytes, and the status, which is negative after a signal.
    """
    start, peak = time.perf_counter(), 0
    with log.open("ab") as said:
        child = subprocess.Popen(
            arguments, cwd=log.parent, env=dict(environment), stdout=said, stderr=said, start_new_session=True
        )
        try:
            while child.poll() is None:
                peak = max(peak, sum(map(anonymous, family(child.pid))))
                if kill is not None and kill():
                    os.killpg(child.pid, signal.SIGKILL)
                    break
                time.sleep(INTERVAL)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
    return {"seconds": round(time.perf_counter() - start, 2), "peak_bytes": peak, "status": status}


def family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started."""
    yield pid
    try:
        yield from (each.pid for each in psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 2)


def size(folder: Path) -> int:
    """Return the bytes of a folder's files; links to elsewhere do not count."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def table(result: Mapping[str, Any]) -> str:
    """Return Markdown tables of seconds, memory and disk."""
    return "\n\n".join(_tables(each) for each in result["runs"])


def _tables(run: Mapping[str, Any]) -> str:
    trained, tested = (sum(count[split] for count in run["counts"].values()) for split in suite_images.SPLITS)
    lines = [f"{run['suite']}: {trained:,} training and {tested:,} test images", ""]
    lines += ["| command | s | memory |", "|---|--:|--:|"]
    lines += [f"| make {what} | {seconds:.0f} | |" for what, seconds in run["made"].items()]
    lines += [f"| {c['name']} | {c['seconds']:.0f} | {c['peak_bytes'] / 1e6:,.0f} MB |" for c in run["commands"]]
    stages = [s for s in STAGES if any(each["stages"].get(s, {}).get("seconds", 0) >= 0.5 for each in run["cells"])]
    lines += ["", f"| cell | {' | '.join(stages)} |", "|---|" + "--:|" * len(stages)]
    for each in run["cells"]:
        seconds = [f"{each['stages'][stage]['seconds']:.0f} s" for stage in stages]
        lines.append(f"| {each['cell']} | {' | '.join(seconds)} |")
    lines += ["", "| on the disk | |", "|---|--:|"]
    lines += [f"| {what} | {nbytes / 1e6:,.0f} MB |" for what, nbytes in run["disk"].items()]
    return "\n".join(lines)


def missed(result: Mapping[str, Any]) -> str:
    """Return the sentences about missed targets, or nothing."""
    said, runs = [], result["runs"]
    for run in runs:
        said += [f"{name} was made again after a kill" for name in run["made_again"]]
        if len(run["cells"]) != len(CELLS):
            said.append(f"{len(run['cells'])} cells have a record, not {len(CELLS)}")
    peaks = [max(command["peak_bytes"] for command in run["commands"]) for run in runs]
    if len(peaks) > 1 and peaks[-1] > peaks[0] + MORE:
        said.append(f"memory is not flat: {peaks[0] / 1e6:,.0f} MB, and {peaks[-1] / 1e6:,.0f} MB for the whole")
    spent = sum(command["seconds"] for command in runs[-1]["commands"]) + sum(runs[-1]["made"].values())
    if spent > result["limit"]:
        said.append(f"the whole took {spent / 60:.1f} minutes, {result['limit'] / 60:.0f} are allowed")
    return "\n".join(said)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    given = parser(__doc__ or "", repeats=1)
    given.add_argument("--folder", type=Path, required=True, help="where the stand-in is written; it stays there")
    given.add_argument("--images", type=int, help="training and test images in all (90000; 400000 for --vision20)")
    given.add_argument("--train", type=float, default=1.0, help="share of the real training sets; 0 is the least")
    given.add_argument("--vision20", action="store_true", help="twenty tasks in place of eight")
    given.add_argument("--device", default="auto")
    given.add_argument("--set", nargs="*", default=[], dest="overrides", help="more options, e.g. precision=bf16")
    given.add_argument("--workers", type=int, default=2, help="processes that write images")
    given.add_argument("--limit", type=float, default=LIMIT, help="seconds that --check allows the whole")
    given.add_argument("--page", type=Path, help="a page whose section <!-- full-suite --> gets the tables")
    read = given.parse_args(arguments)
    read.images = read.images or (400000 if read.vision20 else 90000)
    if read.images < 1 or read.workers < 1 or not 0 <= read.train <= 1 or read.limit <= 0:
        given.error("--images, --workers and --limit must be positive, and --train in [0, 1]")
    if read.repeats != 1:
        given.error("--repeats: a table is made once, since all it makes is kept; leave it at 1")
    return read


def main() -> None:
    """Make, run, print, and write or check on request."""
    given = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no command outlives this one
    suite = "vision20" if given.vision20 else "vision8"
    amounts = [given.images // 3, given.images] if given.check else [given.images]
    result: dict[str, Any] = {"experiment": EXPERIMENT, "cells": list(CELLS), "limit": given.limit, "runs": []}
    result["provenance"] = provenance()
    for images in amounts:
        overrides = tuple(given.overrides)
        bench = Bench(
            given.folder.expanduser().resolve(), suite, images, given.train, given.device, overrides, given.workers
        )
        result["runs"].append(bench.run() | {"images": images, "overrides": given.overrides})
    if given.page:
        fill(given.page, "full-suite", table(result))
    conclude(result, table(result), missed(result), given)


if __name__ == "__main__":
    main()
