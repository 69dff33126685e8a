"""Checksums of items before collation."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from opacus_pi.attribution.item_fingerprints import fingerprint_items
from opacus_pi.attribution.samples import sample_checksums

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, 7, generator=GENERATOR)
WIDE = torch.randn(4, 5000, generator=GENERATOR)
Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    y: int


def expected(batch):
    return sample_checksums(batch, 0)


@pytest.mark.parametrize("batch", [X, X.double(), X.half(), (9 * X).long(), WIDE])
@pytest.mark.parametrize(
    "made",
    [
        list,
        lambda x: [t.numpy() for t in x],
        lambda x: [(t,) for t in x],
        lambda x: [{"x": t} for t in x],
        lambda x: [UserDict(x=[t]) for t in x],
        lambda x: [t.clone().requires_grad_(t.is_floating_point()) for t in x],
        lambda x: [*x[:-1], x[-1].numpy()],  # not all of one type
    ],
)
def test_they_are_the_checksums_of_the_collated_batch(batch, made):
    width, sums = expected(batch)
    found = fingerprint_items(made(batch))
    assert found.widths.tolist() == [[width]] * 4
    np.testing.assert_array_equal(found.checksums[:, 0], sums)


@pytest.mark.parametrize(
    "numbers", [[1, 5, -7], [0.1, 2.5, 1e300], [True, False, True]]
)
def test_numbers_are_parts_of_one_entry(numbers):
    collated = torch.tensor(numbers, dtype=torch.float64 if 0.1 in numbers else None)
    width, sums = expected(collated)
    found = fingerprint_items([(n, "text") for n in numbers])
    assert width == 1 and found.widths.tolist() == [[1, 0]] * 3
    np.testing.assert_array_equal(found.checksums[:, 0], sums)
    np.testing.assert_array_equal(
        fingerprint_items([np.float64(n) for n in numbers]).checksums[:, 0], sums
    )


def test_nested_items():
    items = [Pair(x, Record(2 * x, 3)) for x in X]
    found = fingerprint_items(items)
    assert found.widths.tolist() == [[21, 21, 1]] * 4
    np.testing.assert_array_equal(found.checksums[:, 1], expected(2 * X)[1])


def test_token_ids_are_one_part():
    items = [{"ids": list(range(i, i + 20)), "label": i} for i in range(3)]
    found = fingerprint_items(items)
    assert found.widths.tolist() == [[20, 1]] * 3
    ids = torch.tensor([item["ids"] for item in items])
    np.testing.assert_array_equal(found.checksums[:, 0], expected(ids)[1])


def test_items_of_different_shapes():
    items = [torch.arange(float(n)) for n in (2, 700, 0, 5)]
    found = fingerprint_items(items)
    assert found.widths[:, 0].tolist() == [2, 700, 0, 5]
    for item, total in zip(items, found.checksums[:, 0], strict=True):
        if len(item):
            assert total == expected(item[None])[1][0]
    found = fingerprint_items([(items[0], 1), (items[1],)])
    assert found.widths.tolist() == [[2, 1], [700, 0]]


def test_what_has_no_checksum_has_width_0():
    endless = []
    endless.append(endless)
    items = [
        "text",
        None,
        object(),
        X[0].to_sparse(),
        X[0].to(torch.complex64),
        torch.zeros(2, device="meta"),
        np.array(["a", "b"]),
        np.array([object()]),
        np.datetime64("2020-01-01"),
        10**400,
        endless,
        torch.zeros(0, 3),
    ]
    found = fingerprint_items(items)
    assert found.widths.tolist() == found.checksums.tolist() == [[0]] * len(items)
    assert fingerprint_items([]).widths.shape == (0, 0)
    assert fingerprint_items({"x": X}).widths.shape == (0, 0)


def test_nothing_is_changed_and_nothing_is_drawn():
    items = [x.clone().requires_grad_() for x in X]
    readonly = X[0].numpy().copy()
    readonly.setflags(write=False)
    before = torch.get_rng_state()
    fingerprint_items([*items, readonly])
    assert torch.equal(before, torch.get_rng_state())
    assert all(item.grad_fn is None for item in items)
    assert torch.equal(torch.stack(items), X)
