"""One thread per process, tests without their data packages skipped, and whole files handed out, the longest first."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # numbers do not depend on how many processors there are
    os.environ[name] = "1"
gc.disable()  # until all is imported and collected: nothing of it is garbage
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of a hundred processes compiles byom again

ROOT = Path(__file__).parents[1]
LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        "e2e/test_published_images", "contract/test_merge", "docs/test_notebooks", "config/test_yaml",
        "contract/test_variants", "e2e/test_published_text", "e2e/test_launchers", "e2e/test_resume",
        "e2e/test_true_size", "e2e/test_accelerate", "e2e/test_methods", "e2e/test_preview", "docs/test_readme",
        "e2e/test_command", "e2e/test_new_options", "e2e/test_seq2seq", "serving/test_process",
        "device/test_law", "unit/test_preview_figures", "unit/test_statistics", "e2e/test_lora", "unit/test_lora_page",
        "golden/test_signatures", "reliability/test_writers", "unit/test_record", "unit/test_backbone",
        "unit/test_report", "unit/test_selection", "unit/test_identities", "identities/test_awd", "unit/test_figures",
        "unit/test_recipes", "unit/test_checkpoint", "identities/test_pcb", "unit/test_metric",
    )
)  # fmt: skip
APART = tuple(f"tests/e2e/test_{name}.py" for name in ("published_images", "true_size"))


@pytest.fixture(autouse=True, scope="session")
def no_power_failure():
    """Leave files to the system's own writing: tests kill processes, never machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def threads():
    """Return what sets PyTorch's number of threads, for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def coarse_figures():
    """Draw figures coarsely: that they are drawn is tested, not how finely."""
    from byom.report.figures.style import STYLE
    from tests.e2e.tiny import COARSE

    with pytest.MonkeyPatch.context() as patch:
        for name, value in COARSE.items():
            patch.setitem(STYLE, name, value)
        yield


def pytest_collection(session: pytest.Session) -> None:
    """Read each version of a yaml once per process: Hydra would read most of the tree for every composition."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers the class that reads files
    files, held = SourcesRegistry.instance().resolve("file"), {}
    read = files.load_config

    def load(source, config_path):
        file = Path(source.path, source._normalize_file_name(config_path))
        if not file.is_file():
            return read(source, config_path)
        stamp = (source.provider, file, file.stat().st_mtime_ns, file.stat().st_size)
        if stamp not in held:
            held[stamp] = pickle.dumps(read(source, config_path))
        return pickle.loads(held[stamp])  # which takes a third of a deep copy

    files.load_config = load


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is loaded by now, millions of objects, out of every later collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


def missing_data() -> list[str]:
    """Return the data packages and archives that `make setup` would fetch and that are not there."""
    packages, archives = (
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / f"data-{kind}.txt").read_text(), re.M)
        for kind in ("requirements", "archives")
    )
    missing = [name for name, wanted in packages if _version(name) != wanted]
    place = Path(sys.prefix) / "share" / "byom"
    return missing + [name for name, _ in archives if not any(place.glob(f"{name.replace('-', '[-_]')}-*/"))]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder in which all tests of a run find what one of them has made, such as tiny experts."""
    if "BYOM_TEST_SHARED" not in os.environ:
        os.environ["BYOM_TEST_SHARED"] = folder = tempfile.mkdtemp(prefix="byom-shared-")
        (Path(folder) / "experts").mkdir()
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("BYOM_TEST_SHARED"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `data` where data is missing; put long files first where several processes run."""
    marked = [item for item in items if item.get_closest_marker("data")]
    if marked and (missing := missing_data()):
        skip = pytest.mark.skip(reason=f"data that make setup fetches is not here: {', '.join(missing)}")
        for item in marked:
            item.add_marker(skip)
    if hasattr(config, "workerinput"):
        rank = {file: place for place, file in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


if importlib.util.find_spec("xdist"):
    from xdist.scheduler import LoadFileScheduling

    class Units(LoadFileScheduling):
        """Hands out whole files, which share fixtures; those of `APART` by test or first part of its id."""

        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return f"{file}::{test.partition('-')[0].partition('[')[2] or test}" if file in APART else file

    def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Units | None:
        """Hand out tests by `Units` unless another distribution was chosen."""
        if config.getvalue("dist") not in ("load", "loadfile"):
            return None
        config.option.loadscopereorder = False
        return Units(config, log)
