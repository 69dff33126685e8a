"""Fingerprints tell data sets apart without reading an example."""

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from opacus_pi.accounting import fingerprint

LABELS = torch.tensor([0, 1, 2, 1, 0])


class Labelled:
    """A data set whose examples must not be touched."""

    def __init__(self, labels, attribute="targets"):
        self.length = len(labels)
        setattr(self, attribute, labels)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise AssertionError("an example was read")


def test_labels_tell_data_sets_apart():
    one, other = Labelled(LABELS), Labelled(LABELS.flip(0) + 1)
    assert fingerprint(one) == fingerprint(Labelled(LABELS.clone()))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(Labelled(LABELS[:-1]))
    assert fingerprint(one) != fingerprint(TensorDataset(LABELS))
    assert fingerprint(one).startswith("Labelled:5:")


@pytest.mark.parametrize("attribute", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_any_container_of_labels_gives_one_hash(attribute, kind):
    value = fingerprint(Labelled(kind(LABELS.tolist()), attribute))
    assert value == fingerprint(Labelled(LABELS))


def test_tensor_data_sets_use_their_last_tensor():
    one = TensorDataset(torch.zeros(5, 2), LABELS)
    assert fingerprint(one) == fingerprint(TensorDataset(torch.ones(5, 2), LABELS))
    assert fingerprint(one) != fingerprint(TensorDataset(torch.zeros(5, 2), LABELS + 1))


def test_subsets_are_followed():
    whole = Labelled(LABELS)
    assert fingerprint(Subset(whole, [0, 2])) != fingerprint(Subset(whole, [1, 2]))
    assert fingerprint(Subset(whole, [0, 2])).startswith("Subset[Labelled]:2:")
    nested = Subset(Subset(whole, [0, 2, 4]), [1])
    assert fingerprint(nested) != fingerprint(Subset(Subset(whole, [0, 2, 4]), [2]))


def test_without_labels_class_and_length_must_do():
    assert fingerprint(list(range(7))) == "list:7"
    assert fingerprint(Labelled(LABELS, "answers")) == "Labelled:5"
    assert fingerprint(Labelled([object()] * 3)) == "Labelled:3"


def test_no_random_state_is_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fingerprint(TensorDataset(torch.zeros(5, 2), LABELS))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_a_data_set_without_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match=r"data_set=.*Stream to have a length"):
        fingerprint(Stream())
