"""The committed tables of the LoRA experiments and the parts of their page are those of the committed records."""

from __future__ import annotations

from experiments.lora import page as lora


def test_lora_tables_are_current(tmp_path):
    made = [path for names in lora.SUITES.values() for path in lora.tables(lora.find(lora.RESULTS, *names), tmp_path)]
    assert {path.name for path in made} == {path.name for path in (lora.RESULTS / "tables").iterdir()}
    for path in made:
        assert path.read_bytes() == (lora.RESULTS / "tables" / path.name).read_bytes(), path.name
    page = lora.PAGE.read_text(encoding="utf-8")
    assert lora.fill(page) == page
