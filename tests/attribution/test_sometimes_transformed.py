"""Loops that transform some batches, and loops that only look like them."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine
from opacus_pi.attribution.causes import (
    BESIDE_BATCHES,
    COMPUTED,
    MOVED_AND_CHANGED,
    OTHER_SIZE,
    UNTRACED,
)
from tests.attribution.runs import Log

NUM, BATCH, WIDTH, CLASSES = 40, 8, 6, 3


class Run:
    """A private training with weights that do not move, and its true norms."""

    def __init__(self, *, poisson=False, told=False):
        torch.manual_seed(1)
        self.x, self.y = torch.randn(NUM, WIDTH), torch.arange(NUM) % CLASSES
        self.net = nn.Linear(WIDTH, CLASSES)
        self.log = Log(unattributed="worst_case" if told else "refuse")
        self.engine = PrivacyEngine(recorder=self.log)
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(self.net.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH),
            noise_multiplier=1.0,
            max_grad_norm=100.0,
            poisson_sampling=poisson,
        )
        self.num = 0

    def step(self, x, y):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.num += 1

    @property
    def causes(self):
        return set(self.engine._run.tracker.causes)

    def link(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            links = self.engine.ledger.custody.links
        return next(link for link in links if link.name == name)

    def norm(self, x, y):
        """Return the norm of the gradient of one example."""
        loss = nn.functional.cross_entropy(self.net(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(self.net.parameters()))
        return torch.cat([g.flatten() for g in grads]).norm().item()


def every_second(run):
    for _ in range(2):
        for x, y in run.loader:
            run.step(x.flip(-1) if run.num % 2 else x, y)


def first_every_second(run):
    for _ in range(2):
        for x, y in run.loader:
            run.step(x if run.num % 2 else x.flip(-1), y)


def by_chance(run):
    for _ in range(3):
        for x, y in run.loader:
            run.step(x.flip(-1) if torch.rand(()) < 0.5 else x, y)


def noisy_in_turn(run):
    for _ in range(2):
        for x, y in run.loader:
            run.step(x + 0.1 * torch.randn_like(x) if run.num % 2 else x, y)


def later_epochs(run):
    for epoch in range(3):
        for x, y in run.loader:
            run.step(2 * x if epoch else x, y)


def first_epoch(run):
    for epoch in range(3):
        for x, y in run.loader:
            run.step(x if epoch else 2 * x, y)


def only_the_last(run):
    for x, y in run.loader:
        run.step(x.exp() if run.num == 4 else x, y)


def attacked_in_turn(run):
    attacked = nn.Linear(WIDTH, CLASSES)
    for _ in range(2):
        for x, y in run.loader:
            if run.num % 2:
                other = x.clone().requires_grad_(True)
                loss = nn.functional.cross_entropy(attacked(other), y)
                (gradient,) = torch.autograd.grad(loss, other)
                x = x + 0.1 * gradient.sign()
            run.step(x, y)


def evaluated_between(run):
    for x, y in run.loader:
        run.step(2 * x if run.num % 2 else x, y)
        with torch.no_grad():
            run.model(next(iter(run.loader))[0])


LOOPS = [
    every_second,
    first_every_second,
    by_chance,
    noisy_in_turn,
    later_epochs,
    first_epoch,
    only_the_last,
    attacked_in_turn,
    evaluated_between,
]


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_batches_that_are_sometimes_transformed_are_assumed_the_latest(loop, poisson):
    run = Run(poisson=poisson)
    with pytest.warns(UserWarning, match="in the order of the latest batch") as caught:
        loop(run)
    assert len([w for w in caught if "samples" in str(w.message)]) == 1
    counts = run.engine.attribution
    assert counts["unattributed"] == 0
    assert min(counts["by_storage"] + counts["by_content"], counts["by_latest"]) > 0
    assert run.causes == {COMPUTED.name}
    identity = run.link("identity")
    assert identity.state == "unchecked" and "latest batch" in identity.sentence
    assert run.link("draw").state == "checked"


@pytest.mark.filterwarnings("ignore:Samples are attributed without")
def test_the_norms_are_those_of_the_transformed_examples():
    run = Run()
    for x, y in run.loader:
        run.step(2 * x if run.num % 2 else x, y)
    assert sorted(i for i, _ in run.log.reports) == list(range(NUM))
    for i, norm in run.log.reports:
        x = (1 + i // BATCH % 2) * run.x[i]
        assert norm == pytest.approx(run.norm(x, run.y[i]), rel=1e-4)


# ------------------------------------------------------------- a part of the samples
def masked(x):
    x = x.clone()
    x[torch.arange(len(x)), torch.arange(len(x)) % WIDTH] = 9.0
    return x


def noisy(x):
    return x + 0.05 * torch.randn_like(x)


AT_AN_END = {
    "the last": slice(BATCH - 1, None),
    "the first": slice(1),
    "the last ones": slice(3, None),
    "the first ones": slice(5),
}


@pytest.mark.filterwarnings("ignore:Samples are attributed without")
@pytest.mark.parametrize("change", [masked, noisy])
@pytest.mark.parametrize("kept", AT_AN_END.values(), ids=AT_AN_END)
@pytest.mark.parametrize("others_change", [True, False])
def test_samples_at_an_end_may_be_unchanged(kept, change, others_change):
    """All others of the batch are computed from the samples in their places."""
    run, true = Run(), []
    for x, y in run.loader:
        other = change(x) if others_change or run.num == 1 else x
        if run.num == 1:
            other[kept] = x[kept]
        true += [run.norm(*pair) for pair in zip(other, y, strict=True)]
        run.step(other, y)
    assert run.causes == {COMPUTED.name}
    assert run.engine.attribution["unattributed"] == 0
    assert [norm for _, norm in sorted(run.log.reports)] == pytest.approx(true, 1e-4)
    assert run.link("identity").state == "unchecked"
    assert run.link("draw").state == "checked"


def flipped(x):
    return x.flip(-1)


@pytest.mark.filterwarnings("ignore:Samples are attributed without")
def test_a_loop_that_changes_some_samples_may_leave_those_at_an_end():
    run = Run()
    for x, y in run.loader:
        other, num = flipped(x), run.num
        kept = AT_AN_END["the last ones"] if num else torch.tensor([1, 4, 6])
        other[kept] = x[kept]
        run.step(other, y)
    assert run.causes == {COMPUTED.name}


def with_generated(x, run):
    return torch.randn_like(x)


def with_old(x, run):
    return noisy(run.x[:BATCH])


def with_permuted(x, run):
    return masked(x.flip(0))


@pytest.mark.filterwarnings("ignore:.*ample")
@pytest.mark.parametrize("kept", AT_AN_END.values(), ids=AT_AN_END)
@pytest.mark.parametrize("change", [with_generated, with_old, with_permuted])
def test_other_samples_at_an_end_are_unattributed(kept, change):
    run = Run()
    for x, y in run.loader:
        other = x
        if run.num == 1:
            other = change(x, run)
            other[kept] = x[kept]
        run.step(other, y)
    num_kept = len(range(BATCH)[kept])
    assert run.engine.attribution["unattributed"] == BATCH - num_kept
    assert COMPUTED.name not in run.causes


# -------------------------------------------------------------- not the latest batch
def replayed_after(run):
    """A second update for each batch, on inputs of long ago."""
    for _ in range(6):
        for x, y in run.loader:
            run.step(x, y)
            run.step(run.x[:BATCH] + 1, run.y[:BATCH])


def replayed_before(run):
    for _ in range(6):
        for x, y in run.loader:
            if run.num > 6:
                run.step(run.x[:BATCH] + 1, run.y[:BATCH])
            run.step(x, y)


def replayed_before_the_last(run):
    for i, (x, y) in enumerate(run.loader):
        if i == 4:
            run.step(run.x[:BATCH] + 1, run.y[:BATCH])
        run.step(x, y)


def zipped_with_another_loader(run):
    others = DataLoader(TensorDataset(torch.randn(NUM, WIDTH), run.y), BATCH)
    for (x, y), (u, v) in zip(run.loader, others, strict=True):
        run.step(u, v)
        run.step(x, y)


def in_turn_with_another_loader(run):
    others = DataLoader(TensorDataset(torch.randn(NUM, WIDTH), run.y), BATCH)
    batches = iter(run.loader), iter(others)
    for i in range(10):
        run.step(*next(batches[i % 2]))


def _queued(loader, num):
    """Yield batches that are transformed in turn, some ahead, as a prefetcher does."""
    held = []
    for i, (x, y) in enumerate(loader):
        held.append((2 * x if i % 2 else x, y))
        if len(held) > num:
            yield held.pop(0)
    yield from held


def queued(run):
    for _ in range(2):
        for x, y in _queued(run.loader, 1):
            run.step(x, y)


def listed(run):
    for x, y in list(run.loader):
        run.step(2 * x if run.num % 2 else x, y)


def listed_reversed(run):
    for x, y in list(run.loader)[::-1]:
        run.step(2 * x if run.num % 2 else x, y)


def permuted(run):
    for x, y in run.loader:
        order = torch.arange(len(x)).flip(0)
        x, y = x[order], y[order]
        run.step(2 * x if run.num % 2 else x, y)


def transformed_first_then_permuted(run):
    for x, y in run.loader:
        order = torch.arange(len(x)).flip(0)
        x, y = x[order], y[order]
        run.step(x if run.num else x.exp(), y)


OTHERS = [
    replayed_after,
    replayed_before,
    replayed_before_the_last,
    zipped_with_another_loader,
    in_turn_with_another_loader,
    queued,
    listed,
    listed_reversed,
    permuted,
    transformed_first_then_permuted,
]


@pytest.mark.filterwarnings("ignore:.*ample", "ignore:.*batches that the loader")
@pytest.mark.parametrize("loop", OTHERS)
def test_inputs_that_may_be_of_other_batches_are_refused(loop):
    run = Run()
    loop(run)
    assert run.engine.attribution["unattributed"] >= BATCH
    with pytest.raises(AccountingError, match="samples are unattributed"):
        _ = run.engine.ledger
    assert sum(run.engine.attribution.values()) == run.num * BATCH


@pytest.mark.filterwarnings("ignore:.*ample")
@pytest.mark.parametrize(
    ("loop", "cause"),
    [
        (replayed_before_the_last, BESIDE_BATCHES),
        (zipped_with_another_loader, BESIDE_BATCHES),
        (transformed_first_then_permuted, MOVED_AND_CHANGED),
    ],
)
def test_an_assumption_is_withdrawn_when_a_later_pass_contradicts_it(loop, cause):
    run = Run(told=True)
    loop(run)
    assert run.causes == {cause.name}
    assert run.engine.attribution["by_latest"] == 0
    identity = run.link("identity")
    assert identity.state == "unchecked"
    assert "8 samples of earlier updates were assumed" in identity.sentence


@pytest.mark.filterwarnings("ignore:.*ample")
def test_the_reason_for_batches_that_wait_is_true():
    """A pass of another size leaves open which batches were used until then."""
    run = Run(told=True)
    for x, y in run.loader:
        if run.num == 1:
            run.step(torch.cat([x + 1, x + 2]), torch.cat([y, y]))
        else:
            run.step(2 * x if run.num > 2 else x, y)
    assert run.causes == {OTHER_SIZE.name, UNTRACED.name}
    sentence = run.link("identity").sentence
    assert "some that were delivered before had not been recognised" in sentence


@pytest.mark.filterwarnings("ignore:.*samples are unattributed")
def test_batches_of_unattributed_samples_are_not_said_to_be_left_out():
    run = Run(told=True)
    for x, y in run.loader:
        views = torch.cat([x, x]) + torch.randn(2 * len(x), WIDTH)
        run.step(views, torch.cat([y, y])) if run.num % 2 else run.step(x, y)
    with pytest.warns(UserWarning, match="not recognised in any update") as caught:
        _ = run.engine.ledger
    assert not [w for w in caught if "entered no update" in str(w.message)]
