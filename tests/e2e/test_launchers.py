"""Launchers and searches: the missing cells of a table in other processes, and Optuna on validation data."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from hydra.utils import get_class

from byom.__main__ import main
from byom.cli import config, sweeps
from byom.errors import OptionError
from byom.merge.ties import Ties
from byom.pipeline import cell as pipeline
from tests.e2e.tiny import fewer, overrides

HEADLINE = "vision8_offline_headline"
PRESETS = [f"{group}/{name}" for group in sweeps.PLUGINS for name in config.options(group)]
SCHEMAS = {
    "hydra/launcher/joblib": "hydra_plugins.hydra_joblib_launcher.config.JobLibLauncherConf",
    "hydra/launcher/submitit_local": "hydra_plugins.hydra_submitit_launcher.config.LocalQueueConf",
    "hydra/launcher/submitit_slurm": "hydra_plugins.hydra_submitit_launcher.config.SlurmQueueConf",
    "hydra/sweeper/optuna": "hydra_plugins.hydra_optuna_sweeper.config.OptunaSweeperConf",
}


def records(folder):
    return {p.name: p for p in sorted(folder.rglob("runs/**/*.json")) if not p.name.endswith(".failed.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished tiny table: its folder, its options, and its records' contents."""
    folder = tmp_path_factory.mktemp("table")
    options = [*overrides(folder), "tune=none", "note='${oc.env:BYOM_SWEEP}'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BYOM_SWEEP", "in-one-process")
        fewer(patch)
        assert main(["table", HEADLINE, *options]) == 0
    return folder, options, {name: json.loads(p.read_text()) for name, p in records(folder).items()}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_only_the_missing_cells_go_to_the_launcher_and_the_table_is_the_same(whole, launcher, monkeypatch, capfd):
    folder, options, before = whole
    table = next(folder.rglob("tables/*dinov2.csv"))
    expected = table.read_bytes()
    lost = [name for name in before if "+fft" in name][:1]
    fewer(monkeypatch)
    for name in (*lost, table.name):
        next(folder.rglob(name)).unlink()
    kept = {name: p.stat().st_mtime_ns for name, p in records(folder).items()}
    monkeypatch.setenv("BYOM_SWEEP", f"in-{launcher}")
    assert main(["table", HEADLINE, *options, f"hydra/launcher={launcher}"]) == 0
    after = {name: json.loads(p.read_text()) for name, p in records(folder).items()}
    assert {name: records(folder)[name].stat().st_mtime_ns for name in kept} == kept
    assert {name: r["scores"] for name, r in after.items()} == {name: r["scores"] for name, r in before.items()}
    assert {after[name]["note"] for name in lost} == {f"in-{launcher}"}, "the sweep's name did not reach the jobs"
    assert table.read_bytes() == expected
    assert "4 of 5 cells finished before, 1 to run" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.data
def test_a_sweep_runs_a_job_for_each_cell(tmp_path):
    sweep = ["merge=average,ties", "byom=none", "evaluate=test", "hydra/launcher=joblib"]
    assert main(["-m", *overrides(tmp_path), *sweep]) == 0
    assert sorted(name.partition("+")[0] for name in records(tmp_path)) == ["average", "ties"]


@pytest.mark.slow
@pytest.mark.data
def test_a_failing_cell_is_marked_and_listed_and_the_others_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "execute", _broken(pipeline.execute))
    fewer(monkeypatch, 2, 4, 8, 11, 12)
    options = [*overrides(tmp_path), "tune=none", "hydra/launcher=basic"]
    assert main(["table", HEADLINE, *options]) == 1
    said = capsys.readouterr().err
    assert "byom: 3 of 5 cells failed: RuntimeError: no TIES today\n" in said and said.count("no TIES today") == 1
    assert said.count("\n    merge=ties ") == len(list(tmp_path.rglob("*.failed.json"))) == 3
    assert len(records(tmp_path)) == 5 - 3


def _broken(execute):
    def instead(cell):
        if isinstance(cell.settings.effective()[0], Ties):
            raise RuntimeError("no TIES today")
        return execute(cell)

    return instead


@pytest.mark.slow
@pytest.mark.data
def test_optuna_maximises_the_validation_score_repeatably(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
    monkeypatch.setenv("BYOM_SWEEP", "search")
    search = ["hydra/sweeper=optuna", "merge=ties", "merge.scale=interval(0.2,2.0)", "hydra.sweeper.n_trials=4"]
    asked = ["-m", *overrides(tmp_path), *search, "byom=none"]
    assert main([*asked, "evaluate=test"]) == 1
    assert "must not see the test score" in capsys.readouterr().err
    assert not records(tmp_path)
    assert main([*asked, "evaluate=validation"]) == 0
    found = [json.loads(p.read_text()) for p in records(tmp_path).values()]
    tried = {r["hyperparameters"]["merge"]["scale"]: r["summary"]["validation"]["absolute"] for r in found}
    assert len(tried) == 4 and all(0.2 <= scale <= 2.0 for scale in tried)
    best = yaml.safe_load(next(tmp_path.rglob("multirun/search/optimization_results.yaml")).read_text())
    assert best["best_value"] == max(tried.values()) == tried[best["best_params"]["merge.scale"]]
    assert f"merge.scale={best['best_params']['merge.scale']}" in capsys.readouterr().out
    assert main([*asked, "evaluate=validation"]) == 0
    assert capsys.readouterr().out.count("finished before") == 4


def test_search_spaces_survive_the_split_by_fields():
    space = ["hydra/sweeper=optuna", "merge=choice(average,ties)", "merge.scale=interval(0.2,2.0)"]
    assert sweeps.fitting(space) == [[space[0], "merge=average"], [space[0], "merge=ties", space[2]]]
    alone = ["merge=ties", "merge.scale=interval(0.2,2.0)", "byom.density=choice(0.1,0.2)"]
    assert sweeps.fitting(alone) == [alone]


def test_a_launcher_that_is_unknown_or_not_installed_is_named(monkeypatch, capsys):
    with pytest.raises(OptionError, match=r"no hydra/launcher=jobli; did you mean 'joblib'.*byom\[sweeps\]"):
        sweeps.multirun(["hydra/launcher=jobli"], float)
    with pytest.raises(OptionError, match=r"no hydra/launcher=ray;.*byom\[sweeps\]"):
        sweeps.launch([["merge=ties"]], float, ["hydra/launcher=ray"])
    monkeypatch.setattr(sweeps, "installed", lambda target: "hydra_plugins." not in target)
    for asked in ("hydra/launcher=submitit_slurm", "hydra/sweeper=optuna"):
        with pytest.raises(OptionError, match=rf"{asked} needs .* pip install 'byom\[sweeps\]'"):
            sweeps.multirun([asked], float)
    assert main(["table", HEADLINE, "hydra/sweeper=optuna"]) == 1
    assert "a table has its own cells" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_states_every_field_of_its_plugin(preset):
    stated = yaml.safe_load((config.folder() / f"{preset}.yaml").read_text())
    schema = get_class(SCHEMAS[preset])
    assert set(stated) == {field.name for field in dataclasses.fields(schema)}
    assert stated["_target_"] == schema._target_ and sweeps.installed(schema._target_)
