"""Every published table, sweep and open question on images runs to its end on tiny data in the hubs' own formats."""

import pytest

from byom.cli import config
from tests.e2e.published import cells, check, chosen, kind, plan, run
from tests.hub import build, once, shared
from tests.published_models import add_experts, pickled_experts

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
NAMES = [n for n in config.options("experiment") if chosen(n, "experts") and chosen(n, "suite").startswith("vision")]
LARGER = [name for name in NAMES if any(size in name for size in ("vitb16", "vitl14"))]
ROWS = ("byom=single_task", "byom=post_pruning", "byom=lora", "byom=emr", "merge=ties")
SAMPLE = ("density_sweep",)
"""What `make test` runs of them."""
QUESTIONS = {
    "number_of_tasks", "diverse_tasks", "byom_vs_joint_training", "density_sweep", "rank_sweep", "prune_then_merge",
}  # fmt: skip


def by_family(names):
    """Parametrise by experiment; those whose id begins alike share a results folder and run in one process."""
    ids = {name: f"{chosen(name, 'results').rpartition('/')[2]}-{name}" for name in names}
    marks = {name: () if name in SAMPLE else pytest.mark.slow for name in names}
    every = [pytest.param(n, id=ids[n], marks=marks[n]) for n in sorted(names, key=ids.get)]
    return pytest.mark.parametrize("name", every)


@pytest.fixture(scope="module")
def hub():
    """A hub of all data sets, to which experts are added when they are asked for; returned for each experiment."""
    folder = shared()
    once(folder, "vision20", lambda: build(folder, ["vision20"]))

    def home(name):
        option = chosen(name, "experts")
        if not option.startswith("task_vectors"):
            suites = {chosen(name, "suite") for name in NAMES if chosen(name, "experts") == option}
            largest = max(suites, key=["vision8", "vision14", "vision20"].index)
            once(folder, option, lambda: add_experts(folder, option, largest, folder / "work"))
        return folder

    return home


@pytest.fixture(scope="module")
def extra(hub):
    """Return the further overrides of an experiment: where pickles are, and one draw of several."""

    def options(name):
        draw = ["suite.draw=0"] * (name == "number_of_tasks")
        if not name.endswith("_ta"):
            return draw
        folder = shared() / "pickles"
        names = config.option("experts", "task_vectors_b32").names
        once(shared(), "pickles", lambda: pickled_experts(folder, names))
        return [*draw, f'experts.path_of="{folder}/{{task}}/finetuned.pt"']

    return options


@by_family(sorted(set(NAMES) - set(LARGER)))
def test_it_runs_to_its_end_and_its_table_has_published_columns(name, hub, extra, monkeypatch):
    status, results = run(name, hub(name), monkeypatch, *extra(name))
    assert status == 0
    check(name, results)


@by_family(LARGER)
def test_a_larger_backbone_differs_in_numbers_and_its_own_cells_run(name, hub, extra, monkeypatch):
    smaller = {kind(cell) for cell in cells(name.replace("b16", "b32").replace("l14", "b32"))}
    here = cells(name)
    first = [cell for row in ROWS for cell in [next((c for c in here if row in c), None)] if cell]
    new = [cell for cell in here if kind(cell) not in smaller]
    assert len(first) >= 3 and len(new) <= 6, "the smaller backbone has not these rows: run this table to its end"

    def own(every):
        return [cell for cell, plain in zip(every, here, strict=True) if plain in (*first, *new)]

    status, results = run(name, hub(name), monkeypatch, *extra(name), select=own)
    assert status == 0
    check(name, results)


def test_open_questions_are_among_them():
    assert set(NAMES) - set(LARGER) >= QUESTIONS and len(LARGER) == 8
    assert all(plan(name)["rows"] for name in NAMES)
