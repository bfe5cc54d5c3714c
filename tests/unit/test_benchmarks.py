"""The stand-in for the hub at the tables' size, and the command lines of the benchmarks that need a card or an hour."""

from __future__ import annotations

import io
import signal
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import full_suite, gpu, gpu_merging, suite_images
from byom.cli import config, sweeps
from byom.merge.task_arithmetic import TaskArithmetic
from tests.hub import visit

COUNTS = {"train": 2, "test": 3}


@pytest.mark.parametrize(("suite", "tested"), [("vision8", 87433), ("vision20", 227068)])
def test_sizes_are_the_real_ones_or_in_their_proportions(suite, tested):
    whole, cut = suite_images.sizes(suite, None), suite_images.sizes(suite, 9000)
    assert [*whole] == [task.name for task in suite_images.tasks(suite)] == [*cut]
    assert sum(each["test"] for each in whole.values()) == tested
    assert sum(n for each in cut.values() for n in each.values()) == pytest.approx(9000, rel=0.07)
    scale = 9000 / sum(n for each in whole.values() for n in each.values())
    for task in suite_images.tasks(suite):
        assert cut[task.name]["test"] == max(1, round(scale * whole[task.name]["test"]))
        assert cut[task.name]["train"] >= len(task.classes)
    tests_alone = suite_images.sizes(suite, 90000, train=0)
    assert sum(each["test"] for each in tests_alone.values()) == pytest.approx(90000, abs=10)
    assert all(
        each["train"] == len(t.classes) for t, each in zip(suite_images.tasks(suite), tests_alone.values(), strict=True)
    )


VISION8 = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
OWN_COLUMNS = ("fer2013", "cifar100")


@pytest.fixture(scope="module")
def read():
    """The tasks that are read, by name."""
    return {task.name: task for task in suite_images.tasks("vision20") if task.name in VISION8 + OWN_COLUMNS}


