"""Loops that skip whole batches, which is said, and loops that only seem to."""

import warnings
from itertools import islice

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine

NUM, BATCH = 40, 8


class Run:
    """A model, its optimizer and its loader; counts batches and updates."""

    def __init__(self, *, poisson=True, batch=BATCH):
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(NUM, 6), torch.arange(NUM) % 3)
        model = nn.Linear(6, 3)
        self.engine = PrivacyEngine()
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            data_loader=DataLoader(data, batch_size=batch),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
        )
        self.skipped = self.used = 0

    def loss(self, batch):
        return cross_entropy(self.model(batch[0]), batch[1])

    @torch.no_grad()
    def is_hard(self, batch):
        return bool(self.loss(batch) > 1.2)

    def step(self, batch):
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()
        self.used += 1

    def step_or_skip(self, batch, is_used):
        if is_used:
            self.step(batch)
        else:
            self.skipped += 1

    def draw(self):
        """Return the link "draw", as it is read; warnings are errors."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            links = self.engine.ledger.custody.links
        return next(link for link in links if link.name == "draw")


# --------------------------------------------------------------- batches are skipped
def hard_ones_only(run):
    for _ in range(6):
        for batch in run.loader:
            run.step_or_skip(batch, run.is_hard(batch))
    run.step(next(iter(run.loader)))


def by_content(run):
    for _ in range(3):
        for batch in run.loader:
            run.step_or_skip(batch, batch[0].sum() > 0)
    run.step(next(iter(run.loader)))


def after_a_backward_pass(run):
    for _ in range(3):
        for i, batch in enumerate(run.loader):
            run.optimizer.zero_grad()
            loss = run.loss(batch)
            loss.backward()
            if i % 2:
                run.optimizer.step()
            else:
                run.skipped += 1


def by_content_with_evaluations(run):
    for _ in range(6):
        for batch in run.loader:
            run.step_or_skip(batch, batch[0].sum() > 0)
            run.is_hard(next(iter(run.loader)))
    run.step(next(iter(run.loader)))


def one_draw_beside_a_pass(run):
    for _ in range(3):
        for batch in run.loader:
            run.step(batch)
            other = next(iter(run.loader))
            run.step_or_skip(other, run.used == 1 or run.is_hard(other))


def one_draw_a_held_pass(run):
    """As ``one_draw_a_pass``, but each iterator is held until the next one."""
    for _ in range(20):
        batches = iter(run.loader)
        batch = next(batches)
        run.step_or_skip(batch, not run.used or run.is_hard(batch))
    run.step(next(iter(run.loader)))


def one_draw_a_pass(run):
    run.step(next(iter(run.loader)))
    for _ in range(20):
        batch = next(iter(run.loader))
        run.step_or_skip(batch, run.is_hard(batch))
    run.step(next(iter(run.loader)))


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize(
    "loop",
    [
        hard_ones_only,
        by_content,
        after_a_backward_pass,
        one_draw_a_pass,
        one_draw_a_held_pass,
        one_draw_beside_a_pass,
    ],
)
def test_skipped_batches_are_counted_and_said(loop, poisson):
    run = Run(poisson=poisson)
    loop(run)
    assert run.skipped > 3
    with pytest.warns(UserWarning, match="entered no update, and later ones did"):
        run.engine.ledger  # noqa: B018
    link = run.draw()  # without another warning
    assert link.state == "unchecked"
    # of the last pass, what was skipped after its last update is not counted
    num = int(link.sentence.split()[0])
    assert run.skipped - 3 <= num <= run.skipped


@pytest.mark.parametrize("poisson", [True, False])
def test_batches_are_skipped_although_others_are_for_evaluation(poisson):
    run = Run(poisson=poisson)
    by_content_with_evaluations(run)
    assert run.skipped > 3
    with pytest.warns(UserWarning, match="entered no update, and later ones did"):
        run.engine.ledger  # noqa: B018
    assert run.draw().state == "unchecked"


def test_the_number_grows_and_is_said_once():
    run = Run(poisson=False)
    batches = list(run.loader)
    for batch in batches[1::2]:
        run.step(batch)
    with pytest.warns(UserWarning, match="^The library .* 2 of 4 batches"):
        run.engine.ledger  # noqa: B018
    for batch in list(run.loader)[-1:]:
        run.step(batch)
    sentence = run.draw().sentence  # one batch at the end of the first pass
    assert sentence.count("batches that the loader delivered") == 1
    assert sentence.startswith("7 of 10 batches")


# ------------------------------------------------------------ each batch is accounted
def every_batch(run):
    for _ in range(3):
        for batch in run.loader:
            run.step(batch)


def evaluated_between(run):
    for _ in range(3):
        for batch in run.loader:
            run.step(batch)
        run.model.eval()
        for batch in run.loader:
            run.is_hard(batch)
        run.model.train()
    run.step(next(iter(run.loader)))


def looked_at_first(run):
    next(iter(run.loader))
    for batch in run.loader:
        run.step(batch)


def shown_between(run):
    for _ in range(3):
        for batch in run.loader:
            run.step(batch)
        next(iter(run.loader))
    run.step(next(iter(run.loader)))


def evaluated_on_one_batch_within_a_pass(run):
    run.step(next(iter(run.loader)))
    for _ in range(2):
        for batch in run.loader:
            run.step(batch)
            run.is_hard(next(iter(run.loader)))


def evaluated_on_one_batch_every_second_update(run):
    for _ in range(3):
        for batch in run.loader:
            run.step(batch)
            if run.used % 2 == 0:
                run.is_hard(next(iter(run.loader)))


def evaluated_by_an_iterator_of_its_own(run):
    others = iter(run.loader)
    for batch in run.loader:
        run.step(batch)
        run.is_hard(next(others))


def left_at_a_number_of_updates(run):
    for _ in range(4):
        for i, batch in enumerate(run.loader):
            if i == 3:
                break
            run.step(batch)


def sliced(run):
    for _ in range(4):
        for batch in islice(run.loader, 3):
            run.step(batch)


def one_iterator(run):
    batches = iter(run.loader)
    for _ in range(12):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(run.loader)
            batch = next(batches)
        run.step(batch)


def one_batch_ahead(run):
    for _ in range(3):
        before = None
        for batch in run.loader:
            if before is not None:
                run.step(before)
            before = batch
        run.step(before)


def in_another_order(run):
    for _ in range(3):
        for batch in reversed(list(run.loader)):
            run.step(batch)


def accumulated(run):
    """Two batches an update; the fifth batch of a pass is left for the next one."""
    num = 0
    for _ in range(3):
        for batch in run.loader:
            run.loss(batch).backward()
            num += 1
            if num % 2 == 0:
                run.optimizer.step()
                run.optimizer.zero_grad()


def rest_of_accumulation_dropped(run):
    for _ in range(3):
        for i, batch in enumerate(run.loader):
            run.loss(batch).backward()
            if i % 2:
                run.optimizer.step()
                run.optimizer.zero_grad()
        run.optimizer.zero_grad()


def in_physical_batches(run):
    for _ in range(2):
        with BatchMemoryManager(
            data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer
        ) as loader:
            for batch in loader:
                run.step(batch)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize(
    "loop",
    [
        every_batch,
        evaluated_between,
        looked_at_first,
        shown_between,
        evaluated_on_one_batch_within_a_pass,
        evaluated_on_one_batch_every_second_update,
        evaluated_by_an_iterator_of_its_own,
        left_at_a_number_of_updates,
        sliced,
        one_iterator,
        one_batch_ahead,
        in_another_order,
        in_physical_batches,
    ],
)
def test_loops_that_skip_no_batch_by_choice(loop, poisson):
    run = Run(poisson=poisson)
    loop(run)
    assert run.draw().state == "checked"


@pytest.mark.parametrize("loop", [accumulated, rest_of_accumulation_dropped])
def test_accumulation_skips_no_batch(loop):
    run = Run(poisson=False)
    loop(run)
    assert run.draw().state == "checked"


def test_a_smaller_last_batch_may_be_left_out():
    run = Run(poisson=False, batch=12)
    for _ in range(3):
        for batch in run.loader:
            run.step_or_skip(batch, len(batch[0]) == 12)
    assert run.skipped == 3
    assert run.draw().state == "checked"


def test_empty_batches_may_be_left_out():
    run = Run(batch=1)
    for _ in range(2):
        for batch in run.loader:
            run.step_or_skip(batch, len(batch[0]))
    assert run.skipped > 3
    assert run.draw().state == "checked"
