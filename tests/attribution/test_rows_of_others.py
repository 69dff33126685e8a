"""Inputs of any pass whose entries are those of other examples of the batch."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine
from opacus_pi.attribution import Tracker
from opacus_pi.attribution.causes import ROWS_OF_OTHERS

USERS, ITEMS, NUM, SIZE, WIDTH = 40, 300, 96, 12, 6
ASSUMED = "data set instead.", "within the model."
SAID, QUIET = "more entries of other examples", "It is assumed that they were not"


class Rating(nn.Module):
    """Rates one item, or several, for each user."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, 4), nn.Embedding(ITEMS, 4)

    def forward(self, user, item):
        user, item = self.users(user), self.items(item)
        return ((user[:, None] if item.dim() > 2 else user) * item).sum(-1)


class Popularity(nn.Module):
    """Rates items alone."""

    def __init__(self):
        super().__init__()
        self.items, self.out = nn.Embedding(ITEMS, 4), nn.Linear(4, 1)

    def forward(self, item):
        return self.out(self.items(item)).squeeze(-1)


def features(width=WIDTH):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3))


def ratings():
    item, other = torch.randint(ITEMS, (2, NUM))
    return TensorDataset(torch.randint(USERS, (NUM,)), item, other)


def numbers(width=WIDTH):
    return TensorDataset(torch.randn(NUM, width), torch.randint(3, (NUM,)))


def drawn(values, *more):
    """Draw from the batch, with replacement."""
    return values[torch.randint(len(values), (len(values), *more))]


def of_all(values, num=ITEMS):
    return torch.randint(num, (len(values),))


def ranked(one, other):
    return -functional.logsigmoid(one - other).mean()


def near(one, other):
    return (one - other).square().mean()


def several(model, user, item, others):
    return ranked(model(user, item)[:, None], model(user, others))


def mixed(x):
    return 0.6 * x + 0.4 * drawn(x)


OTHERS = {  # by model: loops in which a gradient depends on other examples
    "ids": (
        Rating,
        ratings,
        {
            "second": lambda m, u, i, _: ranked(m(u, i), m(u, drawn(i))),
            "first": lambda m, u, i, _: -ranked(m(u, drawn(i)), m(u, i)),
            "keyword": lambda m, u, i, _: ranked(m(u, i), m(u, item=drawn(i))),
            "users": lambda m, u, i, _: ranked(m(u, i), m(drawn(u), i)),
            "several": lambda m, u, i, _: several(m, u, i, drawn(i, 3)),
            "in-batch": lambda m, u, i, _: several(
                m, u, i, torch.stack([i.roll(k) for k in (1, 2, 3)], 1)
            ),
            "after others": lambda m, u, i, _: (
                ranked(m(u, i), m(u, of_all(i))) + ranked(m(u, i), m(u, drawn(i)))
            ),
        },
    ),
    "items": (
        Popularity,
        ratings,
        {"alone": lambda m, u, i, _: ranked(m(i), m(drawn(i)))},
    ),
    "numbers": (
        features,
        numbers,
        {
            "in 3-D": lambda m, x, _: near(m(x)[:, None], m(drawn(x, 3))),
            "mixup": lambda m, x, _: near(m(x), m(mixed(x))),
        },
    ),
    "one number": (
        lambda: features(1),
        lambda: numbers(1),
        {"drawn": lambda m, x, _: near(m(x), m(drawn(x)))},
    ),
}
OWN = {  # loops in which it does not
    "ids": (
        Rating,
        ratings,
        {
            "all items": lambda m, u, i, _: ranked(m(u, i), m(u, of_all(i))),
            "few items": lambda m, u, i, _: ranked(m(u, i), m(u, of_all(i, 9))),
            "several": lambda m, u, i, _: several(
                m, u, i, torch.randint(ITEMS, (len(i), 3))
            ),
            "delivered": lambda m, u, i, j: ranked(m(u, i), m(u, j)),
            "shifted": lambda m, u, i, _: ranked(m(u, i), m(u, (i + 1) % ITEMS)),
            "same": lambda m, u, i, _: ranked(m(u, i), 2 * m(u, i)),
            "own again": lambda m, u, i, _: several(m, u, i, i[:, None].repeat(1, 3)),
        },
    ),
    "items": (
        Popularity,
        ratings,
        {"alone": lambda m, u, i, _: ranked(m(i), m(of_all(i)))},
    ),
    "numbers": (
        features,
        numbers,
        {
            "noise": lambda m, x, _: near(m(x), m(x + 0.1 * torch.randn_like(x))),
            "generated": lambda m, x, _: near(m(x), m(torch.randn_like(x))),
            "masked": lambda m, x, _: near(m(x), m(x * (torch.rand_like(x) < 0.5))),
        },
    ),
    "marks": (
        features,
        lambda: TensorDataset(torch.eye(WIDTH)[torch.randint(WIDTH, (NUM,))]),
        {"flipped": lambda m, x: near(m(x), m((x + (torch.rand_like(x) < 0.2)) % 2))},
    ),
    "one mark": (
        lambda: features(1),
        lambda: TensorDataset(torch.randint(2, (NUM, 1)).float()),
        {"flipped": lambda m, x: near(m(x), m((torch.rand_like(x) < 0.5).float()))},
    ),
}


def cases(table):
    return [(kind, name) for kind, (*_, loops) in table.items() for name in loops]


