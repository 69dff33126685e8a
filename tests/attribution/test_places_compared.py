"""The entries that are compared: changes with a structure, padding, generators."""

import random

import numpy as np
import pytest
import torch

from opacus_pi.attribution.collate_identity import follow
from opacus_pi.attribution.item_contents import content_sums
from opacus_pi.attribution.item_fingerprints import fingerprint_items
from opacus_pi.attribution.samples import (
    DeliveredTensor,
    places_compared,
    sample_checksums,
)

WIDTHS = [1, 2, 255, 256, 257, 511, 512, 513, 784, 1023, 1024, 1025, 3000, 12288]


def bottom_third(x):
    return x[:, :, 2 * x.shape[2] // 3 :]


def two_channels(x):
    return x[..., 1:]


def all_but_every_eleventh(x):
    return x[:, np.arange(x.shape[1]) % 11 != 0]


def tail(x):
    return x[:, 256:]


def assign(part, x, others):
    """Put a part of other samples into x, by the part's own indexing."""
    marks = torch.arange(x.numel()).reshape(x.shape)
    chosen = part(marks).reshape(-1)
    x.view(-1)[chosen] = others.reshape(-1)[chosen]


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        (bottom_third, (1, 20, 20)),
        (bottom_third, (3, 32, 32)),
        (two_channels, (32, 32, 3)),
        (all_but_every_eleventh, (3000,)),
        (tail, (300,)),
        (tail, (511,)),
    ],
)
def test_a_change_of_a_part_is_seen_in_memory_and_in_copies(part, shape):
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    sums = sample_checksums(x, 0)[1]
    delivered = DeliveredTensor(x, 0, verify=True)
    mixed = x.clone()
    assign(part, mixed, x.flip(0))
    assert (sample_checksums(mixed, 0)[1] != sums).all()
    x.data.copy_(mixed)  # torch counts no write
    assert delivered.changed(x).all()


def test_moved_contents_are_compared_in_drawn_places():
    entries = np.random.default_rng(0).normal(size=(4, 500)).astype(np.float32)
    changed = entries.copy()
    changed[:, np.arange(500) % (500 // 32) != 0] += 1
    assert (content_sums(changed) != content_sums(entries)).all()


@pytest.mark.parametrize("widths", [(4, 70), (64, 65, 300), (70, 512, 513, 3000)])
def test_a_content_does_not_depend_on_the_other_items_of_a_batch(widths):
    items = [torch.randn(width) for width in widths]
    together = fingerprint_items(items)
    sums = content_sums(together.entries[0], together.widths[:, 0])
    for item, own in zip(items, sums, strict=True):
        alone = fingerprint_items([item, item])
        assert (content_sums(alone.entries[0], alone.widths[:, 0]) == own).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_places_are_enough_and_distinct(width):
    places = places_compared(width)
    assert (np.diff(places) > 0).all() and places[0] >= 0 and places[-1] < width
    assert min(width, 256) <= len(places) <= 512
    assert len(places) == width or width > 512


@pytest.mark.parametrize("width", [520, 784, 1024, 1030, 3000])
@pytest.mark.parametrize("share", [0.002, 0.01])
def test_changes_are_missed_no_more_often_than_said(width, share):
    size = max(1, round(share * width))
    rng, missed, num = np.random.default_rng(1), 0, 1000
    for _ in range(num):
        changed = rng.choice(width, size, replace=False)
        missed += not np.isin(changed, places_compared(width)).any()
    expected = (1 - size / width) ** 256
    assert missed / num <= expected + 4 * np.sqrt(expected / num)


@pytest.mark.parametrize("widths", [(300, 511, 600), (513, 700, 1024, 1025, 3000)])
def test_padded_items_are_found_over_all_widths(widths):
    items = [torch.randn(width) for width in widths]
    order = list(reversed(range(len(items))))
    padded = torch.zeros(len(items), max(widths) + 7)
    for row, item in enumerate(order):
        padded[row, : widths[item]] = items[item]
    found = follow(fingerprint_items(items), padded, batch_dim=0).items
    assert found.tolist() == order


def test_items_padded_in_two_dimensions_are_found():
    items = [torch.randn(25 + i, 30 + i) for i in range(4)]
    padded = torch.zeros(4, 40, 40)
    for row, item in enumerate(reversed(items)):
        padded[row, : item.shape[0], : item.shape[1]] = item
    assert follow(fingerprint_items(items), padded, batch_dim=0).items.tolist() == [
        *(3, 2, 1, 0)
    ]


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_items_arrays_and_samples_have_the_same_checksums(width):
    batch = torch.randn(3, width)
    sums = sample_checksums(batch, 0)[1]
    for items in (list(batch), list(batch.numpy()), batch.tolist()):
        assert np.array_equal(fingerprint_items(items).checksums_of(0), sums)
    assert np.array_equal(sample_checksums(batch.T, 1)[1], sums)


def test_no_global_generator_is_used():
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    places_compared(54321)
    sample_checksums(torch.ones(2, 54321), 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
