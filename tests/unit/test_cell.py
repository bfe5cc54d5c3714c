"""Cells: the names in the cache that users' folders have, and what consecutive cells share."""

from __future__ import annotations

import gc
import weakref

import pytest

from byom.cli import config
from byom.errors import OptionError
from byom.pipeline import run
from byom.pipeline.cell import Cell
from byom.pipeline.labs import Labs
from byom.storage.atomic import write_json
from byom.storage.lock import alone

KEYS = {
    ("merge=ties", "byom=fft", "byom.density=0.1", "tune=validation"): ("652547568435", "223c0a8266f0", "dfe71d31d8ec"),
    ("merge=fisher", "byom=prune_then_merge", "seed=3"): ("897b2c2c925b", "2fd77cc5b8ff", "438db8a1fdb7"),
    ("merge=average", "byom=surgery"): ("e408eed32217", "7a4d288ace61", "1cf3b1cfdeb1"),
    ("merge=ties", "byom=post_pruning"): ("b50269e691ad", "28b30e756ce0", "633628c2ff04"),
    ("finetune=lora", "byom=lora", "merge=task_arithmetic", "merge.scale=0.3"): (
        "e44733ee5bee", "4dc16ee8b861", "999f53c587b4",
    ),
}  # fmt: skip
EXPERTS = {("seed=0",): ("b71cfc2cc8fe", "05df2f9ebf0c"), ("finetune=lora",): ("de1ab8fbda9a", "8983cc58c082")}


@pytest.fixture
def settings(tmp_path):
    return lambda *options: config.settings([*options, f"cache={tmp_path}"])


@pytest.mark.data
@pytest.mark.parametrize("options", KEYS, ids=" ".join)
def test_names_in_the_cache_are_those_of_earlier_versions(options, settings):
    cell = Cell(settings(*options))
    method, tuner = cell.settings.effective()
    keys = cell.keys
    assert (keys.tuning(method, tuner), keys.merged(method), keys.served(method, cell.settings.byom)) == KEYS[options]


@pytest.mark.data
@pytest.mark.parametrize("options", EXPERTS, ids=" ".join)
def test_names_of_experts_are_those_of_earlier_versions(options, settings):
    lab = Cell(settings(*options)).lab
    assert (lab.signature_of("mnist"), lab.signature_of("mnist", 2)) == EXPERTS[options]


@pytest.mark.data
def test_only_stages_that_make_something_costly_have_a_folder(settings):
    assert set(Cell(settings("merge=ties", "byom=fft")).folders) == {"merge"}
    assert set(Cell(settings("merge=ties", "byom=post_pruning")).folders) == set()
    assert set(Cell(settings("merge=average", "byom=surgery")).folders) == {"merge", "variant"}


@pytest.mark.data
def test_runs_that_agree_share_a_lab_and_it_ends_when_another_is_needed(settings):
    labs = Labs()
    first = labs.of(settings("merge=ties", "byom=fft"))
    assert labs.of(settings("merge=average", "byom=none", "tune=validation")) is first
    assert labs.of(settings("merge=ties", "evaluate.batch_size=7")) is not first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


@pytest.mark.data
def test_a_block_ends_its_lab(settings):
    with Labs() as labs:
        lab = labs.of(settings("merge=ties"))
    assert labs.of(settings("merge=ties")) is not lab


def test_a_run_says_what_it_fine_tuned_itself(settings, tmp_path, monkeypatch):
    cell = Cell(settings("merge=ties"))
    folders = {task: tmp_path / "experts" / cell.lab.signature_of(task) for task in cell.lab.tasks}
    first, second, *others = folders
    done, order = set(), []

    def expert(task):
        if task not in done:
            order.append(task)
            done.add(task)
            write_json(folders[task] / "training.json", {})
            if len(order) == 1:  # meanwhile another process trains the next
                write_json(folders[others[1]] / "training.json", {})
        return task

    monkeypatch.setattr(cell.lab, "expert", expert)
    write_json(folders[second] / "training.json", {})
    with alone(folders[first]):
        assert list(cell.experts) == list(folders)
    assert order[-2:] == [first, second] and cell.training["models"] == len(others) - 1


@pytest.mark.parametrize(("said", "found"), [("", []), ("0.1 1 0.05", [0.1, 1.0, 0.05])])
def test_densities_of_a_sweep_come_through_the_environment(said, found, monkeypatch):
    monkeypatch.setenv(run.DENSITIES, said)
    assert run._densities() == found


@pytest.mark.parametrize("said", ["many", "nan", "2", "0.1 -1"])
def test_a_variable_that_holds_no_densities_is_named(said, monkeypatch):
    monkeypatch.setenv(run.DENSITIES, said)
    with pytest.raises(OptionError, match=f"BYOM_DENSITIES='{said}' is set in the environment.*unset it"):
        run._densities()
