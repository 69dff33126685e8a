"""What is trained as by Opacus, and not accounted."""

import opacus
import pytest
import torch
from opacus.schedulers import ExponentialGradClip
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from opacus_pi.integration.engine import PerInstanceMixin
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import Log, Training, data

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger", "ignore:PrivacyEngine detected new dataset"
)


# ------------------------------------------------- trained as by Opacus, not accounted
def refused(training, match):
    for ask in (
        lambda: training.engine.ledger,
        lambda: training.engine.privacy_losses(2),
        lambda: training.engine.epsilons(1e-3),
    ):
        with pytest.raises(AccountingError, match=match):
            ask()
    assert training.engine.get_epsilon(1e-3) > 0  # Opacus's own number stays


def test_ghost_clipping_with_a_clip_scheduler():
    training = Training(grad_sample_mode="ghost", batch_size=12).train(1)
    assert training.engine.ledger.num_rows == 1
    scheduler = ExponentialGradClip(training.optimizer, gamma=0.1)
    scheduler.step()
    training.train(1)
    refused(training, "clipped to 1, but the noise was scaled for a clip norm of 0.1")


def test_ghost_clipping_with_two_backward_passes():
    training = Training(grad_sample_mode="ghost", poisson_sampling=False)
    batches = list(training.loader)
    training.optimizer.zero_grad()
    for x, y in batches[:2]:
        training.criterion(training.model(x), y).backward()
    training.optimizer.step()
    refused(training, "two backward passes")


def test_ghost_clipping_after_gradients_were_discarded_on_purpose():
    training = Training(grad_sample_mode="ghost", poisson_sampling=False)
    batches = list(training.loader)
    training.criterion(training.model(batches[0][0]), batches[0][1]).backward()
    training.optimizer.zero_grad()
    training.batch(*batches[1])
    assert training.engine.ledger.num_rows == 1
    assert len(training.recorder.observed) == len(batches[1][0])


def test_ghost_clipping_with_norms_of_an_earlier_batch():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out, self.four = nn.Linear(3, 2), nn.Linear(8, 3), False

        def forward(self, x):
            shape = (-1, 4, 1, 3) if self.four else (-1, 4, 3)
            return self.out(self.first(x.reshape(shape)).flatten(1))

    net = Reshaping()
    training = Training(
        module=net, grad_sample_mode="ghost", poisson_sampling=False
    ).train(1)
    assert training.engine.ledger.num_rows == 1
    net.four = True
    training.batch(*next(iter(training.loader)))  # the next batch is an error
    refused(training, "earlier batch")


class Mixing(nn.Module):
    """A frozen BatchNorm, which Opacus accepts in training mode too."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(12, 3)
        self.norm.requires_grad_(False)

    def forward(self, x):
        return self.out(self.norm(x).flatten(1))


def test_frozen_batch_norm_in_training_mode():
    refused(Training(module=Mixing(), batch_size=12).train(1), "BatchNorm")


def test_frozen_batch_norm_in_evaluation_mode():
    net = Mixing()
    net.norm.eval()
    training = Training(module=net, batch_size=12).train(1)
    assert training.engine.ledger.num_rows == 1
    training.model.train()
    training.train(1)
    refused(training, "BatchNorm")


def test_an_example_drawn_twice_for_one_update():
    training = Training(poisson_sampling=False)
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    for _ in range(2):
        training.criterion(training.model(x), y).backward()
    training.optimizer.step()
    refused(training, "more than once")


def test_adaptive_ghost_clipping_of_opacus():
    from opacus.utils.adaptive_clipping import adaptive_clipping_utils

    class Engine(
        PerInstanceMixin, adaptive_clipping_utils.PrivacyEngineAdaptiveClipping
    ):
        pass

    engine = Engine(accountant="rdp", recorder=Log())
    training = Training(engine=engine, grad_sample_mode="ghost", batch_size=24)
    training.recorder = engine.recorder
    training.train(1)
    refused(training, "does not clip")


class Endless(IterableDataset):
    def __init__(self):
        self.pairs = list(data())

    def __iter__(self):
        return iter(self.pairs)

    def __len__(self):
        return len(self.pairs)


def test_iterable_data_set():
    loader = DataLoader(Endless(), batch_size=6)
    training = Training(loader=loader, data_set=loader.dataset, poisson_sampling=False)
    with pytest.warns(UserWarning, match="map-style"):
        training.train(1)
    refused(training, "iterable")
    assert training.engine.attribution["unattributed"] == 24


def test_iterable_data_set_without_length():
    class Stream(Endless):
        __len__ = None

    loader = DataLoader(Stream(), batch_size=6)
    with pytest.raises(TypeError) as ours:
        Training(loader=loader, poisson_sampling=False)
    with pytest.raises(TypeError) as opacus_s:
        engine = opacus.PrivacyEngine()
        Training(loader=loader, poisson_sampling=False, engine=engine)
    assert str(ours.value) == str(opacus_s.value)


def test_training_diverged():
    training = Training(batch_size=12)
    with torch.no_grad():
        training.net.out.weight.fill_(float("nan"))
    refused(training.train(1), "diverged")


def test_strict_refuses_at_once():
    recorder = Recorder(strict=True)
    net = Mixing()
    net.norm.eval()
    training = Training(module=net, recorder=recorder, batch_size=12).train(1)
    training.model.train()
    with pytest.raises(AccountingError, match="BatchNorm"):
        training.train(1)


def test_a_second_run_starts_a_new_ledger_and_does_not_hide_the_first():
    first = Training(batch_size=12).train(2)
    second = Training(engine=first.engine, batch_size=12).train(1)
    assert second.engine.recorder.num_steps == 2
    with pytest.raises(
        AccountingError, match="holds 2 updates.*one engine for each model"
    ):
        second.engine.privacy_losses(2)
    first.train(1)
    with pytest.raises(AccountingError, match="one PrivacyEngine for each run"):
        _ = second.engine.ledger
