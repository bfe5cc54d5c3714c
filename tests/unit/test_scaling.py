"""Subsets of a suite become one table: means and spreads over subsets, by number of tasks."""

import copy
import json

import numpy as np
import pytest

from byom.report.figures.scaling import accuracy_by_tasks
from byom.report.report import read_runs
from byom.report.scaling import display, generate, summarised
from tests.unit.synthetic_runs import TASKS, records

SUBSETS = {"vision8_offline-2-0": TASKS[:2], "vision8_offline-2-1": TASKS[2:4], "vision8_offline-4-0": TASKS[:4]}


@pytest.fixture
def every(tmp_path):
    for suite, tasks in SUBSETS.items():
        folder = tmp_path / "runs" / suite / "vit_small_dinov2"
        folder.mkdir(parents=True)
        for record in records(seeds=(0,), densities=(0.1,)):
            cut = copy.deepcopy(record)
            cut["choices"]["suite"] = suite
            cut["scores"] = {s: {t: rows[t] for t in tasks} for s, rows in cut["scores"].items()}
            own = [cut["single_task"]["test"][t] for t in tasks]
            got = [cut["scores"]["test"][t]["accuracy"] for t in tasks]
            cut["summary"]["test"] = {"absolute": np.mean(got), "normalised": np.mean(np.array(got) / own)}
            (folder / f"x--{cut['signature']}.json").write_text(json.dumps(cut))
    return tmp_path, [read_runs(tmp_path, suite, "vit_small_dinov2") for suite in SUBSETS]


def test_means_and_spreads_are_over_subsets_of_a_size(every):
    frame = summarised(every[1])
    row = frame[(frame["method"] == "TIES") & (frame["tasks"] == 2)].iloc[0]
    both = [
        next(r for r in runs.done if (r.choices.merge, r.choices.byom) == ("ties", "none")) for runs in every[1][:2]
    ]
    values = [r.summary["test"].normalised for r in both]
    assert row["normalised"] == pytest.approx(np.mean(values))
    assert row["normalised_std"] == pytest.approx(np.std(values, ddof=1))
    assert row["subsets"] == 2
    assert set(frame["tasks"]) == {2, 4}


def test_the_table_has_a_column_a_size_and_no_spread_of_one_subset(every):
    shown = display(summarised(every[1]))
    assert list(shown.columns) == ["Method", "m %", "2 tasks", "4 tasks"]
    assert shown["2 tasks"].str.contains("±").all() and not shown["4 tasks"].str.contains("±").any()


def test_files_and_figure(every):
    text, files = generate(every[0], "vit_small_dinov2", list(SUBSETS), "vision8_offline")
    assert {f.suffix for f in files} == {".md", ".csv", ".tex", ".png", ".pdf"}
    assert "2 of 2 tasks, 1 of 4 tasks" in files[0].read_text() and "TIES" in text
    figure = accuracy_by_tasks(summarised(every[1]))
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(names) == len(set(names)) == len(display(summarised(every[1])))
