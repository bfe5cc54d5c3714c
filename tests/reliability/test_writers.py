"""Writers survive: whatever fails or is killed, the old content is there or nothing, and the next run succeeds.

Every writer of the package is here, or is one that writes into a draft: `test_every_writer_of_the_package_is_known`
looks for others. A writer runs once to count its changes of the disk (files opened for writing, renamed, removed,
folders made), then again for each of them, told there that the disk is full, and once with a disk that really takes no
more bytes. It is killed in a fork at each change too, if its way of writing is not another's: else at the first, the
middle and the last.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from byom.checkpoint.adapters.export import adapters
from byom.checkpoint.bundle import Bundle
from byom.data.split import Split, save_split
from byom.errors import ByomError
from byom.experts.finetune.loop import _keep
from byom.merge.base import Problem
from byom.pipeline.cached import note, once
from byom.report.figures.style import save as save_figure
from byom.storage.atomic import write_json, write_text
from byom.storage.contents import content_digest
from byom.storage.place import Place
from byom.storage.tensor_files import write_file
from byom.variants.lora import ByomLora
from byom.weights import Weights

ROOT = Path(__file__).parents[2]
FULL = 16  # bytes that a full disk still takes
APART = {"figures", "cached models"}  # several files, each whole: none of them needs the others
FAILS = ("open", "os.rename", "os.mkdir")
THOROUGH = {"Weights.save in shards", "records", "tables and pages (write_text)", "heads and statistics (write_file)"}
KILLS = (*FAILS, "os.remove", "os.rmdir", "shutil.rmtree")


def weights(value: float) -> Weights:
    return Weights.of({"layer.weight": torch.full((8, 6), value), "layer.bias": torch.full((8,), value)})


def served(value: float):
    moved = {"layer.weight": torch.full((8, 6), value) + torch.eye(8, 6), "layer.bias": torch.zeros(8)}
    return ByomLora(2).serve(Problem(weights(value), {"a": Weights.of(moved)}), weights(value))


def bundle(folder: Path, value: float) -> None:
    Bundle(served(value).reference, served(value).deltas).save(folder / "out")


def packed(folder: Path, value: float) -> None:
    experts = {task: weights(value + number) for number, task in enumerate(("a", "b"), 1)}
    served = ByomLora(2).streamed(Problem(weights(value), experts), weights(value))
    Bundle(served.reference, served.deltas).save(folder / "out")


def export(folder: Path, value: float) -> None:
    kept = {n: v for n, v in served(value).deltas["a"].parts.items() if n.endswith("weight")}
    one = served(value)
    one.deltas["a"].parts.clear()
    one.deltas["a"].parts.update(kept)
    adapters(one, folder / "out", base_model="me/base")


def shards(folder: Path, value: float) -> None:
    weights(value).save(folder / "out", shard_bytes=100)


def training(folder: Path, value: float) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _keep(folder / "out", model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0), int(value))


def split(folder: Path, value: float) -> None:
    inputs = {"pixels": torch.full((2, 3, 4, 4), int(value), dtype=torch.uint8)}
    save_split(folder / "out" / "split.safetensors", Split(inputs, torch.zeros(2, dtype=torch.long), "print"))


def figure(folder: Path, value: float) -> None:
    save_figure(drawn(value), folder / "out" / "figure")


def drawn(value: float):
    from matplotlib.figure import Figure

    made = Figure(figsize=(0.3, 0.3))
    made.add_subplot().set_axis_off()
    made.text(0.5, 0.5, str(value))
    return made


def cached(folder: Path, value: float) -> None:
    (folder / "out").mkdir(exist_ok=True)
    note(folder / "out" / "model").unlink(missing_ok=True)
    once(folder / "out" / "model", lambda: weights(value).save(folder / "out" / "model"))


def digest(folder: Path, value: float) -> None:
    source = folder.with_name("source")
    source.mkdir(exist_ok=True)
    if not (source / f"{value}.txt").exists():
        (source / f"{value}.txt").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("byom.storage.contents.SETTLED", -(1 << 62))  # those of files that just changed are not kept
        content_digest(source, [f"{value}.txt"], folder / "out")


def record(folder: Path, value: float) -> None:
    made = {"status": "done", "value": value, "choices": {}}
    place = Place(folder / "out", "suite", "backbone", "cell", "0" * 12)
    place.require_writable()
    place.write(made)


Write = Callable[[Path, float], object]
WRITERS: dict[str, Write] = {
    "Weights.save": lambda f, v: weights(v).save(f / "out"),
    "Weights.save in shards": shards,
    "Bundle.save": bundle,
    "Bundle.save of tasks packed meanwhile": packed,
    "adapters": export,
    "Delta.save": lambda f, v: served(v).deltas["a"].save(f / "out" / "a.safetensors"),
    "heads and statistics (write_file)": lambda f, v: write_file(
        f / "out" / "h.safetensors", {"w": torch.full((3,), v)}, {}
    ),
    "records": record,
    "previews and costs (write_json)": lambda f, v: write_json(f / "out" / "a.json", {"value": v}),
    "tables and pages (write_text)": lambda f, v: write_text(f / "out" / "table.md", f"{v}\n" * 50),
    "figures": figure,
    "encoded inputs": split,
    "digests of data": digest,
    "states of training": training,
    "cached models": cached,
}


def full() -> None:
    raise OSError(28, "No space left on device")


class Changes:
    """Counts changes below a folder, and does something at the n-th; it hears of them for the rest of the process."""

    def __init__(self) -> None:
        self.folder, self.events, self.at, self.act, self.seen = "", (), 0, full, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.folder or event not in self.events or not self._below(arguments[0]):
            return
        if event != "open" or _writes(arguments[2]):
            self.seen += 1
            if self.seen == self.at:
                self.act()

    def _below(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(self.folder) and ".lock" not in str(path)


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


CHANGES = Changes()


@pytest.fixture(scope="module", autouse=True)
def heard():
    sys.addaudithook(CHANGES)


def attempt(write: Write, folder: Path, events: tuple[str, ...], at: int = 0, act: Callable[[], None] | None = None):
    """Write a second time, and return how many changes that made.

    Args:
        write: The writer.
        folder: Where it writes.
        events: Which changes count.
        at: At which something happens.
        act: What happens there.
    """
    CHANGES.folder, CHANGES.events, CHANGES.at, CHANGES.act, CHANGES.seen = f"{folder}/", events, at, act or full, 0
    try:
        write(folder, 2.0)
    finally:
        CHANGES.folder = ""
    return CHANGES.seen


def failed(write: Write, folder: Path, at: int) -> bool:
    """Say whether a writer whose disk is full at one change says so, or does not need it."""
    try:
        attempt(write, folder, FAILS, at)
    except ByomError as error:
        assert re.search("cannot write .*(Free space|set results=)", str(error)), error
        return True
    return False


def killed(write: Write, folder: Path, at: int) -> int:
    """Write in a fork that is killed at one change, and return its status."""
    if not (child := os.fork()):
        try:
            attempt(write, folder, KILLS, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def no_more_than(size: int):
    """Let no file grow further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, object]:
    """Return what a reader sees, but for what differs by time and place."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    shown = {name: file for name, file in found.items() if not any(p[:1] == "." for p in name.split("/"))}
    return dict(_read(name, file.read_bytes()) for name, file in shown.items())


def _read(name: str, content: bytes) -> tuple[str, object]:
    if name.endswith(".cost.json"):
        return name, sorted(json.loads(content))
    if "/digests/" in name:
        return "digests", len(content)
    if not name.endswith(".safetensors"):
        return name, content
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])  # safetensors orders its metadata at random
    return name, (json.dumps(header, sort_keys=True), content[end:])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.suffix != ".lock"]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Return what makes a folder as a writer leaves it, and says what is in it before and after it is written again."""
    made: dict[str, tuple[Path, dict, dict]] = {}

    def states(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("writer")
            (folder / "then").mkdir()
            WRITERS[name](folder / "then", 1.0)
            shutil.copytree(folder / "then", folder / "later")
            WRITERS[name](folder / "later", 2.0)
            made[name] = folder / "then", contents(folder / "then"), contents(folder / "later")
        return made[name]

    return states


def check(name: str, folder: Path, before: dict, after: dict) -> None:
    """Check that nothing is half there, and that the next run succeeds and tidies up."""
    found = contents(folder)
    if name in APART:
        assert all(value in (before.get(file), after.get(file)) for file, value in found.items())
    else:
        assert found in (before, after, {}), sorted(found)
    WRITERS[name](folder, 2.0)
    assert contents(folder) == after
    assert leftovers(folder) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_at_any_change_of_the_disk_leaves_old_or_new_and_the_next_run_tidies_up(name, states, tmp_path):
    then, before, after = states(name)
    shutil.copytree(then, tmp_path / "0")
    points = attempt(WRITERS[name], tmp_path / "0", KILLS)
    assert contents(tmp_path / "0") == after and points
    every = range(1, points + 1)
    for point in every if name in THOROUGH else sorted({1, (points + 1) // 2, points}):
        folder = tmp_path / str(point)
        shutil.copytree(then, folder)
        assert killed(WRITERS[name], folder, point) == -signal.SIGKILL
        check(name, folder, before, after)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_at_any_change_is_said_in_a_sentence_and_leaves_the_old(name, states, tmp_path):
    then, before, after = states(name)
    shutil.copytree(then, tmp_path / "0")
    points, refused = attempt(WRITERS[name], tmp_path / "0", FAILS), 0
    for point in range(1, points + 1):
        folder = tmp_path / str(point)
        shutil.copytree(then, folder)
        said = failed(WRITERS[name], folder, point)
        assert said or contents(folder) == after  # it may not need a folder that is there
        assert leftovers(folder) == []
        check(name, folder, before, after)
        refused += said
    assert refused
    shutil.copytree(then, tmp_path / "full")
    with no_more_than(FULL), pytest.raises(ByomError, match="cannot write .*(Free space|set results=)"):
        WRITERS[name](tmp_path / "full", 2.0)
    assert leftovers(tmp_path / "full") == []
    check(name, tmp_path / "full", before, after)


WRITES = re.compile(
    r"\.write_text\(|\.write_bytes\(|\bsave_file\(|\.savefig\(|\.to_parquet\(|torch\.save\(|np\.savez?\w*\(|"
    r"json\.dump\(|pickle\.dump\(|\.save_pretrained\([^.]|\.to_csv\([^)]*(path|file|folder)|open\([^)]*[\"'][wax]b?\+?[\"']"
)
BEHIND = {  # what writes with its own hands, and what stands in front of it
    "byom/storage/atomic.py": "drafts",
    "byom/storage/tensor_files.py": "a draft",
    "byom/storage/streamed.py": "a draft",
    "byom/storage/shards.py": "a folder that is swapped in: the index",
    "byom/storage/place.py": "a probe that is removed",
    "byom/checkpoint/adapters/export.py": "a folder that is swapped in",
    "byom/folders/output.py": "a folder that is swapped in",
    "byom/folders/pack.py": "a folder that is swapped in",
    "byom/folders/beside.py": "what output and pack swap in",
    "byom/folders/words.py": "what output and pack swap in",
    "byom/storage/tokens.py": "what output and pack swap in",
    "byom/storage/manifest.py": "what its callers swap in",
    "byom/experts/finetune/lora.py": "a folder that is swapped in",
    "byom/experts/finetune/processes.py": "a draft, read and removed by the processes of one command",
    "byom/report/figures/style.py": "a draft",
    "byom/data/worker.py": "a pipe to its parent",
    "byom/data/draft.py": "a file in a folder of its own, gone on with after a kill",
    "byom/pipeline/provenance.py": "/proc/self/clear_refs",
}


def test_every_writer_of_the_package_is_known():
    """Find files that write without a draft; each has a reason above, and drafts are what the others call."""
    files = [*(ROOT / "byom").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    code = {str(file.relative_to(ROOT)): re.sub(r'"""(?s:.*?)"""', "", file.read_text()) for file in files}
    found = {name for name, text in code.items() if WRITES.search(text)}
    assert found - set(BEHIND) == set(), "write through byom.storage.atomic, and add the writer to WRITERS"
    assert set(BEHIND) <= found
    for name, how in BEHIND.items():
        assert {"a draft": "drafted(", "a folder": "replacing("}.get(how[:8].strip(), "") in code[name]
