"""Inputs that the loop cuts or pads: by the batch, by a schedule, or not at all."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

from opacus_pi import AccountingError, PrivacyEngine
from opacus_pi.attribution.input_sizes import SizeSequence

NUM, STEPS, WORDS, SIZE = 60, 9, 20, 6
EPOCH = NUM // SIZE
SAID = "rose and fell from one forward pass to another"


class Averaging(nn.Module):
    """Averages over all time steps, or over those that are no padding."""

    def __init__(self, *, is_masked=False):
        super().__init__()
        self.is_masked = is_masked
        self.words, self.out = nn.Embedding(WORDS, 5), nn.Linear(5, 3)

    def forward(self, ids, mask=None):
        if isinstance(ids, dict):
            ids, mask = ids["ids"], ids["mask"]
        mask = ids > 0 if mask is None and self.is_masked else mask
        words = self.words(ids)
        if mask is None:
            return self.out(words.mean(1))
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return self.out((words * share[..., None]).sum(1))


class Steps(nn.Module):
    """Averages the outputs of all time steps."""

    def __init__(self, time=1):
        super().__init__()
        self.time = time
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.layers(x).mean(self.time)


class Convolving(nn.Module):
    """Averages over the positions of images of any size."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Conv2d(2, 4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x).tanh().mean((2, 3)))


def texts():
    """Return texts that are padded to one length, which none has, and labels."""
    torch.manual_seed(0)
    lengths = torch.randint(1, STEPS, (NUM, 1))
    ids = torch.randint(1, WORDS, (NUM, STEPS)) * (torch.arange(STEPS) < lengths)
    return TensorDataset(ids, torch.randint(0, 3, (NUM,)))


def steps():
    """Return texts with several numbers for each word."""
    ids, labels = texts().tensors
    return TensorDataset(torch.randn(WORDS, 4)[ids] * (ids > 0)[..., None], labels)


def train(step, *, model=None, data=None, epochs=2, audit=False, collate=None, **more):
    """Train by a function that gets model, batch and number; return what is said."""
    data, model, engine = data or texts(), model or Averaging(), PrivacyEngine()
    criterion = nn.CrossEntropyLoss()
    is_ghost = more.get("grad_sample_mode") == "ghost"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, optimizer, *ghost, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=DataLoader(data, batch_size=SIZE, collate_fn=collate),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **({"criterion": criterion} if is_ghost else {}),
            **more,
        )
        passed = engine.audit(criterion).passed if audit else None
        num = 0
        for _ in range(epochs):
            for x, y in loader:
                if not len(x):
                    continue
                optimizer.zero_grad()
                (ghost or [criterion])[0](step(model, x, num), y).backward()
                optimizer.step()
                num += 1
        try:
            custody = engine.ledger.custody
        except AccountingError as error:
            return str(error), [], passed
    warned = [str(w.message) for w in said if SAID in str(w.message)]
    return {link.name: link for link in custody.links}["rows"], warned, passed


def longest(x):
    is_word = x != 0
    return int((is_word.any(2) if x.dim() > 2 else is_word).sum(1).max())


def shortest(x):
    return int((x > 0).sum(1).min())


