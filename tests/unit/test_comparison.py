from __future__ import annotations

import numpy as np
import pytest

from byom.errors import ByomError
from byom.report.bootstrap import interval, points
from byom.report.comparison import display_comparison
from byom.storage.parts import TaskScore
from tests.unit import synthetic_runs as synthetic


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return synthetic.records()


def test_hits_unpack_most_significant_bit_first():
    bits = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 0])
    packed = np.packbits(bits).tobytes().hex()
    assert points(TaskScore("accuracy", 0.5, 10, packed), "mnist").tolist() == bits.tolist()
    for examples in (17, 8):
        with pytest.raises(ByomError, match="hits of mnist hold 2 bytes"):
            points(TaskScore("accuracy", 0.5, examples, packed), "mnist")
    with pytest.raises(ByomError, match="hits of mnist hold 2 values"):
        points(TaskScore("f1", 0.5, 3, points=(0.5, 0.5)), "mnist")


def test_hits_agree_with_accuracy(records):
    score = records[0]["scores"]["test"]["svhn"]
    assert points(TaskScore.lift(score), "svhn").mean() == pytest.approx(score["accuracy"])


def test_interval_agrees_with_drawing_examples_one_by_one():
    rng = np.random.default_rng(3)
    tasks = [rng.integers(-1, 2, n) / 1.0 for n in (300, 120)]
    drawn = [task[rng.integers(0, len(task), (20_000, len(task)))].mean(1) for task in tasks]
    expected = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    assert interval(tasks) == pytest.approx(expected, abs=0.005)
    assert interval(tasks) == interval(tasks)


def test_interval_of_equal_models_is_a_point():
    assert interval([np.zeros(50)]) == (0, 0)


def test_comparison_is_paired(records):
    found = synthetic.tables(records).comparison.set_index(["method", "density"])
    row = found.loc[("BYOM-FFT on TIES", 0.05)]

    def means(merge, variant):
        kept = [r for r in records if r["choices"]["merge"] == merge and r["choices"]["byom"] == variant]
        kept = [r for r in kept if r["hyperparameters"]["byom"]["density"] == 0.05]
        return np.array([r["summary"]["test"]["absolute"] for r in kept])

    differences = means("ties", "fft") - means("pretrained", "post_pruning")
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["difference_std"] == pytest.approx(differences.std(ddof=1))
    assert row["lower"] < row["difference"] < row["upper"]
    assert row["distance"] == pytest.approx(1.15 - 0.4 * synthetic.REACHED["ties"])
    assert row["seeds"] == 3


def test_comparison_uses_the_seeds_both_have(records):
    fewer = [r for r in records if r["choices"]["byom"] != "post_pruning" or r["choices"]["seed"] == 1]
    found = synthetic.tables(fewer).comparison
    assert set(found["seeds"]) == {1}
    assert found["difference_std"].isna().all()


def test_comparison_without_a_partner_is_blank(records):
    alone = synthetic.tables([r for r in records if r["choices"]["byom"] == "fft"]).comparison
    assert alone["difference"].isna().all()
    assert set(display_comparison(alone)["95 % interval"]) == {"—"}
    assert len(synthetic.tables([records[0]]).comparison) == 0


def test_no_norms_no_ratio(records):
    bare = [{name: value for name, value in r.items() if name != "norms"} for r in records]
    found = synthetic.tables(bare).comparison
    assert found[["distance", "residual"]].isna().all(axis=None)
    assert found["difference"].notna().all()
