"""The pipeline on real data: from the command to the record, and what its records must satisfy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byom.__main__ import main
from byom.cli import config
from byom.data.source.base import DataError
from byom.pipeline.cell import Cell
from byom.pipeline.labs import Labs
from byom.pipeline.run import metric, run
from tests.e2e.tiny import KEPT, overrides
from tests.golden.make import scores

pytestmark = pytest.mark.data
GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_vision.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def labs():
    with Labs() as keeper:
        yield keeper


@pytest.fixture(scope="module")
def cell(folder, labs):
    def make(*options):
        settings = config.settings([*overrides(folder), *options])
        return run(settings, labs)

    try:
        make("merge=pretrained", "byom=none")
    except DataError as error:
        pytest.skip(str(error))
    return make


def hits(record):
    return {task: row["hits"] for task, row in record["scores"]["test"].items()}


def test_density_one_is_the_single_task_model(cell):
    single = cell("merge=pretrained", "byom=single_task")
    assert hits(cell("merge=ties", "byom=fft", "byom.density=1.0")) == hits(single)
    assert single["summary"]["test"]["normalised"] == 1.0


def test_density_zero_is_the_reference(cell):
    assert hits(cell("merge=average", "byom=fft", "byom.density=0.0")) == hits(cell("merge=average", "byom=none"))
    assert hits(cell("byom=post_pruning", "byom.density=0.0")) == hits(cell("merge=pretrained", "byom=none"))


def test_fft_on_the_pretrained_model_is_post_pruning(cell):
    fft = cell("merge=pretrained", "byom=fft", "byom.density=0.1")
    pruned = cell("byom=post_pruning", "byom.density=0.1")
    assert hits(fft) == hits(pruned)
    assert fft["norms"] == pruned["norms"]


def test_post_pruning_ignores_the_merge_method_and_is_one_record(cell):
    assert (
        cell("merge=ties", "byom=post_pruning")["signature"] == cell("merge=average", "byom=post_pruning")["signature"]
    )


def test_task_arithmetic_at_one_over_t_predicts_like_the_average(cell):
    assert hits(cell("merge=task_arithmetic", "merge.scale=0.5", "byom=none")) == hits(
        cell("merge=average", "byom=none")
    )


def test_stored_parameters_follow_the_formula(cell):
    record = cell("merge=average", "byom=fft", "byom.density=0.1")
    storage, d = record["storage"], record["storage"]["model_parameters"]
    assert storage["parameters"] == d + len(KEPT) * int(0.1 * d)
    assert storage["bytes"] > 4 * storage["parameters"]
    assert storage["density"]["of_all"] == pytest.approx(0.1, abs=1e-5)


def test_norms_split_into_kept_and_dropped(cell):
    for row in cell("merge=average", "byom=fft", "byom.density=0.1")["norms"].values():
        assert row["kept"] ** 2 + row["dropped"] ** 2 == pytest.approx(row["to_merged"] ** 2, rel=1e-4)


def test_tuning_keeps_the_best_setting_on_validation(cell):
    record = cell("merge=task_arithmetic", "tune=validation", "byom=none")
    trail = record["tuning"]["trail"]
    best = max(row["validation"] for row in trail)
    assert record["tuning"]["searched"] == len(trail) == 10
    first = next(row for row in trail if row["validation"] == best)
    assert record["hyperparameters"]["merge"]["scale"] == first["scale"]
    assert record["summary"]["validation"]["normalised"] == pytest.approx(best)


def test_a_finished_cell_is_not_run_again(cell, folder, monkeypatch):
    record = cell("merge=average", "byom=none")
    monkeypatch.setattr("byom.pipeline.cell.execute", lambda _: pytest.fail("ran again"))
    assert cell("merge=average", "byom=none") == record
    assert metric(record) == record["summary"]["validation"]["absolute"]


def test_a_failing_cell_is_marked_and_tried_again(cell, folder, monkeypatch):
    options = ("merge=average", "byom=fft", "byom.density=0.3")
    monkeypatch.setattr(Cell, "reference", property(lambda _: (_ for _ in ()).throw(RuntimeError("boom"))))
    with pytest.raises(RuntimeError, match="boom"):
        cell(*options)
    failed = list(folder.rglob("*.failed.json"))
    assert [json.loads(f.read_text())["error"] for f in failed] == ["RuntimeError: boom"]
    monkeypatch.undo()
    assert cell(*options)["status"] == "done"
    assert not list(folder.rglob("*.failed.json"))


def test_a_damaged_cached_expert_is_refused_by_name(tmp_path):
    def fresh(*options):
        with Labs() as labs:
            return run(config.settings([*overrides(tmp_path, own=True), "finetune.epochs=1", *options]), labs)

    fresh("merge=average", "byom=none")
    file = sorted((tmp_path / "cache" / "experts").glob("*/model.safetensors"))[0]
    original = file.read_bytes()
    file.write_bytes(original[:-5] + bytes([original[-5] ^ 1]) + original[-4:])
    with pytest.raises(Exception, match=r"does not match its checksum") as caught:
        fresh("merge=average", "byom=fft", "byom.density=0.77")
    assert str(file.parent) in str(caught.value)


def test_scores_are_the_golden_ones(cell):
    """Exact on one machine; another CPU's rounding may move single examples of 40, hence the tolerance of two."""
    found = scores(cell)
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, row in golden.items():
        assert found[name] == pytest.approx(row, abs=2 / 40 + 1e-9), name


def test_the_command_writes_a_record_and_reports_it(cell, folder, capsys):
    arguments = ["run", *overrides(folder), "merge=average", "byom=none"]
    assert main(arguments) == 0
    assert "average + none" in capsys.readouterr().out
    assert main(["report", f"results={folder}/results/scratch", "suite=vision8_offline"]) == 0
    shown = capsys.readouterr().out
    assert "Averaging" in shown
    assert all(Path(line).is_file() for line in shown.splitlines() if line.endswith((".md", ".csv", ".tex", ".png")))


def test_an_unwritable_results_folder_is_found_before_any_work(cell, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("byom.pipeline.cell.execute", lambda _: pytest.fail("work was started"))
    arguments = ["run", *overrides(folder), "merge=average", "byom=none", f"results={tmp_path}/file/scratch"]
    assert main(arguments) == 1
    assert "set results= to a writable folder" in capsys.readouterr().err
