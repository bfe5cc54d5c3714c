"""Every published table on images runs to its end on tiny data in the hubs' own schema and formats."""

import pytest

from byom.cli import config
from tests.e2e.published import IMAGES, add_images, check, run
from tests.published_models import pickled_experts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]
NAMES = [name for name in IMAGES if name.startswith("vision")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return add_images(tmp_path_factory.mktemp("hub"), NAMES)


@pytest.fixture(scope="module")
def pickles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickles")
    pickled_experts(folder, config.option("experts", "task_vectors_b32").names)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_its_end_and_its_table_has_published_columns(name, home, pickles, monkeypatch):
    extra = [f'experts.path_of="{pickles}/{{task}}/finetuned.pt"'] * name.endswith("_ta")
    status, results = run(name, home, monkeypatch, *extra)
    assert status == 0
    check(name, results)
