"""Options that have another name now are found under both, by runs, sweeps, records, bundles and imports."""

from __future__ import annotations

from importlib import import_module

import pytest

from byom.cli import config, sweeps
from byom.cli.overrides import renamed
from byom.storage.parts import RENAMED
from byom.storage.record import Record
from byom.variants.base import delta
from byom.variants.symerge import ModelTinting
from tests.unit import synthetic_runs as synthetic

OPTIONS = [(group, former, name) for (group, former), name in RENAMED.items()]


@pytest.mark.parametrize(("group", "former", "name"), OPTIONS)
def test_both_names_choose_one_option(group, former, name):
    assert name in config.options(group) and former not in config.options(group)
    before, after = (config.settings([f"{group}={one}"]) for one in (former, name))
    assert before.byom == after.byom and before.choices() == after.choices()
    assert before.choices()[group] == name
    assert before.place() == after.place() and f"+{former}--" in before.place().label


def test_the_former_name_is_one_of_a_sweep():
    assert sweeps.cells(["byom=tinting,fft merge=ties"], []) == [
        ["byom=symerge", "merge=ties"],
        ["byom=fft", "merge=ties"],
    ]
    assert [renamed(o) for o in ("merge=tinting", "byom.layer=tinting", "byom=tinting_2", "~byom")] == [
        "merge=tinting",
        "byom.layer=tinting",
        "byom=tinting_2",
        "~byom",
    ]


def test_a_record_of_the_former_name_is_read_as_one_of_today():
    values = synthetic.record("pretrained", "tinting", 0) | {
        "titles": {"merge": "Pre-trained", "byom": "Model Tinting"}
    }
    record = Record.lift(values)
    assert record.choices.byom == "symerge" and record.titles.byom == "SyMerge"
    assert values["choices"]["byom"] == "tinting", "what was read is as it was"


def test_a_bundle_that_names_the_former_module_is_opened():
    variant = ModelTinting(steps=3)
    named = delta._named(variant)
    assert named["module"] == "symerge"
    assert delta._built(named | {"module": "tinting"}) == variant
    assert import_module("byom.variants.tinting") is import_module("byom.variants.symerge")
