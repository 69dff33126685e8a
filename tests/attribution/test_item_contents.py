"""Data sets whose indices do not stand for one example each are found."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    default_collate,
)
from torchvision.datasets import FakeData

from opacus_pi import AccountingError, PrivacyEngine
from opacus_pi.attribution.causes import (
    CONTENTS_OF_OTHERS,
    LABELS_CHANGED,
    LABELS_KEPT,
    MOVED_IN_DATA_SET,
    NOTHING_KEPT,
)
from opacus_pi.attribution.item_contents import (
    ItemContents,
    contents_of,
    labels_of,
)
from opacus_pi.attribution.item_fingerprints import fingerprint_items
from opacus_pi.attribution.tracker import Tracker

NUM, WIDTH = 24, 6


class Ordered(Dataset):
    """Examples in an order that can be changed."""

    def __init__(self):
        self.x = torch.randn(NUM, WIDTH, generator=torch.Generator().manual_seed(1))
        self.order = list(range(NUM))

    def __len__(self):
        return NUM

    def __getitem__(self, i):
        return self.x[self.order[i]], i % 3

    def next_epoch(self):
        pass


class Flipped(Ordered):
    def next_epoch(self):
        self.order.reverse()


class TwoSwapped(Ordered):
    def next_epoch(self):
        self.order[:2] = self.order[1::-1]


class Written(Ordered):
    def next_epoch(self):
        self.x[:] = self.x.flip(0)


class Augmented(Ordered):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.randn(WIDTH), y


class Labelled(Augmented):
    """Augmented examples, with the label that each has for itself."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0], self.order[i] % 3


class LabelledFlipped(Labelled):
    def next_epoch(self):
        self.order.reverse()


class WithIndexFlipped(LabelledFlipped):
    """The index beside the label would be the same for any example."""

    def __getitem__(self, i):
        return *super().__getitem__(i), i, random.random()


class EqualLabelsFlipped(LabelledFlipped):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], 1


class NoLabels(Labelled):
    """A random number stands where others have the label."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0], random.random()


class Photos(FakeData):
    """A data set of torchvision, whose transform augments."""

    def __init__(self):
        super().__init__(NUM, (3, 2, 1), num_classes=3, transform=self.augmented)

    @staticmethod
    def augmented(image):
        return torch.from_numpy(np.array(image)).flatten() + torch.randn(WIDTH)

    def next_epoch(self):
        pass


class PhotosFlipped(Photos):
    """Its ``__getitem__`` is torchvision's, and yet the examples move."""

    def next_epoch(self):
        self.random_offset = 1 - self.random_offset


class OwnPhotos(Photos):
    def __getitem__(self, i):
        return super().__getitem__(i)


class Mirrored(Ordered):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x.flip(0) if torch.rand(1) < 0.5 else x), y


class EqualItems(Flipped):
    """All items are one of three, so that moving them shows nothing of an index."""

    def __init__(self):
        super().__init__()
        self.x = self.x[:3].repeat(NUM // 3, 1)


class Ragged(Flipped):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x[: 4 + self.order[i] % 3], y


class OneOfAClass(Ordered):
    """Any example of a class, so that first contents are equal now and then."""

    def __getitem__(self, i):
        return self.x[i % 3 + 3 * random.randrange(NUM // 3)], i % 3


class SortsBatches(Ordered):
    def __getitems__(self, indices):
        return [self[i] for i in sorted(indices)]


class ShortOrLong(Ragged):
    """Some batches have only long items, others are padded."""

    def __getitem__(self, i):
        x, y = Ordered.__getitem__(self, i)
        return x[: 3 if self.order[i] % 12 == 0 else WIDTH], y

    def next_epoch(self):
        pass


def scaled(items):
    x, y = default_collate(items)
    return 2 * x + 1, y


def padded(items):
    x, y = zip(*items, strict=True)
    x = nn.utils.rnn.pad_sequence(x, batch_first=True)
    return nn.functional.pad(x, (0, WIDTH - x.shape[1])), torch.tensor(y)


def reordered(items):
    return default_collate(items[::-1])


def trained(data, *, num_epochs=2, around=lambda data: data, **options):
    torch.manual_seed(0)
    module, engine = nn.Linear(WIDTH, 3), PrivacyEngine()
    loader = DataLoader(around(data), 6, shuffle=True, **options)
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader|.*[Ss]ample")
        warnings.filterwarnings("ignore", message="This run no longer")
        for _ in range(num_epochs):
            for x, y, *_ in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y.long()).backward()
                optimizer.step()
            data.next_epoch()
    return engine


@pytest.mark.parametrize(
    ("data", "options", "num_moved"),
    [
        (Flipped(), {}, 24),
        (Flipped(), {"num_workers": 1}, 24),
        (Flipped(), {"collate_fn": reordered}, 24),
        (Flipped(), {"collate_fn": scaled}, 24),
        (Ragged(), {"collate_fn": padded}, 24),
        (TwoSwapped(), {}, 2),
        (Written(), {}, 24),
    ],
)
def test_moved_examples_are_unattributed(data, options, num_moved):
    engine = trained(data, **options)
    assert engine.attribution["unattributed"] == num_moved
    assert engine._run.tracker.causes[MOVED_IN_DATA_SET.name] == num_moved
    with pytest.raises(AccountingError, match="for another index before"):
        _ = engine.ledger


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LabelledFlipped, {}),
        (LabelledFlipped, {"num_workers": 1}),
        (LabelledFlipped, {"collate_fn": reordered}),
        (WithIndexFlipped, {}),
        (PhotosFlipped, {}),
    ],
)
def test_moved_and_augmented_examples_are_found_by_their_labels(kind, options):
    engine = trained(kind(), **options)
    assert engine._run.tracker.causes[LABELS_CHANGED.name] >= 18
    with pytest.raises(AccountingError, match="other content and another label"):
        _ = engine.ledger


