"""Experts from files: what is theirs, what is refused, and how a table tells families apart."""

from types import SimpleNamespace

import pytest
import torch

from byom.checkpoint import read
from byom.errors import CheckpointError, OptionError
from byom.experts.files import Files
from byom.experts.finetune.full import Full
from byom.experts.hub import Hub
from byom.weights import Weights

BASE = {"model.w": torch.arange(12.0).reshape(3, 4), "model.b": torch.ones(3)}


def lab(head=None):
    backbone = SimpleNamespace(own_head=lambda task, tensors: head)
    base = Weights.of(BASE, origin="base")
    tasks = {"cars": SimpleNamespace(name="cars", regression=False)}
    return SimpleNamespace(pretrained=base, backbone=backbone, tasks=tasks, checkpoint=lambda path: read(path, base))


def saved(folder, change=0.01, **extra):
    state = {name: tensor + change * torch.ones_like(tensor) for name, tensor in BASE.items()}
    folder.mkdir(exist_ok=True)
    torch.save(state | extra, folder / "StanfordCars.pt")
    return state


def files(folder, **options):
    return Files("mine", f"{folder}/{{task}}.pt", {"cars": "StanfordCars"}, **options)


def test_an_expert_is_read_in_the_names_of_the_backbone(tmp_path):
    state = saved(tmp_path / "a")
    found = files(tmp_path / "a").open(lab(), "cars", 0)
    assert all(torch.equal(found[name], state[name]) for name in BASE)


def test_weights_that_were_not_fine_tuned_from_the_base_are_refused(tmp_path):
    saved(tmp_path / "a", change=9.0)
    with pytest.raises(CheckpointError, match=r"task cars\) is .* times the pre-trained model's norm away"):
        files(tmp_path / "a").open(lab(), "cars", 0)


def test_a_changed_file_is_another_expert_and_a_missing_one_says_where_to_get_it(tmp_path):
    task = SimpleNamespace(name="cars")
    saved(tmp_path / "a")
    before = files(tmp_path / "a").key(task, Full())
    saved(tmp_path / "a", change=0.02, more=torch.ones(5))
    assert files(tmp_path / "a").key(task, Full()) != before
    with pytest.raises(CheckpointError, match=r"not at .*StanfordCars.pt; set experts.path_of \(ask me\)"):
        files(tmp_path / "none", source="ask me").path("cars")


def test_heads_come_from_checkpoints_only_where_they_hold_one(tmp_path):
    saved(tmp_path / "a", **{"classifier.weight": torch.ones(2, 3)})
    assert files(tmp_path / "a").head(lab(), "cars") is None
    assert files(tmp_path / "a", heads="checkpoint").head(lab("a head"), "cars") == "a head"
    with pytest.raises(CheckpointError, match=r"no classifier .* \(it has classifier.weight beside"):
        files(tmp_path / "a", heads="checkpoint").head(lab(), "cars")


def test_what_a_family_cannot_give_is_said(tmp_path):
    saved(tmp_path / "a")
    with pytest.raises(OptionError, match="several experts per task, and mine has one"):
        files(tmp_path / "a").open(lab(), "cars", 1)
    with pytest.raises(OptionError, match="must have {task} in it"):
        Files("mine", "models/one.pt")
    for family in ("", "trained"):
        with pytest.raises(OptionError, match="must name who fine-tuned"):
            Files(family, "{task}")
    with pytest.raises(OptionError, match="no expert for task dtd; did you mean"):
        Hub("mine", {"dtd2": "me/dtd"}).repository("dtd")


def test_repositories_and_revisions_go_by_task_with_a_rest():
    hub = Hub(
        "mine", {"*": "me/vit_{task}", "dtd": "you/dtd"}, names={"cars": "stanford"}, revisions={"*": "v1", "dtd": "v2"}
    )
    assert str(hub.repository("cars")) == "me/vit_stanford@v1"
    assert str(hub.repository("dtd")) == "you/dtd@v2"
