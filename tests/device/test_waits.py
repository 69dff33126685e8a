"""How often training waits for the device, and devices without float64.

A data set on the device costs no wait in an update, once the probes of the first
updates are over, except that each pass over the data begins with one audited batch and
a row that is written is fetched once. A batch that the loop copies to the device has to
be recognised by its content, which is fetched once in each update.
"""

import warnings

import opacus
import pytest
import torch

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.causes import EQUAL_COPIES
from opacus_pi.attribution.samples import DelayedChecksums
from opacus_pi.custody import Chain
from opacus_pi.custody.loss_factors import LossFactors
from opacus_pi.custody.loss_shares import LossShares
from tests.device.simulated import NAME, Counts, without_float64, without_waits
from tests.device.test_training import assert_same_ledgers
from tests.device.trainings import MODES, train_privately

AUDITED, ROW = 0, 3  # positions in a pass of four updates


def settled(mode, **options):
    """Return the counts of the updates after the first pass, by position."""
    counts = train_privately(NAME, mode, **options).counts[4:]
    return [(place % 4, found) for place, found in enumerate(counts)]


@pytest.mark.parametrize("mode", MODES)
def test_no_update_waits_if_the_data_are_on_the_device(mode):
    for place, found in settled(mode, is_there=True):
        if place == AUDITED:
            assert set(found) == {"shape"}
        elif place == ROW:
            assert found == {"to_host": 1}
        else:
            assert found == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_copied_batch_is_fetched_once(mode):
    for place, found in settled(mode):
        assert found == {"to_host": 2 if place == ROW else 1}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_opacus_itself_never_waits(mode):
    for _, found in settled(mode, engine=opacus.PrivacyEngine()):
        assert found == {}


def test_entries_are_fetched_once():
    content = DelayedChecksums(torch.randn(3, 400, device=NAME), 0)
    before = Counts()
    assert content.checksums.shape == (3,)
    assert content.entries.shape[0] == 3
    assert before.waits() == 1


def test_copies_with_other_gradients_are_counted_without_a_wait():
    tracker, x = Tracker(), torch.randn(4, 5)
    x[1] = x[2]
    tracker.delivered([0, 1, 2, 3], (x, torch.tensor([0, 1, 1, 0])))
    tracker.mark_backward(tracker.bind(x[[3, 2, 0, 1]]))
    passes = tracker.take_attributed([4])
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0], device=NAME)
    with without_waits():
        charged = tracker.charged(norms, passes)
    assert charged.tolist() == [1.0, 4.0, 3.0, 4.0]
    assert not tracker.causes
    with pytest.warns(UserWarning, match="gradients differ"):
        tracker.report_to(Chain())
    assert tracker.causes == {EQUAL_COPIES.name: 2}


def test_a_wait_can_be_made_an_error():
    value = torch.ones(2, device=NAME)
    with without_waits(), pytest.raises(RuntimeError, match="would wait"):
        value.sum().item()
    assert value.sum().item() == 2


@pytest.mark.parametrize("mode", MODES)
def test_training_on_a_device_without_float64(mode):
    """Norms agree with those of the CPU to a relative 1e-4."""
    here = train_privately("cpu", mode)
    with without_float64():
        assert_same_ledgers(train_privately(NAME, mode), here)
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(1, dtype=torch.float64, device=NAME)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], ""),
        ([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]], "different factors"),
        ([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], "by 1 and another by 3"),
    ],
)
def test_factors_of_losses_are_compared_when_the_chain_is_read(weights, says):
    chain = Chain()
    factors = LossFactors(chain, is_mean=True)
    given = [torch.tensor(row, device=NAME) / 3 for row in weights]
    losses = [torch.ones(3, device=NAME, requires_grad=True) for _ in given]
    before = Counts()
    for each, factor in zip(losses, given, strict=True):
        factors.watch(each)
        (each * factor).sum().backward()
    assert before.waits() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (link,) = [x for x in chain.custody().links if x.name == "loss"]
    assert says in link.sentence
    (unseen,) = [x for x in Chain().custody().links if x.name == "loss"]
    assert (link != unseen) == bool(says)


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5]])
def test_shares_of_losses_are_compared_when_the_chain_is_read(weights):
    chain = Chain()
    shares = LossShares(chain)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(9, 3, generator=generator).to(NAME) for _ in range(3)]
    labels = [torch.randint(3, (9,), generator=generator).to(NAME) for _ in given]
    of_classes = None if weights is None else torch.tensor(weights).to(NAME)
    before = Counts()
    for x, y in zip(given, labels, strict=True):
        outputs = x.requires_grad_() * 1
        shares.saw((x,), {}, outputs)
        torch.nn.functional.cross_entropy(outputs, y, of_classes).backward()
        shares.run()
    assert before.waits() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (link,) = [x for x in chain.custody().links if x.name == "loss"]
    assert ("the same sum in 3 batches" in link.sentence) == (weights is not None)
