"""The command line as a user meets it: start-up, sweeps, Weights & Biases, stopped tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byom.__main__ import main
from byom.cli import config
from tests.e2e.tiny import fewer, overrides

ROOT = Path(__file__).parents[2]


def shell(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "byom", *arguments],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": str(cwd), **environment}, check=False,
    )  # fmt: skip


def test_help_is_fast_and_needs_no_torch():
    best = min(_seconds_of_help() for _ in range(3))
    assert best < 1
    code = (
        "import sys, byom.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def _seconds_of_help():
    start = time.perf_counter()
    assert "byom run" in shell("--help").stdout
    return time.perf_counter() - start


def test_importing_byom_imports_no_torch():
    code = "import sys, byom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_mistake_is_one_sentence_and_status_one(capsys):
    assert main(["run", "merge=tie"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("byom: there is no merge=tie; did you mean 'ties'")
    assert main(["rnu"]) == 1
    assert "did you mean 'run'" in capsys.readouterr().err


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch, capsys):
    for given, then in ((None, "passive"), ("active", "active")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "x")
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        assert main(["list", "tune"]) == 0
        assert os.environ["OMP_WAIT_POLICY"] == then
    capsys.readouterr()


def test_report_accepts_only_what_it_uses(capsys):
    assert main(["report", "merge=ties"]) == 1
    assert "knows no 'merge=ties'" in capsys.readouterr().err


def test_list_names_every_option_and_the_cached_experts(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BYOM_CACHE", str(tmp_path))
    expert = tmp_path / "experts" / "abc"
    expert.mkdir(parents=True)
    (expert / "training.json").write_text(json.dumps({"task": "mnist", "backbone": "Vit", "seed": 3}))
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for group in ("merge", "byom", "suite", "backbone"):
        assert all(option in shown for option in config.options(group))
    assert re.search(r"mnist\s+seed 3\s+Vit", shown)


@pytest.mark.data
def test_a_multirun_writes_one_record_and_one_offline_wandb_run_a_job(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("BYOM_SWEEP", raising=False)
    monkeypatch.chdir(tmp_path)
    options = [*overrides(tmp_path), "merge=average,ties", "byom=none"]
    live = ["logger=wandb", "logger.mode=offline", f"logger.folder={tmp_path}/wb"]
    assert main(["-m", *options, *live]) == 0
    wandb.teardown()  # its service writes the files on its own time
    records = [json.loads(p.read_text()) for p in (tmp_path / "results").rglob("runs/**/*.json")]
    assert sorted(r["choices"]["merge"] for r in records) == ["average", "ties"]
    runs = sorted((tmp_path / "wb" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    contents = [next(run.glob("run-*.wandb")).read_bytes() for run in runs]
    groups = {name for content in contents for name in re.findall(rb"sweep-\d{8}-\d{6}", content)}
    assert len(groups) == 1
    for content in contents:
        assert b"test/mnist/accuracy" in content
        assert b"scores-" in content
    capsys.readouterr()
    assert main(["-m", *options]) == 0
    assert capsys.readouterr().out == "2 of 2 cells finished before, 0 to run\n"


@pytest.mark.data
def test_a_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    experiment = "vision8_offline_headline"
    options = [experiment, *overrides(tmp_path), "tune=none"]
    fewer(monkeypatch)
    monkeypatch.setattr("byom.pipeline.run.job", _stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        from byom.cli import table

        table.table(options)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("runs/**/*.json")}
    assert len(kept) == 3
    monkeypatch.undo()
    fewer(monkeypatch)
    assert main(["table", *options]) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before") == shown.count("3 of 5 cells finished before, 2 to run\n[  1/2] ") == 1
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert "BYOM-FFT on TIES" in shown


def _stop_after(cells):
    from byom.pipeline import run

    original, seen = run.job, []

    def job(settings):
        if len(seen) == cells:
            raise KeyboardInterrupt
        seen.append(settings)
        return original(settings)

    return job


@pytest.mark.data
def test_a_missing_data_package_is_named_and_can_be_skipped(tmp_path, capsys):
    lost = "suite.tasks.digits.source.root.name=no-such-package"
    options = [*overrides(tmp_path), "merge=average", "byom=none", lost]
    assert main(["run", *options]) == 1
    assert "no-such-package is not installed" in capsys.readouterr().err
    assert main(["run", *options, "suite.skip_missing=true"]) == 0
    record = json.loads(next((tmp_path / "results").rglob("average+none*.json")).read_text())
    assert list(record["scores"]["test"]) == ["mnist"]
    assert record["skipped_tasks"] == ["digits"]


@pytest.mark.data
def test_an_altered_data_package_is_refused(tmp_path, capsys):
    altered = f"suite.tasks.digits.source.root.sha256={'0' * 64}"
    assert main(["run", *overrides(tmp_path), "merge=average", "byom=none", altered]) == 1
    said = capsys.readouterr().err
    assert "published" in said and "fine-tune" not in said
