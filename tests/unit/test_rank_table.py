from __future__ import annotations

import numpy as np
import pytest

from byom.errors import ByomError
from byom.report.bootstrap import points
from byom.report.rows import rows
from experiments.lora import display
from experiments.lora import tables as table
from tests.unit import synthetic_ranks as synthetic
from tests.unit.synthetic_runs import lift


@pytest.fixture(scope="module")
def records():
    return synthetic.lifted()


@pytest.fixture(scope="module")
def frame(records):
    return table.ranked(records["adapters"])


def only(frame, family, **values):
    kept = frame[frame["family"] == family]
    for name, value in values.items():
        kept = kept[kept[name] == value]
    (row,) = kept.to_dict("records")
    return row


def test_rows_stand_by_family_and_rank(frame):
    kinds = list(dict.fromkeys(frame["family"]))
    assert kinds == [kind for kind in table.FAMILIES if kind in kinds]
    assert set(kinds) == set(table.FAMILIES)
    for name, ranks in (("lora", synthetic.RANKS), ("lora_global", (1, 2, 4, 8)), ("lora_merged", (1, 4, 16))):
        assert tuple(frame[frame["family"] == name]["rank"]) == ranks
    assert tuple(frame[frame["family"] == "post_pruning"]["density"]) == synthetic.DENSITIES


def test_names_leave_rank_and_density_to_their_columns(frame):
    names = frame.groupby("family")["method"].unique().map(list).to_dict()
    assert names["lora"] == ["BYOM-LoRA"]
    assert names["lora_global"] == ["BYOM-LoRA, global ranks"]
    assert names["lora_merged"] == ["BYOM-LoRA on TIES"]
    assert names["fft"] == ["BYOM-FFT on TIES"]
    assert names["merged"] == ["Averaging", "Task Arithmetic", "TIES"]


def test_the_order_of_records_does_not_matter(records, frame):
    assert table.ranked(records["adapters"][::-1]).equals(frame)


def test_what_is_stored_is_counted_as_in_the_paper(frame):
    one, own = only(frame, "lora", rank=4), only(frame, "single_task")
    assert one["task_parameters"] == synthetic.MATRICES * 4 * (synthetic.SIDES + 1)
    assert one["task_bytes"] == 4 * one["task_parameters"]
    assert one["parameters"] == synthetic.runs.SIZE + len(synthetic.TASKS) * one["task_parameters"]
    assert own["task_parameters"] == synthetic.MATRICES * synthetic.RANK * synthetic.SIDES


def test_relative_error_is_what_is_dropped_of_the_whole_difference(records, frame):
    found = only(frame, "lora", rank=4)
    (one,) = [r for r in records["adapters"] if r.variant_settings == _plain(4)]
    expected = {task: norms.dropped / norms.to_pretrained for task, norms in one.norms.items()}
    assert {task: found[f"error_{task}"] for task in synthetic.TASKS} == pytest.approx(expected)
    assert found["error"] == pytest.approx(np.mean(list(expected.values())))
    assert only(frame, "pretrained")["error"] == 1
    assert only(frame, "single_task")["error"] == only(frame, "lora", rank=64)["error"] == 0


def _plain(rank):
    return {"rank": rank, "rank_allocation": "uniform", "reference": "pretrained"}


def test_a_task_that_did_not_move_has_no_error_and_one_not_measured_no_number():
    still, unmeasured = (synthetic.record("pretrained", "lora", **_plain(2)) for _ in range(2))
    still["norms"] = {task: dict.fromkeys(norms, 0.0) for task, norms in still["norms"].items()}
    unmeasured["norms"] = {}
    assert table.ranked(lift([still]))["error"].item() == 0
    assert np.isnan(table.ranked(lift([unmeasured]))["error"].item())
    assert display.display_ranks(table.ranked(lift([unmeasured])))["Relative error"].item() == "—"


def test_seeds_become_a_mean_and_a_spread():
    (row,) = table.ranked(lift([synthetic.record("pretrained", "lora", seed, **_plain(2)) for seed in (0, 1)])).to_dict(
        "records"
    )
    means = [synthetic.record("pretrained", "lora", s, **_plain(2))["summary"]["test"]["absolute"] for s in (0, 1)]
    assert row["seeds"] == 2
    assert (row["mean"], row["mean_std"]) == pytest.approx((np.mean(means), np.std(means, ddof=1)))


