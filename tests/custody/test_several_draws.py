"""Updates that hold samples of several Poisson draws, which are charged as one."""

import warnings

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager

from opacus_pi import AccountingError
from tests.private_training import Training

SEVERAL = r"An update used samples of \d+ batches that were drawn one after another"
MODES = ["hooks", "ghost", "fast"]


def _said(loop, mode="hooks", **options):
    """Train quietly by a loop; return why the link "draw" is not checked, or ""."""
    training = Training(grad_sample_mode=mode, batch_size=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(training)
        try:
            links = training.engine.ledger.custody.links
        except AccountingError as error:
            return str(error)
    (draw,) = [link for link in links if link.name == "draw"]
    return "" if draw.state == "checked" else draw.sentence


def _parts(training, size=2, *, loader=None):
    return BatchMemoryManager(
        data_loader=loader or training.loader,
        max_physical_batch_size=size,
        optimizer=training.optimizer,
    )


# --------------------------------------------------------------------- several draws
def skipped_by_hand(training):
    for number, batch in enumerate(training.loader):
        training.optimizer.signal_skip_step(number % 3 != 2)
        training.batch(*batch)


def left_within_a_batch(training):
    for seed in range(12):
        torch.manual_seed(seed)
        with _parts(training, 1) as parts:
            for number, batch in enumerate(parts):
                training.batch(*batch)
                if number == seed % 3:
                    break


def a_part_without_a_step(training):
    """The loop goes on after a part, and all later updates end one part too early."""
    with _parts(training, 1) as parts:
        for number, batch in enumerate(parts):
            if number == 2:
                continue
            training.batch(*batch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loop", [skipped_by_hand, left_within_a_batch, a_part_without_a_step]
)
def test_several_draws_in_one_update_are_refused(loop, mode):
    for seed in range(8):  # an example in both draws is another reason
        said = _said(loop, mode, seed=seed)
        if "more than once" not in said:
            assert SEVERAL.split(r"\d")[0] in said
            return
    raise AssertionError


# -------------------------------------------------------------------------- controls
def whole_passes(training):
    training.train(3)


def all_parts(training):
    for size in (1, 2, 50):
        with _parts(training, size) as parts:
            for batch in parts:
                training.batch(*batch)


def left_after_an_update(training):
    with _parts(training, 1) as parts:
        for batch in parts:
            training.batch(*batch)
            if not training.optimizer._is_last_step_skipped:
                break
    whole_passes(training)


def parts_by_workers(training):
    loader = training.loader
    loader.num_workers = 2
    with _parts(training, 1, loader=loader) as parts:
        for batch in parts:
            training.batch(*batch)


def halves_in_one_update(training):
    """Both halves of a batch, which ``signal_skip_step`` joins."""
    for x, y in training.loader:
        halves = list(zip(x.split(1), y.split(1), strict=True))
        for number, half in enumerate(halves):
            training.optimizer.signal_skip_step(number < len(halves) - 1)
            training.batch(*half)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loop",
    [whole_passes, all_parts, left_after_an_update, parts_by_workers],
)
def test_parts_of_one_draw_are_one_draw(loop, mode):
    assert _said(loop, mode) == ""


@pytest.mark.parametrize("mode", MODES)
def test_halves_by_hand_are_one_draw(mode):
    assert _said(halves_in_one_update, mode) == ""


@pytest.mark.parametrize("loop", [skipped_by_hand, left_within_a_batch])
def test_under_fixed_sampling_participations_are_counted(loop):
    said = _said(loop, poisson_sampling=False)
    assert "drawn one after another" not in said


def test_accumulated_passes_are_charged_each():
    def accumulated(training):
        training.model.allow_grad_accumulation()  # Opacus forbids it by default
        for number, (x, y) in enumerate(training.loader):
            training.criterion(training.model(x), y).backward()
            if number % 2:
                training.optimizer.step()
                training.optimizer.zero_grad()

    said = [_said(accumulated, seed=seed) for seed in range(6)]
    assert not any("drawn one after another" in one for one in said)
    assert "" in said
