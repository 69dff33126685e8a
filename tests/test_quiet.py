"""Warnings are ignored for a while, and shown ones stay shown."""

import warnings

import pytest

from opacus_pi._quiet import quiet


def told():
    warnings.warn("a place in the loop", UserWarning, stacklevel=2)


def loop(between, times=3):
    """Warn at one place in each round, and look at something between."""
    for _ in range(times):
        told()
        between()


def look(context):
    with context():
        warnings.simplefilter("ignore")
        told()


@pytest.mark.parametrize(
    ("between", "action", "number"),
    [
        (lambda: look(quiet), "default", 1),
        (lambda: look(quiet), "always", 3),
        (lambda: look(warnings.catch_warnings), "default", 3),  # what Python does
        (lambda: None, "default", 1),
        (lambda: look(lambda: quiet()), "module", 1),
    ],
)
def test_a_warning_is_shown_once(between, action, number):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        globals().pop("__warningregistry__", None)
        loop(between)
    assert [str(one.message) for one in caught] == ["a place in the loop"] * number


def test_errors_pass_and_filters_come_back():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = warnings.filters[:]
        with pytest.raises(KeyError), quiet():
            told()
            raise KeyError
        assert warnings.filters == before
        with pytest.raises(UserWarning):
            told()


def test_a_warning_that_was_not_shown_before_is_shown_afterwards():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        globals().pop("__warningregistry__", None)
        look(quiet)
        assert not caught
        told()
    assert len(caught) == 1
