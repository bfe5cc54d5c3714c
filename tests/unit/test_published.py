"""Published numbers are sourced and consistent, and stand beside ours without pretending to be comparable."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from byom.cli import config
from byom.cli.table import published_tables
from byom.errors import OptionError
from byom.report.figures.published import ours_against_published
from byom.report.figures.style import save
from byom.report.published import CONFIDENCE, UNCHECKED, Line, Published, pairs
from byom.report.published_table import as_latex, as_markdown, generate
from byom.report.report import Runs, Tables, read_runs
from tests.unit.synthetic_runs import TASKS, records

NAMES = config.options("published")


def named(name):
    return published_tables([name])[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_table_names_its_source_and_agrees_with_itself(name):
    table = named(name)
    assert table.source and table.url.startswith("https://") and table.confidence in CONFIDENCE
    assert table.dagger == name.startswith("byom_")
    assert len({line.label for line in table.rows}) == len(table.rows)


@pytest.mark.parametrize("name", NAMES)
def test_matched_rows_name_options_and_fields_that_exist(name):
    for line in named(name).rows:
        match = line.match or {"byom": "none"}
        assert "byom" in match, f"'{line.label}' would match a row with anything put back"
        for group in {"merge", "byom"} & set(match):
            stated = yaml.safe_load((config.folder() / group / f"{match[group]}.yaml").read_text())
            asked = {key.split(".")[1] for key in match if key.startswith(f"{group}.")}
            assert asked <= {*stated, "then"}, line.label


def table(**changes):
    line = Line("TIES", {"merge": "ties", "byom": "none"}, (90.0,) * 8, 90.0)
    given = {
        "name": "x", "title": "two tasks", "source": "a paper", "url": "https://x", "confidence": "exact",
        "family": "trained", "what": "accuracy", "measure": "absolute", "tasks": TASKS, "note": "", "dagger": False,
        "rows": (line,),
    }  # fmt: skip
    return Published(**{**given, **changes})


@pytest.mark.parametrize(("values", "mean"), [((90.0, 80.0), 85.07), ((90.25, 80.25), 85.27)])
def test_a_row_that_contradicts_itself_is_refused(values, mean):
    two = {"tasks": ("mnist", "svhn")}
    with pytest.raises(OptionError, match=f"values of 'TIES' average 85.[02][05]0, not {mean}"):
        table(rows=(Line("TIES", None, values, mean),), **two)
    with pytest.raises(OptionError, match="'TIES' has 1 values"):
        table(rows=(Line("TIES", None, (90.0,), 90.0),), **two)
    with pytest.raises(OptionError, match="values of measure 'normalised'"):
        table(measure="normalised")
    table(rows=(Line("TIES", None, values, mean, odd="the source prints it so"),), **two)


def test_as_many_decimals_are_printed_as_the_source_has():
    coarse, fine = Line("a", None, (75.0, 80.1), 77.5), Line("b", None, (75.2, 80.15), 77.7)
    assert (coarse.decimals, fine.decimals) == ((1, 1), (2, 2))


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
    text = as_markdown(runs, [(table(), found := pairs(Tables(runs), table()))])
    ours = [100 * r.test["mnist"].value for r in runs.done if _is(r, "ties", "none")]
    assert found[0].values["mnist"] == pytest.approx(np.mean(ours))
    cells = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in cells] == ["ours", "published", "difference"]
    for column in (2, -2):
        one, other, gap = (float(row[column]) for row in cells)
        assert gap == pytest.approx(one - other, abs=0.11)


def _is(record, merge, variant):
    return (record.choices.merge, record.choices.byom) == (merge, variant)


def test_densities_match_within_their_digits(runs):
    line = Line("BYOM-FFT (10%)", {"merge": "ties", "byom": "fft", "byom.density": 0.10004}, (), 85.0)
    far = Line("BYOM-FFT (11%)", {"merge": "ties", "byom": "fft", "byom.density": 0.11}, (), 85.0)
    near, other = pairs(Tables(runs), table(rows=(line, far)))
    assert near.row and near.row.density == 0.1 and other.row is None


def kinds(text):
    return [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")][2:]


def test_nothing_is_subtracted_from_other_checkpoints_and_daggers_explain_themselves(runs):
    other = table(family="hf-clip", confidence="unverified", dagger=True)
    text = as_markdown(runs, [(other, found := pairs(Tables(runs), other))])
    assert kinds(text) == ["ours", "published"] and np.isnan(found[0].gap)
    assert "family 'trained', the published numbers of 'hf-clip': other checkpoints" in text
    assert "TIES†" in text and f"† {UNCHECKED}" in text
    assert f"† {UNCHECKED}" in as_latex(runs, [(other, found)]).replace("\\", "")
    assert "other checkpoints" not in as_markdown(runs, [(table(), pairs(Tables(runs), table()))])


def test_of_other_tasks_only_rows_that_merge_nothing_are_subtracted(runs):
    lines = tuple(
        Line(merge, {"merge": merge, "byom": byom}, (90.0, 80.0), 85.0)
        for merge, byom in (("ties", "none"), ("pretrained", "none"), ("pretrained", "single_task"))
    )
    fewer = table(tasks=TASKS[:2], rows=lines)
    text = as_markdown(runs, [(fewer, pairs(Tables(runs), fewer))])
    assert kinds(text) == ["ours", "published", *["ours", "published", "difference"] * 2]
    assert "We merge 8 tasks, the source 2" in text


def test_averages_are_compared_with_what_the_source_averaged(runs):
    line = Line("TIES", {"merge": "ties", "byom": "none"}, (), 85.0)
    ours = [r.summary["test"] for r in runs.done if _is(r, "ties", "none")]
    for measure in ("absolute", "normalised"):
        (pair,) = pairs(Tables(runs), table(rows=(line,), measure=measure))
        assert pair.mean == pytest.approx(100 * np.mean([getattr(one, measure) for one in ours]))


def test_a_note_of_the_runs_stands_on_top(runs):
    marked = tuple(replace(record, note="NOT A RESULT: tiny data") for record in runs.done)
    text = as_markdown(Runs(runs.suite, runs.backbone, marked, ()), [(table(), [])])
    assert text.splitlines()[2] == "**NOT A RESULT: tiny data**"


def test_files_hold_every_published_row(runs, tmp_path):
    tables = [table(), table(title="again", dagger=False)]
    text, files = generate(tmp_path, "vision8_offline", "vit_small_dinov2", tables)
    assert {file.suffix for file in files} == {".md", ".csv", ".tex", ".png", ".pdf"}
    assert all(file.stat().st_size for file in files) and "two tasks" in text


def test_the_figure_draws_what_both_have(runs, tmp_path):
    found = pairs(Tables(runs), table())
    figure = ours_against_published([(table(), found)])
    drawn = {line.get_label(): line.get_xdata()[0] for line in figure.axes[0].get_lines()}
    assert drawn == {"published": 90.0, "ours": pytest.approx(found[0].mean)}
    assert save(figure, tmp_path / "figure")[0].stat().st_size > 3000


def test_rows_of_ours_beside_one_published_row_share_its_place(runs):
    line = Line("BYOM-FFT", {"byom": "fft", "byom.density": 0.1}, None, 90.0)
    given = table(rows=(line, *table().rows), dagger=True, confidence="unverified")
    found = pairs(Tables(runs), given)
    several = [pair.mean for pair in found if pair.line is line]
    axes = ours_against_published([(given, found)]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["BYOM-FFT†", "TIES†"]
    ours = next(line for line in axes.get_lines() if line.get_label() == "ours")
    at_first = [x for x, y in zip(ours.get_xdata(), ours.get_ydata(), strict=True) if y == 0]
    assert sorted(at_first) == pytest.approx(sorted(several)) and len(several) > 1


@pytest.mark.parametrize("name", config.options("experiment"))
def test_every_experiment_states_its_command_and_known_tables(name):
    path = config.folder() / "experiment" / f"{name}.yaml"
    text = path.read_text()
    assert re.match(rf"# byom table {name}\b", text), "the first comment is the command"
    for published in yaml.safe_load(text).get("published", []):
        assert set(named(published).tasks)


def test_the_pages_are_what_the_configs_say():
    from experiments import catalogue

    page = catalogue.PAGE.read_text()
    assert catalogue.fill(page) == page, "run python -m experiments.catalogue"
    assert catalogue.SOURCES.read_text() == catalogue.sources()


JOINT = {"sun397": 72.85, "stanford_cars": 74.44, "resisc45": 93.90, "eurosat": 98.22, "svhn": 95.80, "gtsrb": 98.91,
         "mnist": 99.45, "dtd": 77.87}  # fmt: skip
JOINT_LARGE = {"sun397": 80.84, "stanford_cars": 90.64, "resisc45": 96.32, "eurosat": 99.19, "svhn": 97.57,
               "gtsrb": 99.07, "mnist": 99.63, "dtd": 84.36}  # fmt: skip


@pytest.mark.parametrize("name", ["ta_vit_b32", "byom_vit_b32", "ta_vit_l14", "byom_vit_l14"])
def test_joint_training_is_what_its_first_source_says(name):
    given = named(name)
    (line,) = (line for line in given.rows if line.match == {"merge": "mtl", "byom": "none"})
    assert dict(zip(given.tasks, line.values, strict=True)) == (JOINT if name.endswith("b32") else JOINT_LARGE)
    assert not line.odd and "task_vectors/issues/5" in line.confirmed
    assert given.name_of(line) == line.label and (given.name_of(given.rows[0]) != line.label)


def test_a_confirmed_row_has_no_dagger_and_says_who_confirms_it(runs):
    sure = Line("MTL", None, (90.0,) * 8, 90.0, confirmed="another source")
    given = table(dagger=True, confidence="unverified", rows=(*table().rows, sure))
    text = as_markdown(runs, [(given, found := pairs(Tables(runs), given))])
    assert "TIES†" in text and "MTL†" not in text and "MTL is confirmed: another source." in text
    labels = [x.get_text() for x in ours_against_published([(given, found)]).axes[0].get_yticklabels()]
    assert sorted(labels) == ["MTL", "TIES†"]


def test_nothing_is_subtracted_from_the_first_set_of_tall_checkpoints(runs):
    experts = [
        yaml.safe_load((config.folder() / "experts" / f"tall_{m}.yaml").read_text()) for m in ("b16", "b32", "l14")
    ]
    given = [named(name) for name in NAMES if "tall_" in name]
    assert {e["family"] for e in experts} == {"tall-repaired"} and {t.family for t in given} == {"tall-original"}
    assert all(e["file"].startswith("single_task/") for e in experts) and len(given) == 5
    today = Runs(runs.suite, runs.backbone, tuple(replace(r, family="tall-repaired") for r in runs.done), ())
    text = as_markdown(today, [(t, pairs(Tables(today), t)) for t in given[:1]])
    assert "family 'tall-repaired', the published numbers of 'tall-original': other checkpoints" in text
    assert "DTD's test images had been trained on" in text and "difference" not in kinds(text)
