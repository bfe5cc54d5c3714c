"""The method and the variant of CONTRIBUTING.md, in a copy of the tree: they run and obey the laws of the contract."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tiny import overrides

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LAWS = [
    "-q", "-k", "median or rows", "-p", "no:cacheprovider", "-W", "ignore:Module already imported",
    "tests/contract/test_merge.py", "tests/contract/test_variants.py",
]  # fmt: skip
IN_THE_TREE = """
import json, sys
import pytest
from byom.__main__ import main

run, laws = json.loads(sys.argv[1])
assert main(run) == main(["list", "merge"]) == 0
print("laws:", flush=True)
sys.exit(pytest.main(laws))
"""


def add(tree, chapter, python, option):
    """Write the two files of a chapter where it says."""
    part = TEXT.partition(f"## {chapter}")[2]
    for kind, place in (("python", tree / "byom" / python), ("yaml", tree / "conf" / option)):
        assert not place.exists()
        place.write_text(re.search(rf"```{kind}\n(.*?)```", part, re.S)[1], encoding="utf-8")


@pytest.mark.slow
@pytest.mark.data
def test_a_new_method_and_a_new_variant_are_one_python_file_and_one_yaml_each(tmp_path):
    tree = tmp_path / "tree"
    for name in ("byom", "conf", "tests"):
        shutil.copytree(ROOT / name, tree / name)  # with what is compiled
    shutil.copy(ROOT / "pyproject.toml", tree)
    add(tree, "Adding a merge method", "merge/median.py", "merge/median.yaml")
    add(tree, "Adding a variant", "variants/rows.py", "byom/rows.yaml")
    run = ["run", *overrides(tmp_path), "merge=median", "byom=fft"]
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_TREE, json.dumps([run, LAWS])],
        cwd=tree, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    commands, _, laws = done.stdout.partition("laws:")
    assert "median + fft" in commands and re.search(r"^merge= .*\bmedian\b", commands, re.M)
    assert laws.count(".") > 80  # the laws found both
