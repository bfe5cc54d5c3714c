"""The catalogue of experiments and the page of published numbers are those of the configuration."""

import shutil
from pathlib import Path

import pytest

from byom.cli import config
from byom.report import scaling
from experiments import catalogue

SCALING = Path(__file__).parents[2] / "results" / "scaling"


def test_the_catalogue_is_current():
    page = catalogue.PAGE.read_text(encoding="utf-8")
    assert catalogue.fill(page) == page
    assert all(f"`byom table {name}" in page for name in config.options("experiment"))


def test_published_numbers_are_current():
    assert catalogue.SOURCES.read_text(encoding="utf-8") == catalogue.sources()


@pytest.mark.parametrize("name", config.options("experiment"))
def test_an_experiment_states_its_cost(name):
    text = (config.folder() / "experiment" / f"{name}.yaml").read_text()
    about = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert any(word in about for word in ("Cost:", "seed 0", "seed=0")), name


def test_the_table_by_number_of_tasks_is_that_of_its_records(tmp_path):
    shutil.copytree(SCALING / "runs", tmp_path / "runs")
    suites = sorted(path.name for path in (SCALING / "runs").iterdir())
    _, files = scaling.generate(tmp_path, "vit_small_dinov2", suites, "vision8_offline")
    for file in files[:3]:
        assert file.read_text() == (SCALING / "tables" / file.name).read_text(), file.name
