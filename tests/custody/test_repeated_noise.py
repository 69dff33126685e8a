"""Noise that is drawn twice because its generator was put back."""

import pytest
import torch
from opacus import PrivacyEngine as OpacusEngine
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import AccountingError, PrivacyEngine
from tests.private_training import Training, data

REPEATED = "noise was drawn before in this run"


def _epochs_seeded_alike(training):
    for _ in range(2):
        torch.manual_seed(0)
        training.train(1)


def _is_refused(training):
    with pytest.raises(AccountingError, match=REPEATED):
        training.engine.ledger.num_examples  # noqa: B018
    return True


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast", "ew"])
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_a_seed_in_every_epoch_is_refused(mode, poisson_sampling):
    training = Training(
        grad_sample_mode=mode, poisson_sampling=poisson_sampling, shuffle=False
    )
    with pytest.warns(UserWarning, match=REPEATED):
        _epochs_seeded_alike(training)
    assert _is_refused(training)


def test_the_reason_is_true_noise_repeats():
    training = Training(shuffle=False, poisson_sampling=False)
    drawn = []
    training.optimizer.attach_step_hook(
        lambda optimizer: drawn.append(
            torch.cat([(p.grad - p.summed_grad).flatten() for p in optimizer.params])
        )
    )
    training.optimizer.scale_grad = lambda: None
    with pytest.warns(UserWarning):
        _epochs_seeded_alike(training)
    half = len(drawn) // 2
    torch.testing.assert_close(drawn[0], drawn[half], atol=1e-5, rtol=0)


def test_other_seeds_and_switches_are_no_repetition():
    training = Training()
    for seed in range(3):
        torch.manual_seed(seed + 1)
        training.train(1)
        # an evaluation that repeats itself
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            training.net(data().tensors[0])
    assert training.engine.ledger.num_examples


def test_a_generator_of_the_users_own_is_followed():
    generator = torch.Generator()
    training = Training(noise_generator=generator)
    with pytest.warns(UserWarning, match=REPEATED):
        for _ in range(2):
            generator.manual_seed(5)
            training.train(1)
    assert _is_refused(training)


def test_a_run_without_noise_repeats_none():
    training = Training(noise_multiplier=0.0, poisson_sampling=False, shuffle=False)
    _epochs_seeded_alike(training)
    assert training.engine.ledger.num_examples


def test_a_run_that_goes_on_with_the_same_seed_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    first = Training().train(1)
    first.engine.save_checkpoint(
        path=path, module=first.model, optimizer=first.optimizer
    )
    second = Training()
    second.engine.load_checkpoint(
        path=path, module=second.model, optimizer=second.optimizer
    )
    with pytest.warns(UserWarning, match=REPEATED):
        second.train(1)
    assert _is_refused(second)

    third = Training()
    third.engine.load_checkpoint(
        path=path, module=third.model, optimizer=third.optimizer, restore_rng=True
    )
    third.train(1)
    assert third.engine.ledger.num_examples


def test_monitored_training_with_noise_is_followed():
    net = nn.Linear(3, 2)
    data_set = [(torch.randn(3), i % 2) for i in range(12)]
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_monitored(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data_set, batch_size=4),
        criterion=nn.CrossEntropyLoss(),
        noise_std=0.1,
    )
    with pytest.warns(UserWarning, match=REPEATED):
        for _ in range(2):
            torch.manual_seed(0)
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    with pytest.raises(AccountingError, match=REPEATED):
        engine.ledger.num_examples  # noqa: B018


def test_the_weights_are_those_of_opacus():
    ours, theirs = (Training(engine=e) for e in (PrivacyEngine(), OpacusEngine()))
    for training in (ours, theirs):
        torch.manual_seed(3)
        training.train(2)
    for one, other in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        assert torch.equal(one, other)
