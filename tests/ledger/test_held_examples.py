"""A data set is recognised by what it holds: arrays, files, texts, other data sets."""

import os
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from opacus_pi.ledger import fingerprint
from opacus_pi.ledger.same_data import (
    compared,
    difference,
    same_data_set,
    same_transforms,
    without_transforms,
)

LABELS = [0, 0, 1, 1]


class Held(Dataset):
    """A data set of the user's own, with whatever attributes it gets."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.targets = LABELS

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        raise AssertionError("an example was read")


class Flip:
    def __init__(self, p):
        self.p = p

    def __call__(self, x):
        return x


def folder_of(path, contents):
    """Write files, and return a data set as ImageFolder describes one."""
    path.mkdir()
    for name, content in contents.items():
        (path / name).write_bytes(content)
    names = sorted(contents)
    samples = [(str(path / one), y) for one, y in zip(names, LABELS, strict=True)]
    return Held(root=str(path), samples=samples)


PHOTOS = {"a.bmp": b"1" * 9, "b.bmp": b"2" * 9, "c.bmp": b"3" * 9, "d.bmp": b"4" * 9}


def test_files_that_were_renamed_are_another_order(tmp_path):
    one = fingerprint(folder_of(tmp_path / "one", PHOTOS))
    renamed = {"z.bmp" if k == "a.bmp" else k: v for k, v in PHOTOS.items()}
    assert "names of files" in difference(
        one, fingerprint(folder_of(tmp_path / "two", renamed))
    )


def test_files_of_one_size_that_changed_names_are_another_order(tmp_path):
    one = fingerprint(folder_of(tmp_path / "one", PHOTOS))
    swapped = PHOTOS | {"a.bmp": PHOTOS["b.bmp"], "b.bmp": PHOTOS["a.bmp"]}
    found = difference(one, fingerprint(folder_of(tmp_path / "two", swapped)))
    assert found == "the sizes and ends of the files of all examples"


def test_a_folder_may_move(tmp_path):
    one = fingerprint(folder_of(tmp_path / "one", PHOTOS))
    shutil.move(tmp_path / "one", tmp_path / "moved")
    names = sorted(os.listdir(tmp_path / "moved"))
    at_hand = Held(root=tmp_path / "moved", files=names)  # relative names, no tuples
    pairs = [
        (str(tmp_path / "moved" / n), y) for n, y in zip(names, LABELS, strict=True)
    ]
    moved = fingerprint(Held(root=str(tmp_path / "moved"), samples=pairs))
    assert one == moved and compared(one, moved).covers_examples
    assert ":f" in fingerprint(at_hand)


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: Held(pictures=x),
        lambda x: Held(pictures=x.numpy()),
        lambda x: Held(pictures=x.permute(1, 0).contiguous().permute(1, 0)),
        lambda x: Held(parts={"x": x}),
        lambda x: Held(pairs=[(row, 1) for row in x]),
        lambda x: Held(inner=TensorDataset(x, torch.tensor(LABELS))),
        lambda x: [(row, 1) for row in x],
        lambda x: ConcatDataset([TensorDataset(x[:1]), TensorDataset(x[1:])]),
        lambda x: Subset(Held(pictures=x), [3, 2, 1, 0]),
    ],
)
def test_examples_are_found_under_any_name(hold):
    x = torch.arange(12.0).view(4, 3)
    swapped = x[[1, 0, 2, 3]]
    one, again, other = (fingerprint(hold(v)) for v in (x, x.clone(), swapped))
    assert one == again and compared(one, again).covers_examples
    assert not same_data_set(one, other)


def test_each_example_of_a_large_set_counts():
    x = np.random.default_rng(0).integers(0, 255, (5000, 3, 32, 32), dtype=np.uint8)
    labels = np.zeros(5000)
    swapped = x.copy()
    swapped[[1234, 1235]] = x[[1235, 1234]]
    names = []
    for pixels in (x, swapped):
        held = TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels))
        names.append(fingerprint(held))
    assert not same_data_set(*names)


def test_what_is_noted_during_training_does_not_count():
    counts, cache = np.zeros(4), np.zeros((4, 3))
    held = Held(x=torch.zeros(4, 3), seen=counts, _cache=cache)
    before = fingerprint(held)
    counts += 1
    cache += 1
    assert fingerprint(held) == before


def test_transforms_count_on_their_own():
    names = [
        fingerprint(Held(x=torch.zeros(4, 2), augment=Flip(p))) for p in (0, 0.5, 0.5)
    ]
    assert same_data_set(names[0], names[1])
    assert same_transforms(names[0], names[1]) is False
    assert same_transforms(names[1], names[2]) is True
    assert same_transforms(names[1], without_transforms(names[2])) is None
    assert same_transforms("mine", names[1]) is None


def test_what_was_not_compared_is_said(tmp_path):
    held = Held(texts=["one", "two", "three", "four"])
    name = fingerprint(held)
    assert not compared(name, name).covers_examples
    assert "only class, length and labels" in compared(name, "Held:4").evidence
    assert "texts of all examples" in compared(name, name).evidence
    bare = "Held:4:e" + "0" * 16
    assert "class and length (no labels were found)" in compared(bare, bare).evidence


def test_old_fingerprints_are_compared_in_what_they_have():
    held = TensorDataset(torch.zeros(4, 2), torch.tensor(LABELS))
    new = fingerprint(held)
    old = new[: new.index(":e")]  # class, length, labels and the part x
    assert same_data_set(old, new) and same_data_set(new, old)
    assert not compared(old, new).covers_examples
    assert not same_data_set(
        old, fingerprint(TensorDataset(torch.ones(4, 2), torch.tensor(LABELS)))
    )


def test_odd_attributes_do_no_harm():
    class NoLength:
        __getitem__ = None

        def __len__(self):
            raise TypeError("no length")

    class NoText:
        def __call__(self):
            pass

        def __repr__(self):
            raise ValueError("no text")

    held = Held(
        a=NoLength(),
        transform=NoText(),
        b=torch.zeros(4, 0),
        c=torch.eye(4).to_sparse(),
        d=[None] * 4,
        e=np.array([None] * 4),
        f=[""] * 4,
        g=torch.zeros(4, 2, device="meta"),
        h=["\0"] * 4,
    )
    held.itself = held
    assert fingerprint(held) == fingerprint(held)
    assert fingerprint(Subset(held, [])).startswith("Subset[Held]:0:")
