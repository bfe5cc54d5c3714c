"""Every published experiment on images runs to its end on tiny data in the hubs' own schema and formats."""

import pytest

from byom import config
from tests.e2e.published import check, chosen, plan, run
from tests.hub import build
from tests.published_models import add_experts, pickled_experts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]
NAMES = [n for n in config.options("experiment") if chosen(n, "experts") and chosen(n, "suite").startswith("vision")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder, ["vision20"])
    wanted = {(chosen(name, "experts"), chosen(name, "suite")) for name in NAMES}
    for option in sorted({option for option, _ in wanted if not option.startswith("task_vectors")}):
        add_experts(folder, option, "vision20" if (option, "vision20") in wanted else "vision8", folder / "work")
    return folder


@pytest.fixture(scope="module")
def pickles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickles")
    pickled_experts(folder, config.option("experts", "task_vectors_b32").names)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_its_end_and_its_table_has_published_columns(name, home, pickles, monkeypatch):
    extra = ["suite.draw=0"] if name == "number_of_tasks" else []
    if chosen(name, "experts").startswith("task_vectors"):
        extra.append(f'experts.path_of="{pickles}/{{task}}/finetuned.pt"')
    status, results = run(name, home, home / "made" / chosen(name, "results"), monkeypatch, *extra)
    assert status == 0
    check(name, results)


def test_open_questions_are_among_them():
    asked = {
        "number_of_tasks",
        "diverse_tasks",
        "byom_vs_joint_training",
        "density_sweep",
        "rank_sweep",
        "prune_then_merge",
    }
    assert asked <= set(NAMES)
    assert all(plan(name)["rows"] for name in NAMES)
