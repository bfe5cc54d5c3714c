"""Every published experiment on texts runs to its end on tiny data in the hubs' own schema and formats."""

import pytest

from byom.cli import config
from tests.e2e.published import check, chosen, run
from tests.hub import build
from tests.problems import slow
from tests.published_models import add_experts, add_flan_t5, add_roberta

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:fisher. .* refuses vmap"),
]
SAMPLE = ("glue8_roberta_fft",)
"""What `make test` runs of them."""
NAMES = [n for n in config.options("experiment") if (chosen(n, "suite") or "").startswith(("glue", "flan"))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder, ["glue8"])
    add_flan_t5(folder, folder / "work")
    add_roberta(folder, folder / "work")
    for option, suite in {chosen(n, "experts"): chosen(n, "suite") for n in NAMES if chosen(n, "experts")}.items():
        add_experts(folder, option, "glue8_text" if suite == "flan4" else suite, folder / "work")
    return folder


@pytest.mark.parametrize("name", [*SAMPLE, *slow(*sorted({*NAMES} - {*SAMPLE}))])
def test_it_runs_to_its_end_and_its_table_has_published_columns(name, home, monkeypatch):
    tasks = [t.name for t in config.option("suite", chosen(name, "suite")).tasks]
    extra = [f"suite.tasks.{task}.validation=4" for task in tasks]
    status, results = run(name, home, monkeypatch, "finetune.epochs=1", *extra)
    assert status == 0
    check(name, results)
