"""Which data sets are known to keep the order of their examples."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    random_split,
)
from torchvision.datasets import CIFAR10, FakeData, ImageFolder

from opacus_pi.attribution.plain_indexing import indexes_plainly, loads_batches

TENSORS = TensorDataset(torch.arange(6), torch.arange(6))


class Own(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return i


class Renamed(CIFAR10):
    pass


class Reversed(TensorDataset):
    def __getitem__(self, i):
        return super().__getitem__(-i)


class ReversedInBatches(Subset):
    def __getitems__(self, indices):
        return super().__getitems__(indices[::-1])


def without_files(kind):
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("data_set", "expected"),
    [
        (TENSORS, True),
        ([1, 2], True),
        (np.arange(3), True),
        (FakeData(6), True),
        (without_files(CIFAR10), True),
        (without_files(ImageFolder), True),
        (without_files(Renamed), True),
        (Subset(TENSORS, [0, 3]), True),
        (random_split(TENSORS, [2, 4])[0], True),
        (ConcatDataset([TENSORS, Subset(TENSORS, [1])]), True),
        (StackDataset(TENSORS, torch.arange(6)), True),
        (StackDataset(a=TENSORS, b=TENSORS), True),
        (Own(), False),
        (Reversed(torch.arange(6)), False),
        (Subset(Own(), [0, 3]), False),
        (ReversedInBatches(TENSORS, [0, 3]), False),
        (ConcatDataset([TENSORS, Own()]), False),
        (StackDataset(a=TENSORS, b=Own()), False),
        (object(), False),
    ],
)
def test_known_classes(data_set, expected):
    assert indexes_plainly(data_set) is expected


def test_a_data_set_that_holds_itself():
    data_set = Subset(TENSORS, [0])
    data_set.dataset = data_set
    assert not indexes_plainly(data_set)


@pytest.mark.parametrize(
    ("data_set", "expected"),
    [
        (TENSORS, False),
        ([1, 2], False),
        (Own(), False),
        (Subset(Own(), [0]), False),
        (StackDataset(TENSORS, Own()), False),
        (ReversedInBatches(TENSORS, [0, 3]), True),
        (Subset(ReversedInBatches(TENSORS, [0, 3]), [0]), True),
    ],
)
def test_which_data_sets_load_batches_themselves(data_set, expected):
    assert loads_batches(data_set) is expected
