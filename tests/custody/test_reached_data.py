"""A function that refers to the training set is found by its names and attributes."""

import functools

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from opacus_pi.custody.reached_data import reaches_data


class Stored(Dataset):
    """Examples in a tensor, an array and a list, with an option."""

    def __init__(self):
        self.x = torch.randn(6, 3)
        self.y = np.arange(6)
        self.texts = [str(i) for i in range(6)]
        self.pad = 0.0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.x[index]

    @staticmethod
    def plain(items):
        return default_collate(items)

    def padded(self, items):
        return pad_sequence(items, padding_value=self.pad)

    def itself(self, items):
        return torch.stack([*items, self[0]])

    def tensor(self, items):
        return torch.stack([*items, self.x[0]])

    def by_another(self, items):
        return self.tensor(items)


class Collate:
    def __init__(self, data):
        self.data = data

    def __call__(self, items):
        return torch.stack([*items, *(self.data[i] for i in range(2))])


class PaddedCollate(Collate):
    def __call__(self, items):
        return pad_sequence(items, padding_value=self.data.pad)


DATA = Stored()
VIEW = DATA.x[2:]


def of_module(items):
    return torch.cat([torch.stack(items), VIEW[:1]])


def of_a_list(items):
    return [*items, DATA.texts[0]]


def of_an_array(items):
    return [*items, DATA.y[1:]]


def own_names(items):
    DATA = [item * 2 for item in items]
    return torch.stack([VIEW for VIEW in DATA])


def padded(items):
    return pad_sequence(items, padding_value=DATA.pad)


def inside(data):
    return lambda items: [data[i] for i, _ in enumerate(items)]


@pytest.mark.parametrize(
    "function",
    [
        DATA.itself,
        DATA.tensor,
        DATA.by_another,
        Collate(DATA),
        of_module,
        of_a_list,
        of_an_array,
        inside(DATA),
        functools.partial(lambda items, data: [*items, data[0]], data=DATA),
        lambda items: of_module(items),
        lambda items, data=DATA: [*items, data[0]],
    ],
)
@pytest.mark.parametrize(
    "data_set", [DATA, Subset(DATA, [1, 2]), ConcatDataset([DATA, Stored()])]
)
def test_references_to_the_data_are_found(function, data_set):
    assert reaches_data(function, data_set)


@pytest.mark.parametrize(
    "function",
    [
        DATA.plain,
        DATA.padded,
        PaddedCollate(DATA),
        own_names,
        padded,
        default_collate,
        functools.partial(pad_sequence, batch_first=True),
    ],
)
def test_other_functions_do_not_refer_to_it(function):
    assert not reaches_data(function, DATA)


def test_another_data_set_is_not_meant():
    assert not reaches_data(inside(Stored()), DATA)
