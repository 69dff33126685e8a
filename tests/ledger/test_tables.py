"""Data sets whose items are dicts, and those of the package ``datasets``."""

import pytest
import torch

from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.same_data import same_data_set

datasets = pytest.importorskip("datasets")

SIZE = 40


def texts(step=1, flip=False):
    tokens = [[i % 7, (i * step) % 11, 3][: 1 + i % 3] for i in range(SIZE)]
    labels = [(i + flip) % 2 for i in range(SIZE)]
    people = [f"p{i:02}" for i in range(SIZE)]
    return datasets.Dataset.from_dict(
        {"input_ids": tokens, "labels": labels, "person": people}
    )


def same(one, other):
    return same_data_set(fingerprint(one), fingerprint(other))


@pytest.mark.parametrize(
    "other",
    [
        lambda d: d.shuffle(seed=1),
        lambda d: d.shuffle(seed=1).flatten_indices(),
        lambda d: d.select(range(SIZE - 1, -1, -1)),
        lambda d: texts(step=2),
        lambda d: texts(flip=True),
        lambda d: d.map(lambda row: {"labels": 1 - row["labels"]}),
    ],
)
def test_another_order_other_labels_and_other_tokens_are_found(other):
    one = texts()
    assert not same(one, other(one))


@pytest.mark.parametrize(
    "other",
    [
        lambda d: texts(),
        lambda d: d.with_format("torch"),
        lambda d: d.remove_columns("person"),
        lambda d: d.select(range(SIZE)),
        lambda d: d.shuffle(seed=1).select(_back(d.shuffle(seed=1), d)),
    ],
)
def test_the_same_examples_in_the_same_order_are_recognised(other):
    one = texts()
    assert same(one, other(one))


def test_a_call_that_changes_nothing_changes_no_setting():
    one = texts()
    assert fingerprint(one.remove_columns([])) == fingerprint(one)


def _back(shuffled, one):
    place = {name: i for i, name in enumerate(shuffled["person"])}
    return [place[name] for name in one["person"]]


def test_of_a_subset_its_own_examples_count():
    one, other = texts(), texts()
    first, second = torch.utils.data.Subset(one, [3, 5]), other.select([3, 5])
    assert same(first, torch.utils.data.Subset(other, [3, 5]))
    assert not same(first, torch.utils.data.Subset(other, [5, 3]))
    assert not same(second, other.select([5, 3]))


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_lists_of_dicts_are_compared():
    def rows(flip=False):
        data = texts(flip=flip).with_format("torch")
        return [data[i] for i in range(SIZE)]

    assert same(Rows(rows()), Rows(rows()))
    assert not same(Rows(rows()), Rows(rows()[::-1]))
    assert not same(Rows(rows()), Rows(rows(flip=True)))
