"""Records of every shape that was ever written are read as one, and say where a number comes from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from byom.__main__ import main
from byom.cli import config
from byom.cli.rebuilt import _literal, rebuilt
from byom.cli.why import FURTHER
from byom.errors import ByomError
from byom.merge.base.needs import Needs
from byom.report.comparison import display_comparison
from byom.report.report import read_runs
from byom.storage.parts import RENAMED
from byom.storage.parts import Needs as Recorded
from byom.storage.record import Record
from tests.problems import slow
from tests.unit import synthetic_runs as synthetic

ROOT = Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / "results").rglob("runs/*/*/*.json") if "scratch" not in p.parts)
SHAPES = {}
for file in FILES:
    SHAPES.setdefault(tuple(sorted(json.loads(file.read_text()))), file)


def test_three_shapes_were_written_and_all_are_read():
    assert len(SHAPES) >= 3
    for file in FILES:
        record, values = Record.read(file), json.loads(file.read_text())
        assert record.path == file and record.signature in file.name
        assert record.mean == values["summary"]["test"]["absolute"]
        assert {task: score.value for task, score in record.test.items()} == {
            task: row["accuracy"] for task, row in values["scores"]["test"].items()
        }
        assert (record.cost is None) == ("cost" not in values)
        assert record.titles.merge and record.titles.byom
        assert record.choices.named == {g: RENAMED.get((g, name), name) for g, name in values["choices"].items()}


NEEDS = {
    "weights": {},
    "weights, unlabelled train inputs": {"inputs": ("train",)},
    "weights, test inputs": {"inputs": ("test",), "sees_test": True},
    "weights, test inputs, unlabelled train inputs": {"inputs": ("test", "train"), "sees_test": True},
    "weights, labelled train inputs": {"inputs": ("train",), "labels": True},
    "weights, unlabelled validation inputs": {"inputs": ("validation",)},
    "2 models a task, unlabelled train inputs": {"inputs": ("train",), "members": 2},
}


def test_needs_in_words_are_the_same_needs():
    every = [Record.read(file).needs for file in FILES]
    assert set(Counter(needs.words for needs in every)) == set(NEEDS)
    for needs in every:
        assert needs == Recorded(
            needs.words, **{"statistics": needs.statistics, "joint": needs.joint} | NEEDS[needs.words]
        )
    assert {s for needs in every for s in needs.statistics} >= {"fisher", "gram"}


def test_needs_are_stored_as_fields_and_read_back():
    given = Needs(frozenset({"gram"}), frozenset({"train", "test"}), labels=True, members=3)
    stored = json.loads(json.dumps(given.to_json()))
    assert {f.name for f in fields(Needs)} <= set(stored)
    read = Record.lift(synthetic.record("ties", "none", 0) | {"needs": stored}).needs
    assert read == Recorded(given.words, ("test", "train"), True, ("gram",), 3, False, True)


@pytest.mark.parametrize("group", ["merge", "byom", "router"])
def test_the_needs_of_every_option_are_told_by_their_words_as_well(group):
    for name in config.options(group):
        needs = config.option(group, name).needs
        values = synthetic.record("ties", "none", 0) | {"needs": {"words": needs.words, "sees_test": needs.sees_test}}
        read = Record.lift(values).needs
        assert (set(read.inputs), read.members) == (needs.inputs, needs.members), name
        assert read.labels == (needs.labels and needs.inputs != {"test"}), name


def test_errors_and_skipped_tasks_of_either_shape():
    one = synthetic.record("ties", "none", 0)
    one |= {"skipped_tasks": ["a", {"task": "b", "reason": "gone"}], "error": {"message": "out of memory"}}
    record = Record.lift(one)
    assert record.skipped_tasks == ("a", "b (gone)") and record.error == "out of memory"


GRIDS = [file for file in FILES if file.name.startswith("consensus+none")]  # searched over a grid of their own
SAMPLE = [
    file
    for file in dict.fromkeys([*SHAPES.values(), *GRIDS, *FILES[:: len(FILES) // 15]])
    if not Record.read(file).overrides
]


@pytest.mark.data
@pytest.mark.parametrize("file", SAMPLE, ids=lambda file: file.stem)
def test_a_rebuilt_command_is_the_records_own_cell(file):
    record = Record.read(file)
    assert not record.overrides
    assert config.settings(rebuilt(record, file.parents[3])).signature() == record.signature


def test_a_record_that_says_its_overrides_is_run_by_them():
    one = synthetic.record("ties", "fft", 0, 0.1) | {"overrides": ["merge=ties", "results=elsewhere", "seed=0"]}
    assert rebuilt(Record.lift(one), Path("here")) == ["merge=ties", "seed=0", "results=here"]


@pytest.mark.parametrize(
    "value",
    [True, None, 3, 0.25, "plain", "*embed*", "it's", "a\\b", "a\\'b\\", "null", [1, "b c"], {"k": [0.1, 2]}, [], ""],
)
def test_values_survive_the_command_line(value):
    (override,) = config.parsed([f"key={_literal(value)}"])
    assert override.value() == value


@pytest.fixture
def results(tmp_path):
    synthetic.write(tmp_path, synthetic.records())
    return tmp_path


def why(*arguments):
    return main(["why", *map(str, arguments)])


@pytest.mark.parametrize("row", ["byom-fft on ties, 10%", *slow("BYOM-FFT on TIES, 10 %")])
@pytest.mark.parametrize(
    ("column", "head"),
    [("mean", "Mean"), ("Normalised mean", "Normalised mean"), ("svhn", "svhn"), ("stored", "Bytes (MB)")],
)
def test_why_prints_value_records_choices_and_commands(results, capsys, row, column, head):
    assert why("vision8_offline", row, column, f"results={results}") == 0
    text = capsys.readouterr().out
    tables = synthetic.tables(synthetic.records())
    place = next(n for n, one in enumerate(tables.rows) if (one.label, one.density) == ("BYOM-FFT on TIES", 0.1))
    cell = tables.shown[head].iloc[place]
    assert text.startswith(f"vision8_offline, vit_small_dinov2: BYOM-FFT on TIES, 10 %, {head}: {cell} (over 3 seeds)")
    for record in tables.rows[place].records:
        assert f"{record.signature}.json" in text
        assert f"chosen on validation data: scale={record.tuning.chosen['scale']}, of 10 settings" in text
        assert f"seed={record.choices.seed} results={results}" in text
    assert text.count("byom run suite=vision8_offline backbone=vit_small_dinov2 finetune=full merge=ties byom=fft") == 3


@pytest.mark.parametrize("column", ["difference", "Dropped ratio", "95 % interval"])
def test_why_explains_the_comparison_with_the_records_of_both_rows(results, capsys, column):
    assert why("vision8_offline", "BYOM-FFT on TIES, 10 %", column, f"results={results}") == 0
    text = capsys.readouterr().out
    tables = synthetic.tables(synthetic.records())
    shown, head = display_comparison(tables.comparison), FURTHER.get(column, FURTHER["residual"]).head
    head = column if column in shown else head
    place = next(n for n, row in enumerate(shown.itertuples()) if (row.Method, row[2]) == ("BYOM-FFT on TIES", "10"))
    assert f", {head}: {shown[head].iloc[place]} (over 3 seeds)" in text
    rows = [row for row in tables.rows if row.density == 0.1 and row.name in ("BYOM-FFT on TIES", "Post-Pruning")]
    assert sorted(row.name for row in rows) == ["BYOM-FFT on TIES", "Post-Pruning"]
    assert all(f"{record.signature}.json" in text for row in rows for record in row.records)
    assert "against Post-Pruning, 10 %" in text and text.count("byom run") == 6
    if column == "difference":
        means = [{record.choices.seed: record.mean for record in row.records} for row in rows]
        fft, pruned = means if rows[0].variant == "fft" else means[::-1]
        assert all(f"seed {seed}: {100 * (fft[seed] - pruned[seed]):+.1f}" in text for seed in fft)


def test_why_explains_costs(capsys):
    results = ROOT / "results" / "methods"
    assert why("vision8_offline", "PCB-Merging", "merge seconds", f"results={results}") == 1
    assert "did you mean" in capsys.readouterr().err
    assert why("vision8_offline", "PCB-Merging", "Merge s", f"results={results}") == 0
    text = capsys.readouterr().out
    runs = read_runs(results, "vision8_offline", "vit_small_dinov2")
    taken = [r.cost.merge.seconds for r in runs.done if r.choices.merge == "pcb" and r.choices.byom == "none"]
    assert taken and all(f": {seconds:.1f}\n" in text for seconds in taken)
    assert why("vision8_offline", "EMR-Merging, kNN-routed", "price", f"results={results}") == 0
    text = capsys.readouterr().out
    first = [r for r in runs.done if r.choices.seed == 0]  # routers have no other seed
    means = [r.mean for r in first if r.choices.byom == "emr" and r.choices.router != "mlp"]
    assert len(means) == 2 and f"Price: {100 * (max(means) - min(means)):.1f} (over" in text
    assert "against EMR-Merging\n" in text


@pytest.mark.data
def test_why_of_a_record_names_its_row_and_a_rebuilt_cell_that_is_another(results, capsys):
    file = sorted(results.rglob("ties+fft--*.json"))[0]
    assert why(file) == 0
    text = capsys.readouterr().out
    assert "BYOM-FFT on TIES" in text and str(file) in text and text.count("byom run") == 1
    assert "another cell than the record's today" in text  # the signatures of made-up records are made up


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("vision8_offline", "TEIS", "mean"), "has no row 'TEIS'; did you mean 'TIES'"),
        (("vision8_offline", "TIES", "men"), "has no column 'men'; did you mean 'mean'"),
        (("vision8_ofline", "TIES", "mean"), "did you mean 'vision8_offline'"),
        (("vision8_offline", "Post-Pruning", "mean"), "there are 4 rows 'Post-Pruning', of 1 %, 5 %, 10 %, 20 %"),
        (("vision8_offline", "TIES", "mean", "backbone=vit"), "has no record of backbone=vit"),
        (("vision8_offline",), "which number?"),
        (("vision8_offline", "TIES", "difference"), "only BYOM-FFT is compared"),
        (("vision8_offline", "TIES", "Merge s"), "results=results/methods"),
    ],
)
def test_a_miss_names_the_nearest(results, capsys, arguments, said):
    assert why(*arguments, f"results={results}") == 1
    assert said in capsys.readouterr().err


def test_files_that_are_no_records_of_runs_are_refused(results, capsys):
    assert why(results / "runs" / "vision8_offline" / "vit_small_dinov2" / "ties.json") == 1
    assert "there is no record" in capsys.readouterr().err
    other = results / "export.json"
    other.write_text("{}")
    assert why(other) == 1
    assert "is not the record of a run" in capsys.readouterr().err


def test_a_failed_record_says_why_and_how_to_run_it_again(results, capsys):
    one = synthetic.record("ties", "fft", 7, 0.1)
    values = {k: one[k] for k in ("format", "choices", "signature", "config")} | {
        "status": "failed",
        "error": "no disk",
    }
    (file,) = synthetic.write(results, [values])
    assert why(file) == 0
    text = capsys.readouterr().out
    assert "failed, no disk" in text and "byom run suite=vision8_offline" in text


def test_a_damaged_record_is_named(tmp_path):
    file = tmp_path / "x.json"
    for text, said in (
        ("{", "is not JSON"),
        ('{"format": 9}', "format 9"),
        ('{"format": 1, "status": "done"}', "lacks"),
    ):
        file.write_text(text)
        with pytest.raises(ByomError, match=rf"x\.json .*{said}"):
            Record.read(file)
