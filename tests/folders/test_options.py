"""Options of `byom merge` as people type them, and as recipes have them."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from byom.__main__ import main
from byom.cli import given
from byom.errors import CheckpointError, OptionError


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Three models of two tensors in the folder that is worked in: the base is 0, the experts are 1 and 2."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"base": 0.0, "a": 1.0, "b": 2.0}.items():
        (tmp_path / name).mkdir()
        tensors = {part: torch.full((2, 2), value) for part in ("layers.0.weight", "layers.1.weight")}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def merged(*options, out="out"):
    assert main(["merge", out, *options]) == 0
    return {name: float(value[0, 0]) for name, value in load_file(f"{out}/model.safetensors").items()}


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ('["x=1",b]', {"x=1": "x=1", "b": "b"}),
        ("[a=it's,b=b]", {"a": "it's", "b": "b"}),
        ('[a="it\'s, here",b=b]', {"a": "it's, here", "b": "b"}),
        ("[a=x=1,b=C:\\b]", {"a": "x=1", "b": "C:\\b"}),
        ([{"a": "x"}, {"b": "y"}], {"a": "x", "b": "y"}),
        (["a=x", "folder/b"], {"a": "x", "b": "folder/b"}),
    ],
)
def test_paths_may_hold_every_mark(typed, read):
    assert given.experts(typed) == read


def test_the_folder_that_one_is_in_is_called_by_its_own_name(models, monkeypatch):
    monkeypatch.chdir(models / "a")
    assert given.experts("[.,..]") == {"a": ".", models.name: ".."}


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("{a: x, a: y}", "a is given twice"),
        ("{a:x,b:y}", "a blank after the colon"),
        ("[a=x,a=y]", "two are called 'a'"),
        ([{"a": "x"}, {"a": "y"}], "experts gives a twice"),
    ],
)
def test_a_list_of_experts_that_says_two_things_is_refused(typed, why):
    with pytest.raises(OptionError, match=why):
        given.experts(typed)


def test_a_path_below_a_folder_that_begins_with_a_tilde_is_no_home(models):
    (models / "a").rename(models / "~a")
    assert merged("base=base", "experts=[a=./~a]") == {"layers.0.weight": 1.0, "layers.1.weight": 1.0}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["scale=[layers=nan]"], "scale: 'nan' is no finite number"),
        (["scale={layers: true}"], "scale: True is no finite number"),
        (["merge=[ties]"], r"merge takes one name, and '\[ties\]' is given"),
        (["merge=ties,average"], "merge takes one name"),
        (["merge=null"], "merge takes one name"),
        (["merge.density=0.2"], "merge.density is given and merge= is not"),
        (["merge=ties", "merge.weights={a:1}"], "merge.weights does not take"),
        (["merge=fisher"], "merge=fisher needs statistics"),
        (["recipe="], "recipe= is empty"),
        (["base=a", "base=b"], "base is given twice"),
    ],
)
def test_an_option_that_means_nothing_is_refused_with_its_cause(options, why, models, capsys):
    import re

    given = [] if options[0].startswith("base=") else ["base=base"]
    assert main(["merge", "out", *given, "experts=[a=a,b=b]", *options]) == 1
    said = capsys.readouterr().err
    assert re.search(why, said) and "Traceback" not in said
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("base: base\nbase: a\nexperts: [a]\n", "base is given twice"),
        ("base: base\nexperts: {a: a, a: b}\n", "a is given twice"),
        ("base: base\nexperts: [a]\nmerge: {ties: {density: 0.1}}\n", "a recipe has merge: NAME on one line"),
        ("base: base\nexperts: [a]\nmerge:\n", "merge takes one name"),
        ("base: base\nexperts: [a]\nkeep: [{layers.0: a}, layers.0]\n", "keep gives layers.0 twice"),
    ],
)
def test_a_recipe_that_says_two_things_is_refused(text, why, models):
    (models / "recipe.yaml").write_text(text, encoding="utf-8")
    from byom.cli.folders import requested

    with pytest.raises((OptionError, CheckpointError), match=why):
        requested(given.options(["recipe=recipe.yaml"]), packs=False)


def test_options_of_a_recipes_method_are_not_given_to_another(models):
    (models / "recipe.yaml").write_text("base: base\nexperts: [a, b]\nmerge: ties\nmerge.density: 0.5\n", "utf-8")
    with pytest.raises(OptionError, match="gives merge.density for its own merge=ties"):
        given.options(["recipe=recipe.yaml", "merge=average"])
    assert given.options(["recipe=recipe.yaml", "merge=ties"])["merge.density"] == 0.5
    assert given.options(["recipe=recipe.yaml", "merge.density=0.1"])["merge.density"] == "0.1"


def test_a_written_recipe_has_what_was_typed_and_makes_the_same_model(models):
    (models / "a").rename(models / "007")
    first = merged(
        "base=base", "experts=[007,b]", "only=[0,1]", "keep=[layers.0=007]", "scale=[layers.1=0.5]", "dtype=float16"
    )
    assert first == {"layers.0.weight": 1.0, "layers.1.weight": 0.75}
    recipe = yaml.safe_load((models / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["experts"] == {"007": "007", "b": "b"} and recipe["only"] == ["0", "1"]
    assert recipe["merge"] == "average"
    assert merged("recipe=out/recipe.yaml", out="again") == first
    weights = [(models / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert weights[0] == weights[1]
    assert merged("recipe=out/recipe.yaml", "keep=[]", out="typed")["layers.0.weight"] == 1.5
