"""The page on programs that cannot be accounted for says what really happens."""

import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "not-accounted.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
# What the examples of each section print, in this order.
EXPECTED = {
    "One Poisson batch for several updates": ["used for more than one update"],
    "Noise that is drawn again": ["noise was drawn before in this run"],
    "A clip norm lowered within an update": ["True"],
    "A setting that training data decided once": [r"\['loss'\]"],
    "Restarted passes over a fixed schedule": ["5"],
    "Batches that the loop skips": [
        r"\d of \d+ batches that the loader delivered entered no update"
    ],
    "Losses that couple examples": [
        "loss   FAILED",
        "engine.audit: CrossEntropyLoss with weights",
        "True",
        "It has a ledger.",
    ],
    "Models that mix examples": [
        "The model mixes the examples of a batch",
        "It has a ledger.",
    ],
    "Batches that the loop cuts": ["such as its number of time steps, rose and fell"],
    "A network in a list": [r"weights The weight 'encoder\[0\].weight', which is not"],
    "Time-first layers": [r"\(batch_first=False\) confuses the two"],
    "Examples sorted in the model": ["'first' is given the examples in another order"],
    "Items that share an example": ["It has a ledger."],
    "Weights used outside of their layers": [r"uses 'encoder\.weight' outside"],
    "A layer in two modules": ["2 modules of the model contain it"],
    "EmbeddingBag": ["EmbeddingBag"],
    "Ghost clipping after thawing a layer": [
        "requires_grad was changed after make_private"
    ],
    "Activation checkpointing with expanded weights": [
        "not those of each example's own gradient"
    ],
}


def blocks(section):
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def sections():
    return {text.splitlines()[0]: text for text in SECTIONS[1:]}


def test_every_section_is_tested_and_in_the_table():
    assert set(sections()) == set(EXPECTED)
    anchors = {name.lower().replace(" ", "-") for name in sections()}
    assert set(re.findall(r"\(#([a-z0-9-]+)\)", SECTIONS[0])) == anchors


@pytest.mark.parametrize("name", EXPECTED)
def test_the_examples_print_what_the_page_says(name, capsys):
    namespace = {"__name__": "page"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for code in [*blocks(SECTIONS[0]), *blocks(sections()[name])]:
            exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    place = 0
    for expected in EXPECTED[name]:
        found = re.search(expected, printed[place:])
        assert found, (expected, printed[place:])
        place += found.end()
