"""Every mutant of ``tests/mutants`` can be planted: its text stands once in today's code."""

from pathlib import Path

import byom
from tests.mutants.mutant import locate
from tests.mutants.mutants import MUTANTS


def test_the_text_of_every_mutant_stands_once():
    assert len(locate(MUTANTS, Path(byom.__file__).parent)) == len(MUTANTS) >= 60
