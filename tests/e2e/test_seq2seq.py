"""A tiny T5 through the pipeline: fine-tuned whole and by LoRA on words and numbers, merged, put back, generated."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from byom.backbone.seq2seq import Seq2Seq
from byom.cli import config
from byom.data.source.table import Table
from byom.data.suite import Suite, Task
from byom.functional.metrics import value_of
from byom.pipeline.labs import laboratory
from byom.pipeline.run import run
from byom.weights.lowrank import Adapted
from tests.problems import slow
from tests.tiny_t5 import tiny_t5

pytestmark = pytest.mark.data  # of the default suite, whose settings are what these start from

MOODS = {"good": "good", "fine": "good", "bad": "not good", "poor": "not good"}
STARS = {"poor": "1.0", "bad": "1.0", "fine": "2.0", "good": "3.5"}
SIZES = {"train": 240, "validation": 24, "test": 48, "shots": 2}


def write(folder, name, labels):
    """Write texts in which one word tells the label."""
    chance = random.Random(0)
    words = ["it", "is", "was", "a", "film", "day", "mood"]
    texts = {" ".join(chance.choices(words, k=4)) + f" {word}": labels[word] for word in [*labels] * 120}
    rows = [json.dumps({"text": text, "label": label}) for text, label in texts.items()]
    chance.shuffle(rows)
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return Table(str(folder), {"train": f"{name}.jsonl"})


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    mood = Task("mood", write(folder, "mood", MOODS), "text", ("good", "not good"), prompt="how is {text} ?", **SIZES)
    values = tuple(sorted(set(STARS.values())))
    stars = Task(
        "stars", write(folder, "stars", STARS), "text", values, prompt="and {text} ?", metric="spearman", **SIZES
    )
    backbone = Seq2Seq(str(tiny_t5(folder / "t5")), max_length=12, max_new_tokens=4, learning_rate=3e-3)

    def make(*options, **changes):
        places = [f"results={folder}/results", f"cache={folder}/cache", "evaluate=test"]
        made = config.settings([*places, "finetune.epochs=6", "finetune.batch_size=16", *options])
        return replace(made, suite=Suite("words", (mood, stars)), backbone=replace(backbone, **changes))

    return make


def test_experts_learn_to_say_the_answers_and_a_merged_model_runs(settings):
    single = run(settings("byom=single_task", "merge=pretrained"))
    before = run(settings("byom=none", "merge=pretrained"))
    scores = {name: (read(before, name), read(single, name)) for name in ("mood", "stars")}
    assert all(after > 0.9 and after > first + 0.3 for first, after in scores.values()), scores
    assert before["storage"]["parameters"] == laboratory(settings()).pretrained.numel
    put_back = run(settings("byom=fft", "byom.density=0.5", "merge=task_arithmetic"))
    assert read(put_back, "mood") >= read(run(settings("byom=none", "merge=task_arithmetic")), "mood")


@pytest.mark.slow
def test_adapters_learn_too_and_stay_small(settings):
    lora = ["finetune=lora", "finetune.rank=4", "finetune.learning_rate=0.03", "finetune.epochs=8"]
    scored = {"answer": "scored"}
    before = run(settings(*lora, "byom=none", "merge=pretrained", **scored))
    after = run(settings(*lora, "byom=single_task", **scored))
    assert read(after, "mood") > read(before, "mood") + 0.2
    experts = laboratory(settings(*lora, **scored)).expert("mood")
    assert isinstance(experts, Adapted) and len(experts.factored) == 3 * 4, "three attentions of four matrices"


@pytest.mark.filterwarnings("ignore:fisher. Answering refuses vmap")
@pytest.mark.parametrize(
    "options",
    [
        ["merge=regmean"],
        *slow(["merge=fisher", "statistics.fisher.examples=16"], ["merge=adamerging", "merge.steps=4"]),
    ],
)
def test_methods_that_look_at_inputs_see_likelihoods_of_answers(settings, options):
    merged = run(settings("byom=none", *options, answer="scored"))
    plain = run(settings("byom=none", "merge=pretrained", answer="scored"))
    assert read(merged, "mood") > read(plain, "mood")


def read(record, task):
    return value_of(record["scores"]["test"][task])