def test_every_rank_stands_beside_the_sparse_row_nearest_in_bytes(records):
    found = table.at_equal_bytes(records["adapters"])
    uniform = found[found["method"] == "BYOM-LoRA"]
    assert set(uniform["sparse"]) == {"Post-Pruning", "BYOM-FFT on TIES"}
    for row in uniform.to_dict("records"):
        sizes = [6 * int(m * synthetic.runs.SIZE) for m in synthetic.DENSITIES]
        assert row["sparse_bytes"] == min(sizes, key=lambda size: abs(size - row["task_bytes"]))
    assert set(found["method"]) == {"BYOM-LoRA", "BYOM-LoRA, global ranks", "BYOM-LoRA on TIES"}


def test_sizes_more_than_a_tenth_apart_are_not_compared(records):
    found = table.at_equal_bytes(records["adapters"])
    far = abs(found["sparse_bytes"] - found["task_bytes"]) > 0.1 * found["task_bytes"]
    assert far.any() and not far.all()
    assert (found["difference"].isna() == far).all() and (found["lower"].isna() == far).all()
    shown = display.display_bytes(found)
    assert (shown.loc[far, "Difference (points)"] == "—").all()
    assert (shown.loc[far, "95 % interval"] == "—").all()
    assert (shown["Its kB per task"] != "—").all()


def test_the_difference_is_paired_over_examples(records):
    found = table.at_equal_bytes(records["adapters"])
    row = found[(found["method"] == "BYOM-LoRA") & (found["rank"] == 2)].to_dict("records")[0]
    assert row["difference"] == pytest.approx(row["mean"] - row["sparse_mean"])
    assert row["lower"] <= row["difference"] <= row["upper"]
    one, two = (next(r for r in rows(records["adapters"]) if r.variant == v) for v in ("single_task", "single_task"))
    same = table.difference(one, two)
    assert (same["difference"], same["lower"], same["upper"]) == (0, 0, 0)


def test_a_difference_takes_the_seeds_that_both_have():
    one, two = (
        rows(lift([synthetic.record("pretrained", "lora", s, **_plain(q)) for s in seeds]))[0]
        for q, seeds in ((4, (0, 1)), (1, (1, 2)))
    )
    found, (first, second) = table.difference(one, two), (one.records[1], two.records[0])
    hits = [np.mean(points(first.test[t], t) - points(second.test[t], t)) for t in synthetic.TASKS]
    assert found["pairs"] == 1
    assert found["difference"] == pytest.approx(np.mean(hits))
    assert np.isnan(table.difference(one, rows(lift([synthetic.record("pretrained", "none", 5)]))[0])["difference"])


def test_without_sparse_rows_nothing_is_compared(records):
    low = [r for r in records["adapters"] if r.choices.byom == "lora"]
    assert not len(table.at_equal_bytes(low))


def test_recipes_stand_beside_the_lora_of_equal_size(records):
    found = table.recipes(records).set_index("recipe")
    assert list(found.index) == list(table.RECIPES)
    assert list(found["method"]) == [
        "LoRA, rank 1 (q, k, v)",
        "IA3",
        "LoRA, rank 64 (q, k, v, out)",
        "Bottleneck, width 128",
        "Full fine-tuning",
    ]
    for recipe, lora in table.EQUAL.items():
        assert found["difference"][recipe] == pytest.approx(found["mean"][lora] - found["mean"][recipe])
        sizes = found["task_parameters"][[recipe, lora]]
        assert sizes.max() <= 1.01 * sizes.min()
    assert found["difference"][["rank1", "adapters", "full"]].isna().all()


def test_recipes_that_are_not_there_are_left_out(records):
    some = {name: records[name] for name in ("ia3", "full")}
    assert list(table.recipes(some)["recipe"]) == ["ia3", "full"]
    assert table.recipes(some)["difference"].isna().all()
    assert not len(table.recipes({"adapters": lift([synthetic.record("ties", "none")])}))
    assert not len(table.recipes({}))


def test_recipes_on_other_test_data_are_refused(records):
    odd = synthetic.other("ia3")
    odd["fingerprints"] = {"data": {task: {"test": "another"} for task in synthetic.TASKS}}
    with pytest.raises(ByomError, match="test data"):
        table.recipes({**records, "ia3": lift([odd])})


def test_the_printed_rank_table_has_no_sparse_rows(frame):
    shown = display.display_ranks(frame)
    assert not set(shown["Method"]) & {"Post-Pruning", "BYOM-FFT on TIES"}
    assert list(shown.columns) == [
        "Method",
        "q",
        *synthetic.TASKS,
        "Mean",
        "Normalised",
        *(display.HEADS[name] for name in ("task_parameters", "task_bytes", "parameters", "error")),
    ]
    first = shown[(shown["Method"] == "BYOM-LoRA") & (shown["q"] == "4")].to_dict("records")[0]
    assert first["Stored per task (M)"] == "0.1476" and first["Stored per task (kB)"] == "591"
    assert not set(synthetic.TASKS) & set(display.display_ranks(frame, by_task=False).columns)
