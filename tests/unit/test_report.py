from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from byom.cli import config
from byom.errors import ByomError, OptionError
from byom.report import render
from byom.report.comparable import check_comparable
from byom.report.frame import best, display, task_names
from byom.report.notes import header
from byom.report.report import as_markdown, as_text, generate, read_runs
from tests.unit import synthetic_runs as synthetic

SUITE, BACKBONE = "vision8_offline", "vit_small_dinov2"


def numbers(made: list[dict]) -> pd.DataFrame:
    return synthetic.tables(made).frame


def table(made: list[dict]) -> pd.DataFrame:
    return synthetic.tables(made).shown


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return synthetic.records()


@pytest.fixture(scope="module")
def frame(records) -> pd.DataFrame:
    return numbers(records)


def failed(one: dict, **changes) -> dict:
    kept = {name: one[name] for name in ("format", "choices", "hyperparameters", "signature")}
    return kept | {"status": "failed", "error": "ran out of memory\nTraceback"} | changes


def test_rows_stand_in_the_documented_order(frame):
    names = [(row.method, row.density) for row in frame.itertuples()]
    merges = ["Averaging", "Task Arithmetic", "TIES"]
    expected = [("Pre-trained", None), ("Single-task", None), *((merge, None) for merge in merges)]
    expected += [("Post-Pruning", m) for m in synthetic.DENSITIES]
    expected += [(f"BYOM-FFT on {merge}", m) for merge in merges for m in synthetic.DENSITIES]
    assert [(name, None if np.isnan(m) else m) for name, m in names] == expected


def test_curves_of_one_method_stay_together():
    made = [synthetic.record("ties", "fft", 0, m) for m in (0.01, 0.1) for _ in range(2)]
    for one in made[::2]:
        one["hyperparameters"]["merge"]["density"] = 0.1
    assert numbers(made)["density"].tolist() == [0.01, 0.1, 0.01, 0.1]


def test_order_of_records_does_not_matter(records, frame):
    pd.testing.assert_frame_equal(numbers(records[::-1]), frame)


def test_seeds_become_mean_and_sample_deviation(records, frame):
    of_row = [r for r in records if r["choices"]["merge"] == "ties" and r["choices"]["byom"] == "none"]
    row = frame[frame["method"] == "TIES"].iloc[0]
    svhn = [r["scores"]["test"]["svhn"]["accuracy"] for r in of_row]
    assert row["seeds"] == 3
    assert row["accuracy_svhn"] == pytest.approx(sum(svhn) / 3)
    assert row["accuracy_svhn_std"] == pytest.approx(np.sqrt(sum((x - sum(svhn) / 3) ** 2 for x in svhn) / 2))
    assert row["normalised"] == pytest.approx(np.mean([r["summary"]["test"]["normalised"] for r in of_row]))


def test_one_seed_has_no_spread():
    shown = table(synthetic.records(seeds=(0,)))
    assert not shown.map(lambda cell: "±" in cell).to_numpy().any()


def test_table_is_in_per_cent_with_one_decimal(frame):
    shown = table(synthetic.records())
    assert list(shown.columns[:2]) == ["Method", "m %"]
    assert list(shown.columns[2:-6]) == list(synthetic.TASKS) == task_names(frame)
    row, cells = frame.iloc[7], shown.iloc[7]
    assert cells["m %"] == "10"
    assert cells["svhn"] == f"{100 * row['accuracy_svhn']:.1f} ± {100 * row['accuracy_svhn_std']:.1f}"
    assert cells["Parameters (M)"] == "39.6"
    assert shown["m %"].tolist()[:3] == ["—", "—", "—"]


def test_what_validation_chose_does_not_split_seeds(frame):
    row = display(frame).set_index("Method").loc["TIES"]
    assert row["λ / searched"] == "0.3, 0.4 / 10"
    assert frame.set_index("method").loc["Pre-trained", "chosen"] == ""


def test_tuned_density_of_the_merge_leaves_the_variants_density_apart():
    made = [synthetic.record("ties", "fft", 0, m) for m in (0.01, 0.1)]
    for one in made:
        one["tuning"]["chosen"] = {"scale": 0.3, "density": 0.2}
    assert numbers(made)["density"].tolist() == [0.01, 0.1]
    assert numbers(made)["chosen"].tolist() == ["density=0.2 scale=0.3"] * 2


def test_a_fixed_scale_says_so():
    one = synthetic.record("task_arithmetic", "none", 0)
    one["tuning"] = None
    assert table([one])["λ / searched"].tolist() == ["0.3 fixed"]


def test_a_scale_that_is_left_to_the_method_says_nothing():
    one = synthetic.record("ties", "none", 0)
    one["hyperparameters"]["merge"]["scale"], one["tuning"] = None, None
    assert table([one])["λ / searched"].tolist() == ["—"]


def test_rows_that_read_alike_are_told_apart_by_what_differs():
    one, two = synthetic.record("ties", "none", 0), synthetic.record("ties", "none", 0)
    two["hyperparameters"]["merge"]["density"] = 0.1
    assert [row.label for row in synthetic.tables([one, two]).rows] == ["TIES (density 0.1)", "TIES (density 0.2)"]


