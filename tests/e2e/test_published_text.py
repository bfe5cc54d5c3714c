"""Every published experiment on texts runs to its end on tiny data in the hubs' own schema and formats."""

import pytest

from byom.cli import config
from tests.e2e.published import check, chosen, run
from tests.hub import build, once
from tests.problems import slow
from tests.published_models import add_experts, add_flan_t5, add_roberta

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:fisher. .* refuses vmap"),
]
SAMPLE = ("glue8_roberta_lora",)
"""What `make test` runs of them."""
NAMES = [n for n in config.options("experiment") if (chosen(n, "suite") or "").startswith(("glue", "flan"))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub of all data sets, to which models and experts are added when an experiment asks for them."""
    folder = tmp_path_factory.mktemp("hub")
    build(folder, ["glue8"])
    suites = {chosen(n, "experts"): chosen(n, "suite") for n in NAMES}

    def home(name):
        models = add_roberta if "roberta" in name else add_flan_t5
        once(folder, models.__name__, lambda: models(folder, folder / "work"))
        if option := chosen(name, "experts"):
            suite = "glue8_text" if suites[option] == "flan4" else suites[option]
            once(folder, option, lambda: add_experts(folder, option, suite, folder / "work"))
        return folder

    return home


@pytest.mark.parametrize("name", [*SAMPLE, *slow(*sorted({*NAMES} - {*SAMPLE}))])
def test_it_runs_to_its_end_and_its_table_has_published_columns(name, hub, monkeypatch):
    tasks = [t.name for t in config.option("suite", chosen(name, "suite")).tasks]
    extra = [f"suite.tasks.{task}.validation=4" for task in tasks]
    status, results = run(name, hub(name), monkeypatch, "finetune.epochs=1", *extra)
    assert status == 0
    check(name, results)