def identity_of(engine):
    links = engine.ledger.custody.links
    return next(link for link in links if link.name == "identity")


@pytest.mark.parametrize("kind", [Labelled, OwnPhotos])
def test_labels_of_augmented_examples_do_not_prove_their_identity(kind):
    engine = trained(kind(), num_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        identity = identity_of(engine)
    assert (identity.state, identity.sentence) == ("unchecked", LABELS_KEPT.explanation)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_padding_does_not_change_the_content_of_an_item(num_workers):
    engine = trained(
        ShortOrLong(), num_epochs=4, collate_fn=padded, num_workers=num_workers
    )
    assert identity_of(engine).state == "checked"


def test_a_random_choice_within_a_class_is_said():
    random.seed(0)
    engine = trained(OneOfAClass(), num_epochs=6)
    with pytest.warns(UserWarning, match="content that other indices had"):
        identity = identity_of(engine)
    assert identity.sentence == CONTENTS_OF_OTHERS.explanation


def test_the_order_within_a_batch_that_a_data_set_loads_is_its_own():
    engine = trained(SortsBatches(), num_epochs=1)
    with pytest.warns(UserWarning, match="has its own __getitems__"):
        assert identity_of(engine).state == "unchecked"
    with pytest.raises(AccountingError, match="another index before"):
        _ = trained(SortsBatches()).ledger


def test_a_data_set_that_loads_batches_in_order_is_checked_in_the_second_epoch():
    class Batches(Ordered):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    assert identity_of(trained(Batches())).state == "checked"


@pytest.mark.parametrize("width", [0, 1, 2, 3])
@pytest.mark.parametrize("noise", [0, 1e-3])
def test_small_items_are_compared_wholly(width, noise):
    shape = (20, width) if width else (20,)
    x, y = torch.randn(shape), torch.arange(20) // 5
    tracker, indices = Tracker(), list(range(20))
    for order in (torch.arange(20), torch.arange(20).flip(0)):
        now = x[order] + noise * torch.randn(shape)
        found = tracker.delivered(indices, (now, y[order], torch.tensor(indices)))
    assert set(found.indices) == {-1} and found.identity.cause is LABELS_CHANGED


def test_small_items_without_an_index_are_found_by_content():
    x, y, tracker = torch.randn(20, 2), torch.arange(20) // 5, Tracker()
    tracker.delivered(list(range(20)), (x, y))
    found = tracker.delivered(list(range(20)), (x.flip(0), y.flip(0)))
    assert set(found.indices) == {-1} and found.identity.cause is MOVED_IN_DATA_SET


def test_contents_and_labels_do_not_depend_on_the_other_items():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 90, (40, 2))
    items = [(rng.normal(size=a), rng.integers(0, 9, b), 7 * a) for a, b in sizes]
    items += [(np.ones(1), np.ones(2), i) for i in range(3)]
    whole = fingerprint_items(items)
    contents, labels = contents_of(whole), labels_of(whole)
    for places in np.split(rng.permutation(42), 14):
        some = fingerprint_items([items[i] for i in places])
        assert (contents_of(some) == contents[places]).all()
        assert (labels_of(some) == labels[places]).all()
    assert len(set(contents)) == 43 and (labels[:40, 2] != 0).all()


@pytest.mark.parametrize("kind", [EqualLabelsFlipped, NoLabels])
def test_augmented_examples_without_labels_are_said(kind):
    engine = trained(kind())
    with pytest.warns(UserWarning, match="no label in its items that stays the same"):
        identity = identity_of(engine)
    assert (identity.state, identity.sentence) == (
        "unchecked",
        NOTHING_KEPT.explanation,
    )


@pytest.mark.parametrize(
    "around",
    [
        lambda data: data,
        lambda data: Subset(data, range(12)),
        lambda data: ConcatDataset([Subset(data, range(6)), data]),
    ],
)
def test_torchvision_is_known_to_keep_the_order_of_examples(around):
    assert identity_of(trained(Photos(), around=around)).state == "checked"


def test_of_a_subset_the_indices_are_compared():
    engine = trained(Flipped(), around=lambda data: Subset(data, range(12)))
    assert engine.attribution["unattributed"] == 0  # none of the twelve comes again
    engine = trained(Flipped(), around=lambda data: Subset(data, range(6, 18)))
    assert engine.attribution["unattributed"] == 12


