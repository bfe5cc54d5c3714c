"""Published numbers are sourced and consistent, and stand beside ours without pretending to be comparable."""

import json
import re

import numpy as np
import pytest
import yaml

from byom import config
from byom.errors import OptionError
from byom.figure_style import save
from byom.published import CONFIDENCE, UNCHECKED, Line, Published, read
from byom.published_figure import ours_against_published
from byom.published_table import as_markdown, generate, pairs
from byom.report import read_runs
from tests.unit.synthetic_runs import TASKS, records

NAMES = config.options("published")


@pytest.mark.parametrize("name", NAMES)
def test_every_table_names_its_source_and_agrees_with_itself(name):
    table = read(name)
    assert table.source and table.url.startswith("https://") and table.confidence in CONFIDENCE
    assert table.dagger == name.startswith("byom_")
    assert len({line.label for line in table.rows}) == len(table.rows)


@pytest.mark.parametrize("name", NAMES)
def test_matched_rows_name_options_that_exist(name):
    for line in read(name).rows:
        for group in {"merge", "byom"} & set(line.match or {}):
            assert line.match[group] in config.options(group), line.label


def table(**changes):
    line = Line("TIES", {"merge": "ties", "byom": "none"}, (90.0, 80.0), 85.0)
    given = {
        "name": "x", "title": "two tasks", "source": "a paper", "url": "https://x", "confidence": "exact",
        "family": "trained",
        "what": "accuracy", "tasks": ("mnist", "svhn"), "note": "", "dagger": False, "rows": (line,),
    }  # fmt: skip
    return Published(**{**given, **changes})


def test_a_row_that_contradicts_itself_is_refused():
    odd = Line("TIES", None, (90.0, 80.0), 87.0)
    with pytest.raises(OptionError, match="values of 'TIES' average 85.000, not 87"):
        table(rows=(odd,))
    with pytest.raises(OptionError, match="'TIES' has 1 values"):
        table(rows=(Line("TIES", None, (90.0,), 90.0),))
    table(rows=(Line("TIES", None, (90.0, 80.0), 87.0, odd="the source prints it so"),))


def test_unverified_rows_cannot_lose_their_dagger():
    with pytest.raises(OptionError, match="dagger False"):
        table(confidence="unverified")


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs" / "vision8_offline" / "vit_small_dinov2"
    folder.mkdir(parents=True)
    for record in records():
        name = f"{record['choices']['merge']}+{record['choices']['byom']}--{record['signature']}.json"
        (folder / name).write_text(json.dumps(record))
    return read_runs(tmp_path, "vision8_offline", "vit_small_dinov2")


def test_ours_published_and_their_difference_stand_together(runs):
    text = as_markdown(runs, [(table(), found := pairs(runs, table()))])
    ours = [100 * r["scores"]["test"]["mnist"]["accuracy"] for r in runs.done if _is(r, "ties", "none")]
    assert found[0].values["mnist"] == pytest.approx(np.mean(ours))
    cells = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in cells] == ["ours", "published", "difference"]
    mnist = [float(row[2]) for row in cells]
    assert mnist[2] == pytest.approx(mnist[0] - mnist[1], abs=0.11)


def _is(record, merge, variant):
    return record["choices"]["merge"] == merge and record["choices"]["byom"] == variant


def test_densities_match_within_their_digits(runs):
    line = Line("BYOM-FFT (10%)", {"merge": "ties", "byom": "fft", "byom.density": 0.10004}, (90.0, 80.0), 85.0)
    far = Line("BYOM-FFT (11%)", {"merge": "ties", "byom": "fft", "byom.density": 0.11}, (90.0, 80.0), 85.0)
    near, other = pairs(runs, table(rows=(line, far)))
    assert near.row and near.row.density == 0.1 and other.row is None


def test_other_checkpoints_are_said_to_be_others_and_daggers_explain_themselves(runs):
    other = table(family="hf-clip", confidence="unverified", dagger=True)
    text = as_markdown(runs, [(other, pairs(runs, other))])
    assert "family 'trained', the published numbers of 'hf-clip': other checkpoints" in text
    assert "TIES†" in text and f"† {UNCHECKED}" in text
    assert "other checkpoints" not in as_markdown(runs, [(table(), pairs(runs, table()))])


def test_a_note_of_the_runs_stands_on_top(runs):
    for record in runs.done:
        record["note"] = "NOT A RESULT: tiny data"
    assert as_markdown(runs, [(table(), [])]).splitlines()[2] == "**NOT A RESULT: tiny data**"


def test_files_hold_every_published_row(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("byom.published_table.every", lambda names: [table(), table(title="again", dagger=False)])
    text, files = generate(tmp_path, "vision8_offline", "vit_small_dinov2", ["x", "x"])
    assert {file.suffix for file in files} == {".md", ".csv", ".tex", ".png", ".pdf"}
    assert all(file.stat().st_size for file in files) and "two tasks" in text


def test_the_figure_draws_what_both_have(runs, tmp_path):
    found = pairs(runs, table())
    figure = ours_against_published([(table(), found)])
    drawn = {line.get_label(): line.get_xdata()[0] for line in figure.axes[0].get_lines()}
    assert drawn == {"published": 85.0, "ours": pytest.approx(found[0].mean)}
    assert save(figure, tmp_path / "figure")[0].stat().st_size > 5000


@pytest.mark.parametrize("name", config.options("experiment"))
def test_every_experiment_states_its_command_and_known_tables(name):
    path = config.folder() / "experiment" / f"{name}.yaml"
    text = path.read_text()
    assert re.match(rf"# byom table {name}\b", text), "the first comment is the command"
    for published in yaml.safe_load(text).get("published", []):
        assert set(read(published).tasks)
    assert len(TASKS) == 8
