"""Checks of options: what passes is returned, what fails names the option, the value and the remedy."""

from math import inf, nan

import pytest

from byom.errors import OptionError, at_least, fraction, one_of, positive, whole


def test_what_is_in_range_is_returned():
    assert one_of("merge.scope", "row", ["tensor", "row"]) == "row"
    assert [fraction("m", value) for value in (0, 0.3, 1.0)] == [0, 0.3, 1.0]
    assert fraction("m", 0.4, below=0.5) == 0.4
    assert positive("rate", 1e-9, "0.1") == 1e-9
    assert at_least("prior", 0, 0, "1") == 0 and at_least("prior", 7.5, 0, "1") == 7.5
    assert whole("steps", 0, 0) == 0 and whole("steps", 3, 1) == 3


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: one_of("merge.rank", "all", ["full"]), r"merge\.rank=all is not known; use full$"),
        (lambda: one_of("x", "d", ["a", "b", "c"]), "x=d is not known; use a, b or c$"),
        (lambda: fraction("m", 10), r"m=10 is not a fraction in \[0, 1\]; write 10 % as m=0\.1"),
        (lambda: fraction("m", nan), "m=nan is not a fraction"),
        (lambda: fraction("m", "0.1"), "m=0.1 is not a fraction"),
        (lambda: fraction("m", 0.5, below=0.5), r"m=0\.5 is not a fraction in \[0, 0\.5\)"),
        (lambda: positive("rate", 0, "0.1"), r"rate=0 is not a positive number; use for example 0\.1"),
        (lambda: positive("rate", inf, "0.1"), "rate=inf is not"),
        (lambda: positive("rate", nan, "0.1"), "rate=nan is not"),
        (lambda: at_least("prior", -1e-9, 0, "1"), "prior=-1e-09 must be 0 or more, and finite; use for example 1"),
        (lambda: at_least("prior", nan, 0, "1"), "prior=nan must be"),
        (lambda: whole("steps", 0, 1), "steps=0 must be a whole number, 1 or more"),
        (lambda: whole("steps", 2.0, 1), "steps=2.0 must be a whole number"),
    ],
)
def test_what_is_not_is_refused(check, message):
    with pytest.raises(OptionError, match=message):
        check()
