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
from itertools import islice, pairwise
from pathlib import Path

import pytest

from byom.storage import lock
from tests.e2e.tiny import overrides

ROOT = Path(__file__).parents[2]
HEADLINE = "vision8_offline_headline"


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, **options
    )


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Return what gives an order to a process that runs commands in forks, and returns its answers."""
    log = tmp_path_factory.mktemp("forks") / "stderr"
    with log.open("w") as said:
        process = start("-m", "tests.e2e.killed", stdin=subprocess.PIPE, stderr=said)

        def order(work, folder, given, *command, answers):
            process.stdin.write(json.dumps([work, str(folder), given, command]) + "\n")
            process.stdin.flush()
            lines = (line for line in process.stdout if line.startswith(('{"status"', '{"statuses"')))
            found = [json.loads(line) for line in islice(lines, answers)]
            assert len(found) == answers and "failed" not in log.read_text(), log.read_text()[-3000:]
            return found

        yield order
        process.communicate()
    assert process.returncode == 0


def killed_at(forks, numbers, folder):
    """Run a tiny table once for each number, killed at that change of the folder; return what each run left."""
    options = [*overrides(folder, own=True), "tune=none"]
    return forks("killed", folder, numbers, "table", HEADLINE, *options, answers=len(numbers))


@pytest.mark.slow
@pytest.mark.data
def test_a_table_killed_at_any_change_of_its_files_ends_the_same(tmp_path, forks):
    [whole] = killed_at(forks, [0], tmp_path / "whole")
    draw = random.Random(5)
    first, fourth, third = (whole["seen"] // part for part in (8, 4, 3))
    numbers = [draw.randrange(1, first), draw.randrange(fourth, third), draw.randrange(fourth, third)]
    runs = killed_at(forks, [*numbers, 0], tmp_path / "cut")
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
def test_two_processes_that_want_one_cell_train_each_expert_once(tmp_path, forks):
    options = [*overrides(tmp_path, own=True), "merge=average", "byom=none", "evaluate=test"]
    [both] = forks("together", tmp_path, 2, "run", *options, answers=1)
    assert both["statuses"] == [0, 0], both["said"]
    for task in ("digits", "mnist"):
        assert sum(f"fine-tune {task}:   0%" in err for err in both["said"]) == 1
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
