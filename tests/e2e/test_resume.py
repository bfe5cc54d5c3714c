"""Killing a command at any point, and two processes that want the same: nothing is lost, broken or done twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from byom.storage import lock
from tests.e2e.tiny import overrides

ROOT = Path(__file__).parents[2]
HEADLINE = "vision8_offline_headline"


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def killed_at(numbers, folder):
    """Run a tiny table once for each number, killed at that change of the folder; return what each run left."""
    options = [*overrides(folder, own=True), "tune=none"]
    done = start("-m", "tests.e2e.killed", str(folder), ",".join(map(str, numbers)), "table", HEADLINE, *options)
    out, err = done.communicate()
    assert done.returncode == 0 and "failed" not in err, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"status"')]


@pytest.mark.slow
@pytest.mark.data
def test_a_table_killed_at_any_change_of_its_files_ends_the_same(tmp_path):
    [whole] = killed_at([0], tmp_path / "whole")
    draw = random.Random(5)
    first, fourth, third = (whole["seen"] // part for part in (8, 4, 3))
    numbers = [draw.randrange(1, first), draw.randrange(fourth, third), draw.randrange(fourth, third)]
    runs = killed_at([*numbers, 0], tmp_path / "cut")
    assert [run["status"] for run in runs[:3]] == [-signal.SIGKILL] * 3
    assert runs[-1]["status"] == 0
    for before, after in pairwise(runs):
        assert before["finished"].items() <= after["finished"].items(), "a finished cell was run again"
    assert 0 < len(runs[2]["finished"]) < len(runs[-1]["finished"]) == len(whole["finished"])
    assert tables(tmp_path / "cut") == tables(tmp_path / "whole")
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")


def tables(folder):
    """Return every table without times, as bytes."""
    files = (folder / "results" / "scratch" / "tables").glob("[!.]*")
    return {file.name: file.read_bytes() for file in files if "--methods" not in file.name}


def scores(folder):
    records = [p for p in folder.rglob("runs/**/*.json") if not p.name.startswith(".")]
    return {p.name: [json.loads(p.read_text())[part] for part in ("scores", "fingerprints")] for p in records}


@pytest.mark.slow
@pytest.mark.data
def test_two_processes_that_want_one_cell_train_each_expert_once(tmp_path):
    options = [*overrides(tmp_path, own=True), "finetune.epochs=20", "merge=average", "byom=none", "evaluate=test"]
    both = [start("-m", "byom", "run", *options) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for task in ("digits", "mnist"):
        assert sum(f"fine-tune {task}:   0%" in err for _, err in said) == 1
    assert len(list(tmp_path.rglob("experts/*/training.json"))) == 2
    assert len(list(tmp_path.rglob("runs/**/average+none*.json"))) == 1


def test_the_lock_of_a_killed_process_is_free_and_who_waits_says_so(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "expert"
    code = "from byom.storage.lock import alone; from pathlib import Path; import sys, time\n"
    code += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = start("-c", code, str(folder))
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    threading.Timer(1.0, holder.kill).start()
    began = time.monotonic()
    with lock.alone(folder):
        assert time.monotonic() - began < 30  # it would hold the lock for 60
    holder.communicate()
    assert re.fullmatch(rf"byom: waiting for {folder} .*another process.*\n", capsys.readouterr().err)
