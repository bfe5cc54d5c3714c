"""Records of previews are read with their types, and written as they were read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byom.errors import ByomError
from byom.report.preview import text
from byom.storage.atomic import write_json
from byom.storage.preview import NEEDED, PreviewRecord, Summary, Weighting
from tests.unit.synthetic_previews import values

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "results" / "previews").rglob("*.json"))


@pytest.fixture(params=["committed", "two", "eight, no joint"])
def file(request, tmp_path):
    if request.param == "committed":
        assert FILES
        return FILES[0]
    made = values(2, splits=("validation", "test")) if request.param == "two" else values(8, joint=0)
    return write_json(tmp_path / "x.json", made)


def test_a_record_is_read_with_all_that_it_holds(file):
    record, held = PreviewRecord.read(file), json.loads(file.read_text())
    assert {name: getattr(record, name) for name in held["choices"]} == held["choices"]
    assert (record.tasks, record.titles, record.path) == (tuple(held["tasks"]), held["titles"], file)
    for row, stored in zip(record.joint, held["joint"], strict=True):
        assert row.weights == tuple(stored["weights"]) and row.seconds.make == stored["seconds"]["make"]
        assert {split: list(found) for split, found in row.accuracy.items()} == stored["accuracy"]
    for split, said in held["summary"].items():
        assert record.single_task(split).tolist() == [
            row["accuracy"][split][n] for n, row in enumerate(held["experts"])
        ]
        for name, one in said.items():
            assert record.best(name, split) == record.points[name][one["best"]]
            agreement = record.summary[split][name].agreement
            assert (agreement and agreement.mean_difference) == (
                one["agreement"] and one["agreement"]["mean_difference"]
            )


def test_what_is_read_is_written_as_the_same_bytes(file, tmp_path):
    held = json.loads(file.read_text())
    for name in ("joint", "experts"):
        held[name] = [Weighting.lift(row).to_json() for row in held[name]]
    held["pretrained"] = Weighting.lift(held["pretrained"]).to_json()
    held["points"] = {name: [Weighting.lift(row).to_json() for row in rows] for name, rows in held["points"].items()}
    held["summary"] = {
        split: {name: Summary.lift(row).to_json() for name, row in said.items()}
        for split, said in held["summary"].items()
    }
    assert write_json(tmp_path / "again.json", held).read_bytes() == file.read_bytes()


def test_weights_and_what_lies_in_a_weighting_cannot_change():
    record = PreviewRecord.lift(values(3))
    row = record.points["average"][0]
    assert isinstance(row.weights, tuple) and isinstance(row.accuracy["validation"], tuple)
    agreement = record.chosen["average"].agreement
    assert agreement and isinstance(agreement.difference, tuple) and isinstance(agreement.rank, tuple)


def test_a_preview_that_is_read_again_says_what_a_fresh_one_says(tmp_path):
    made = values(2, methods=("mixture", "average"), splits=("validation", "test"))
    read = PreviewRecord.read(write_json(tmp_path / "x.json", made))
    assert list(read.summary) == ["test", "validation"]  # files are sorted
    assert (read.choosing, read.shown) == ("validation", "test")
    assert list(read.points) == list(read.titles) == list(read.chosen) == ["mixture", "average"]
    assert text(read) == text(PreviewRecord.lift(made))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_weights_are_chosen_on_the_split_that_is_shown_where_there_is_one(split):
    record = PreviewRecord.lift(values(2, splits=(split,)))
    assert record.choosing == record.shown == split


@pytest.mark.parametrize("name", NEEDED)
def test_a_record_without_a_field_is_refused_by_its_file(tmp_path, name):
    held = values(2)
    del held[name]
    with pytest.raises(ByomError, match=rf"x\.json lacks {name}; delete it and preview again"):
        PreviewRecord.read(write_json(tmp_path / "x.json", held))


@pytest.mark.parametrize(("written", "said"), [("{", "is not JSON .* preview again"), ('{"format": 9}', "format 9")])
def test_a_damaged_record_is_named(tmp_path, written, said):
    file = tmp_path / "x.json"
    file.write_text(written)
    with pytest.raises(ByomError, match=rf"x\.json .*{said}"):
        PreviewRecord.read(file)
