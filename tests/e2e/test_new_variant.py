"""The sparse variant of CONTRIBUTING.md, added to a copy of the tree and held to the laws of the contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = ["-q", "-k", "rows", "-p", "no:cacheprovider", "tests/contract/test_variants.py"]


def test_a_new_sparse_variant_is_one_python_file_and_one_yaml(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("byom", "conf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    chapter = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a variant")[2]
    python, option = (re.search(rf"```{kind}\n(.*?)```", chapter, re.S)[1] for kind in ("python", "yaml"))
    (tmp_path / "byom" / "variants" / "rows.py").write_text(python)
    (tmp_path / "conf" / "byom" / "rows.yaml").write_text(option)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    laws = subprocess.run(
        [sys.executable, "-m", "pytest", *CONTRACT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert laws.returncode == 0, laws.stdout[-3000:]
    assert laws.stdout.count(".") > 50  # the laws found the option
