"""Metrics equal their definitions, scores survive JSON, and intervals of correlations are real resamples."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import matthews_corrcoef

from byom.data.source.table import Table
from byom.data.suite import Suite, Task
from byom.errors import DataError, OptionError
from byom.functional.metrics import METRICS, Metric, metric, value_of
from byom.pipeline.evaluate import Score, evaluate
from byom.report.bootstrap import RESAMPLES, gain_interval, interval, points
from byom.report.report import as_markdown
from byom.storage.parts import TaskScore
from tests.unit import synthetic_runs as synthetic


def pair(seed=0, count=40):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(count, generator=generator)
    return labels + 0.3 * torch.randn(count, generator=generator), labels


def test_correlations_are_those_of_the_definitions():
    predictions, labels = pair()
    pearson, spearman = np.corrcoef(predictions, labels)[0, 1], spearmanr(predictions, labels).statistic
    assert metric("spearman")(predictions, labels) == pytest.approx(spearman)
    assert metric("pearson_spearman")(predictions, labels) == pytest.approx((pearson + spearman) / 2, abs=1e-6)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(("classes", "count"), [(2, 1), (2, 40), (5, 300), (3, 200_000)])
def test_matthews_is_that_of_scikit_learn(classes, count):
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=count)
    for predictions in (
        np.where(rng.random(count) < 0.4, labels, rng.integers(classes, size=count)),
        labels,
        0 * labels,
    ):
        expected = matthews_corrcoef(labels, predictions)
        assert METRICS["matthews"].value(predictions, labels) == pytest.approx(expected, abs=1e-12)
        assert METRICS["matthews"].value(predictions + 7, labels + 7) == pytest.approx(expected, abs=1e-12)


def test_matthews_is_the_correlation_of_two_binary_vectors():
    predictions, labels = torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([0, 1, 0, 0, 1, 0])
    assert metric("matthews")(predictions, labels) == pytest.approx(np.corrcoef(predictions, labels)[0, 1])


@pytest.mark.parametrize("name", METRICS)
def test_perfect_is_one_and_a_constant_prediction_of_a_correlation_is_none(name):
    labels = torch.tensor([0.0, 1.0, 2.0, 1.0]) if METRICS[name].regression else torch.tensor([0, 1, 1, 0])
    if METRICS[name].predict:
        return  # its predictions are not shaped as labels are
    assert metric(name)(labels, labels) == pytest.approx(1)
    if not METRICS[name].decomposes:
        assert metric(name)(torch.zeros_like(labels), labels) == 0


@pytest.mark.parametrize("name", ["spearman", "pearson_spearman"])
def test_nothing_correlates_with_constant_labels(name):
    assert metric(name)(torch.tensor([0.1, 0.2, 0.7]), torch.ones(3)) == 0


def test_an_unknown_metric_is_refused():
    with pytest.raises(OptionError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        metric("acuracy")


@pytest.mark.parametrize("name", METRICS)
def test_scores_survive_json(name):
    if METRICS[name].regression:
        score = Score(*pair(), name)
    else:
        predictions = torch.tensor([0, 1, 2, 1])
        read = METRICS[name].predict
        score = Score(read(torch.eye(9)[predictions]) if read else predictions, torch.tensor([0, 1, 1, 1]), name)
    row = json.loads(json.dumps(score.to_json()))
    assert value_of(row) == pytest.approx(score.value)
    assert Score.from_json(row).value == pytest.approx(score.value, abs=1e-5)
    assert Score.from_json(row).metric == name == TaskScore.lift(row).metric
    if METRICS[name].decomposes:
        assert Score.from_json(row).points.tolist() == score.points.tolist()


def test_a_head_may_say_what_its_logits_predict():
    class Doubled:
        def __call__(self, features):
            return features

        def predict(self, logits):
            return 2 * logits[:, 0]

    from byom.data.splits import Split

    net = torch.nn.Identity()
    net.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    net.forward = lambda pixels: pixels
    labels = torch.tensor([0.5, 1.0, 0.25])
    split = Split({"pixels": labels[:, None] / 2}, labels)
    assert evaluate(net, Doubled(), split, 2, "spearman").predictions.tolist() == labels.tolist()


def correlated(seed, noise):
    labels = torch.arange(60.0)
    noisy = labels + noise * torch.randn(60, generator=torch.Generator().manual_seed(seed))
    return TaskScore.lift(Score(noisy, labels, "spearman").to_json())


@pytest.mark.slow
def test_a_correlations_interval_holds_its_gain_and_not_zero_where_one_model_is_far_better():
    good, bad = {"stsb": correlated(0, 1)}, {"stsb": correlated(1, 60)}
    low, high = gain_interval([(good, bad)])
    assert 0 < low < good["stsb"].value - bad["stsb"].value < high
    assert gain_interval([(good, good)]) == (0, 0)
    assert gain_interval([(good, bad)]) == (low, high)


def test_hits_and_correlations_share_an_interval():
    drawn = [torch.rand(50, generator=torch.Generator().manual_seed(s)) > 0.4 for s in (0, 1)]
    hits = [TaskScore.lift(Score.of(one).to_json()) for one in drawn]
    alone = gain_interval([({"a": hits[0]}, {"a": hits[1]})])
    assert alone == interval([points(hits[0], "a") - points(hits[1], "a")])
    both = gain_interval([({"a": hits[0], "b": correlated(0, 5)}, {"a": hits[1], "b": correlated(0, 5)})])
    assert both[1] - both[0] == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15)
    assert RESAMPLES >= 1000


def task(name="stsb", **options):
    return Task(name, Table("/nowhere", {"train": "x.csv"}), "text", ("low", "high"), **options)


def test_labels_of_a_correlation_are_numbers():
    assert task(metric="spearman").index("3.8") == 3.8
    with pytest.raises(DataError, match="has the label 'high', which is not a number"):
        task(metric="spearman").index("high")


def test_a_cut_suite_is_a_suite_of_its_own_and_its_subsets_are_nested():
    tasks = tuple(task(f"t{i}") for i in range(6))
    small, large = (Suite("six", tasks, size=size, draw=3) for size in (2, 4))
    assert (small.name, large.name) == ("six-2-3", "six-4-3")
    assert {t.name for t in small.tasks} < {t.name for t in large.tasks} < {t.name for t in tasks}
    draws = {tuple(t.name for t in Suite("six", tasks, size=3, draw=d).tasks) for d in range(8)}
    assert len(draws) > 3
    with pytest.raises(OptionError, match=r"suite.size=7: suite six has 6 tasks"):
        Suite("six", tasks, size=7)


def test_a_suite_is_cut_to_named_tasks():
    tasks = tuple(task(f"t{i}") for i in range(4))
    cut = Suite("four", tasks, only=("t3", "t1"))
    assert (cut.name, [t.name for t in cut.tasks]) == ("four-t3-t1", ["t3", "t1"])
    with pytest.raises(OptionError, match=r"suite.only names 't9'"):
        Suite("four", tasks, only=("t9",))


class Identity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixels):
        return pixels


def scored(logits, labels, name):
    from byom.data.splits import Split

    return evaluate(Identity(), lambda features: features, Split({"pixels": logits}, labels), 7, name)


def _distance(predictions, labels):
    return 1 - np.abs(predictions - labels) / 9


@pytest.fixture
def nearness(monkeypatch):
    """Define a metric whose examples score numbers between 0 and 1, as token F1 does."""
    monkeypatch.setitem(METRICS, "nearness", Metric("nearness", points=_distance))
    return "nearness"


def test_top5_counts_labels_among_the_five_largest_logits():
    logits = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(12, (64,), generator=torch.Generator().manual_seed(1))
    score = scored(logits, labels, "top5")
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert score.points.tolist() == (ranks < 5).tolist()
    assert score.value == pytest.approx(float((ranks < 5).double().mean()))
    assert scored(logits[:, :4], labels % 4, "top5").value == 1
    assert scored(logits, labels, "accuracy").value < score.value < 1


def test_means_over_examples_go_through_record_table_and_bootstrap(nearness):
    labels = torch.randint(10, (80,), generator=torch.Generator().manual_seed(1))
    noise = torch.randn(80, 10, generator=torch.Generator().manual_seed(2))
    right = torch.nn.functional.one_hot(labels, 10)
    for name in ("top5", nearness):
        good, bad = (scored(noise + gain * right, labels, name).to_json() for gain in (3.0, 0.5))
        made = [synthetic.record("ties", variant, 0, m) for variant, m in (("none", 0.0), ("fft", 0.1))]
        made.append(synthetic.record("pretrained", "post_pruning", 0, 0.1))
        for one, row in zip(made, (bad, good, bad), strict=True):
            values = [*one["scores"]["test"].values()]
            one["scores"]["test"]["svhn"] = json.loads(json.dumps(row))
            one["summary"]["test"]["absolute"] += (row["value"] - values[1]["accuracy"]) / len(values)
        tables = synthetic.tables(made)
        assert f"svhn: {METRICS[name].title}" in as_markdown(tables)
        row = tables.frame.set_index("method").loc["BYOM-FFT on TIES"]
        assert row["accuracy_svhn"] == pytest.approx(good["value"])
        (compared,) = tables.comparison.to_dict("records")
        assert compared["lower"] < compared["difference"] < compared["upper"]
        ours, theirs = ({"svhn": TaskScore.lift(row)} for row in (good, bad))
        low, high = gain_interval([(ours, theirs)])
        assert 0 < low < good["value"] - bad["value"] < high


def test_points_that_are_not_bits_survive_json(nearness):
    score = Score(torch.tensor([1, 5, 9]), torch.tensor([1, 2, 0]), nearness)
    row = json.loads(json.dumps(score.to_json()))
    assert "hits" not in row and points(TaskScore.lift(row), "a").tolist() == pytest.approx([1, 2 / 3, 0])
    assert Score.from_json(row).value == score.value == pytest.approx(5 / 9)


def test_a_metric_is_either_a_mean_over_examples_or_not():
    with pytest.raises(OptionError, match="either compute or points"):
        Metric("nothing")
    with pytest.raises(OptionError, match="Spearman correlation is not a mean over examples"):
        _ = Score(*pair(), "spearman").points