@pytest.mark.parametrize("kind", [Ordered, Augmented, Mirrored, EqualItems])
def test_other_data_sets_are_attributed(kind):
    engine = trained(kind(), num_epochs=4)
    assert engine.attribution["unattributed"] == 0
    assert MOVED_IN_DATA_SET.name not in engine._run.tracker.causes
    assert engine.ledger.mechanism.num_steps == 16


def test_contents_agree_with_a_table():
    rng = np.random.default_rng(0)
    contents, first = ItemContents(), {}
    sums_of = rng.integers(1, 2**62, 300)
    for epoch in range(6):
        order = rng.permutation(300) if epoch % 2 else np.arange(300)
        for batch in np.array_split(rng.permutation(300), 7):
            sums = sums_of[order[batch]]
            others = {value: index for index, value in first.items()}
            expected = [
                i in first and first[i] != s and s in others
                for i, s in zip(batch.tolist(), sums.tolist(), strict=True)
            ]
            for i, s in zip(batch.tolist(), sums.tolist(), strict=True):
                first.setdefault(i, s)
            assert contents.moved(batch, sums).tolist() == expected


def test_random_changes_that_meet_another_item_now_and_then():
    rng = np.random.default_rng(0)
    contents = ItemContents()
    first = rng.permutation(100)[:40] + 1  # 40 of 100 possible contents
    contents.moved(np.arange(40), first)
    moved = [
        contents.moved(np.arange(40), rng.integers(1, 101, 40)).sum() for _ in range(20)
    ]
    assert not any(moved)
    assert contents.moved(np.arange(2), first[[1, 0]]).sum() == 0  # too few to tell


def noted(*, labels=True):
    """Contents and labels of 30 indices, of which two have changed."""
    contents, indices = ItemContents(), np.arange(30) * 2
    sums, classes = indices + 1000, (indices // 2 % 3)[:, None]
    labels_of = (lambda: classes) if labels else (lambda: None)
    contents.moved(indices, sums, labels_of)
    contents.moved(
        indices[:2], np.array([7, 8]), lambda: classes[:2] if labels else None
    )
    return contents, indices, sums, classes


def test_saved_contents_are_compared_as_before():
    contents, indices, sums, classes = noted()
    again = ItemContents.from_state_dict(contents.state_dict())
    order = np.random.default_rng(0).permutation(30)
    for one in (contents, again):
        assert one.doubt() is LABELS_KEPT
        assert not one.moved(indices, sums, lambda: classes).any()
        found = one.moved(indices, sums + 9000, lambda: classes[order])
        assert found.all() and one.cause() is LABELS_CHANGED
    later = ItemContents.from_state_dict(again.state_dict())
    assert later.moved(indices[:1], sums[:1] + 1, lambda: classes[:1]).all()
    assert later.doubt() is None


def test_contents_without_labels_are_saved():
    contents, indices, sums, _ = noted(labels=False)
    again = ItemContents.from_state_dict(contents.state_dict())
    assert again.doubt() is NOTHING_KEPT
    assert not again.moved(indices, sums).any()
    empty = ItemContents.from_state_dict(ItemContents().state_dict())
    assert empty.doubt() is None and not empty.moved(indices, sums).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("indices", torch.tensor([-1])),
        ("indices", torch.full((30,), 1 << 40)),
        ("indices", None),
        ("sums", torch.zeros(3, dtype=torch.int64)),
        ("sums", torch.zeros(30)),
        ("counts", torch.zeros(1, dtype=torch.int64)),
        ("labels.first", torch.zeros(30, dtype=torch.int64)),
        ("labels.indices", torch.arange(3)),
        ("labels.counts", "many"),
        ("labels.have_moved", torch.tensor([1])),
    ],
)
def test_damaged_contents_are_refused(name, value):
    state = noted()[0].state_dict() | {name: value}
    with pytest.raises(ValueError, match="saved contents are incomplete or damaged"):
        ItemContents.from_state_dict(state)


def flips_of_few_contents(seed, change):
    """Number of samples reported in three epochs of 40 items of 6 bits."""
    rng = np.random.default_rng(seed)
    items = rng.integers(0, 2, (40, 6))
    contents, num_reported = ItemContents(), 0
    for epoch in range(3):
        now = items if epoch == 0 else change(items, rng)
        for batch in rng.permutation(40).reshape(5, 8):
            sums = now[batch] @ 2 ** np.arange(6) + 1
            num_reported += int(contents.moved(batch, sums).sum())
    return num_reported


def flipped_at_random(items, rng):
    return np.where(rng.random((40, 1)) < 0.5, items[:, ::-1], items)


def permuted(items, rng):
    return rng.permutation(items)


def test_random_flips_of_few_contents_are_told_from_a_permutation():
    flips = [flips_of_few_contents(seed, flipped_at_random) for seed in range(40)]
    permutations = [flips_of_few_contents(seed, permuted) for seed in range(40)]
    assert np.count_nonzero(flips) <= 1
    assert np.count_nonzero(permutations) >= 38
