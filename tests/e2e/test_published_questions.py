"""Every sweep, comparison and open question on images runs to its end on tiny data in the hubs' own formats."""

import pytest

from tests.e2e.published import IMAGES, add_images, check, plan, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]
NAMES = [name for name in IMAGES if not name.startswith("vision")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return add_images(tmp_path_factory.mktemp("hub"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_its_end_and_leaves_its_tables(name, home, monkeypatch):
    status, results = run(name, home, monkeypatch, *["suite.draw=0"] * (name == "number_of_tasks"))
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
