"""Remedies that errors name are tried; places that are no folders are refused with a sentence."""

from __future__ import annotations

import pytest
import torch

from byom.__main__ import main
from byom.cli import config, sweeps
from byom.cli.overrides import quoted, read
from byom.data.source.root import Folder
from byom.errors import ByomError, CheckpointError, OptionError
from byom.experts.files import Files
from byom.experts.finetune.bottleneck import Bottleneck
from byom.experts.finetune.ia3 import Ia3
from byom.experts.hub import Hub
from byom.functional.tensors import packs_experts
from byom.pipeline.checks import require_exportable
from byom.storage.names import require_file_names
from byom.weights import Weights

FILES = ["experts=files", "experts.family=mine", "experts.path_of=x/{task}"]
NOBODY = "~nobody_here/x"


def _quoted_in(error: Exception) -> str:
    return str(error).rstrip('"').rpartition(' "')[2] if str(error).endswith('"') else ""


@pytest.mark.parametrize(
    ("broken", "values"),
    [
        ("x.templates=[a photo of {},b]", ["a {}", "b, c"]),
        ('x.repositories={"*":"me/model_{task}"}', {"name": "value"}),
    ],
)
def test_a_broken_container_is_mended_by_quotes_inside_of_it(broken, values):
    with pytest.raises(OptionError) as error:
        quoted(broken)
    assert read(quoted(_quoted_in(error.value))).value() == values


def test_the_example_of_repositories_is_one_that_is_read():
    with pytest.raises(OptionError) as error:
        Hub("mine", {})
    assert read(quoted(_quoted_in(error.value))).value() == {"*": "me/model_{task}"}


@pytest.mark.data
def test_a_new_entry_of_a_mapping_is_added_by_a_plus():
    override = "experts.names={mnist:a b}"
    with pytest.raises(OptionError, match=r"experts.names has no mnist yet.*\+experts.names="):
        config.resolve([*FILES, override])
    assert vars(config.settings([*FILES, f"+{override}"]).experts)["names"] == {"mnist": "a b"}


def test_an_option_without_a_default_is_named():
    with pytest.raises(OptionError, match=r"^experts.path_of is not given.*add experts.path_of=VALUE"):
        config.settings(["experts=files", "experts.family=mine"])


@pytest.mark.data
@pytest.mark.parametrize("value", ["null", "[a]", "{a:1}", "2024", "1e5", ""])
@pytest.mark.parametrize("key", ["results", "cache"])
def test_a_place_is_a_path(key, value):
    with pytest.raises(OptionError, match=rf"^{key}=.* is no folder; .*{key}=./NAME"):
        config.settings([f"{key}={value}"])
    assert config.settings([f"{key}=./2024"]).cache


@pytest.mark.data
@pytest.mark.parametrize(
    "use",
    [
        lambda: config.settings([f"results={NOBODY}"]),
        lambda: Files("mine", NOBODY + "{task}").path("mnist"),
        lambda: Folder(NOBODY).folder(),
        lambda: sweeps.multirun(["merge=average,ties", f"results={NOBODY}"], lambda settings: 0.0),
    ],
)
def test_a_home_folder_of_nobody_is_said_to_be_one(use):
    with pytest.raises(ByomError, match="a user that this machine does not know"):
        use()


@pytest.mark.parametrize("command", ["pack", "export"])
def test_an_override_is_no_folder(command, capsys):
    assert main([command, "~suite.tasks.mnist"]) == 1
    assert "where to?" in capsys.readouterr().err


def test_a_sweep_whose_results_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OptionError, match="cannot write the sweep to .*set results="):
        sweeps.multirun(["merge=average,ties", f"results={tmp_path}/file/x"], lambda settings: 0.0)


@pytest.mark.data
def test_a_sweep_finds_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sweeps.multirun(["merge=average", "results=~/x"], lambda settings: 0.0)
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "home" / "x").is_dir()


@pytest.mark.data
@pytest.mark.parametrize("recipe", [Ia3(), Bottleneck()])
def test_experts_with_added_modules_are_not_exported_as_they_are(recipe):
    from dataclasses import replace

    settings = replace(config.settings(["byom=single_task"]), finetune=recipe)
    with pytest.raises(OptionError, match="no low-rank difference"):
        require_exportable(settings)


@pytest.mark.parametrize("name", ["x" * 151, "é" * 76], ids=["letters", "accents"])
def test_a_name_too_long_for_a_file_is_refused_before_it_is_written(name):
    with pytest.raises(OptionError, match="cannot name a file everywhere: it is longer than 150 bytes"):
        require_file_names([name], "task")
    require_file_names([name[:75]], "task")


@pytest.mark.parametrize("one", ["3", "expert_3", "expert3"])
def test_a_tensor_of_one_expert_is_not_of_all(one):
    assert not packs_experts(f"mlp.experts.{one}.depthwise.weight", (8, 4, 3))
    assert packs_experts("mlp.experts.depthwise", (8, 4, 3))


def test_the_working_folder_is_not_replaced_under_ones_feet(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    weights = Weights.of({"a": torch.ones(2)})
    for place in (".", "..", str(tmp_path / "work")):
        with pytest.raises(CheckpointError, match="the folder that you work in"):
            weights.save(place)
    assert Weights.open(weights.save("out"))["a"].sum() == 2