CUT = {
    "to the longest": lambda m, x, n: m(x[:, : longest(x)]),
    "to the shortest": lambda m, x, n: m(x[:, : shortest(x)]),
    "from the other end": lambda m, x, n: m(x[:, STEPS - longest(x) :]),
    "by narrow": lambda m, x, n: m(x.narrow(1, 0, longest(x))),
    "made contiguous": lambda m, x, n: m(x[:, : longest(x)].contiguous()),
    "strided": lambda m, x, n: m(x[:, :: 1 + longest(x) % 3]),
    "to one of two lengths": lambda m, x, n: m(x if longest(x) > 7 else x[:, :7]),
    "with its mask": lambda m, x, n: m(x[:, : longest(x)], (x > 0)[:, : longest(x)]),
    "by keyword": lambda m, x, n: m(ids=x[:, : longest(x)]),
    "in a dict": lambda m, x, n: m(
        {"ids": x[:, : longest(x)], "mask": (x > 0)[:, : longest(x)]}
    ),
    "padded again": lambda m, x, n: m(
        pad_sequence([row[row > 0] for row in x], batch_first=True)
    ),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_length_that_the_loop_computes_from_the_batch_is_said(kind):
    rows, warned, _ = train(CUT[kind], poisson_sampling=False)
    assert rows.state == "unchecked" and SAID in rows.sentence
    assert len(warned) == 1 and "collate_fn" in warned[0] and "mask" in warned[0]


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
@pytest.mark.parametrize("audit", [True, False])
def test_it_is_said_in_every_mode_and_after_an_audit(mode, audit):
    rows, warned, _ = train(
        CUT["to the longest"],
        model=Steps(),
        data=steps(),
        grad_sample_mode=mode,
        audit=audit,
    )
    assert rows.state == "unchecked" and SAID in rows.sentence and len(warned) == 1


def test_a_time_first_input_that_is_cut_is_said():
    rows, warned, _ = train(
        lambda m, x, n: m(x.transpose(0, 1)[: longest(x)]),
        model=Steps(time=0),
        data=steps(),
        batch_first=False,
    )
    assert rows.state == "unchecked" and len(warned) == 1


def test_images_that_are_cut_to_the_largest_are_said():
    torch.manual_seed(0)
    images = torch.rand(NUM, 2, 8, 8)
    for image, size in zip(images, torch.randint(2, 9, (NUM,)).tolist(), strict=True):
        image[:, :, size:] = 0
    data = TensorDataset(images, torch.randint(0, 3, (NUM,)))

    def step(model, x, _):
        width = int((x != 0).any(1).any(1).sum(1).max())
        return model(x[..., :width])

    rows, warned, _ = train(step, model=Convolving(), data=data)
    assert rows.state == "unchecked" and len(warned) == 1


SCHEDULED = {
    "whole": lambda m, x, n: m(x),
    "moved": lambda m, x, n: m(x.clone()),
    "constant copies": lambda m, x, n: m(x[:, :6].contiguous()),
    "constant": lambda m, x, n: m(x[:, :6]),
    "without the last": lambda m, x, n: m(x[:, :-1]),
    "strided": lambda m, x, n: m(x[:, ::2]),
    "grows": lambda m, x, n: m(x[:, : 3 + n // 8]),
    "grows unevenly": lambda m, x, n: m(x[:, : 2 + int(1.7 * (n // 10))]),
    "grows to the whole": lambda m, x, n: m(x[:, : min(3 + n // 3, STEPS)]),
    "shrinks": lambda m, x, n: m(x[:, : STEPS - n // 8]),
    "by the epoch": lambda m, x, n: m(x[:, : (9, 5, 7)[n // EPOCH]]),
    "whole in every second epoch": lambda m, x, n: m(
        x[:, :5] if n // EPOCH == 1 else x
    ),
    "in two stages": lambda m, x, n: m(x[:, : 4 if n < 11 else STEPS]),
    "whole at first": lambda m, x, n: m(x if n < 11 else x[:, :4]),
    "every second": lambda m, x, n: m(x[:, :5] if n % 2 else x),
    "every third": lambda m, x, n: m(x if n % 3 == 1 else x[:, :5]),
    "in chunks": lambda m, x, n: sum(
        m(x[:, start : start + 4]) for start in range(0, x.shape[1], 4)
    ),
    "several crops": lambda m, x, n: m(x) + m(x[:, :4]) + m(x[:, 2:5]) + m(x[:, :6]),
}


@pytest.mark.parametrize("kind", SCHEDULED)
def test_constant_and_scheduled_sizes_are_not_said(kind):
    rows, warned, _ = train(SCHEDULED[kind], epochs=3, poisson_sampling=False)
    assert not warned and "rose and fell" not in rows.sentence
    assert rows.state == "checked" or "each was computed from" in rows.sentence


def cut_in_collate(items):
    """Collate items, and cut the batch to its longest text."""
    x, y = default_collate(items)
    return x[:, : max(longest(x), 1)], y


@pytest.mark.parametrize("kind", ["whole", "moved", "without the last", "in chunks"])
def test_lengths_that_collate_fn_chose_are_not_said_again(kind):
    rows, warned, _ = train(SCHEDULED[kind], collate=cut_in_collate, epochs=4)
    assert not warned and SAID not in rows.sentence


def test_the_remedy_in_collate_fn_is_audited():
    options = {"collate": cut_in_collate, "audit": True, "epochs": 1}
    error, _, passed = train(SCHEDULED["whole"], **options)
    assert not passed and "collate_fn" in error
    masked = Averaging(is_masked=True)
    rows, warned, passed = train(SCHEDULED["whole"], model=masked, **options)
    assert passed and rows.state == "checked" and not warned


EXPLAINED = [
    ([[9] * 5], True),
    ([[9, 9, 9, 7, 7]], True),
    ([[4, 8, 16], [16, 20, 31]], True),
    ([[9, 8, 8, 6], [3, 3, 1]], True),
    ([[9, 7, 9, 7, 9, 7]], True),
    ([[7, 9, 7, 7, 9, 7, 7, 9]], True),
    ([[9, 9, 9], [5, 5, 5], [7, 7, 7], [9, 9, 9]], True),
    ([[9, 9, 9, 7, 9]], False),
    ([[9, 7, 9, 7, 9, 9, 7]], False),
    ([[9, 9, 9, 8], [9, 9, 9, 8]], False),  # the same batches in each epoch
    ([[3, 5, 8, 9], [3, 5, 8, 9]], False),  # sorted by length
    ([[9], [5], [7]], False),  # one batch of each pass
    ([[5, 9, 7]], False),
]


@pytest.mark.parametrize(("passes", "is_explained"), EXPLAINED)
def test_which_sizes_follow_a_rule(passes, is_explained):
    sequence = SizeSequence()
    for number, sizes in enumerate(passes):
        for size in sizes:
            sequence.add(size, number)
    assert sequence.is_explained is is_explained
