"""The time left and the order of a sweep: what cells share is made once, and no number comes before it is known."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager

import pytest

from byom.cli import config, missing, sweeps
from byom.errors import DataError
from byom.pipeline import order, plan, run
from byom.pipeline.forecast import TRAIN, Forecast
from byom.pipeline.provenance import hardware
from byom.storage.atomic import write_json
from byom.storage.lock import alone
from byom.weights import cuts, kept

SUITE = ("suite=vision8_offline", "evaluate=test")
NOTHING = dict.fromkeys(("data", "experts", "statistics", "tune", "merge", "variant", "route"), 0.0)


@pytest.fixture
def cells(tmp_path):
    """Settings of some cells; with the name of an experiment, of all of its own."""
    places = (f"cache={tmp_path}/cache", f"results={tmp_path}/results/scratch")

    def composed(*sweep):
        with config.shared():
            return [config.settings([*cell, *places]) for cell in sweep]

    return composed


def demo():
    return sweeps.experiment("vision8_offline_headline").cells()


def taken(cell, first, trains=345.0):
    """Seconds of the stages of a cell on a machine that trains a model in 43 s and searches slower than it scores."""
    searches = 1.2 * 12.0 * len(cell.effective()[1].candidates(cell.effective()[0])) / 3
    evaluates = 12.0 if cell.names["byom"] == "none" else 13.0
    own = {"tune": searches, "merge": 0.5, "variant": 0.0 if cell.names["byom"] == "none" else 2.0}
    return NOTHING | own | {"evaluate": evaluates} | ({"data": 3.0, "experts": trains} if first else {})


@pytest.mark.parametrize("tune", ["none", "validation"])
def test_after_the_first_cell_the_time_left_is_near_the_truth(tune, cells):
    every = cells(*([*cell, f"tune={tune}"] for cell in demo()))
    forecast, searched, truth = Forecast(every), set(), []
    assert forecast.left().seconds == 0.0 and TRAIN in forecast.left().unmeasured
    for number, cell in enumerate(every):
        stages = taken(cell, number == 0)
        name = str(cell.effective()[0]) if stages["tune"] else ""
        if name in searched:  # the search of a merge method is made once
            stages["tune"] = 0.0
        searched.add(name)
        truth.append(stages)
    assert len(every) == 13 and sum(truth[0].values()) > 20 * sum(truth[1].values())
    promises = []
    for number, cell in enumerate(every[:-1]):
        forecast.finished(cell, truth[number])
        promises.append((forecast.left().seconds, sum(sum(stages.values()) for stages in truth[number + 1 :])))
    assert all(real / 1.5 < promised < 1.5 * real for promised, real in promises), promises


def test_a_failed_cell_is_not_left_and_teaches_nothing(cells):
    every = cells(*demo()[:3])
    forecast = Forecast(every)
    forecast.finished(every[0], {})
    assert forecast.left().seconds == 0.0 and TRAIN in forecast.left().unmeasured
    forecast.finished(every[1], taken(every[1], True))
    assert TRAIN not in forecast.left().unmeasured and forecast.left().seconds > 0


def test_what_the_cache_holds_is_not_left(cells, tmp_path):
    every = cells([*SUITE, "merge=ties", "byom=fft"])
    [training] = [work for _, works in Forecast(every)._works for work in works if work.kind == TRAIN]
    *kept, lost = sorted(training.keys)
    for key in kept:
        write_json(tmp_path / "cache" / "experts" / key / "training.json", {})
    works = [work for _, works in Forecast(every)._works for work in works]
    assert {work.keys for work in works if work.kind == TRAIN} == {frozenset([lost])}


def test_a_forecast_fetches_no_expert(monkeypatch, tmp_path):
    def fetch(*given):
        raise AssertionError("fetched")

    monkeypatch.setattr("byom.experts.hub.hub.fetch", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cell = config.settings(["suite=vision8", "experts=clip_hf_b32", "merge=average", "byom=none", f"cache={tmp_path}"])
    forecast = Forecast([cell])
    assert {kind for kind, _ in (work[:2] for _, works in forecast._works for work in works)} >= {("merge", "Average")}
    forecast.left()


def test_records_of_this_machine_say_what_has_not_been_measured_yet(cells):
    [ours] = cells([*SUITE, "merge=ties", "byom=fft"])
    record = {
        "provenance": {"hardware": hardware()}, "stages": {"evaluate": {"seconds": 24.0}}, "status": "done",
        "cost": {"training": {"models": 2, "seconds": 20.0}, "merge": {"seconds": 4.0}, "variant": {"seconds": 8.0}},
        "config": {"finetune": ours.resolved["finetune"]},
    }  # fmt: skip
    forecast = Forecast([ours])
    forecast.earlier(ours, record)
    assert forecast.left().seconds == pytest.approx(8 * 10 + 4 + 8 + 24)
    folder = ours.place().done.parent
    write_json(folder / "other.json", record | {"provenance": {"hardware": {"cpu": "another"}}})
    (folder / "damaged.json").write_text("{", encoding="utf-8")
    assert TRAIN in Forecast([ours]).left().unmeasured
    write_json(folder / "z.json", record)
    assert Forecast([ours], pace=0.01).left().seconds == pytest.approx(
        8 * 10 + 0.01 * sum(task.test for task in ours.suite.tasks)
    )
    write_json(folder / "z.json", record | {"config": {"finetune": {}}})
    assert TRAIN in Forecast([ours]).left().unmeasured


def test_cells_that_share_much_follow_one_another_and_others_keep_their_order(cells):
    given = [
        "seed=0 merge=ties byom=fft", "seed=1 merge=ties byom=fft", "seed=0 merge=average byom=fft", "",
        "seed=0 merge=ties byom=none", "seed=1 merge=ties byom=none", "seed=0 merge=ties byom=fft byom.density=0.2",
    ]  # fmt: skip
    settings = cells(*([*SUITE, *line.split()] for line in given))
    settings[3] = None
    assert order.neighbours(settings) == [0, 6, 4, 2, 1, 5, 3]
    assert order.spread(settings) == [0, 2, 1, 3, 6, 4, 5]


def test_failures_come_in_the_order_of_the_experiment_and_the_others_run(cells, monkeypatch, capsys):
    lines = ["merge=ties byom=fft", "merge=average byom=fft", "merge=ties byom=none", "merge=none byom=fft"]
    every = [[*SUITE, *line.split()] for line in lines]
    settings = {tuple(cell): one for cell, one in zip(every, cells(*every[:3]), strict=False)}
    ran, stages = [], {"stages": {"evaluate": {"seconds": 100.0}, "variant": {"seconds": 0.0}}}

    def job(one):
        ran.append(f"{one.names['merge']} {one.names['byom']}")
        if one.names["merge"] == "ties":
            raise DataError("no ties")
        choices = {**one.choices(), "suite": one.suite.name}
        write_json(one.place().done, {"choices": choices, "signature": "", "status": "done"} | stages)

    def composed(*cell):
        if cell not in settings:
            raise DataError("no such merge")
        return settings[cell]

    monkeypatch.setattr(run, "job", job)
    failed = missing.run_missing(every, composed)
    assert ran == ["ties fft", "ties none", "average fft"]
    assert [(every.index(cell), str(error)) for cell, error in failed] == [
        (0, "no ties"), (2, "no ties"), (3, "no such merge"),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert re.findall(r"\[ *\d/4\]", said) == [f"[  {n}/4]" for n in (1, 2, 3, 4)] and "left" not in said
    monkeypatch.setattr(run, "job", lambda one: ran.append("again"))
    missing.run_missing(every[:3], composed)
    assert ran[3:] == ["again", "again"]
    assert capsys.readouterr().out.startswith("1 of 3 cells finished before, 2 to run\n[  1/2] ")


@pytest.mark.parametrize(
    ("seconds", "unmeasured", "text"),
    [(0.0, {TRAIN}, " " * 13), (200.0, {TRAIN}, ">  3:20 left "), (3605.9, set(), "  60:05 left ")],
)
def test_the_time_left_is_blank_or_a_bound_where_it_is_not_known(seconds, unmeasured, text):
    class Known:
        def left(self):
            return seconds, unmeasured

    assert missing._left(Known()) == text  # pyright: ignore[reportArgumentType]


def test_a_plan_names_what_was_never_timed_here(cells, monkeypatch):
    monkeypatch.setattr(plan, "_trial", lambda cells: (10**6, 0.01))
    text = plan.text("x", plan.plan(cells([*SUITE, "merge=ties", "byom=fft"])))
    assert "about 0 min, after 10.0 ms per example in a trial on this machine; without fine-tuning 8 experts" in text
    assert "merging, packing, which this machine has not timed yet" in text
    assert json.dumps(text)


def test_processes_run_different_cells_and_none_runs_one_that_another_has_finished(cells, monkeypatch, capsys):
    every = [[*SUITE, f"merge={merge}", "byom=fft"] for merge in ("ties", "average", "task_arithmetic")]
    first, *others = cells(*every)
    settings = {tuple(cell): one for cell, one in zip(every, (first, *others), strict=True)}
    ran = []
    monkeypatch.setattr(run, "job", lambda one: ran.append(one.names["merge"]))
    with alone(run.running(first)):
        assert not missing.run_missing(every, lambda *cell: settings[cell])
    assert ran == ["average", "task_arithmetic", "ties"]
    monkeypatch.setattr(run.cell, "execute", lambda one: pytest.fail("it has been run"))
    values = {"choices": {**first.choices(), "suite": first.suite.name}, "signature": "", "status": "done"}
    scored = {"summary": {"test": {"absolute": 0.5, "normalised": 0.6}}}

    @contextmanager
    def meanwhile(folder):
        write_json(first.place().done, values | scored)
        yield

    monkeypatch.setattr(run, "alone", meanwhile)
    assert run.run(first) == values | scored
    assert "finished before" in capsys.readouterr().out


def test_a_launchers_job_finds_the_cuts_of_all_densities_and_keeps_them_in_the_cache(cells, tmp_path, monkeypatch):
    [one] = cells([*SUITE, "merge=ties", "byom=fft"])
    seen = []
    monkeypatch.setattr(run.cell, "execute", lambda _: seen.append((cuts._SWEEP.get(), kept._FOLDER.get())) or {})
    monkeypatch.setenv(run.DENSITIES, "0.01 0.1")
    run._measured(one, None)
    assert seen == [((0.01, 0.1), tmp_path / "cache" / "cuts")]
    assert missing._densities([one, None]) == [0.1]


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (["merge=ties,average"], True), (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"], True),
        (["hydra/sweeper=optuna", "merge=ties"], False), (["hydra.sweep.dir=x"], False),
        (["note='${hydra:job.num}'", "seed=0,1"], False),
    ],
)  # fmt: skip
def test_sweeps_of_all_combinations_do_not_need_a_sweeper_of_hydras(given, ours):
    assert sweeps.combines(given) == ours


def test_the_cells_of_a_sweep_are_all_combinations_once():
    assert sweeps.product(["byom=none,fft", "byom.density=0.1,0.2", "seed=0"]) == [
        ["seed=0", "byom=none"], ["seed=0", "byom=fft", "byom.density=0.1"], ["seed=0", "byom=fft", "byom.density=0.2"],
    ]  # fmt: skip
