"""Loggers: what was run reaches them, whenever they come and however it ended, and once; all failed jobs are named."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from byom.__main__ import main
from byom.cli import config, sweeps
from byom.cli.failures import keep, kept, said
from byom.data.suite import Suite
from byom.errors import ByomError, DataError, OptionError
from byom.pipeline import cell, run
from byom.pipeline.logger import Console, Wandb
from tests.unit.synthetic_runs import record as made


class Run:
    """What `wandb.init` returns, as far as it is used."""

    def __init__(self, options):
        self.options, self.logged, self.summary, self.exit_code = options, [], {}, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.exit_code = 0

    def log(self, values):
        self.logged.append(values)

    def log_artifact(self, artifact):
        self.logged.append(artifact)

    def finish(self, exit_code=0):
        self.exit_code = exit_code


@pytest.fixture
def live(monkeypatch):
    """The runs that a stand-in for W&B was told of."""
    runs: list[Run] = []
    artifact = SimpleNamespace(add=lambda *_: None)

    def init(**options):
        runs.append(Run(options))
        return runs[-1]

    fake = SimpleNamespace(init=init, Artifact=lambda *_, **__: artifact, Table=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(Suite, "available", lambda suite: suite)
    monkeypatch.setattr(run.cell, "execute", lambda _: {k: v for k, v in DONE.items() if k not in HEADER})
    monkeypatch.setattr(cell.Cell, "__init__", lambda *_: None)
    base = config.settings([f"results={tmp_path}/results/scratch", f"cache={tmp_path}/cache", "merge=average"])
    return lambda logger: replace(base, logger=logger)


DONE = made("average", "none", 0)
HEADER = ("signature", "created", "choices", "config")


def wandb(tmp_path, **options):
    return Wandb(folder=str(tmp_path / "wb"), **options)


def test_records_that_exist_are_sent_when_a_logger_comes_later_and_only_once(tmp_path, live, settings):
    run.run(settings(Console()))
    assert live == []
    for _ in range(3):
        run.run(settings(wandb(tmp_path)))
    assert [one.exit_code for one in live] == [0]
    assert "test/mean/absolute" in live[0].logged[0]
    run.run(settings(wandb(tmp_path, project="other")))
    assert len(live) == 2 and live[0].options["id"] == live[1].options["id"]
    assert all(one.options["resume"] == "allow" for one in live)


def test_records_of_a_table_are_sent_though_only_its_missing_cells_go_to_a_launcher(
    tmp_path, live, settings, monkeypatch
):
    from byom.cli.missing import run_missing

    one, launched = settings(wandb(tmp_path)), []
    monkeypatch.setattr(sweeps, "launch", lambda cells, *_: launched.append(len(cells)) or [None for _ in cells])
    assert run_missing([["x"]], lambda *_: one, ["hydra/launcher=joblib"]) == [] and launched == [1]
    run.run(settings(Console()))
    assert live == []
    for _ in range(2):
        assert run_missing([["x"]], lambda *_: one, ["hydra/launcher=joblib"]) == [] and launched == [1]
        assert len(live) == 1


def test_a_record_of_this_run_is_sent_once_also_when_it_is_found_again(tmp_path, live, settings):
    for _ in range(2):
        run.run(settings(wandb(tmp_path)))
    assert len(live) == 1


def test_a_failed_cell_is_a_failed_run_and_a_later_success_is_one_of_its_own(tmp_path, live, settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run.cell, "execute", lambda _: (_ for _ in ()).throw(DataError("no such data")))
        for _ in range(2):
            with pytest.raises(DataError):
                run.run(settings(wandb(tmp_path)))
    assert [one.exit_code for one in live] == [1, 1]
    assert len({one.options["id"] for one in live}) == 1
    assert live[0].summary["error"] == "DataError: no such data"
    run.run(settings(wandb(tmp_path)))
    assert [one.exit_code for one in live] == [1, 1, 0] and live[2].options["id"] != live[1].options["id"]


def test_a_logger_that_fails_says_so_costs_no_record_and_is_made_good_later(
    tmp_path, live, settings, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["wandb"], "init", lambda **_: (_ for _ in ()).throw(ConnectionError("no network")))
        assert run.run(settings(wandb(tmp_path)))["status"] == "done"
        assert "is not mirrored to W&B (ConnectionError: no network)" in capsys.readouterr().err
    run.run(settings(wandb(tmp_path)))
    assert len(live) == 1


def test_a_run_that_is_stopped_waits_for_no_logger(tmp_path, live, settings, monkeypatch):
    monkeypatch.setattr(run.cell, "execute", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.run(settings(wandb(tmp_path)))
    assert live == []


def test_every_failed_job_of_a_sweep_is_named_whatever_process_it_ran_in(tmp_path):
    keep(tmp_path, 10, ["a=3", "b=1"], ValueError("odd"))
    keep(tmp_path, 2, ["a=1", "b=1"], DataError("gone"))
    keep(tmp_path, 9, ["a=2", "b=1"], DataError("gone"))
    text = str(said(kept(tmp_path)))
    assert text.splitlines() == [
        "2 jobs failed: gone", "    a=1", "    a=2", "byom: 1 job failed: ValueError: odd", "    a=3"
    ]  # fmt: skip


def fails(settings):
    raise DataError(f"seed {settings.seed} is odd")


def test_a_multirun_names_all_jobs_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BYOM_SWEEP", "one")
    monkeypatch.setattr(Suite, "available", lambda suite: suite)
    monkeypatch.setattr("byom.pipeline.run.job", fails)
    assert main(["-m", f"results={tmp_path}", f"cache={tmp_path}", "seed=1,3"]) == 1
    assert "1 job failed: seed 1 is odd\n    seed=1\nbyom: 1 job failed: seed 3 is odd" in capsys.readouterr().err


def test_the_parts_of_a_sweep_run_though_one_failed_and_a_sweep_that_cannot_be_had_says_why(tmp_path, monkeypatch):
    ran, options = [], [f"results={tmp_path}", "byom=none,fft,single_task", "byom.density=0.1"]

    def part(*_, **__):
        def raises():
            ran.append(sys.argv[-2:])
            if len(ran) != 2:
                keep(tmp_path / "sweep", len(ran), ran[-1], failed := DataError(f"job {len(ran)}"))
                raise failed

        return lambda _: raises

    monkeypatch.setattr(sweeps.hydra, "main", part)
    monkeypatch.setattr(sweeps, "_sweep", lambda _: tmp_path / "sweep")
    monkeypatch.setattr(sweeps, "_searched", lambda _: [])
    with pytest.raises(DataError, match="job 1"):
        sweeps.multirun(options, float)
    assert len(ran) == 2
    monkeypatch.setattr(sweeps, "fitting", lambda _: [["a=1"], ["a=2"]])
    with pytest.raises(ByomError, match=r"job 3\n.*\nbyom: 1 job failed: job 4"):
        sweeps.multirun(options, float)
    monkeypatch.setattr(sweeps.hydra, "main", lambda *_, **__: lambda _: lambda: exec("raise OptionError('no such')"))
    with pytest.raises(OptionError, match="no such"):
        sweeps.multirun(options, float)


def test_a_table_text_is_as_before():
    with pytest.raises(ByomError, match="x"):
        raise said([(["a=1"], ByomError("x"))])
    assert json.loads(json.dumps(str(said([(["a=1"], ByomError("x"))])))) == "1 job failed: x\n    a=1"
