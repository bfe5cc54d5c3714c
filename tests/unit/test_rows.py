"""What makes a row: which records it joins, where it stands, what it is called, and which split its columns are of."""

from __future__ import annotations

import pytest

from byom.cli import config
from byom.merge.base.wrapper import Wrapper
from byom.merge.ties import Ties
from byom.report import render
from byom.report.comparable import check_comparable
from byom.report.frame import display
from tests.unit import synthetic_runs as synthetic


def made(variant: str = "none", seed: int = 0, **groups) -> dict:
    """Make a record of TIES with further hyperparameters by group."""
    one = synthetic.record("ties", variant, seed)
    for group, values in groups.items():
        one["hyperparameters"][group] |= values
    return one


def test_validation_and_test_are_columns_of_their_own():
    records = [made(seed=0), made(seed=1)]
    for one, validation, test in zip(records, (0.25, 0.75), (0.5, 1.0), strict=True):
        one["summary"]["validation"]["absolute"] = validation
        one["summary"]["test"]["absolute"] = test
    (row,) = synthetic.tables(records).frame.to_dict("records")
    assert (row["validation"], row["mean"]) == (0.5, 0.75)


def test_numbers_sort_as_numbers():
    records = [made(variant="lora", byom={"rank": rank}) for rank in (100, 16, 2)]
    found = [row.settings["byom.rank"] for row in synthetic.tables(records).rows]
    assert found == [2, 16, 100]


def test_the_seed_of_a_method_is_the_seed_of_the_run():
    records = [made(seed=seed, merge={"seed": seed}, byom={"seed": 10 + seed}) for seed in range(3)]
    assert synthetic.tables(records).frame["seeds"].tolist() == [3]


def test_a_record_from_before_weights_and_densities_per_task_is_of_the_same_row():
    alike = {"weights": [], "densities": []}
    records = [made(seed=0), made(seed=1, merge=alike), made(seed=2, merge=alike | {"weights": [1.0, 2.0]})]
    assert sorted(synthetic.tables(records).frame["seeds"].tolist()) == [1, 2]


def test_rows_are_told_apart_by_a_word_where_a_number_differs_too():
    records = [made(merge={"density": number, "mode": word}) for number, word in ((0.1, "sum"), (0.2, "mean"))]
    assert {row.label for row in synthetic.tables(records).rows} == {"TIES (mode mean)", "TIES (mode sum)"}


def test_rows_of_one_setting_at_several_kilobytes_are_told_apart_by_those_alone():
    both = [("none", 90.0), ("train", 90.0), ("train", 10_000.0)]
    records = [made(variant="budget", byom={"kilobytes": size, "inputs": inputs}) for inputs, size in both]
    labels = [row.label for row in synthetic.tables(records).rows]
    assert labels == [f"Budget on TIES (inputs {inputs}), {size:g} kB" for inputs, size in both]
    assert [row.label for row in synthetic.tables(records[1:]).rows] == [f"Budget on TIES, {n} kB" for n in (90, 10000)]


def of_svc(then: dict | str, **titles) -> dict:
    """Make a record of what calibrates another method, in the shape of its time."""
    one = synthetic.record("ties", "none", 0)
    one["choices"]["merge"] = "svc"
    one["hyperparameters"]["merge"] = {"floor": 1.0, "then": then}
    return one | ({"titles": {"byom": "merged model alone", "router": ""} | titles} if titles else {})


@pytest.mark.parametrize(
    ("then", "titles", "label"),
    [
        ({"class": "TaskArithmetic", "scale": 1.0}, {"merge": "SVC"}, "SVC of Task Arithmetic"),
        ({"class": "TaskSingularVectors"}, {"merge": "SVC"}, "SVC of TSV-M"),
        ({"class": "Mine"}, {"merge": "SVC"}, "SVC of Mine"),
        ({"class": "TaskGrams"}, {"merge": "SVC of ASWUDI"}, "SVC of ASWUDI"),
        ({"class": "Ties"}, {}, "Svc of TIES"),
        ("TIES", {"merge": "SVC"}, "SVC"),
    ],
)
def test_a_wrapper_is_named_with_what_it_wraps(then, titles, label):
    assert [row.label for row in synthetic.tables([of_svc(then, **titles)]).rows] == [label]


def test_every_wrapper_is_titled_with_what_it_wraps():
    every = [config.option("merge", name) for name in config.options("merge")]
    wrappers = [type(option)(then=Ties(0.5)) for option in every if isinstance(option, Wrapper)]
    assert len(wrappers) >= 4
    assert [one.title for one in wrappers] == [f"{type(one).title} of TIES" for one in wrappers]


def test_a_recipe_whose_class_was_moved_is_the_same_recipe():
    one, two = made(seed=0), made(seed=1)
    one["config"]["finetune"]["_target_"] = "byom.old.Full"
    two["config"]["finetune"]["_target_"] = "byom.new.Full"
    check_comparable(synthetic.lift([one, two]))


def test_a_table_as_wide_as_the_terminal_fits():
    shown, tasks = display(synthetic.tables([made(), made(seed=1)]).frame), list(synthetic.TASKS)
    whole = render.text(shown, tasks, width=10_000)
    width = len(whole.splitlines()[0])
    assert render.text(shown, tasks, width=width) == whole != render.text(shown, tasks, width=width - 1)
