"""Batches whose rows depend on other items are said, and found by an audit."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from opacus_pi import AccountingError, PrivacyEngine

WIDTH, PAD = 4, 0
criterion = nn.CrossEntropyLoss()


class Tokens(Dataset):
    """Sequences of 2 to 9 tokens, with a class."""

    def __init__(self):
        lengths = [2, 3, 4, 3, 2, 9, 3, 2, 5, 6, 2, 3]
        generator = torch.Generator().manual_seed(1)
        self.x = [torch.randint(1, 20, (n,), generator=generator) for n in lengths]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], i % 3


class Mean(nn.Module):
    """The mean of the embeddings, of all tokens or of those that are not padding."""

    def __init__(self, *, is_masked):
        super().__init__()
        self.is_masked = is_masked
        self.embedding, self.linear = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        kept = (x != PAD).unsqueeze(-1) if self.is_masked else torch.ones(1)
        size = kept.sum(1) if self.is_masked else x.shape[1]
        return self.linear((self.embedding(x) * kept).sum(1) / size)


def padded(items):
    x, y = zip(*items, strict=True)
    return pad_sequence(x, batch_first=True, padding_value=PAD), torch.tensor(y)


def padded_sorted(items):
    return padded(sorted(items, key=lambda item: -len(item[0])))


def padded_in_place(items):
    """Empties the lists that it is given, as some collate functions do."""
    x = [item.pop(0) for item in items]
    return pad_sequence(x, batch_first=True), torch.tensor([i.pop() for i in items])


def masked_at_random(items):
    x, y = padded(items)
    return x * (torch.rand(x.shape) < 0.9), y


def numbers():
    torch.manual_seed(2)
    return TensorDataset(torch.randn(16, WIDTH), torch.arange(16) % 3)


def with_mean(items):
    x, y = default_collate(items)
    return torch.cat([x, x.mean(0).expand_as(x)], dim=1), y


def with_length(items):
    x, y = default_collate(items)
    return torch.cat([x, x.sum(1, keepdim=True).expand_as(x)], dim=1), y


def centred(items):
    x, y = default_collate(items)
    return x - x.mean(0), y


def standardised(items):
    """One item alone has no spread, so it becomes NaN."""
    x, y = default_collate(items)
    return (x - x.mean(0)) / x.std(0), y


def noisy(items):
    x, y = default_collate(items)
    return x + 0.1 * torch.randn_like(x), y


def noisy_by_numpy(items):
    x, y = default_collate(items)
    return x + 0.1 * random.random() + torch.from_numpy(
        np.random.rand(*x.shape)
    ).float(), y


def mixed_up(items):
    x, y = default_collate(items)
    return (0.7 * x + 0.3 * x[torch.randperm(len(x))]) ** 3, y


def augmented_and_sorted(items):
    x, y = default_collate(sorted(items, key=lambda item: -item[0].sum()))
    return x**3 + 1, y


def reordered(items):
    return default_collate(items[::-1])


def cut_to_shortest(items):
    x, y = zip(*items, strict=True)
    size = min(map(len, x))
    return torch.stack([one[:size] for one in x]), torch.tensor(y)


def first_items(items):
    return default_collate(items[:6])


def within_a_budget(items):
    """Limits the sum of the lengths, which the audited batch does not reach."""
    kept, total = [], 0
    for item in items:
        total += len(item[0])
        if total <= 40:
            kept.append(item)
    return padded(kept)


def for_several(items):
    """Cannot be called on one item."""
    x, y = default_collate(items)
    assert len(x) > 1
    return torch.cat([x, x.sum(1, keepdim=True).expand_as(x)], dim=1), y


def prepared(collate, data=None, module=None):
    data = numbers() if data is None else data
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, 3) if module is None else module
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, 8, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )

    def train():
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    return engine, train, module


def on_tokens(collate, *, is_masked):
    return prepared(collate, Tokens(), Mean(is_masked=is_masked))


def wide(collate):
    return prepared(collate, module=nn.Linear(2 * WIDTH, 3))


def rows_link(engine):
    return next(k for k in engine.ledger.custody.links if k.name == "rows")


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: on_tokens(padded, is_masked=False),
        lambda: on_tokens(padded_sorted, is_masked=False),
        lambda: wide(with_mean),
        lambda: prepared(centred),
        lambda: prepared(mixed_up),
        lambda: on_tokens(cut_to_shortest, is_masked=False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]amples", "ignore:This run no longer")
def test_rows_that_depend_on_other_items_are_said_and_then_refused(prepare):
    engine, train, _ = prepare()
    train()
    assert rows_link(engine).state == "unchecked"
    audit = engine.audit(criterion)
    assert not audit.passed and audit["batch"].passed is False
    assert all(row.passed for row in audit.rows if row.name != "batch")
    with pytest.raises(AccountingError, match="Collated among other items"):
        _ = engine.ledger


@pytest.mark.filterwarnings("ignore:.*[Ss]amples", "ignore:This run no longer")
def test_items_that_are_no_numbers_alone_are_said_in_words():
    engine, train, _ = prepared(standardised)
    train()
    text = str(engine.audit(criterion))
    assert "norms that are not finite (infinite or NaN)" in " ".join(text.split())
    assert "nan times" not in text


def test_a_model_without_norms_is_not_blamed_on_collate_fn():
    module = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, 3))
    engine, _, _ = prepared(standardised, module=module)
    row = engine.audit(criterion)["batch"]
    assert row.passed is None and "There are no norms to compare" in row.sentence


class AsLists(Tokens):
    def __getitem__(self, i):
        return list(super().__getitem__(i))


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: on_tokens(padded, is_masked=True),
        lambda: on_tokens(padded_sorted, is_masked=True),
        lambda: prepared(padded_in_place, AsLists(), Mean(is_masked=True)),
        lambda: wide(with_length),
        lambda: wide(for_several),
        lambda: prepared(noisy),
        lambda: prepared(noisy_by_numpy),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]amples")
def test_harmless_rows_are_said_and_then_checked(prepare):
    engine, train, _ = prepare()
    train()
    assert "collate_fn returned more" in rows_link(engine).sentence
    assert engine.audit(criterion)["batch"].passed
    assert rows_link(engine).state == "checked"
    train()
    assert rows_link(engine).state == "checked"


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: prepared(first_items),
        lambda: on_tokens(within_a_budget, is_masked=True),
    ],
)
@pytest.mark.filterwarnings("ignore:This run no longer")
def test_an_audit_finds_that_the_others_decide_who_is_left_out(prepare):
    engine, train, _ = prepare()
    train()
    assert engine.audit(criterion)["batch"].passed is False
    with pytest.raises(AccountingError, match="an example decides whether others"):
        _ = engine.ledger


class WithNegatives(TensorDataset):
    """Adds examples of its own to those of a batch, or only uses its options."""

    scale = 1.0

    def with_others(self, items):
        x, y = default_collate(items)
        others = torch.randint(len(self), (len(x),))
        return torch.cat([x, self.tensors[0][others]], dim=1), y

    def without_others(self, items):
        x, y = default_collate(items)
        return torch.cat([x, self.scale * x.sum(1, keepdim=True).expand_as(x)], 1), y


def test_a_collate_fn_that_may_add_examples_of_the_data_set_stays_unchecked():
    data = WithNegatives(*numbers().tensors)
    engine, train, _ = prepared(data.with_others, data, nn.Linear(2 * WIDTH, 3))
    train()
    with pytest.warns(UserWarning, match="refers to the data set"):
        engine.audit(criterion)
    assert rows_link(engine).state == "unchecked"
    engine, train, _ = prepared(data.without_others, data, nn.Linear(2 * WIDTH, 3))
    train()
    assert engine.audit(criterion)["batch"].passed
    assert rows_link(engine).state == "checked"


def with_more_rows(items):
    x, y = default_collate(items)
    return torch.cat([x, x[:1] + 1]), torch.cat([y, y[:1]])


@pytest.mark.filterwarnings("ignore:.*[Ss]amples")
def test_more_samples_than_items_are_said():
    engine, _, _ = prepared(with_more_rows)
    with pytest.warns(UserWarning, match="returned 9 samples of 8 items"):
        assert engine.audit(criterion)["batch"].passed is None


def test_items_without_additions_are_checked_before_an_audit():
    engine, train, _ = prepared(reordered)
    train()
    assert rows_link(engine).state == "checked"
    assert engine.audit(criterion)["batch"].passed
    assert rows_link(engine).state == "checked"


def test_torch_collate_has_no_such_row():
    engine, train, _ = prepared(None)
    train()
    assert [row.name for row in engine.audit(criterion).rows][-1] == "order"
    assert rows_link(engine).state == "checked"


@pytest.mark.filterwarnings("ignore:.*[Ss]amples")
def test_random_padding_is_not_judged():
    engine, train, _ = on_tokens(masked_at_random, is_masked=True)
    train()
    with pytest.warns(UserWarning, match="draws random numbers or keeps a state"):
        assert engine.audit(criterion)["batch"].passed is None
    assert rows_link(engine).state == "unchecked"


@pytest.mark.filterwarnings("ignore:.*[Ss]amples", "ignore:This run no longer")
def test_sorting_that_cannot_be_followed_is_found():
    x, y = numbers().tensors
    engine, train, _ = prepared(augmented_and_sorted, TensorDataset(x, 0 * y))
    train()
    assert "another position" in engine.audit(criterion)["batch"].sentence
    with pytest.raises(AccountingError, match="another position"):
        _ = engine.ledger


@pytest.mark.filterwarnings("ignore:.*[Ss]amples")
def test_a_collate_fn_that_cannot_be_called_again_is_said():
    def whole_batches_only(items):
        assert len({tuple(x.tolist()) for x, _ in items}) == len(items)
        return with_length(items)

    engine, train, _ = wide(whole_batches_only)
    with pytest.warns(UserWarning, match="could not be called again.*AssertionError"):
        engine.audit(criterion)
    train()
    assert rows_link(engine).state == "unchecked"


def collate_with_options(*, is_scaled):
    """A collate_fn with a variable that has a value only if an option is set."""
    if is_scaled:
        factor = 2.0

    def collate(items):
        x, y = default_collate(items)
        return (x * factor if is_scaled else x), y

    return collate


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.filterwarnings("ignore:.*[Ss]ample")
def test_a_variable_without_a_value_does_not_keep_collate_fn_from_being_called(
    is_scaled,
):
    engine, train, _ = prepared(collate_with_options(is_scaled=is_scaled))
    assert engine.audit(criterion).passed
    train()
    assert rows_link(engine).state == "checked"


# ----------------------------------------------------------------- nothing remains
NUM_CALLS = 0
SIZES = []


def counts_in_globals(items):
    global NUM_CALLS
    NUM_CALLS += 1
    SIZES.append(len(items))
    return with_count(items, NUM_CALLS + len(SIZES))


def with_count(items, count):
    x, y = default_collate(items)
    return x * (1 + count), y


class Counts:
    def __init__(self):
        self.num_calls = 0

    def __call__(self, items, factor=1):
        self.num_calls += 1
        return with_count(items, factor * self.num_calls)


def counts_in_a_closure():
    num_calls, generator = 0, torch.Generator().manual_seed(1)

    def collate(items):
        nonlocal num_calls
        num_calls += 1
        drawn = torch.rand(1, generator=generator)
        return with_count(items, num_calls + drawn)

    return collate


@pytest.mark.parametrize(
    "make",
    [
        lambda: counts_in_globals,
        Counts,
        lambda: functools.partial(Counts(), factor=2),
        lambda: Counts().__call__,
        counts_in_a_closure,
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]ample", "ignore:This run no longer")
def test_an_audit_leaves_the_state_of_collate_fn_as_it_is(make):
    weights = []
    for is_audited in (False, True):
        global NUM_CALLS
        NUM_CALLS = 0
        SIZES.clear()
        engine, train, module = prepared(make())
        if is_audited:
            engine.audit(criterion)
        states = random.getstate()[1], np.random.get_state()[1].tolist()
        train()
        weights.append((copy.deepcopy(module.state_dict()), states))
    assert weights[0][1] == weights[1][1]
    for name, value in weights[0][0].items():
        assert torch.equal(value, weights[1][0][name])
