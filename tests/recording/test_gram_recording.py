"""Gram ledgers from the weights of real, tiny trainings."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.group.divergence import group_divergence, theorem_b1_estimates
from opacus_pi.gradients import norm_sweep
from opacus_pi.recording import gram_ledger
from tests.private_training import Net, Training, data

CRITERION = nn.CrossEntropyLoss()
FORGET = [7, 2, 11]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A DP-SGD training with rows after 4 and 8 updates, some gradients clipped."""
    directory = tmp_path_factory.mktemp("weights")
    recorder = Recorder(every=1, weights_dir=directory)
    training = Training(
        recorder=recorder, batch_size=6, noise_multiplier=2.0, max_grad_norm=0.8
    )
    training.train(2)
    return training, directory


def clipped_gradients(net, indices, max_grad_norm):
    """Each example's clipped gradient as one vector, one at a time, in float64."""
    x, y = data().tensors
    net = net.double().eval()
    found = []
    for i in indices:
        loss = nn.functional.cross_entropy(net(x[i : i + 1].double()), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        flat = torch.cat([g.flatten() for g in grads])
        found.append(flat * min(1.0, max_grad_norm / float(flat.norm())))
    return torch.stack(found).numpy()


def test_grams_of_a_private_run(run):
    training, directory = run
    ledger = training.engine.ledger
    before = copy.deepcopy(training.net.state_dict())
    grams = gram_ledger(
        directory, training.model, CRITERION, training.data_set, FORGET, ledger
    )
    assert grams.steps.tolist() == ledger.steps.tolist() == [4, 8]
    assert grams.example_ids.tolist() == sorted(FORGET)
    assert grams.data_set == ledger.data_set
    some_are_clipped = False
    for step, scaled in zip(grams.steps, grams.scaled(), strict=True):
        net = Net()
        net.load_state_dict(load_file(directory / f"weights-{step:08d}.safetensors"))
        G = clipped_gradients(net, sorted(FORGET), 0.8)
        some_are_clipped |= bool((np.linalg.norm(G, axis=1) > 0.8 - 1e-9).any())
        np.testing.assert_allclose(scaled, G @ G.T / 1.6**2, rtol=1e-4, atol=1e-7)
    assert some_are_clipped
    after = training.net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert group_divergence(grams, 4) > 0


def test_one_example_has_its_privacy_loss(run):
    training, directory = run
    swept = []
    for step in (4, 8):
        net = Net()
        net.load_state_dict(load_file(directory / f"weights-{step:08d}.safetensors"))
        swept.append(norm_sweep(net, CRITERION, training.data_set).numpy())
    mechanism = training.engine.ledger.mechanism
    exact = GradNormLedger(mechanism, [4, 8], swept)
    losses = privacy_losses(exact, 4)
    for index in (0, 5):
        grams = gram_ledger(
            directory, Net(), CRITERION, data(), [index], training.engine.ledger
        )
        found = group_divergence(grams, 4)
        # Divergences of single examples are capped by the worst case, groups are not.
        assert found == pytest.approx(losses[index], rel=2e-3)


def test_nothing_to_forget_costs_nothing(run):
    training, directory = run
    ledger = training.engine.ledger
    grams = gram_ledger(directory, Net(), CRITERION, data(), [], ledger)
    assert group_divergence(grams, 4) == 0
    floor = gram_ledger(
        directory, Net(), CRITERION, data(), [], ledger, kind="minibatch"
    )
    assert theorem_b1_estimates(floor, 4).shape == (20,)


def test_minibatches_are_drawn_and_clipped_as_in_training(run):
    training, directory = run
    forget = np.arange(0, 24, 2)
    options = {"kind": "minibatch", "num_minibatches": 7, "num_estimates": 3}
    grams = gram_ledger(
        directory,
        Net(),
        CRITERION,
        data(),
        forget,
        training.engine.ledger,
        generator=np.random.default_rng(5),
        **options,
    )
    assert grams.grams.shape == (2, 3, 7, 7)
    rng = np.random.default_rng(5)
    for row, step in enumerate((4, 8)):
        net = Net()
        net.load_state_dict(load_file(directory / f"weights-{step:08d}.safetensors"))
        G = clipped_gradients(net, range(24), 0.8)
        for estimate in range(3):
            retain = np.arange(1, 24, 2)
            centre = retain[rng.random(12) < 0.25]
            batches = [np.flatnonzero(rng.random(24) < 0.25) for _ in range(7)]
            V = np.stack([G[b].sum(0) for b in batches]) - G[centre].sum(0)
            found = grams.grams[row, estimate]
            np.testing.assert_allclose(found, V @ V.T, rtol=1e-4, atol=1e-5)
    again = gram_ledger(
        directory, Net(), CRITERION, data(), forget, training.engine.ledger, **options
    )
    assert not np.array_equal(again.grams, grams.grams)


def test_a_monitored_run_with_a_fixed_schedule(tmp_path):
    torch.manual_seed(0)
    net, directory = Net(), tmp_path / "weights"
    recorder = Recorder("swept", weights_dir=directory)
    engine = PrivacyEngine(recorder=recorder)
    model, optimizer, loader = engine.make_monitored(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=6, shuffle=True),
        noise_std=0.1,
        criterion=CRITERION,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    grams = gram_ledger(directory, net, CRITERION, data(), FORGET, engine.ledger)
    np.testing.assert_allclose(
        np.sqrt(np.diagonal(grams.grams[0])),
        engine.ledger.grad_norms[0, sorted(FORGET)],
        rtol=1e-5,
    )
    with pytest.raises(
        ValueError, match="sampling must .*got 'fixed'.*poisson_sampling=True"
    ):
        group_divergence(grams, 4)
    pairs = gram_ledger(
        directory, net, CRITERION, data(), FORGET, engine.ledger, kind="minibatch"
    )
    assert np.isfinite(theorem_b1_estimates(pairs, 4)).all()


def test_scheduled_settings_follow_the_rows(run, tmp_path):
    training, directory = run
    ledger = training.engine.ledger
    noise = np.array([1.6, 3.2])
    scheduled = GradNormLedger(NoisySGD(8, 0.25, noise, 0.8), [4, 8], ledger.grad_norms)
    grams = gram_ledger(directory, Net(), CRITERION, data(), FORGET, scheduled)
    plain = gram_ledger(directory, Net(), CRITERION, data(), FORGET, ledger)
    ratio = plain.scaled() / grams.scaled()
    np.testing.assert_allclose(ratio[0], 1)
    np.testing.assert_allclose(ratio[1], 4)
    longer = GradNormLedger(
        NoisySGD(9, 0.25, np.append(noise, 1.0), 0.8),
        [4, 8, 9],
        ledger.grad_norms[[0, 1, 1]],
    )
    with pytest.raises(
        ValueError, match="changed noise_std, got weights of 2 of 3 rows"
    ):
        gram_ledger(directory, Net(), CRITERION, data(), FORGET, longer)


def test_what_does_not_belong_to_the_run(run, tmp_path):
    training, directory = run
    ledger = training.engine.ledger
    good = {
        "weights_dir": directory,
        "model": Net(),
        "criterion": CRITERION,
        "data_set": data(),
        "forget_indices": FORGET,
        "ledger": ledger,
    }
    x, y = data().tensors
    shorter = GradNormLedger(ledger.mechanism, [4], ledger.grad_norms[:1])
    deeper = nn.Sequential(Net(), nn.Linear(3, 3))
    other = Net()
    other.out = nn.Linear(16, 4)
    for change, message in [
        ({"weights_dir": tmp_path}, r"Recorder\(weights_dir=...\)"),
        ({"data_set": TensorDataset(x, (y + 1) % 3)}, "must be the ledger's"),
        ({"forget_indices": [24]}, "forget_indices must .*got 24"),
        ({"kind": "both"}, "kind must .*got 'both'"),
        (
            {"ledger": shorter},
            r"saved at the ledger.s rows, got weights after \[8\] updates",
        ),
        ({"model": deeper}, "model must have the same tensors as .*, got Sequential"),
        ({"model": other}, "model must have the same tensors as .*, got Net"),
        ({"kind": "minibatch", "num_estimates": 0}, "num_estimates must .*got 0"),
        (
            {"kind": "minibatch", "forget_indices": range(24)},
            "leave at least one example",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            gram_ledger(**good | change)
