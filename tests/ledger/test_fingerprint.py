"""Fingerprints tell data sets apart without asking for an example."""

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    RenyiFilter,
    fingerprint,
    privacy_losses,
)
from opacus_pi.ledger.same_data import same_data_set
from opacus_pi.recording.run import RecordedRun

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
    assert fingerprint(one) == fingerprint(TensorDataset(torch.zeros(5, 2), LABELS))
    assert fingerprint(one) != fingerprint(TensorDataset(torch.zeros(5, 2), LABELS + 1))


class Stored(Labelled):
    """Labels and raw inputs in memory, as image sets keep them."""

    def __init__(self, inputs, labels=LABELS):
        super().__init__(labels)
        self.data = inputs


@pytest.mark.parametrize("kind", [Stored, lambda x: TensorDataset(x, LABELS)])
def test_inputs_tell_data_sets_apart(kind):
    x = torch.arange(30, dtype=torch.float32).view(5, 3, 2)
    other = x.clone()
    other[3, 1, 1] += 1
    one = fingerprint(kind(x))
    assert one == fingerprint(kind(x.clone()))
    assert one != fingerprint(kind(other))
    assert fingerprint(kind(x), inputs=False) == fingerprint(kind(other), inputs=False)
    assert one.startswith(fingerprint(kind(other), inputs=False) + ":x")


def test_all_inputs_of_several_tensors_count():
    x, z = torch.zeros(5, 2), torch.zeros(5)
    one = fingerprint(TensorDataset(x, z, LABELS))
    assert one != fingerprint(TensorDataset(x, z + 1, LABELS))
    assert one != fingerprint(TensorDataset(x + 1, z, LABELS))


def test_any_container_of_inputs_gives_one_hash():
    x = torch.arange(10, dtype=torch.uint8).view(5, 2)
    kinds = [x, x.numpy(), x.long(), x.flatten().view(5, 2).clone()]
    assert len({fingerprint(Stored(values)) for values in kinds}) == 1
    halves = [x.float(), x.double(), x.bfloat16(), x.numpy().astype(np.float32)]
    assert len({fingerprint(Stored(values)) for values in halves}) == 1


def test_subsets_take_their_own_inputs():
    x = torch.arange(10.0).view(5, 2)
    other = x.clone()
    other[4] += 1
    for places, alike in (([0, 2], True), ([2, 4], False)):
        names = {fingerprint(Subset(Stored(v), places)) for v in (x, other)}
        assert (len(names) == 1) == alike


def test_of_large_inputs_some_examples_are_hashed():
    size = 1 << 17  # rows of 16 numbers, of which 2^16 fit
    x = np.zeros((size, 16), dtype=np.uint8)
    names = [fingerprint(Stored(x, np.zeros(size)))]
    for places in (slice(None), slice(0, 1), slice(size - 1, None)):
        other = x.copy()
        other[places] = 1
        names.append(fingerprint(Stored(other, np.zeros(size))))
    assert len(set(names)) == 4


@pytest.mark.parametrize("held", [None, [1, 2], {"x": 1}, torch.zeros(4, 2), "text"])
def test_what_is_no_array_of_all_examples_is_left_out(held):
    name, _, settings = fingerprint(Stored(held)).rpartition(":a")
    expected = fingerprint(Labelled(LABELS), inputs=False)
    assert name == expected.replace("Labelled", "Stored") and len(settings) == 16


def test_properties_are_not_asked():
    class Lazy(Labelled):
        @property
        def data(self):
            raise AssertionError("everything was loaded")

    assert ":x" not in fingerprint(Lazy(LABELS))


def test_names_agree_in_what_both_say():
    x = torch.zeros(5, 2)
    old, one, other = (
        fingerprint(Stored(x), inputs=False),
        fingerprint(Stored(x)),
        fingerprint(Stored(x + 1)),
    )
    assert same_data_set(old, one) and same_data_set(other, old)
    assert same_data_set(one, one) and not same_data_set(one, other)
    assert not same_data_set(one, fingerprint(Stored(x, LABELS + 1)))
    assert not same_data_set(old, fingerprint(Labelled(LABELS)))
    assert same_data_set("mine", "mine") and not same_data_set("mine", "yours")


def test_subsets_are_followed():
    whole = Labelled(LABELS)
    assert fingerprint(Subset(whole, [0, 2])) != fingerprint(Subset(whole, [1, 2]))
    assert fingerprint(Subset(whole, [0, 2])).startswith("Subset[Labelled]:2:")
    nested = Subset(Subset(whole, [0, 2, 4]), [1])
    assert fingerprint(nested) != fingerprint(Subset(Subset(whole, [0, 2, 4]), [2]))


def test_without_labels_class_and_length_must_do():
    assert fingerprint(list(range(7)), inputs=False) == "list:7"
    assert fingerprint(Labelled(LABELS, "answers")).startswith("Labelled:5:y")
    assert fingerprint(Labelled([object()] * 3)).startswith("Labelled:3:b")


def test_no_random_state_is_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fingerprint(TensorDataset(torch.zeros(5, 2), LABELS))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_a_data_set_without_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match=r"data_set must have a length, got .*Stream"):
        fingerprint(Stream())


def ledger_of(name):
    mechanism = NoisySGD(1, sample_rate=0.5, noise_std=1.0, max_grad_norm=1.0)
    return GradNormLedger(mechanism, [1], np.ones((1, 5)), data_set=name)


def filter_of(name, other):
    budgets = RenyiFilter(1.0)
    budgets.begin(5, name)
    budgets.begin(5, other)


@pytest.mark.parametrize(
    "compare",
    [
        lambda one, other: ledger_of(one).require_data_set(other),
        lambda one, other: privacy_losses([ledger_of(one), ledger_of(other)], 8),
        filter_of,
        lambda one, other: RecordedRun("swept", 5, 0.5, "fixed", one).require_same(
            RecordedRun("swept", 5, 0.5, "fixed", other)
        ),
    ],
    ids=["ledger", "runs", "filter", "recorder"],
)
def test_what_was_written_without_inputs_is_compared_without(compare):
    stored = Stored(torch.zeros(5, 2))
    old, new = fingerprint(stored, inputs=False), fingerprint(stored)
    compare(old, new)
    compare(new, old)
    with pytest.raises(ValueError, match="data_set"):
        compare(new, fingerprint(Stored(torch.ones(5, 2))))
