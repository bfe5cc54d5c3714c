"""Every merge method, variant and router through the whole pipeline, on two small tasks of real data."""

from __future__ import annotations

import math

import pytest

from byom.cli import config
from byom.data.source.base import DataError
from byom.pipeline.labs import Labs, laboratory
from byom.pipeline.run import run
from byom.report.bootstrap import points
from byom.report.methods import display_methods, methods
from byom.report.report import generate
from byom.report.rows import rows
from byom.storage.parts import TaskScore
from byom.storage.record import Record
from tests.e2e.tiny import KEPT, overrides
from tests.problems import slow

pytestmark = pytest.mark.data
SHORT = {  # fewer steps where a method trains; what is tested is that it runs, not how well
    "adamerging": ["merge.steps=3"],
    "adarank": ["merge.steps=3"],
    "awd": ["merge.steps=20"],
    "surgery": ["byom.steps=3"],
    "symerge": ["byom.steps=3"],
    "wudi": ["merge.steps=10"],
    "mlp": ["router.epochs=2"],
}
PREVIEWED = ("mixture",)
"""Trains several models per task; a preview of `test_preview` runs it."""
SMALL = ["statistics.fisher.examples=16", "statistics.gram.examples=16", "evaluate=test"]


def of_each_need(group):
    """Return the options of a group; `make test` runs one of those that are given the same and share a base class."""
    names = [name for name in reversed(config.options(group)) if name not in PREVIEWED]
    made = {name: config.option(group, name) for name in names}
    first = {(option.needs, type(option).__base__): name for name, option in made.items()}.values()
    return [*first, *slow(*(name for name in config.options(group) if name not in first))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def settings(folder):
    def make(*options):
        return config.settings([*overrides(folder, "scratch"), *SMALL, *options])

    return make


@pytest.fixture(scope="module")
def cell(settings):
    labs = Labs()

    def make(*options):
        return run(settings(*options), labs)

    try:
        make("merge=pretrained", "byom=none")
    except DataError as error:
        pytest.skip(str(error))
    return make


def hits(record, split="test"):
    return {task: points(TaskScore.lift(row), task) for task, row in record["scores"][split].items()}


def sound(record):
    assert record["status"] == "done"
    assert set(record["scores"]["test"]) == set(KEPT)
    assert record["needs"]["words"] and set(record["cost"]) >= {"merge", "variant"}
    assert all(math.isfinite(value) for value in record["summary"]["test"].values())
    assert record["storage"]["bytes"] >= 0 and len(record["storage"]["task_parameters"]) == len(KEPT)


@pytest.mark.parametrize("name", of_each_need("merge"))
def test_a_merge_method_runs(cell, name):
    record = cell(f"merge={name}", "byom=none", *SHORT.get(name, []))
    sound(record)
    assert record["titles"]["merge"] and record["choices"]["merge"] == name
    assert ("statistics" in record["cost"]) == ("statistics" in record["hyperparameters"])


@pytest.mark.parametrize("name", of_each_need("byom"))
def test_a_variant_runs(cell, name):
    record = cell("merge=average", f"byom={name}", *SHORT.get(name, []))
    sound(record)
    assert record["needs"]["sees_test"] == (name in ("surgery", "symerge"))


@pytest.mark.parametrize("name", [name for name in config.options("router") if name != "oracle"])
@pytest.mark.parametrize("variant", ["fft", "emr", "single_task"])
def test_a_router_can_only_lose_what_it_sends_astray(cell, name, variant):
    known = cell("merge=average", f"byom={variant}")
    routed = cell("merge=average", f"byom={variant}", f"router={name}", *SHORT.get(name, []))
    sound(routed)
    assert routed["choices"]["router"] == name and routed["storage"]["router_bytes"] > 0
    for task, right in routed["routed"]["accuracy"]["test"].items():
        assert (hits(routed)[task] <= hits(known)[task]).all()
        astray = 1 - right
        assert hits(known)[task].mean() - hits(routed)[task].mean() <= astray + 1e-9


def test_with_the_data_sets_own_head_a_wrong_model_may_still_be_right(cell):
    given = cell("merge=average", "byom=fft", "router=knn", "router.heads=given")
    strict = cell("merge=average", "byom=fft", "router=knn")
    assert all((hits(strict)[task] <= hits(given)[task]).all() for task in KEPT)
    assert given["signature"] != strict["signature"]


def test_mixing_by_batches_is_another_record_and_says_so(cell):
    mixed = cell("merge=average", "byom=fft", "router=knn", "router.mix=batch", "router.batch_size=20")
    sound(mixed)
    assert mixed["routed"]["mix"] == "batch"


def test_nothing_put_back_makes_routing_free_of_the_choice_of_model(cell):
    alone = cell("merge=average", "byom=none")
    routed = cell("merge=average", "byom=none", "router=knn", "router.heads=given")
    assert all((hits(alone)[task] == hits(routed)[task]).all() for task in KEPT)


def test_what_was_made_before_keeps_its_cost(cell, settings, folder):
    first = cell("merge=fisher", "byom=none")
    again = cell("merge=fisher", "byom=single_task")
    assert first["cost"]["statistics"]["seconds"] > 0
    assert first["cost"]["merge"] != again["cost"]["merge"]  # single-task merges nothing
    fft = cell("merge=fisher", "byom=fft")
    assert fft["cost"]["merge"] == first["cost"]["merge"] and fft["cost"]["statistics"] == first["cost"]["statistics"]


def test_statistics_are_made_ahead_and_found_again(settings, cell, capsys):
    from byom.cli import statistics

    made = settings("merge=regmean", "byom=none")
    lab = laboratory(made)
    assert statistics.fit(made, {"gram": made.statistics["gram"]}) == 0
    shown = capsys.readouterr().out
    assert all(task in shown for task in KEPT) and "gram" in shown
    first = lab.statistics("mnist", {"gram": made.statistics["gram"]})["gram"]
    assert first.fingerprint() == lab.statistics("mnist", {"gram": made.statistics["gram"]})["gram"].fingerprint()


def test_an_unknown_statistic_is_refused(capsys):
    from byom.__main__ import main

    assert main(["statistics", "hessian"]) == 1
    assert "there is no statistic 'hessian'" in capsys.readouterr().err
    assert main(["statistics"]) == 1
    assert "which statistics" in capsys.readouterr().err


def test_a_joint_model_is_trained_once_and_weights_matter(cell, settings):
    one = cell("merge=mtl", "byom=none")
    two = cell("merge=mtl", "byom=none", "merge.weights=[1,3]")
    assert one["signature"] != two["signature"]
    lab = laboratory(settings("merge=mtl", "byom=none"))
    trained = {file.parent.name for file in (lab.cache / "joint").glob("*/training.json")}
    lab.joint({"mnist": 2.0, "digits": 6.0})
    assert trained == {file.parent.name for file in (lab.cache / "joint").glob("*/training.json")}


def test_the_table_over_all_methods_has_a_row_for_each(cell, settings, folder):
    root = settings("byom=none").place().root
    records = [Record.read(f) for f in (root / "runs").glob("*/*/*.json") if "failed" not in f.name]
    frame = methods(rows(records))
    assert set(frame["merge"]) == {record.choices.merge for record in records} >= {"adamerging"}
    assert set(frame["variant"]) == {record.choices.byom for record in records} >= {"surgery"}
    routed = frame["right"].notna()
    assert routed.any() and (frame["price"][routed].dropna() >= -1e-9).any()
    shown = display_methods(frame)
    assert shown["Needs"].str.contains("†").any() and len(shown) == len(frame)
    made = generate(root, "vision8_offline", "vit_small_dinov2")
    assert {f.name for f in made.files} >= {"vision8_offline--vit_small_dinov2--methods.md"}
