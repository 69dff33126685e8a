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
    assert "at least one file name or text" in difference(
        one, fingerprint(folder_of(tmp_path / "two", renamed))
    )


def test_files_of_one_size_that_changed_names_are_another_order(tmp_path):
    one = fingerprint(folder_of(tmp_path / "one", PHOTOS))
    swapped = PHOTOS | {"a.bmp": PHOTOS["b.bmp"], "b.bmp": PHOTOS["a.bmp"]}
    found = difference(one, fingerprint(folder_of(tmp_path / "two", swapped)))
    ends = "the size, start or end of at least one file"
    assert found == f"{ends}; the content of at least one file"


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
    cache += 1
    assert fingerprint(held) == before
    assert compared(before, before).covers_examples
    counts += 1
    held.epoch = 3
    assert same_data_set(before, fingerprint(held))
    found = compared(before, fingerprint(held))
    assert not found.covers_examples and "beside the labels differ" in found.evidence


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
    numbers = bare + ":y" + "1" * 16
    assert "no labels" not in compared(numbers, numbers).evidence
    assert "such as labels" in compared(numbers, numbers).evidence


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


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["y", "answers", "group"])
def test_labels_count_under_any_name(kind, name):
    class Own(Held):
        def __init__(self, values):
            self.x = torch.eye(4)
            setattr(self, name, kind(values))

    one, again, other = (
        fingerprint(Own(v)) for v in ([0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1])
    )
    assert compared(one, again).covers_examples
    assert (
        difference(one, other) == "at least one number of an example, such as a label"
    )


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_an_order_counts_beside_labels(kind):
    names = [
        fingerprint(Held(x=torch.eye(4), at=kind(order)))
        for order in ([0, 2, 1, 3], [0, 2, 1, 3], [2, 0, 1, 3])
    ]
    assert compared(names[0], names[1]).covers_examples
    assert difference(names[0], names[2]) == "the orders that the data set holds"


SHIFT = [0]


class ByGlobal(Held):
    def __getitem__(self, index):
        return self.x[(index + SHIFT[0]) % 4], 0


def by_closure(shift):
    class Own(Held):
        def __getitem__(self, index):
            return self.x[(index + shift) % 4], 0

    return Own(x=torch.eye(4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"offset": 0}, {"offset": 1}),
        ({"mode": "forward"}, {"mode": "backward"}),
        ({"reverse": False}, {"reverse": True}),
        ({"options": {"seed": 1}}, {"options": {"seed": 2}}),
        ({"index": np.arange(6)}, {"index": np.arange(6)[::-1]}),
        ({"index": list(range(6))}, {"index": list(range(1, 7))}),
        ({"span": range(4)}, {"span": range(1, 5)}),
    ],
)
def test_settings_that_may_decide_which_example_is_meant_are_said(one, other):
    names = [fingerprint(Held(x=torch.eye(4), **kept)) for kept in (one, one, other)]
    assert compared(names[0], names[1]).covers_examples
    found = compared(names[0], names[2])
    assert not found.covers_examples
    assert found.evidence.endswith("settings of the data set differ")


def test_settings_outside_of_the_object_are_said(monkeypatch):
    held = ByGlobal(x=torch.eye(4))
    before = fingerprint(held)
    assert compared(before, fingerprint(held)).covers_examples
    monkeypatch.setattr("tests.ledger.test_held_examples.SHIFT", [1])
    assert not compared(before, fingerprint(held)).covers_examples
    names = [fingerprint(by_closure(shift)) for shift in (1, 1, 2)]
    assert compared(names[0], names[1]).covers_examples
    assert not compared(names[0], names[2]).covers_examples
    monkeypatch.setattr(Held, "shift", 1, raising=False)
    before = fingerprint(held)
    monkeypatch.setattr(Held, "shift", 2)
    assert not compared(before, fingerprint(held)).covers_examples


def test_attributes_that_cannot_be_described_are_said():
    name = fingerprint(Held(x=torch.eye(4), generator=np.random.default_rng(0)))
    found = compared(name, name)
    assert not found.covers_examples and "such as generators" in found.evidence
    old = name[: name.index(":b")]
    assert "settings of the data set were not" in compared(old, name).evidence


def test_data_sets_of_torch_have_no_settings():
    name = fingerprint(Subset(TensorDataset(torch.eye(4), torch.arange(4)), [1, 0]))
    assert compared(name, name).covers_examples and ":a" not in name


@pytest.mark.parametrize("size", [100_000, 300_000, 3_000_000])
def test_the_middle_of_a_file_counts(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    edited = content[:5000] + bytes(size - 10_000) + content[-5000:]
    files = {f"{i}.bin": content for i in range(4)}
    one = fingerprint(folder_of(tmp_path / "one", files))
    again = fingerprint(folder_of(tmp_path / "again", files))
    other = fingerprint(folder_of(tmp_path / "other", files | {"2.bin": edited}))
    found = compared(one, again)
    assert found.covers_examples == (size < 200_000)
    assert ("drawn blocks" in found.evidence) == (size > 200_000)
    part = "the content" if size < 200_000 else "a part"
    assert difference(one, other) == f"{part} of at least one file"


def test_a_file_that_was_changed_is_read_again(tmp_path):
    held = folder_of(tmp_path / "one", PHOTOS)
    before = fingerprint(held)
    path, times = tmp_path / "one" / "b.bmp", (1, 1)
    os.utime(path, times)
    fingerprint(held)
    path.write_bytes(b"5" * 9)
    os.utime(path, times)
    assert not same_data_set(before, fingerprint(held))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("Other:4:0123456789abcdef", "class"),
        ("Held:5:0123456789abcdef", "length"),
        ("Held:4:0123456789abcdee", "labels"),
        ("Held:4", "labels"),
        ("Other:5:0123456789abcdef", "class and length"),
        ("Other:5", "class, length and labels"),
        ("mine", "name"),
    ],
)
def test_a_difference_names_what_differs(other, words):
    assert difference("Held:4:0123456789abcdef", other) == words


@pytest.mark.parametrize(
    ("changed", "asks"),
    [("input_ids", True), ("label", False), ("both", False)],
)
def test_inputs_alone_may_come_from_another_tokenizer(changed, asks):
    def texts(ids, labels):
        place = torch.arange(9)
        rows = torch.stack([place, place + ids], 1)
        return fingerprint(TensorDataset(rows, place % 2 + labels))

    other = texts(int(changed != "label"), int(changed != "input_ids"))
    words = difference(texts(0, 0), other)
    assert words and ("such as a tokenizer" in words) == asks
    assert words.count("at least one input") <= 1  # not of all, and again of some
