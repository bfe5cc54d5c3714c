"""``merge.device`` of every command that merges: it says where, and changes no name of a result."""

from pathlib import Path

import pytest
import torch
import yaml

from byom.__main__ import main
from byom.checkpoint.bundle import Bundle
from byom.cli import config, run, sweeps
from byom.cli.preview import preview
from byom.errors import OptionError
from byom.merge.base.group import Group
from byom.pipeline.cell import Cell
from byom.pipeline.device import resolve
from byom.pipeline.provenance import Stages
from byom.weights import Weights
from byom.weights.placed import chosen
from tests.problems import FLOATS, models, problem, same


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three models, each a folder, in the folder that is worked in; and what groups of them were computed on."""
    monkeypatch.chdir(tmp_path)
    base, tuned = models(2)
    for name, state in {"base": base, **tuned}.items():
        Weights.of(state, name).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def used(monkeypatch):
    """The kinds of device of which groups were made."""
    kinds, made = set(), Group.__init__

    def noted(self, name, pretrained, *rest, **named):
        kinds.add(pretrained.device.type)
        made(self, name, pretrained, *rest, **named)

    monkeypatch.setattr(Group, "__init__", noted)
    return kinds


GIVEN = ("base=base", "experts=[a=task1,b=task2]", "merge=ties")


def test_folders_are_merged_where_it_says(folders, device, used):
    assert main(["merge", "average", *GIVEN[:2], f"merge.device={device.type}"]) == 0, "it is no field of a method"
    assert used == {device.type}
    used.clear()
    assert main(["merge", "here", *GIVEN, "merge.device=cpu"]) == 0
    assert used == {"cpu"}
    used.clear()
    assert main(["merge", "there", *GIVEN, f"merge.device={device.type}"]) == 0
    assert used == {device.type}
    assert same(Weights.open("here"), Weights.open("there"))
    recipe = yaml.safe_load(Path("there/recipe.yaml").read_text(encoding="utf-8"))
    assert not any("device" in option for option in recipe), "a recipe is for other machines, too"


@pytest.mark.parametrize("variant", ["fft", "prune_then_merge", "emr", "tall_mask"])
def test_folders_are_packed_where_it_says(variant, folders, device, used):
    for out, place in (("here", "cpu"), ("there", device.type)):
        assert main(["pack", out, *GIVEN, f"byom={variant}", f"merge.device={place}"]) == 0
    here, there = Bundle.open("here"), Bundle.open("there")
    for task in ("a", "b"):
        assert same(here.weights(task), there.weights(task))
    assert same(here.reference, there.reference) and used == {"cpu", device.type}


def test_a_run_merges_where_it_says_and_is_called_the_same(device, used, tmp_path):
    plain, other = (
        config.settings([*more, "merge=ties", f"cache={tmp_path}"]) for more in ((), (f"merge.device={device.type}",))
    )
    assert (plain.merge_device, other.merge_device) == ("auto", device.type)
    assert plain.signature() == other.signature() and plain.merge == other.merge
    assert plain.resolved == other.resolved and "device" not in other.resolved["merge"]
    cell = Cell(other)
    held = problem(*models(2))
    cell.__dict__["problem"], cell.__dict__["tuning"] = held, {"chosen": {}}
    reference = cell.reference
    assert used >= {device.type} and {reference.place(name) for name in FLOATS} == {torch.device("cpu")}
    assert same(reference, cell.method(held))
    assert same(cell.served.weights("task1"), other.byom.serve(held, reference).weights("task1"))
    stages = Stages({stage: {"seconds": 1.0, "peak_mib": 1.0, "extra_mib": 1.0} for stage in ("merge", "variant")})
    cost = cell.cost(stages)
    assert cost["merge"]["device"] == cost["variant"]["device"] == str(chosen(device.type))
    cell = Cell(plain)
    cell.__dict__["folders"] = {}
    assert "device" not in cell.cost(stages)["variant"] or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("overrides", "primary"),
    [
        (["merge.device=cpu"], "run"),
        (["merge=ties", "merge.device=cpu"], "run"),
        (["merge.device=cpu", "merge=dare", "merge@merge.then=ties"], "run"),
        (["merge=dare", "merge.device=cpu", "merge.drop=0.2"], "preview"),
    ],
    ids=",".join,
)
def test_it_is_an_option_beside_every_method(overrides, primary):
    resolved = config.resolve(overrides, primary).values
    assert resolved == config.plain(config.compose(overrides, primary))
    assert resolved[config.MERGING] == "cpu" and "device" not in resolved["merge"]


def test_it_reaches_every_method_of_a_sweep(capsys):
    assert sweeps.fitting(["merge=average,ties", "merge.device=cpu"]) == [["merge=average,ties", "merge.device=cpu"]]
    run.print_config(config.resolve(["merge.device=cpu"]).values)
    assert yaml.safe_load(capsys.readouterr().out)["merge"]["device"] == "cpu"
    preview(["--cfg", "merge.device=cpu", "merge.density=0.2"])
    assert yaml.safe_load(capsys.readouterr().out)["merge"]["device"] == "cpu"


def test_a_device_that_is_not_there_is_refused_by_name():
    for name in ("meta", "cuda:93", "nothing", 3.5, None):
        with pytest.raises(OptionError, match=rf"merge\.device={name} cannot be used here \(.*merge\.device=auto"):
            chosen(name)
        with pytest.raises(OptionError, match=rf"device={name} cannot be used here \(.*device=auto"):
            resolve(name)
    assert chosen("auto", torch.device("cpu")) == chosen("cpu") == torch.device("cpu")