def test_bits_of_values_and_positions_are_part_of_a_name():
    made = [synthetic.record("ties", "fft", 0, 0.1) for _ in range(4)]
    fewer = [{}, {"values": "int4"}, {"values": "int4", "positions": "entropy"}]
    for one, options in zip(made, [*fewer, fewer[2] | {"rescale": "norm"}], strict=True):
        one["hyperparameters"]["byom"] |= options
    rows = {row.label: row.base for row in synthetic.tables(made).rows}
    coded = "BYOM-FFT (int4, coded positions) on TIES"
    assert set(rows) == {"BYOM-FFT on TIES", coded, f"{coded} (rescale norm)", "BYOM-FFT (int4) on TIES"}
    assert rows["BYOM-FFT on TIES"] == rows["BYOM-FFT (int4) on TIES"] == "TIES"


def test_unknown_names_are_written_in_title_case():
    one = synthetic.record("average", "none", 0)
    one["choices"] |= {"merge": "brand_new", "byom": "even_newer"}
    assert table([one])["Method"].tolist() == ["Even Newer on Brand New"]


def test_two_records_of_one_cell_and_seed_are_refused():
    one = synthetic.record("ties", "none", 0)
    with pytest.raises(ByomError, match="same settings and the same seed"):
        numbers([one, copy.deepcopy(one) | {"signature": "other"}])


def test_best_is_marked_among_merges_and_in_each_density(frame):
    marks, shown = best(frame), display(frame)
    for density in synthetic.DENSITIES:
        group = frame[frame["density"] == density]
        top = (100 * group["mean"]).round(1)
        assert marks.loc[group.index, "Mean"].tolist() == (top == top.max()).tolist()
    assert marks["Mean"].sum() == len(synthetic.DENSITIES) + 1
    assert not marks.loc[shown["Method"].isin(["Pre-trained", "Single-task"])].to_numpy().any()
    assert not marks[["Method", "m %", "Parameters (M)", "Seeds"]].to_numpy().any()


def test_values_that_print_the_same_are_bold_together():
    one, two = synthetic.record("average", "none", 0), synthetic.record("ties", "none", 0)
    for record, accuracy in ((one, 0.80001), (two, 0.80004)):
        record["summary"]["test"]["absolute"] = accuracy
    assert best(numbers([one, two]))["Mean"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["choices"].update(backbone="other"), "backbone"),
        (lambda r: r["fingerprints"]["data"]["svhn"].update(test="t2"), "test data"),
        (lambda r: r["fingerprints"]["data"]["svhn"].update(train="r2"), r"data \(svhn, train\)"),
        (lambda r: r.update(family="hf"), "checkpoint family"),
        (lambda r: r["choices"].update(finetune="lora"), "fine-tuning recipe"),
        (lambda r: r["config"]["finetune"].update(steps=501), "fine-tuning recipe"),
        (lambda r: r["scores"]["test"].pop("dtd"), "tasks"),
    ],
)
def test_records_that_cannot_be_compared_are_refused(records, change, named):
    odd = copy.deepcopy(records[4])
    change(odd)
    with pytest.raises(ByomError, match=rf"differ in their {named} and cannot share.*{odd['signature']}"):
        check_comparable(synthetic.lift([*records[:4], odd]))


def test_the_seed_inside_a_recipe_is_no_difference(records):
    seeded = copy.deepcopy(records[:3])
    for seed, one in enumerate(seeded):
        one["config"]["finetune"]["seed"] = seed
    check_comparable(synthetic.lift(seeded))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ('{"format": 2}', "format 2"), ("[]", "format None"), ('{"format": 1}', "lacks")],
)
def test_a_file_that_is_no_record_is_named(tmp_path, records, text, said):
    broken = synthetic.write(tmp_path, records[:2])[0].with_name("broken.json")
    broken.write_text(text)
    with pytest.raises(ByomError, match=rf"broken\.json .*{said}"):
        read_runs(tmp_path, SUITE, BACKBONE)


def test_missing_records_say_what_to_run(tmp_path, records):
    synthetic.write(tmp_path, records[:1])
    with pytest.raises(OptionError, match="did you mean 'vision8_offline'"):
        generate(tmp_path, "vision8")
    with pytest.raises(OptionError, match="no finished record"):
        generate(tmp_path, SUITE, seeds=[7])


def test_failures_are_counted_and_listed_unless_finished_later(tmp_path, records):
    again, never = failed(records[0]), failed(records[-1], signature="dead")
    synthetic.write(tmp_path, [*records, again, never])
    report = generate(tmp_path, SUITE)
    assert "63 done, 1 failed." in report.text
    assert "BYOM-FFT on TIES, 20 %, seed 2: ran out of memory\n" in report.text


