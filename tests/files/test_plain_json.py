"""JSON with a name that is given twice is refused at every level."""

import json

import pytest

from opacus_pi.files.plain_json import plain_json


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]', '{"": 0, "": 1}']
)
def test_names_that_are_given_twice_are_refused(text):
    json.loads(text)
    with pytest.raises(ValueError, match="is given twice"):
        plain_json(text)


@pytest.mark.parametrize("value", [{"a": [{"a": 1}, {"a": 2}]}, [], None, {}, "a"])
def test_other_texts_are_read_as_python_reads_them(value):
    assert plain_json(json.dumps(value)) == value
