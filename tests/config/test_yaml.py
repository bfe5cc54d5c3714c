"""Every option builds, states every field with the class's default, and has exactly one Python file."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from byom.cli import config, sweeps
from byom.data.suite import Suite
from byom.errors import OptionError
from tests.e2e.published import kind, plan
from tests.problems import slow

ROOT = Path(__file__).parents[2]
PAIRED = {"merge": "merge", "byom": "variants"}
DEFAULTS_ONLY = ("merge", "byom", "finetune", "tune", "evaluate", "logger")
EXEMPT = {
    "evaluate/validation": "its purpose is to differ from the default splits",
    "evaluate/test": "its purpose is to differ from the default splits",
    "logger/wandb": "group and folder follow the sweep and the results folder",
}


def files(*groups):
    return [
        pytest.param(p, id=f"{p.parent.name}/{p.stem}")
        for g in groups
        for p in sorted((ROOT / "conf" / g).glob("*.yaml"))
    ]


@cache
def alone(path):
    """Return one option with the options nested in it, composed by Hydra without anything beside it."""
    return config.compose([], f"{path.parent.name}/{path.stem}")[path.parent.name]


@pytest.mark.parametrize("path", files("backbone", "merge", "byom", "finetune", "tune", "evaluate", "logger"))
def test_builds(path):
    composed = config.resolve([f"{path.parent.name}={path.stem}"]).values[path.parent.name]
    built = instantiate(composed, _convert_="all")
    assert type(built) is get_class(composed["_target_"])
    assert config.made(composed) == built


@pytest.mark.parametrize("path", files(*DEFAULTS_ONLY))
def test_states_every_field_with_the_default_of_the_class(path):
    stated = alone(path)
    cls = get_class(stated["_target_"])
    assert set(stated) - {"_target_"} == {f.name for f in dataclasses.fields(cls)}
    if f"{path.parent.name}/{path.stem}" in EXEMPT:
        return
    assert instantiate(stated, _convert_="all") == cls()


@pytest.mark.parametrize("path", files("backbone"))
def test_a_backbone_states_every_field(path):
    stated = yaml.safe_load(path.read_text())
    cls = get_class(stated.pop("_target_"))
    assert set(stated) <= {f.name for f in dataclasses.fields(cls)}
    assert {f.name for f in dataclasses.fields(cls)} - set(stated) <= {"file"}


@pytest.mark.parametrize("group", PAIRED)
def test_one_file_one_yaml(group):
    modules = {p.stem for p in (ROOT / "byom" / PAIRED[group]).glob("*.py")} - {"__init__", "base"}
    assert modules == set(config.options(group))
    for name in modules:
        target = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())["_target_"]
        assert target.rsplit(".", 1)[0] == f"byom.{PAIRED[group]}.{name}"


@pytest.mark.parametrize("name", config.options("suite"))
def test_a_suite_builds_and_brings_its_backbone(name):
    values = config.resolve([f"suite={name}"]).values
    suite, backbone = config.made(values["suite"]), config.made(values["backbone"])
    assert suite.name == name
    assert len(suite.tasks) == {"flan4": 4, "vision14": 14, "vision20": 20}.get(name, 8)
    for task in suite.tasks:
        backbone.require(task)


@pytest.mark.parametrize("path", files("experts"))
def test_experts_state_every_field_and_name_their_family(path):
    given = yaml.safe_load(path.read_text())
    kind = get_class(given["_target_"])
    assert set(given) - {"_target_"} == {field.name for field in dataclasses.fields(kind)}
    if "???" not in given.values():
        built = instantiate(given, _convert_="all")
        assert built.family and built.validation in ("seen", "unseen", "unknown")


TASKS = [f"{folder}{name}" for folder in ("", "hub/") for name in config.options(f"task/{folder}")]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_builds(name):
    task = instantiate(yaml.safe_load((ROOT / "conf" / "task" / f"{name}.yaml").read_text()), _convert_="all")
    assert task.name == name.removeprefix("hub/")
    assert task.licence


def longest_cell(name):
    return max(sweeps.cells(plan(name)["rows"], plan(name)["common"]), key=len)


OF_A_KIND = {kind(longest_cell(name)): name for name in config.options("experiment")}.values()
"""One experiment of those whose longest cells differ in nothing but numbers, backbone and experts."""
OFFLINE = [name for name in config.options("experiment") if "offline" in str(plan(name))]
EXPERIMENTS = [*OFFLINE, *slow(*(name for name in config.options("experiment") if name not in OFFLINE))]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_expands_to_cells_that_compose_and_build(name, monkeypatch):
    monkeypatch.setattr(Suite, "available", lambda suite: suite)  # whether or not the data is here
    plan = config.resolve([f"experiment={name}"], "table").values["experiment"]
    cells = sweeps.cells(plan["rows"], [*plan["common"], "seed=0,1"])
    assert len(cells) == len({tuple(cell) for cell in cells})
    assert sum("seed=0" in cell for cell in cells) == sum("seed=1" in cell for cell in cells) == len(cells) // 2
    longest = max(cells, key=len)
    if name in OF_A_KIND:
        composed = config.compose(longest)
        assert config.resolve(longest) == (config.plain(composed), dict(composed.hydra.runtime.choices)), longest
    of_a_kind = {kind(cell): cell for cell in cells}.values()
    for cell in of_a_kind:  # others differ in numbers
        assert config.settings(cell).overrides == tuple(cell)


@pytest.mark.parametrize("group", config.ALONE)
def test_an_option_composed_alone_is_what_hydra_composes(group):
    for number, name in enumerate(config.options(group)):
        cell = [f"{group}={name}", "byom=none" if group == "merge" else "merge=dare", "suite=text8_offline"]
        file = config.folder() / group / f"{name}.yaml"
        resolved = config.resolve(cell)
        assert resolved.values[group] == config.plain(OmegaConf.create({group: alone(file)}))[group], cell
        assert resolved.names[group] == name
        if number == 0 or "defaults:" in file.read_text():
            composed = config.compose(cell)
            assert resolved == (config.plain(composed), dict(composed.hydra.runtime.choices)), cell


@pytest.mark.parametrize(
    "more",
    [
        ["merge@merge.then=ties"],
        ["~merge"],
        ["+merge.extra=1"],
        ["backbone.checkpoint=random", "backbone.checkpoint.name=x"],
        ["merge.then.scale=1", "merge.then=null"],
        *slow(
            ["merge=ties"],
            ["backbone.checkpoint=random"],
            ["backbone.checkpoint=[1,2]"],
            ["backbone.checkpoint.name=x", "backbone.checkpoint=random"],
            ["merge.then=ties", "merge.then.scale=1"],
            ["suite.tasks.mnist=1"],
        ),
    ],
    ids=",".join,
)
def test_what_changes_an_option_gives_what_hydra_gives(more):
    cell, answers = ["merge=dare", *more], []
    for compose in (config.resolve, lambda cell: config.plain(config.compose(cell))):
        try:
            answers.append(compose(cell))
        except OptionError as error:
            answers.append(str(error))
    resolved, composed = answers
    assert (resolved if isinstance(resolved, str) else resolved.values) == composed


def test_the_headline_rows_are_rows_of_the_full_table():
    for suite in ("vision8_offline", "text8_offline"):
        plans = [
            config.resolve([f"experiment={suite}{part}"], "table").values["experiment"] for part in ("", "_headline")
        ]
        full, headline = ({tuple(c) for c in sweeps.cells(p["rows"], p["common"])} for p in plans)
        assert headline < full


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["merge=tie"], "did you mean 'ties'"),
        (["suite=vision8_offlin"], "did you mean 'vision8_offline'"),
        (["byom=ftt"], "did you mean 'fft'"),
        (["merge.scal=1"], "did you mean 'scale'"),
        (["seeed=1"], "did you mean 'seed'"),
        (["merge=ties", "merge.densty=0.1"], "did you mean 'density'"),
        (["byom=lora", "byom.rnk=4"], "did you mean 'rank'"),
        (["merge.densty=0.1", "merge=dare", "seed=3"], "Known: .*drop"),
        (["merge.densty=0.1"], "Known: device, scale, weights$"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(overrides, said):
    with pytest.raises(OptionError, match=said):
        config.compose(overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["byom.density=1.5"], "byom.density=1.5 is not a fraction"),
        (["byom.density=-0.1"], "is not a fraction"),
        (["byom.density=nan"], "is not a fraction"),
        (["byom.density=ten"], "is not a fraction"),
        (["merge=ties", "merge.density=20"], "merge.density=20 is not a fraction"),
        (["merge=ties", "merge.combine=median"], "use mean or sum"),
        (["byom.scope=layer"], "use global, tensor or row"),
        (["finetune.epochs=0"], "out of range"),
        (["evaluate.splits=[train]"], "must name some of"),
        (["logger=wandb", "logger.mode=off"], "use online or offline"),
    ],
)
def test_a_value_out_of_range_is_refused_in_a_sentence(overrides, said):
    with pytest.raises(OptionError, match=said):
        config.settings(overrides)


def test_public_names_are_importable():
    import byom

    for name in byom.__all__:
        module, _, attribute = byom._WHERE[name].partition(":")
        assert getattr(byom, name) is getattr(import_module(module), attribute or name)
    with pytest.raises(AttributeError):
        _ = byom.Nothing


def test_a_swept_field_reaches_only_the_options_that_have_it():
    found = sweeps.fitting(["seed=0", "byom=none,post_pruning,fft", "byom.density=0.01,0.1", "byom.scope=tensor"])
    fields = ["byom.density=0.01,0.1", "byom.scope=tensor"]
    assert found == [["seed=0", "byom=none"], ["seed=0", "byom=post_pruning,fft", *fields]]
    assert sweeps.fitting(["byom=fft", "byom.density=0.1"]) == [["byom=fft", "byom.density=0.1"]]
    nested = sweeps.fitting(["merge=dare,average", "merge.then.scale=0.5"])
    assert nested == [["merge=dare", "merge.then.scale=0.5"], ["merge=average"]]
    assert sweeps.fitting(["byom=none,fft", "byom.densty=1"]) == [["byom=none,fft", "byom.densty=1"]]


def test_a_cache_named_by_the_environment_is_looked_up_each_time(monkeypatch, tmp_path):
    for place in ("one", "two"):
        monkeypatch.setenv("BYOM_CACHE", str(tmp_path / place))
        assert config.resolve(["merge=ties"]).values["cache"] == str(tmp_path / place)