def train(table, kind, name, mode="hooks", epochs=2):
    """Train by a loop; return the link "rows", or why it is refused, and warnings."""
    torch.manual_seed(0)
    model, data, loops = table[kind]
    model, data, engine = model(), data(), PrivacyEngine()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=DataLoader(data, batch_size=SIZE),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
        for _ in range(epochs):
            for batch in loader:
                if len(batch[0]):
                    optimizer.zero_grad()
                    loops[name](model, *batch).backward()
                    optimizer.step()
        try:
            links = {link.name: link for link in engine.ledger.custody.links}
        except AccountingError as error:
            return str(error), []
    return links["rows"], [str(w.message) for w in said if SAID in str(w.message)]


@pytest.mark.parametrize(("kind", "name"), cases(OTHERS))
def test_entries_of_other_examples_in_any_pass_are_said(kind, name):
    rows, warned = train(OTHERS, kind, name)
    assert rows.state == "unchecked" and SAID in rows.sentence
    assert len(warned) == 1 and "from all items" in warned[0]


@pytest.mark.parametrize("mode", ["functorch", "fast"])
def test_they_are_said_in_every_mode(mode):
    rows, warned = train(OTHERS, "ids", "second", mode)
    assert rows.state == "unchecked" and SAID in rows.sentence and len(warned) == 1


@pytest.mark.parametrize(("kind", "name"), cases(OWN))
def test_entries_that_do_not_depend_on_the_batch_are_not_said(kind, name):
    rows, warned = train(OWN, kind, name, epochs=4)
    assert not warned and rows.state in ("checked", "unchecked")
    assert rows.state == "checked" or rows.sentence.endswith(ASSUMED)
    assert SAID not in rows.sentence


def test_in_a_short_run_it_is_an_assumption_that_negatives_are_not_of_the_batch():
    rows, warned = train(OTHERS, "ids", "second", epochs=1)
    assert rows.state == "unchecked" and QUIET in rows.sentence and not warned


def passes(tracker, others, sizes, columns, *, popular=1.0):
    """Yield whether each pass with one other input is noted."""
    for number, size in enumerate(sizes):
        start = 1000 * number
        users = torch.arange(start, start + size)
        items = (columns * torch.rand(size) ** popular).long()
        tracker.delivered(list(range(start, start + size)), (users, items))
        given = [users, others(items)]
        forward = tracker.bind_tensors(given)
        tracker.saw_call(forward, given, tuple(given), {})
        yield ROWS_OF_OTHERS in forward.notes


@pytest.mark.parametrize("columns", [2, 10, 100, 10_000])
@pytest.mark.parametrize("popular", [1.0, 4.0])
def test_false_alarms_are_rare(columns, popular):
    torch.manual_seed(0)
    for _ in range(8):
        sizes = torch.poisson(torch.full((70,), 20.0)).long().tolist()
        found = passes(
            Tracker(),
            lambda items: (columns * torch.rand(len(items)) ** popular).long(),
            sizes,
            columns,
            popular=popular,
        )
        assert not any(found)


def test_it_is_found_after_11_batches_and_if_it_begins_late_after_6():
    torch.manual_seed(0)
    early = list(passes(Tracker(), drawn, [20] * 12, ITEMS))
    assert early == [False] * 10 + [True] * 2
    count = iter(range(100))
    late = passes(
        Tracker(),
        lambda i: drawn(i) if next(count) >= 20 else of_all(i),
        [20] * 30,
        300,
    )
    assert list(late).index(True) <= 27


def test_a_loop_that_permutes_the_batch_is_not_said_to_have_entries_of_others():
    tracker, notes = Tracker(), []
    for n in range(20):
        x, z = torch.randn(8, 5), torch.randint(ITEMS, (8,))
        tracker.delivered(list(range(8 * n, 8 * n + 8)), (x, z))
        order = torch.randperm(8)
        given = [x[order], z[order]]
        forward = tracker.bind_tensors(given)
        tracker.saw_call(forward, given, tuple(given), {})
        notes += forward.notes
    assert not notes


class WithIds(nn.Module):
    """A model that may be given an id beside each example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x, ids=None):
        return self.layer(x) if ids is None else self.layer(x + 1e-3 * ids[:, None])


@pytest.mark.parametrize(
    ("with_ids", "ids", "is_said"),
    [
        (False, lambda ids: (), False),
        (True, lambda ids: (ids,), False),
        (True, lambda ids: (drawn(ids),), True),
    ],
    ids=["alone", "own ids", "ids of others"],
)
def test_unattributed_samples_are_not_taken_for_entries_of_others(
    with_ids, ids, is_said
):
    """The indices of a subset change, which makes no gradient depend on others."""
    torch.manual_seed(0)
    tensors = torch.randn(48, WIDTH), torch.randint(3, (48,)), torch.arange(48)
    subset = Subset(TensorDataset(*tensors[: 2 + with_ids]), list(range(24)))
    engine, model = PrivacyEngine(), WithIds()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(subset, batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        for _ in range(6):
            for x, y, *z in loader:
                optimizer.zero_grad()
                functional.cross_entropy(model(x, *ids(*z or [x])), y).backward()
                optimizer.step()
            subset.indices = torch.randperm(48)[:24].tolist()
        with pytest.raises(AccountingError, match="returned for another index before"):
            engine.ledger  # noqa: B018
    assert any(SAID in str(w.message) for w in said) == is_said
