from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from byom.report.figures import style
from experiments.lora import page as lora
from experiments.lora.tables import SPARSE
from tests.e2e.published import png_alone
from tests.unit import synthetic_ranks as synthetic

STEM = "vision8_offline--vit_small_dinov2"
PAGE = lora.PAGE.read_text(encoding="utf-8")


def spectrum() -> dict:
    one = synthetic.spectrum(power=True)
    return {"kinds": {"q": one}, "all": one}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "lora"
    synthetic.write(folder, synthetic.every())
    (folder / "spectra").mkdir()
    (folder / "spectra" / f"{STEM}--full.json").write_text(json.dumps(spectrum()))
    return folder


def block(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.S)
    assert found, name
    return found[1]


def test_the_page_has_every_part():
    for suite in lora.SUITES:
        for part in lora.PARTS:
            assert PAGE.count(f"<!-- {part}:{suite} -->") == PAGE.count(f"<!-- /{part}:{suite} -->") == 1


def test_tables_figures_and_page_are_made_from_records(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    lora.main(results, page)
    tables = {f"{STEM}--{part}.{ending}" for part in ("rank", "bytes", "recipes") for ending in ("md", "csv")}
    assert {path.name for path in (results / "tables").iterdir()} == tables
    drawn = ("accuracy-by-rank", "error-by-rank", "accuracy-by-bytes", "recipes", "singular-values")
    figures = {f"{STEM}--{name}.{ending}" for name in drawn for ending in ("png", "pdf")}
    assert {path.name for path in (results / "figures").iterdir()} == figures
    text = page.read_text(encoding="utf-8")
    assert "| BYOM-LoRA, global ranks | 8 |" in block(text, "rank:vision")
    assert "BYOM-FFT on TIES" in block(text, "bytes:vision") and "| IA3 |" in block(text, "recipes:vision")
    assert "| q | 384 |" in block(text, "spectra:vision")
    assert not any(block(text, f"{part}:text") for part in lora.PARTS)
    csv = pd.read_csv(results / "tables" / f"{STEM}--rank.csv")
    assert set(csv["expert"]) == set(lora.TITLES.values())


@pytest.mark.slow
def test_what_is_made_depends_on_records_alone(results, tmp_path):
    page = lora.fill(PAGE, results)
    assert lora.fill(page, results) == page
    found = lora.find(results, *lora.SUITES["vision"])
    one, two = ([path.read_bytes() for path in lora.tables(found, tmp_path / name)] for name in "ab")
    assert one == two and len(one) == 6


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("none",), ("single_task",), ("lora",), ("lora", "fft"), ("none", "fft")])
@pytest.mark.parametrize("count", [1, 30])
def test_some_rows_are_enough(wanted, count, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "_save", png_alone(style._save))
    some = [r for r in synthetic.every()["adapters"] if r["choices"]["byom"] in wanted][:count]
    synthetic.write(tmp_path, {"adapters": some})
    found = lora.find(tmp_path, *lora.SUITES["vision"])
    assert lora.tables(found, tmp_path / "tables")
    lora.figures(found, tmp_path / "figures")
    (shown,) = found.ranked().values()
    assert len(shown) == len(some)
    for name in shown[~shown["family"].isin(SPARSE)]["method"]:
        assert f"| {name} |" in block(lora.fill(PAGE, tmp_path), "rank:vision")


def test_failed_runs_alone_are_no_records(tmp_path):
    failed = synthetic.record("pretrained", "none") | {"status": "failed", "error": "interrupted"}
    synthetic.write(tmp_path, {"adapters": [failed]})
    assert not lora.find(tmp_path, *lora.SUITES["vision"]).records


def test_without_records_nothing_is_written(tmp_path):
    found = lora.find(tmp_path, *lora.SUITES["text"])
    assert lora.tables(found, tmp_path / "tables") == lora.figures(found, tmp_path / "figures") == []
    assert not any(block(lora.fill(PAGE, tmp_path), f"{part}:text") for part in lora.PARTS)
