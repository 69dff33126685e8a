"""Gradients of earlier updates, and parts of batches, in training without clipping."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from opacus_pi.recording import AccountingError
from tests.integration.monitor.training import linear_data, monitored, small

LEFT = "An update used gradients of an earlier one, which were still in p.grad"
CASES = [
    {"noise_std": 0.0, "poisson_sampling": False},
    {"noise_std": 0.0, "poisson_sampling": True},
    {"noise_std": 0.1, "poisson_sampling": False},
]


def _run(**options):
    return monitored(small(), linear_data(), **options)


def _draw(run):
    links = {link.name: link for link in run.recorder.ledger.custody.links}
    return links["draw"]


def _loss(run, batch):
    x, y = batch
    return cross_entropy(run.module(x), y, reduction="mean")


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("num_passes", [1, 2])
def test_gradients_that_are_not_cleared_are_refused(options, num_passes):
    run = _run(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in run.loader:
            x, y = batch
            sum(_loss(run, batch) for _ in range(num_passes)).backward()
            run.optimizer.step()
    if num_passes == 2 and options["noise_std"]:
        return  # refused for another reason
    with pytest.raises(AccountingError, match=LEFT):
        _ = run.recorder.ledger
    assert not any("not that of the criterion" in str(w.message) for w in caught)


def test_a_second_step_on_the_same_gradients_is_refused():
    run = _run(noise_std=0.0, poisson_sampling=True)
    batches = iter(run.loader)
    with pytest.warns(UserWarning, match=LEFT):
        for _ in range(2):
            run.optimizer.zero_grad()
            _loss(run, next(batches)).backward()
            run.optimizer.step()
            run.optimizer.step()


# -------------------------------------------------------------------------- controls
def to_none(run, batch):
    run.optimizer.zero_grad()
    _loss(run, batch).backward()
    run.optimizer.step()


def to_zero(run, batch):
    run.optimizer.zero_grad(set_to_none=False)
    _loss(run, batch).backward()
    run.optimizer.step()


def after_the_step(run, batch):
    _loss(run, batch).backward()
    run.optimizer.step()
    run.module.zero_grad()


def through_data(run, batch):
    for parameter in run.module.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()
    _loss(run, batch).backward()
    run.optimizer.step()


def clipped(run, batch):
    to_zero_then = run.optimizer.zero_grad
    to_zero_then(set_to_none=False)
    _loss(run, batch).backward()
    torch.nn.utils.clip_grad_norm_(run.module.parameters(), 1e3)
    run.optimizer.step()


def another_loss_before(run, batch):
    """As a generator's loss, whose gradients reach the discriminator, too."""
    run.module(torch.randn(3, 4)).square().mean().backward()
    run.optimizer.zero_grad(set_to_none=False)
    _loss(run, batch).backward()
    run.optimizer.step()


def by_closure(run, batch):
    def closure():
        run.optimizer.zero_grad()
        loss = _loss(run, batch)
        loss.backward()
        return loss

    run.optimizer.step(closure)


def two_batches(run, batch):
    run.optimizer.zero_grad()
    for part in (batch, batch):
        (_loss(run, part) / 2).backward()
    run.optimizer.step()


LOOPS = [to_none, to_zero, after_the_step, through_data, clipped, another_loss_before]


@pytest.mark.parametrize("loop", [*LOOPS, by_closure, two_batches])
@pytest.mark.parametrize("poisson", [True, False])
def test_cleared_gradients_are_fine(loop, poisson):
    run = _run(noise_std=0.0, poisson_sampling=poisson)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An update used the gradients of")
        for _ in range(3):
            for batch in run.loader:
                if len(batch[0]):
                    loop(run, batch)
        assert "earlier" not in _draw(run).sentence
        assert _draw(run).state == "checked"


# --------------------------------------------------------------------- parts of batches
@pytest.mark.parametrize("copy", [torch.Tensor.contiguous, torch.Tensor.clone])
def test_the_used_part_of_a_batch_is_counted(copy):
    run = _run(noise_std=0.0, poisson_sampling=False)
    numbers = {tuple(x.tolist()): i for i, (x, _) in enumerate(linear_data())}
    counted = np.zeros(len(numbers), int)
    for _ in range(3):
        for x, y in run.loader:
            x, y = copy(x[:2]), y[:2]
            to_none(run, (x, y))
            counted[[numbers[tuple(one.tolist())] for one in x]] += 1
    ledger = run.recorder.ledger
    assert np.array_equal(ledger.participations.sum(axis=0), counted)
    assert _draw(run).state == "unchecked"
    assert "used only a part of some delivered batches" in _draw(run).sentence


def test_both_parts_of_a_batch_in_one_update_are_the_whole():
    run = _run(noise_std=0.0, poisson_sampling=False)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        for part in zip(x.split(2), y.split(2), strict=True):
            _loss(run, part).backward()
        run.optimizer.step()
    assert (run.recorder.ledger.participations.sum(axis=0) == 1).all()
    assert _draw(run).state == "checked"


@pytest.mark.parametrize("name", ["batch_size", "drop_last"])
def test_a_sampler_that_is_changed_is_refused(name):
    run = _run(noise_std=0.0, poisson_sampling=False)
    for number, batch in enumerate(run.loader):
        if number == 1:
            setattr(run.loader.batch_sampler, name, 3)
            with pytest.warns(UserWarning, match="batch size, sample rate or length"):
                to_none(run, batch)
        else:
            to_none(run, batch)


# ----------------------------------------------------------------- the loss of the loop
def _loss_link(run):
    links = {link.name: link for link in run.recorder.ledger.custody.links}
    return links["loss"]


def test_without_noise_the_loss_of_the_loop_is_not_compared():
    run = _run(noise_std=0.0)
    for batch in run.loader:
        to_none(run, batch)
    assert _loss_link(run).state == "unchecked"
    assert "are not compared with those of the criterion" in _loss_link(run).sentence


@pytest.mark.parametrize("start", [7, 12])
def test_a_factor_that_begins_late_in_a_short_run_is_found(start):
    run, number = _run(noise_std=0.1, poisson_sampling=False), 0
    with pytest.warns(UserWarning, match="was 3 times that of the mean"):
        for _ in range(3):
            for batch in run.loader:
                number += 1
                run.optimizer.zero_grad()
                (_loss(run, batch) * (3 if number > start else 1)).backward()
                run.optimizer.step()


def test_it_is_said_how_many_updates_were_not_compared():
    run, said = _run(noise_std=0.1, poisson_sampling=False), set()
    for epoch in range(4):
        for batch in run.loader:
            to_none(run, batch)
            if epoch:
                said.add(_loss_link(run).sentence.partition("The last ")[2])
    assert "" in said and any("updates were not compared" in one for one in said)
