"""The notebooks run from a fresh start without an error or a warning, and are committed without outputs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from byom.__main__ import main
from byom.checkpoint.bundle import Bundle
from byom.weights import Weights
from tests.e2e.tiny import COARSE, DROPPED, KEPT, overrides

ANATOMY, QUICKSTART = NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
THIRD = "traffic_lights"
# what runs the cells may warn of itself, and tqdm asks for ipywidgets, without which it draws its bars as well
STRICT = f"""
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", module="ipykernel|jupyter|tornado|zmq")
assert sys.executable == {sys.executable!r}
"""
BETWEEN = f"""
%reset -f
from byom.report.figures.style import STYLE
STYLE |= {COARSE}
del STYLE
"""


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read(path: Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_reads_on_its_own(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert all(cell.execution_count is None and cell.outputs == [] and not cell.metadata for cell in code(notebook))
    assert notebook.cells[0].cell_type == notebook.cells[-1].cell_type == "markdown"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) >= 3 and all((path.parent / link).is_file() for link in links)
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()


def test_every_cell_of_the_quickstart_has_a_sentence_before_it():
    kinds = [cell.cell_type for cell in read(QUICKSTART).cells]
    assert ("code", "code") not in [*pairwise(kinds)]


def small(folder: Path) -> list[str]:
    """Return overrides that leave three tasks and make everything small."""
    kept = [option for option in overrides(folder) if option != f"~suite.tasks.{THIRD}"]
    assert THIRD in DROPPED and THIRD not in KEPT
    sizes = {"train": 96, "validation": 24, "test": 40, "shots": 2}
    return [*kept, *(f"suite.tasks.{THIRD}.{name}={size}" for name, size in sizes.items())]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Run both notebooks with this interpreter in an environment that knows no home and no Jupyter.

    One process runs both, the quickstart from a fresh start: importing what both import takes as long as their cells.

    Returns:
        The quickstart and the anatomy with their outputs, and the folder in which they ran.
    """
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebooks")
    here, options = folder / "notebooks", small(folder)  # the tests' experts are named by a variable that goes away
    here.mkdir()
    both, second = read(QUICKSTART), read(ANATOMY)
    both.cells = [nbformat.v4.new_code_cell(STRICT), *both.cells, nbformat.v4.new_code_cell(BETWEEN)]
    border = len(both.cells)
    both.cells += second.cells
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("JUPYTER", "IPYTHON", "BYOM"))]:
            patch.delenv(name)
        patch.delenv("HOME", raising=False)
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # some versions warn until this says which folders are meant
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / "jupyter"))
        patch.setenv("BYOM_NOTEBOOK", shlex.join(options))
        resources = {"metadata": {"path": str(here)}}
        NotebookClient(both, timeout=300, kernel_name="python3", resources=resources).execute()
    second.cells = both.cells[border:]
    both.cells = both.cells[:border]
    return both, second, folder


def said(notebook) -> str:
    streams = [o for cell in code(notebook) for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]
    return "".join(stream.text for stream in streams)


@pytest.mark.data
@pytest.mark.slow
def test_the_quickstart_runs_and_leaves_a_bundle(executed):
    notebook, _, place = executed
    assert "Warning" not in said(notebook)
    folder = place / "results" / "scratch" / "quickstart"
    bundle = Bundle.open(folder / "bundle")
    assert set(bundle.deltas) == {*KEPT, THIRD}
    for task in bundle.deltas:
        expert = Weights.open(folder / "checkpoints" / task)
        agree = sum(int((bundle.weights(task)[name] == expert[name]).sum()) for name in expert.mergeable())
        assert agree >= int(0.1 * expert.numel)
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    commands = [line for line in sources.splitlines() if line.startswith("byom ")]
    assert len(commands) == 2
    assert all(main([*shlex.split(line)[1:], *small(place)]) == 0 for line in commands)
    shown = "".join(str(output) for cell in code(notebook) for output in cell.outputs)
    assert "BYOM-FFT on TIES, 10 %" in shown and "ties + fft 0.1" in shown


@pytest.mark.data
@pytest.mark.slow
def test_the_anatomy_runs_and_draws_its_figures(executed):
    _, notebook, place = executed
    assert "Warning" not in said(notebook)
    images = [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    written = sorted((place / "results" / "scratch" / "anatomy").glob("*.png"))
    assert len(images) == len(written) == sum("show(" in cell.source for cell in code(notebook)) - 1
