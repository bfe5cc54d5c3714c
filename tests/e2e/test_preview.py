"""Previews on real data: from the command to the record, the same numbers as single runs, and interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byom.__main__ import main
from byom.cli import config
from byom.data.source.base import DataError
from byom.functional.pareto import agreement
from byom.pipeline import preview, scorer
from byom.pipeline.run import run
from byom.storage.preview import PreviewRecord, accuracies
from tests.e2e.tiny import KEPT, overrides
from tests.problems import slow

pytestmark = pytest.mark.data
OPTIONS = ("steps=4", "joint=2", "components=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("previews")
    try:
        run(config.settings([*overrides(made), "merge=pretrained", "byom=none"]))
    except DataError as error:
        pytest.skip(str(error))
    return made


@pytest.fixture
def command(folder, capsys):
    def call(*options):
        status = main(["preview", *overrides(folder), *options])
        return status, capsys.readouterr()

    return call


def files(folder, ending):
    return {path for path in (folder / "results").rglob(ending) if "previews" in path.parts}


def read(shown):
    (path,) = [Path(line) for line in shown.out.splitlines() if line.endswith(".json")]
    return json.loads(path.read_text())


@pytest.fixture
def record(command):
    return read(command(*OPTIONS)[1])


def single_run(folder, *options):
    settings = config.settings([*overrides(folder), "byom=none", "evaluate=validation", *options])
    return [row["accuracy"] for row in run(settings)["scores"]["validation"].values()]


def test_the_command_prints_tables_and_writes_a_record_and_figures(command, folder):
    status, shown = command(*OPTIONS)
    made = read(shown)
    assert status == 0
    assert all(name in shown.out for name in ("Averaging", "Hessian-weighted", "Mixture of Gaussians", "Regret"))
    written = [Path(line) for line in shown.out.splitlines() if line.startswith(str(folder))]
    assert [path.suffix for path in written] == [".json", ".png", ".pdf", ".png", ".pdf"]
    assert all(path.is_file() for path in written)
    assert written[0].parent == folder / "results" / "scratch" / "previews" / "vision8_offline" / "vit_small_dinov2"
    assert made["status"] == "done" and made["tasks"] == list(KEPT)
    assert made["provenance"]["packages"]["torch"] and set(made["fingerprints"]["experts"]) == set(KEPT)
    assert {"data", "experts", "statistics", "preview", "joint"} == set(made["stages"])


def test_every_method_is_previewed_at_every_weighting(record):
    grid = [[n / 4, 1 - n / 4] for n in range(5)]
    assert list(record["points"]) == ["average", "hessian_weighted", "mixture"]
    assert all([row["weights"] for row in rows] == grid for rows in record["points"].values())
    assert [row["weights"] for row in record["joint"]] == [[0.5, 0.5], [0.75, 0.25]]


@pytest.mark.parametrize("method", ["average", *slow("hessian_weighted", "mixture")])
def test_a_point_scores_what_a_run_with_its_weights_scores(record, folder, method):
    point = record["points"][method][1]
    members = ["merge.members=2"] if method == "mixture" else []
    assert point["weights"] == [0.25, 0.75]
    assert point["accuracy"]["validation"] == single_run(
        folder, f"merge={method}", "merge.weights=[0.25,0.75]", *members
    )


def test_the_centre_is_the_uniform_average_and_a_corner_the_expert(record, folder):
    points = record["points"]["average"]
    assert points[2]["accuracy"]["validation"] == single_run(folder, "merge=average")
    assert points[4]["accuracy"] == record["experts"][0]["accuracy"]
    assert points[0]["accuracy"] == record["experts"][1]["accuracy"]
    own = single_run(folder, "byom=single_task")
    assert [row["accuracy"]["validation"][task] for task, row in enumerate(record["experts"])] == own
    assert record["pretrained"]["accuracy"]["validation"] == single_run(folder, "merge=pretrained")


@pytest.mark.slow
def test_joint_points_are_those_of_joint_fine_tuning(record, folder):
    equal, weighted = (row["accuracy"]["validation"] for row in record["joint"])
    assert equal == single_run(folder, "merge=mtl")
    assert weighted == single_run(folder, "merge=mtl", "merge.weights=[3,1]")


def test_the_agreement_compares_the_same_weights(record):
    said = record["summary"]["validation"]["average"]["agreement"]
    read = PreviewRecord.lift(record)
    rows = read.points["average"]
    expected = agreement(accuracies([rows[2], rows[3]], "validation"), accuracies(read.joint, "validation"))
    assert said["points"] == 2 and said["difference"] == list(expected.difference)


def test_a_finished_preview_is_shown_again_without_work(command, record, monkeypatch):
    monkeypatch.setattr("byom.pipeline.preview.execute", lambda *_: pytest.fail("ran again"))
    status, shown = command(*OPTIONS)
    assert status == 0 and read(shown) == record


@pytest.mark.slow
def test_a_finished_preview_says_the_same_again(command):
    options = ("steps=1", "joint=0", "methods=[hessian_weighted,average]", "examples=6", "evaluate=both")
    fresh, again = command(*options)[1].out, command(*options)[1].out
    assert "accuracy in % on test data, weights chosen on validation data" in fresh
    assert again == fresh


def interrupted_after(scored, monkeypatch):
    count, score = [0], scorer.Scorer._score

    def once_more(self, job, bar):
        if count[0] == scored:
            raise KeyboardInterrupt
        count[0] += 1
        return score(self, job, bar)

    monkeypatch.setattr("byom.pipeline.scorer.Scorer._score", once_more)
    return count


@pytest.mark.slow
def test_an_interrupted_preview_goes_on_where_it_was(command, folder, record, monkeypatch):
    options = ("steps=8", "joint=0", "methods=[average,hessian_weighted]")
    interrupted_after(3, monkeypatch)
    status, shown = command(*options)
    assert status == 130 and "run the same command to go on" in shown.err
    (failed,) = files(folder, "*.failed.json")
    assert json.loads(failed.read_text())["error"].startswith("KeyboardInterrupt")
    monkeypatch.undo()
    count = interrupted_after(1000, monkeypatch)
    made = read(command(*options)[1])
    assert not files(folder, "*.failed.json")
    # of 18 points, 10 are of the record with half as many steps, and 3 were scored before the interruption
    assert count == [5]
    for method, rows in made["points"].items():
        assert [row["accuracy"] for row in rows[::2]] == [row["accuracy"] for row in record["points"][method]]


@pytest.mark.slow
def test_fewer_examples_are_the_first_ones_and_another_record(command, record):
    made = read(command("steps=1", "joint=0", "methods=average", "examples=5", "evaluate=both")[1])
    assert made["signature"] != record["signature"]
    assert made["examples"] == {split: dict.fromkeys(KEPT, 5) for split in ("validation", "test")}
    for row in made["points"]["average"]:
        assert all((5 * a) == pytest.approx(round(5 * a)) for split in row["accuracy"].values() for a in split)


def test_a_field_reaches_the_methods_that_have_it(command):
    made = read(command("steps=1", "joint=0", "methods=[average,hessian_weighted]", "merge.prior=1e30")[1])
    assert made["hyperparameters"] == {"average": {}, "hessian_weighted": {"posterior": "fisher", "prior": 1e30}}
    assert made["points"]["hessian_weighted"][0]["accuracy"] == made["pretrained"]["accuracy"]


def test_mistakes_are_sentences_before_any_work(command, monkeypatch):
    monkeypatch.setattr(preview, "execute", lambda *_: pytest.fail("work was started"))
    for options, said in (
        (("methods=[ties]", "steps=7"), "ties cannot be previewed"),
        (("tasks=[mnist]",), "two tasks or more"),
        (("steps=0",), "steps=0 is out of range"),
        (("byom=fft",), "knows no 'byom'"),
    ):
        status, shown = command(*options)
        assert status == 1 and said in shown.err


def test_cfg_prints_what_would_be_previewed(command, monkeypatch):
    monkeypatch.setattr(preview, "run", lambda *_: pytest.fail("ran"))
    status, shown = command("--cfg", "steps=7")
    assert status == 0 and "steps: 7\n" in shown.out
