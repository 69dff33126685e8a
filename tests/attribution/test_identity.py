"""Identity of samples in private training: repeated, generated, and many passes."""

import gc
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.attribution import Tracker, probe
from opacus_pi.attribution.causes import (
    ANOTHER_INPUT,
    ANOTHER_PASS,
    BY_HAND,
    CHANGED_IN_COLLATE,
    COLLATE,
    COMPUTED,
    INPUTS_DISAGREE,
    MIXED_IN_COLLATE,
    NOT_DELIVERED,
    REPEATED,
)
from opacus_pi.recording import AccountingError
from tests.attribution import runs

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run no longer has a ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:.*[Ss]ample",
)
FIXED = {"poisson": False}


def causes_of(run):
    return run.engine._run.tracker.causes


def names(*causes):
    return {cause.name for cause in causes}


# --------------------------------------------------------------- the same example twice
def first_twice(run):
    for x, y in run.loader:
        run.step(torch.cat([x[:1], x[:1], x[2:]]), torch.cat([y[:1], y[:1], y[2:]]))


def expanded(run):
    for x, y in run.loader:
        run.step(x[:1].expand_as(x), y[:1].expand_as(y))


def drawn_again(run):
    for x, y in run.loader:
        chosen = torch.tensor([0, 2, 2, 1])
        run.step(x[chosen], y[chosen])


def two_passes_accumulated(run):
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.backward(x[1:].clone(), y[1:])
        run.optimizer.step()


def two_deliveries_accumulated(run):
    for (x, y), (u, v) in zip(run.loader, run.loader, strict=False):
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.backward(u, v)
        run.optimizer.step()


@pytest.mark.parametrize(
    ("loop", "causes"),
    [
        (first_twice, names(REPEATED)),
        (expanded, names(REPEATED)),
        (drawn_again, names(REPEATED)),
        (two_passes_accumulated, set()),
        (two_deliveries_accumulated, set()),
    ],
)
def test_an_example_that_is_in_an_update_twice_is_refused(loop, causes):
    run = runs.Run(shuffle=False, **FIXED)
    loop(run)
    assert set(causes_of(run)) == causes
    assert run.engine.attribution["unattributed"] == 0
    truth = runs.true_norms(*runs.tensors())
    assert all(abs(truth[i] - norm) < 1e-5 for i, norm in run.recorder.reports)
    with pytest.raises(AccountingError, match="more than once"):
        _ = run.engine.ledger


# ---------------------------------------------------------------- generated samples
class Discriminator:
    """A private discriminator with a loader of real samples."""

    def __init__(self, *, strict=False, mode="hooks"):
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)
        self.engine = PrivacyEngine(recorder=Recorder(strict=strict))
        self.model, self.optimizer, *rest, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(self.net.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            criterion=nn.BCEWithLogitsLoss(),
        )
        self.criterion = rest[0] if rest else nn.BCEWithLogitsLoss()

    def loss(self, out, target):
        return self.criterion(out, torch.full_like(out, target))


def real_and_fake(gan, real):
    out, fake = gan.model(real), gan.model(torch.randn_like(real))
    (gan.loss(out, 1.0) + gan.loss(fake, 0.0)).backward()


def fake_and_real(gan, real):
    fake, out = gan.model(torch.randn_like(real)), gan.model(real)
    (gan.loss(fake, 0.0) + gan.loss(out, 1.0)).backward()


@pytest.mark.parametrize("step", [real_and_fake, fake_and_real])
@pytest.mark.parametrize("strict", [False, True])
def test_real_and_generated_samples_in_one_loss(step, strict):
    gan = Discriminator(strict=strict)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attributed")
        for (real,) in gan.loader:
            gan.optimizer.zero_grad()
            step(gan, real)
            gan.optimizer.step()
    assert gan.engine.attribution["by_storage"] == 32
    assert set(causes_of(gan)) == names(ANOTHER_PASS)
    with pytest.warns(UserWarning, match="participations are not counted"):
        links = {link.name: link for link in gan.engine.ledger.custody.unchecked}
    assert "another loader or a memory of earlier batches" in links["draw"].sentence
    assert "are no examples of the training set" in links["rows"].sentence


def real_then_fake(gan, real):
    gan.loss(gan.model(real), 1.0).backward()
    gan.loss(gan.model(torch.randn_like(real)), 0.0).backward()


def fake_then_real(gan, real):
    gan.loss(gan.model(torch.randn_like(real)), 0.0).backward()
    gan.loss(gan.model(real), 1.0).backward()


def together(gan, real):
    out = gan.model(torch.cat([real, torch.randn_like(real)]))
    target = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
    gan.criterion(out, target).backward()