@pytest.fixture(scope="module")
def home(read, tmp_path_factory):
    """A stand-in with a few images of vision8's tasks, and of those whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("standin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_images, "POOL", 1)
        patch.setattr(suite_images, "tasks", lambda suite: read.values())
        counts = dict.fromkeys(read, COUNTS)
        assert suite_images.build(folder, "vision20", counts, workers=0) == 2 * len(read) == 20
        assert suite_images.build(folder, "vision20", counts, workers=0) == 0, "what is there was written again"
    suite_images._pool.cache_clear()
    return folder


@pytest.mark.parametrize("name", VISION8 + OWN_COLUMNS)
def test_byoms_own_source_reads_every_task(name, read, home, monkeypatch):
    task = read[name]
    with visit(home, monkeypatch):
        pools = task.source.read()
    kind = suite_images.KINDS[task.name]
    assert {split: len(pool) for split, pool in pools.items()} == COUNTS
    assert all(task.index(label) < len(task.classes) for pool in pools.values() for label in pool.labels)
    images = [pools["test"].inputs[n] for n in range(3)]
    for image in images:
        assert image.format == kind.format and image.mode == ("L" if kind.grey else "RGB")
        assert abs(image.width / kind.width - 1) <= kind.spread + 0.02
        assert image.width / image.height == pytest.approx(kind.width / kind.height, rel=0.05)
    assert len({image.tobytes() for image in images}) == 3


def test_an_image_is_keyed_by_its_place_and_is_no_flat_field():
    first = suite_images.picture("eurosat", "test", 7, 3)
    assert first == suite_images.picture("eurosat", "test", 7, 3)
    assert first != suite_images.picture("eurosat", "train", 7, 3) != suite_images.picture("eurosat", "test", 8, 3)
    assert np.asarray(Image.open(io.BytesIO(first))).std() > 5 and len(first) > 1000


def test_shards_of_a_split_hold_every_class_equally_often():
    shards = [
        suite_images.Shard(None, "mnist", "test", first, 500, 1000, "image", "label", tuple("0123456789"))
        for first in (0, 500)
    ]
    labels = np.concatenate([suite_images._labels(shard) for shard in shards])
    assert np.bincount(labels).tolist() == [100] * 10 and len(set(labels[:20])) > 5


def test_the_cut_experiment_has_three_of_the_experiments_own_cells(tmp_path):
    full_suite.tree(tmp_path / "tree", full_suite.CELLS, "vision8")
    name = full_suite.EXPERIMENT
    cut = yaml.safe_load((tmp_path / "tree" / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    cells = sweeps.cells(cut["rows"], cut["common"])
    assert len(cells) == 3
    assert all(cell in sweeps.experiment(name).cells() for cell in cells)
    assert (tmp_path / "tree" / "byom" / "__main__.py").is_file()
    assert (tmp_path / "tree" / "conf" / "run.yaml").samefile(config.folder() / "run.yaml")


def test_a_command_is_killed_with_its_children_and_all_their_memory_counts(tmp_path):
    child = "import time; held = bytearray(40_000_000); print('held', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log.txt"
    start = time.monotonic()
    row = full_suite.watched([sys.executable, "-c", code], {}, log, lambda: "held" in log.read_text(encoding="utf-8"))
    assert row["status"] == -signal.SIGKILL and time.monotonic() - start < 30
    assert row["peak_bytes"] > 40_000_000


def run(peak, again=(), cells=3, seconds=10.0):
    counts = {"mnist": {"train": 1, "test": 2}}
    stages = {"data": {"seconds": 1.0}, "route": {"seconds": 0.0}}
    return {
        "suite": "vision8", "counts": counts, "made": {"images": 1.0}, "made_again": list(again), "disk": {"data": 1},
        "commands": [{"name": "table", "seconds": seconds, "peak_bytes": peak, "status": 0}],
        "cells": [{"cell": "ties none", "stages": stages}] * cells,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([run(10**9), run(10**9 + 10**8)], ""),
        ([run(10**9), run(2 * 10**9)], "not flat"),
        ([run(10**9, again=["data/x"])], "data/x was made again"),
        ([run(10**9, cells=2)], "2 cells"),
        ([run(10**9, seconds=900)], "15.0 minutes"),
    ],
)
def test_missed_targets_are_said(runs, words):
    said = full_suite.missed({"runs": runs, "limit": 900})
    assert (words in said) if words else not said
    assert "| ties none | 1 s |" in full_suite.table({"runs": runs})


def test_command_lines_are_read_and_nonsense_is_refused(capsys):
    assert full_suite.options(["--folder", "x"]).images == 90000
    assert full_suite.options(["--folder", "x", "--vision20"]).images == 400000
    assert full_suite.options(["--folder", "x", "--set", "precision=bf16"]).overrides == ["precision=bf16"]
    read = gpu.options(["--out", "x", "--only", "merging,tests", "--device", "cpu", "--small"])
    assert read.only == ["merging", "tests"] and read.small and gpu.options(["--out", "x"]).only == [*gpu.PARTS]
    assert gpu_merging.options([]).device == "cuda"
    wrong = [
        (full_suite, ["--folder", "x", "--train", "2"]), (full_suite, ["--folder", "x", "--repeats", "2"]),
        (gpu, ["--out", "x", "--only", "merge"]), (gpu, ["--out", "x", "--side", "100"]), (gpu, ["--only", "tests"]),
        (gpu_merging, ["--limit", "0"]),
    ]  # fmt: skip
    for module, arguments in wrong:
        with pytest.raises(SystemExit):
            module.options(arguments)
    assert "is no part; tests, throughput, merging, suite" in capsys.readouterr().err


def test_parts_share_the_time_and_what_is_left_goes_on():
    assert set(gpu.SHARES) == set(gpu.PARTS)
    assert gpu.shares(["merging"], 100.0) == 100.0
    assert gpu.shares([*gpu.PARTS], 900.0) == pytest.approx(300.0)


def test_what_pytest_said_is_counted():
    assert gpu.counted("x\n2 failed, 31 passed, 4 skipped in 3.21s\n") == {"failed": 2, "passed": 31, "skipped": 4}
    assert gpu.counted("killed half-way\n....") == {}


def test_a_part_that_is_cut_off_says_so_and_leaves_no_process(tmp_path):
    row = gpu.ran(["sh", "-c", "echo begun; sleep 60 & wait"], 0.2, tmp_path / "log")
    assert row["status"] is None and row["end"] == "begun\n" and row["seconds"] < 30


def tiny(kind):
    """Three fine-tunes of a matrix and a vector."""
    draw = torch.Generator().manual_seed(0)
    states = [
        {"matrix": torch.randn(24, 16, generator=draw), "bias": torch.randn(16, generator=draw)} for _ in range(4)
    ]
    return gpu_merging.Case(kind, "tiny", states[0], states[1:])


@pytest.mark.parametrize("kind", gpu_merging.MERGES)
def test_every_method_named_is_measured_and_runs(kind):
    jobs = [*gpu_merging.jobs(tiny(kind))]
    named = [f"merge {n}" for n in gpu_merging.MERGES[kind]] + [f"pack {n}" for n in gpu_merging.PACKS[kind]]
    own = ["plain task arithmetic", "unpack fft, one task"] if kind != "matrices" else []
    assert [name for name, *_ in jobs] == [*own[:1], *named, *own[1:]]
    assert all(work() for name, _, work in jobs if name != "merge wudi")  # 300 steps


def test_rows_of_merging_are_measured_and_a_failure_is_a_row(monkeypatch):
    case = tiny("vit")
    jobs = [*gpu_merging.jobs(case)]
    few = [job for job in jobs if job[0].rpartition(" ")[2] in ("arithmetic", "average", "ties", "fft", "task")]
    monkeypatch.setattr(gpu_merging, "jobs", lambda given: [*few, ("broken", 1, lambda: 1 / 0)])
    clock = gpu_merging.Clock("cpu", repeats=1)
    rows = dict(gpu_merging.case_rows(case, clock, 10.0, time.perf_counter() + 60))
    assert "ZeroDivisionError" in rows["tiny: broken"]["failed"]
    assert rows["tiny: merge ties"]["moved_bytes"] == 5 * case.nbytes and rows["tiny: merge ties"]["on"] == ["cpu"]
    assert 0 < rows["tiny: pack fft"]["packed_bytes"] < 3 * case.nbytes
    assert len(rows) == 6 and all(row["runs"] == 1 for row in rows.values() if "failed" not in row)
    late = dict(gpu_merging.case_rows(case, clock, 10.0, time.perf_counter() - 1))
    assert [*late] == [*rows] and all(row == {"not_run": "no time was left"} for row in late.values())
    text = gpu_merging.table({"copy": {"seconds": 1.0, "GB_per_s": 10.0}, **rows, **late})
    assert "no time was left" in text and gpu_merging.table(rows).count("%") == 5


def test_plain_task_arithmetic_is_byoms():
    case = tiny("vit")
    merged = TaskArithmetic(scale=gpu_merging.SCALE)(case.problem)
    out = gpu_merging.plain(case)()
    assert all(torch.allclose(out[name], merged[name], atol=1e-5) for name in out)