def test_header_names_skipped_tasks_and_uncommitted_code(records):
    one = copy.deepcopy(records[0])
    one["skipped_tasks"], one["provenance"]["dirty"] = ["kmnist", {"task": "cars", "reason": "no data"}], True
    text = as_markdown(synthetic.tables([one]))
    assert "Skipped tasks (2): cars (no data), kmnist." in text
    assert "1 runs came from code with uncommitted changes." in text
    assert "## BYOM-FFT" not in text


def test_parameters_that_never_change_are_footnoted(records):
    one = copy.deepcopy(records[-1])
    one["storage"]["density"] = {"of_all": 0.2, "of_differing": 0.258}
    text = as_markdown(synthetic.tables([one]))
    assert "is up to 1.29 times" in text


def test_generate_writes_everything_and_the_same_bytes_again(tmp_path, records):
    synthetic.write(tmp_path, records)
    first = generate(tmp_path, SUITE)
    before = {path: path.read_bytes() for path in first.files}
    assert generate(tmp_path, SUITE, BACKBONE) == first
    assert {path: path.read_bytes() for path in first.files} == before
    tables = [path.name for path in first.files if path.parent.name == "tables"]
    stem = f"{SUITE}--{BACKBONE}"
    assert tables == [f"{stem}.md", f"{stem}.csv", f"{stem}.tex", f"{stem}--comparison.csv"]
    assert not list(tmp_path.rglob(".*"))


def test_csv_keeps_full_precision(tmp_path, records, frame):
    synthetic.write(tmp_path, records)
    path = next(p for p in generate(tmp_path, SUITE).files if p.suffix == ".csv")
    read = pd.read_csv(path)
    read["chosen"] = read["chosen"].fillna("")
    drawn = ["kind", "base", "one_model", "models", "curve", "along", "task_bytes", "test_lower", "test_upper"]
    pd.testing.assert_frame_equal(read, frame.drop(columns=drawn), rtol=1e-15)


def test_finetune_chooses_and_names_the_files(tmp_path):
    both = [synthetic.record("ties", "none", 0, finetune=name) for name in ("full", "lora")]
    synthetic.write(tmp_path, both)
    with pytest.raises(ByomError, match="name one, as in finetune=full"):
        generate(tmp_path, SUITE)
    assert generate(tmp_path, SUITE, finetune="lora").files[0].name == f"{SUITE}--{BACKBONE}--lora.md"


def test_every_backbone_gets_its_own_table(tmp_path):
    synthetic.write(tmp_path, [synthetic.record("ties", "none", 0, backbone=name) for name in ("a", "b")])
    report = generate(tmp_path, SUITE)
    assert [path.name for path in report.files if path.suffix == ".md"] == [
        f"{SUITE}--a.md",
        f"{SUITE}--b.md",
    ]


def test_markdown_is_one_bold_cell_for_each_mark(records, frame):
    text = render.markdown(display(frame), best(frame))
    lines = text.splitlines()
    assert len({line.count(" | ") for line in lines}) == 1
    assert text.count("**") == 2 * best(frame).to_numpy().sum()
    assert f"**{display(frame).loc[4, 'Mean']}**" in lines[2 + 4]


def test_latex_escapes_and_closes():
    cells = pd.DataFrame({"Method": ["a_b & 5 %"], "fashion_mnist": ["1.0 ± 0.1"], "λ": ["—"]})
    bold = pd.DataFrame([[False, True, False]], columns=cells.columns)
    lines = render.latex(cells, bold).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}"
    assert lines[2] == r"Method & fashion\_mnist & $\lambda$ \\"
    assert lines[4] == r"a\_b \& 5 \% & \textbf{1.0 $\pm$ 0.1} & -- \\"
    assert lines[-1] == r"\end{tabular}"


def test_latex_of_the_whole_table_is_plain_ascii(frame):
    text = render.latex(display(frame), best(frame), [2, 5])
    assert text.isascii()
    assert text.count(r"\midrule") == 3
    assert {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")} == {15}


def test_text_fits_the_terminal(records):
    text = as_text(synthetic.tables(records))
    assert max(map(len, text.splitlines())) <= 160
    assert all(task[:7] in text for task in synthetic.TASKS)


def test_text_drops_tasks_only_when_it_must(frame):
    shown, tasks = display(frame), list(synthetic.TASKS)
    assert "± 0" in render.text(shown, tasks, width=400).splitlines()[2].split("64.3")[0]
    assert "svhn" not in render.text(shown, tasks, width=120)


def test_short_names_stay_apart():
    assert render.shorten(["mnist", "fashion_mnist", "imagenet_a", "imagenet_r"]) == [
        "mnist", "fashion", "ima~t_a", "ima~t_r",
    ]  # fmt: skip


def test_import_is_fast_and_light():
    code = "import sys, byom.report.report; print([m for m in ('torch', 'matplotlib', 'hydra') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_tables_say_what_is_wrong_with_their_checkpoints(records):
    caution = config.option("experts", "knots_lora16_l14").caution
    assert "test images were probably trained on" in caution
    cautious = [{**record, "family": "knots-lora16", "experts": {"caution": caution}} for record in records]
    assert f"**{caution}.**" in header(synthetic.lift(cautious))