def two_updates(gan, real):
    gan.loss(gan.model(real), 1.0).backward()
    gan.optimizer.step()
    gan.optimizer.zero_grad()
    gan.loss(gan.model(torch.randn_like(real)), 0.0).backward()


@pytest.mark.parametrize(
    "step", [real_then_fake, fake_then_real, together, two_updates]
)
def test_generated_samples_belong_to_no_example(step):
    gan = Discriminator()
    for (real,) in gan.loader:
        gan.optimizer.zero_grad()
        step(gan, real)
        gan.optimizer.step()
    counts = gan.engine.attribution
    assert counts["by_storage"] + counts["by_content"] == counts["unattributed"] == 32
    assert counts["by_latest"] == 0
    assert causes_of(gan) == {NOT_DELIVERED.name: 32}


def test_adversarial_samples_are_assumed_to_be_of_the_attacked_batch():
    run = runs.Run(**FIXED)
    for x, y in run.loader:
        attacked = x.clone().requires_grad_(True)
        runs.criterion(run.model(attacked), y).backward()
        run.step((attacked + 0.1 * attacked.grad.sign()).detach(), y)
    assert run.engine.attribution["by_latest"] == 24
    assert set(causes_of(run)) == names(COMPUTED)


# ------------------------------------------------------------------- several inputs
class Several(nn.Module):
    """A model of several inputs; those beyond the first are optional."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, other=None, **more):
        beside = (
            0.0 if other is None else other.float().reshape(len(x), -1).sum(1)[:, None]
        )
        return self.layer(x.float()) + beside


def bound(batch, inputs, **keywords):
    """What a pass over some inputs is attributed to, and the tracker."""
    tracker, model = Tracker(), Several()
    handle = probe(model, tracker)
    tracker.delivered([4, 5, 6, 7], batch)
    out = model(*inputs, **keywords)
    out.sum().backward()
    handle.remove()
    (forward,) = tracker.take_attributed([len(inputs[0])])
    return forward.indices.tolist(), tracker


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
Z = torch.randn(4, 6, generator=torch.Generator().manual_seed(6))
Y = torch.tensor([0, 1, 2, 1])
SWAPPED = torch.tensor([1, 0, 2, 3])


@pytest.mark.parametrize(
    "other",
    [
        X[SWAPPED],
        Z[SWAPPED],
        Y[SWAPPED],
        torch.stack([X[SWAPPED], X], 1).reshape(4, 8)[:, :4],
    ],
)
def test_inputs_of_different_examples_are_refused(other):
    indices, tracker = bound((X, Z, Y), (X, other))
    assert indices == [-1, -1, 6, 7] and tracker.causes == {INPUTS_DISAGREE.name: 2}


def test_triplets():
    anchor = X.clone()
    indices, tracker = bound((X, Z), (anchor, Z), negative=X[[1, 2, 3, 0]])
    assert indices == [-1] * 4 and set(tracker.causes) == names(INPUTS_DISAGREE)
    indices, tracker = bound((X, Z), (anchor, Z.clone()), same=X[:, :])
    assert indices == [4, 5, 6, 7] and tracker.causes == {}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(X > 0, id="mask"),
        pytest.param(torch.where(X > 0, 0.0, -1e9), id="additive mask"),
        pytest.param(torch.arange(4).expand(4, 4), id="positions"),
        pytest.param(
            torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 2, 2], [0, 0, 0, 0]]),
            id="padded positions",
        ),
        pytest.param(torch.randn(1, 4), id="one row"),
        pytest.param(torch.randn(7, 4), id="rows of another length"),
        pytest.param(Y, id="labels"),
        pytest.param(nn.functional.one_hot(Y, 3).float(), id="one-hot labels"),
    ],
)
def test_masks_positions_and_numbers_beside_a_batch_are_no_trouble(other):
    if other.shape[0] not in (1, 4):
        indices, tracker = bound((X, Y), (X,), memory=other)
    else:
        indices, tracker = bound((X, Y), (X,), other=other.expand(4, *other.shape[1:]))
    assert indices == [4, 5, 6, 7] and tracker.causes == {}


IDS = torch.tensor([[3, 9, 2, 0], [8, 4, 0, 0], [5, 0, 0, 0], [7, 6, 1, 2]])
ITEMS = torch.tensor([4, 11, 7, 20])


@pytest.mark.parametrize(
    "other",
    [
        (IDS != 0).sum(1),  # lengths
        (IDS != 0).sum(1, keepdim=True) - 1,  # places of the last tokens
        torch.arange(4),
        4 * torch.arange(4),  # where samples begin in one row of all tokens
        torch.full((4,), 4),  # the padded length
        torch.zeros(4, dtype=torch.long),
        ITEMS,
        ITEMS + 12,  # nodes of a graph: the items come after 12 users
        ITEMS[:, None].float(),
    ],
    ids=str,
)
def test_numbers_of_a_samples_own_beside_a_batch_are_no_trouble(other):
    indices, tracker = bound((IDS, ITEMS), (IDS.clone(), other.clone()))
    assert indices == [4, 5, 6, 7] and tracker.causes == {}


@pytest.mark.parametrize(
    "other",
    [
        (ITEMS[SWAPPED] + 1) % 25,
        ITEMS[SWAPPED] + 12,
        (ITEMS[SWAPPED] > 10).long(),
        (IDS != 0).sum(1)[SWAPPED],
        ITEMS.cumsum(0),
        torch.tensor([0.3, 0.9, 0.1, 0.5]),  # drawn: a time for each sample
        torch.tensor([412, 33, 871, 90]),
    ],
    ids=str,
)
def test_numbers_that_may_come_from_other_samples_are_said(other):
    for given in (other, other[:, None]):
        indices, tracker = bound((IDS, ITEMS), (IDS.clone(), given.clone()))
        assert indices == [4, 5, 6, 7] and tracker.causes == {ANOTHER_INPUT.name: 4}


def test_two_inputs_that_are_computed_alike_are_said():
    node = ITEMS[SWAPPED] + 12
    indices, tracker = bound((IDS, ITEMS), (IDS.clone(), node), another=node + 1)
    assert indices == [4, 5, 6, 7] and tracker.causes == {ANOTHER_INPUT.name: 4}


def test_an_input_that_the_loop_computed_beside_a_batch_is_said():
    indices, tracker = bound((X, Z), (X, (2 * Z)[SWAPPED]))
    assert indices == [4, 5, 6, 7] and tracker.causes == {ANOTHER_INPUT.name: 4}


# -------------------------------------------------------------- batches of own classes
class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Plain:
    def __init__(self, x, y):
        self.content = {"x": x, "y": y}
        self.loop = self


@pytest.mark.parametrize("cls", [Slots, Plain])
def test_batches_of_a_plain_class_are_entered(cls):
    def collate(items):
        return cls(*default_collate(items))

    run = runs.Run(collate_fn=collate, strict=True, **FIXED)
    for batch in run.loader:
        x, y = (batch.x, batch.y) if cls is Slots else batch.content.values()
        run.step(x, y)
    assert run.engine.attribution["by_storage"] == 24 and causes_of(run) == {}


def test_a_batch_may_refer_to_a_large_vocabulary():
    class Batch:
        def __init__(self, x):
            self.words, self.x = {str(i): i for i in range(100_000)}, x

    tracker = Tracker()
    tracker.delivered([0, 1], (X[:2], Batch(X[:2])))
    assert tracker.latest is not None and len(tracker.latest.tensors) == 1


# ---------------------------------------------------------------- opaque collate_fn
class Texts(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return "word " * (1 + i % 5) + str(i), i % 3


def tokenise(items):
    codes = [torch.tensor([float(ord(c)) for c in text]) for text, _ in items]
    codes = [nn.functional.pad(c, (0, 40 - len(c))) / 100 for c in codes]
    return torch.stack(codes)[:, : runs.WIDTH], torch.tensor([y for _, y in items])


def sort_and_tokenise(items):
    return tokenise(sorted(items, key=lambda item: len(item[0])))


@pytest.mark.parametrize(
    ("collate", "unattributed"),
    [(tokenise, 0), (sort_and_tokenise, 12)],  # of batches whose order has changed
)
def test_text_is_unchecked_unless_its_labels_have_moved(collate, unattributed):
    run = runs.Run(data_set=Texts(), collate_fn=collate, shuffle=False, **FIXED)
    for x, y in run.loader:
        run.step(x, y)
    assert run.engine.attribution["unattributed"] == unattributed
    causes = {COLLATE.name: 24 - unattributed, CHANGED_IN_COLLATE.name: unattributed}
    assert causes_of(run) == {name: num for name, num in causes.items() if num}


def labels_shifted(items):
    x, y = default_collate(items)
    return x, y.roll(1)


def reversed_and_scaled(items):
    x, y = default_collate(items[::-1])
    return 2 * x, y


def two_swapped_and_scaled(items):
    x, y = default_collate([items[1], items[0], *items[2:]])
    x[:2] *= 2
    return x, y


@pytest.mark.parametrize(
    ("collate", "unattributed"),
    [(reversed_and_scaled, 24), (two_swapped_and_scaled, 12)],
)
def test_items_that_collate_moves_and_scales_are_not_called_mixtures(
    collate, unattributed
):
    run = runs.Run(collate_fn=collate, shuffle=False, **FIXED)
    for x, y in run.loader:
        run.step(x, y)
    assert run.engine.attribution["unattributed"] == unattributed
    assert set(causes_of(run)) == names(CHANGED_IN_COLLATE)
    with pytest.raises(AccountingError, match="in other positions, and changed"):
        _ = run.engine.ledger


def negatives_beside(items):
    x, y = default_collate(items)
    return x, y, x.roll(1, 0)


@pytest.mark.parametrize("collate", [labels_shifted, negatives_beside])
def test_tensors_of_a_batch_in_different_orders_are_mixed_by_collate(collate):
    run = runs.Run(collate_fn=collate, shuffle=False, **FIXED)
    for x, y, *_ in run.loader:
        run.step(x, y)
    counts, causes = run.engine.attribution, causes_of(run)
    assert set(causes) == names(MIXED_IN_COLLATE)
    assert counts["unattributed"] == causes[MIXED_IN_COLLATE.name] > 12
    truth = runs.true_norms(*runs.tensors())
    assert all(abs(truth[i] - norm) < 1e-5 for i, norm in run.recorder.reports)


def test_an_unchecked_collate_is_said_once_and_raised_if_strict():
    run = runs.Run(data_set=Texts(), collate_fn=tokenise, **FIXED)
    with pytest.warns(UserWarning, match="cannot be compared") as caught:
        for x, y in run.loader:
            run.step(x, y)
    assert len([w for w in caught if "compared" in str(w.message)]) == 1
    run = runs.Run(data_set=Texts(), collate_fn=tokenise, strict=True, **FIXED)
    with pytest.raises(AccountingError, match="cannot be compared"):
        run.step(*next(iter(run.loader)))


# ------------------------------------------------------------------ many waiting passes
@pytest.mark.parametrize("num_passes", [65, 500])
def test_any_number_of_passes_is_accumulated(num_passes):
    model, tracker = nn.Linear(4, 1), Tracker()
    handle = probe(model, tracker)
    batches = torch.randn(num_passes, 3, 4)
    for number, x in enumerate(batches):
        first = 3 * number
        tracker.delivered([first, first + 1, first + 2], x)
        model(x).sum().backward()
    found = tracker.attribute([3] * num_passes)
    np.testing.assert_array_equal(found, np.arange(3 * num_passes))
    assert tracker.counts["by_storage"] == 3 * num_passes and not tracker.causes
    handle.remove()


def test_accumulated_passes_in_private_training():
    data = TensorDataset(torch.randn(70, runs.WIDTH), torch.randint(3, (70,)))
    run = runs.Run(data_set=data, batch_size=1, **FIXED)
    for x, y in run.loader:
        run.backward(x, y)
    run.optimizer.step()
    assert run.engine.attribution["by_storage"] == 70 and causes_of(run) == {}
    truth = runs.true_norms(*data.tensors)
    assert sorted(i for i, _ in run.recorder.reports) == list(range(70))
    assert all(abs(truth[i] - norm) < 1e-5 for i, norm in run.recorder.reports)


def test_passes_whose_outputs_are_gone_leave_nothing_behind():
    model, tracker = nn.Linear(4, 1), Tracker()
    handle = probe(model, tracker)
    for number in range(100):
        x = torch.randn(3, 4)
        tracker.delivered([0, 1, 2], x)
        out = model(x)
        if number == 99:
            out.sum().backward()
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o).__name__ == "ForwardPass"]
    assert sum(forward.delivery in tracker._recent for forward in kept) == 1
    assert tracker.attribute([3]).tolist() == [0, 1, 2]
    handle.remove()


# ------------------------------------------------------------------- gradients by hand
def test_gradients_by_hand_have_their_own_cause():
    tracker = Tracker()
    tracker.delivered([0, 1, 2, 3], X)
    tracker.bind([X])  # the model was called, too, without a backward pass
    tracker.bind_gradients(torch.randn(4, 2, 2))
    assert tracker.attribute([4]).tolist() == [0, 1, 2, 3]
    assert tracker.causes == {BY_HAND.name: 4} and tracker.counts["by_latest"] == 4
    assert "grad_sample_mode" in tracker.explanation(BY_HAND.name)


@pytest.mark.parametrize("in_place", [False, True])
def test_inputs_computed_from_a_batch_may_couple_its_examples(in_place):
    run = runs.Run()
    for x, y in run.loader:
        mean = x.mean(0)
        run.step(x.sub_(mean).exp_() if in_place else (x - mean).exp(), y)
    links = {link.name: link for link in run.engine.ledger.custody.unchecked}
    assert "mean of the batch" in links["identity"].sentence
    assert "mean of the batch" in links["rows"].sentence


def test_delivered_inputs_leave_no_doubt_of_rows_or_draws():
    run = runs.Run()
    for x, y in run.loader:
        run.step(x, y)
    unchecked = {link.name for link in run.engine.ledger.custody.unchecked}
    assert not unchecked & {"identity", "rows", "draw"}
