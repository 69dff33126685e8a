"""Loops that train on batches of another loader, or on batches that they kept."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.attribution.causes import COMPUTED, OTHER_BATCHES
from tests.attribution import test_sometimes_transformed

NUM, BATCH, WIDTH, CLASSES = 320, 8, 6, 3  # more batches than are compared
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ample", "ignore:.*batches that the loader"
)


class Data(TensorDataset):
    def __init__(self, num=NUM):
        torch.manual_seed(1)
        super().__init__(torch.randn(num, WIDTH), torch.arange(num) % CLASSES)


class FewContents(Data):
    """Items of four bits: many are equal, and a flipped one is often another item."""

    def __init__(self):
        super().__init__()
        x, y = self.tensors
        self.tensors = (x[:, :4] > 0).float(), y


class Flipping(Data):
    """Half of the items are mirrored, and another half the next time."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x.flip(0) if torch.rand(()) < 0.5 else x), y


class Run(test_sometimes_transformed.Run):
    def __init__(self, data=None, **options):
        self.data = Data() if data is None else data
        net = nn.Linear(self.data.tensors[0].shape[1], CLASSES)
        self.engine = PrivacyEngine(recorder=Recorder(**options))
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(self.data, BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        self.num = 0


def zipped(run):
    """The loop iterates over the private loader, and trains on its own."""
    half = NUM // 2
    order = [*range(half, NUM), *range(half)]
    for _ in range(2):
        own = DataLoader(run.data, BATCH, sampler=order)
        for _, batch in zip(run.loader, own, strict=True):
            run.step(*batch)


def one_known_in_each(run):
    """Of the examples from elsewhere, few were delivered before."""
    for number, batch in zip(range(30), run.loader, strict=False):
        if number < 20:
            run.step(*batch)
        else:
            last = NUM - BATCH * (number - 20)
            run.step(*run.data[[number - 20, *range(last - BATCH + 1, last)]])


def _kept(run):
    """Train on all batches; return some that are not compared any more."""
    kept = []
    for x, y in run.loader:
        run.step(x, y)
        kept.append((x.clone(), y))
    return kept[10:20]


def replayed(run):
    """A second phase trains on batches that the first one kept."""
    kept = _kept(run)
    for batch, _ in zip(kept[::-1], run.loader, strict=False):
        run.step(*batch)


def replayed_samples(run):
    """The batches of the second phase are drawn from all kept samples."""
    x, y = map(torch.cat, zip(*_kept(run), strict=True))
    for _, _ in zip(range(10), run.loader, strict=False):
        rows = torch.randperm(len(x))[:BATCH]
        run.step(x[rows], y[rows])


def transformed_then_replayed(run):
    """Guesses of the first phase are withdrawn in the second."""
    for x, y in run.loader:
        run.step(x.exp(), y)
    for _, _ in zip(range(10), run.loader, strict=False):
        run.step(*run.data[100 : 100 + BATCH])


ELSEWHERE = [
    zipped,
    one_known_in_each,
    replayed,
    replayed_samples,
    transformed_then_replayed,
]


@pytest.mark.parametrize("loop", ELSEWHERE)
def test_examples_of_other_batches_are_not_taken_for_the_latest(loop):
    run = Run()
    loop(run)
    counts = run.engine.attribution
    assert counts["by_latest"] == 0 and sum(counts.values()) == run.num * BATCH
    assert OTHER_BATCHES.name in run.causes and COMPUTED.name not in run.causes
    with pytest.raises(AccountingError, match="samples are unattributed"):
        _ = run.engine.ledger


def test_what_was_assumed_before_is_said():
    run = Run(unattributed="worst_case")
    with pytest.warns(UserWarning, match="as another loader over the same data"):
        transformed_then_replayed(run)
    assert OTHER_BATCHES.name in run.causes and COMPUTED.name not in run.causes
    links = {link.name: link for link in run.engine.ledger.custody.links}
    assert f"{NUM} samples of earlier updates" in links["identity"].sentence
    assert "batches of another loader" in links["draw"].sentence


# ------------------------------------------------------------- loops that are right
def flipped(run):
    """Some samples of each batch are changed in the loop."""
    for _ in range(2):
        for x, y in run.loader:
            chosen = torch.rand(len(x), 1) < 0.5
            run.step(torch.where(chosen, 1 - x, x), y)


def all_flipped(run):
    for _ in range(2):
        for x, y in run.loader:
            run.step(x.flip(1), y)


def probed(run):
    """The loop looks at fixed examples between its updates, and transforms batches."""
    for _ in range(2):
        for x, y in run.loader:
            run.step(x.exp(), y)
            with torch.no_grad():
                run.model(run.data.tensors[0][:BATCH])


@pytest.mark.parametrize("data", [Data, FewContents, Flipping])
@pytest.mark.parametrize("loop", [flipped, all_flipped, probed])
def test_batches_that_the_loop_changes_are_not_those_of_others(loop, data):
    run = Run(data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(run)
    assert OTHER_BATCHES.name not in run.causes
