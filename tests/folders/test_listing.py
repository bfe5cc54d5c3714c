"""``byom list merge`` says which methods merge folders."""

from __future__ import annotations

from byom.__main__ import main


def test_the_list_says_what_needs_weights_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BYOM_CACHE", str(tmp_path))
    assert main(["list", "merge", "byom"]) == 0
    every, merge, variants, alone, *_ = capsys.readouterr().out.splitlines()
    methods = merge.partition(": ")[2].split(", ")
    assert {"average", "ties", "dare", "tsv"} <= set(methods) and not {"fisher", "regmean", "mtl", "adamerging"} & set(
        methods
    )
    assert "fisher" in every and "surgery" in variants and "surgery" not in alone and "fft" in alone
    assert main(["list", "tune"]) == 0
    assert "weights alone" not in capsys.readouterr().out
