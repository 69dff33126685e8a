"""Monitored training: the user's loop bit for bit, or the paper's SGLD exactly."""

import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from opacus_pi.accounting import privacy_losses
from opacus_pi.attribution import Tracker
from opacus_pi.monitor import draws_of, monitor
from opacus_pi.privacy_engine import PrivacyEngine as RecordingEngine
from opacus_pi.recorder import AccountingError, Recorder

pytestmark = [
    pytest.mark.filterwarnings("ignore:This run has no ledger"),
    pytest.mark.filterwarnings("ignore:.*rows are unattributed"),
]
N, CLASSES = 22, 3


class Augmented(Dataset):
    """Images with labels; draws from all three global generators."""

    def __init__(self, num_examples=N):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(num_examples, 1, 6, 6, generator=generator)
        self.targets = torch.randint(CLASSES, (num_examples,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        shift = torch.randn(()) + np.random.randn() + random.gauss(0, 1)
        return self.images[index] + 0.01 * shift.float(), self.targets[index]


def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, CLASSES),
    )


def linear_data(num_examples=N, num_features=4):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_examples, num_features, generator=generator)
    y = torch.randint(CLASSES, (num_examples,), generator=generator)
    return TensorDataset(x, y)


def small(num_features=4):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(num_features, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def monitored(model=None, data_set=None, **changes):
    """Monitor a small default training; returns what a test may want to look at."""
    model = small() if model is None else model
    data_set = linear_data() if data_set is None else data_set
    options = {
        "recorder": Recorder("swept"),
        "tracker": Tracker(),
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(data_set, batch_size=4, shuffle=True),
        "noise_std": 0.5,
        "criterion": nn.CrossEntropyLoss(),
        **changes,
    }
    module, optimizer, loader = monitor(**options)
    return SimpleNamespace(
        **{**options, "module": module, "optimizer": optimizer, "loader": loader}
    )


def epoch(run):
    """The user's loop; yields (gradients before the step, batch size) after it."""
    run.module.train()
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.module(x), y).backward()
        before = [p.grad.clone() for p in run.module.parameters()]
        run.optimizer.step()
        yield before, len(y)


def train(run, num_epochs=1):
    for _ in range(num_epochs):
        for _ in epoch(run):
            pass


def gradients(run):
    return [p.grad for p in run.module.parameters()]


# --------------------------------------------------------------- noise_std=0: untouched


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_noise_training_is_bit_identical(optimizer):
    def trained(watched):
        random.seed(0)
        np.random.seed(0)
        model = net()
        rows = []
        if optimizer == "sgd":
            opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        else:
            opt = torch.optim.Adam(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
        losses = []
        if watched:
            recorder = Recorder("swept", every=0.5, batch_size=8)
            same = monitor(
                recorder=recorder,
                tracker=Tracker(),
                module=model,
                optimizer=opt,
                data_loader=loader,
                noise_std=0,
                criterion=nn.CrossEntropyLoss(),
                poisson_sampling=False,
            )
            assert same[0] is model and same[1] is opt and same[2] is loader
            assert type(loader) is DataLoader and not model._forward_hooks
        for _ in range(3):
            model.train()
            for x, y in loader:
                opt.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                opt.step()
                schedule.step()
                losses.append(loss.item())
        if watched:
            rows = recorder.ledger.steps.tolist()
            assert recorder.num_steps == len(losses)
        states = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        return model.state_dict(), opt.state_dict(), losses, states, rows

    plain, watched = trained(False), trained(True)
    assert watched[4] == [3, 6, 9, 12, 15, 18]
    assert plain[2] == watched[2]
    assert all(torch.equal(plain[0][k], watched[0][k]) for k in plain[0])
    torch.testing.assert_close(plain[1], watched[1], rtol=0, atol=0)
    assert torch.equal(plain[3][0], watched[3][0])
    assert np.array_equal(plain[3][1], watched[3][1]) and plain[3][2] == watched[3][2]


def test_without_noise_a_closure_and_accumulated_batches_are_the_users_matter():
    run = monitored(noise_std=0, poisson_sampling=False)
    x, y = next(iter(run.loader))

    def closure():
        run.optimizer.zero_grad()
        loss = cross_entropy(run.module(x), y)
        loss.backward()
        return loss

    for _ in range(6):
        run.optimizer.step(closure)
    assert run.recorder.ledger.mechanism.num_steps == 6


def test_without_noise_a_loss_is_refused_and_a_noise_may_be_assumed():
    run = monitored(noise_std=0)
    train(run)
    ledger = run.recorder.ledger
    assert ledger.mechanism.noise_std == 0 and ledger.mechanism.max_grad_norm == np.inf
    with pytest.raises(ValueError, match=r"ledger\.with_noise_std\(sigma\)"):
        ledger.ratios()
    assert np.isfinite(ledger.with_noise_std(0.1).ratios()).all()


# ------------------------------------------------------------------ the noisy mechanism


def test_the_noise_has_its_mean_and_standard_deviation():
    model = nn.Linear(400, 300, bias=False)  # 120,000 entries
    data = TensorDataset(torch.randn(8, 400), torch.randint(300, (8,)))
    run = monitored(
        model,
        data,
        data_loader=DataLoader(data, batch_size=4),
        noise_std=0.25,
        noise_generator=torch.Generator().manual_seed(0),
        poisson_sampling=False,
    )
    for before, _ in epoch(run):
        noise = (model.weight.grad - before[0]).double()
        size = noise.numel()
        assert abs(noise.mean()) < 4 * 0.25 / size**0.5
        assert abs(noise.std() - 0.25) < 4 * 0.25 / (2 * size) ** 0.5
        assert abs((noise**4).mean() / 0.25**4 - 3) < 4 * (96 / size) ** 0.5


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_the_update_is_the_mechanism_exactly(poisson_sampling):
    """Scaled to the expected batch size, then noise: the same numbers by hand."""
    model = small()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[2].parameters()},
    ]
    run = monitored(
        model,
        optimizer=torch.optim.SGD(groups, lr=0.1),
        poisson_sampling=poisson_sampling,
        noise_generator=torch.Generator().manual_seed(7),
    )
    by_hand = torch.Generator().manual_seed(7)
    mean_batch_size = N / 6 if poisson_sampling else 4
    sizes = []
    for _ in range(3):
        for before, size in epoch(run):
            sizes.append(size)
            for used, mean in zip(gradients(run), before, strict=True):
                noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
                total = torch.zeros_like(mean) if size == 0 else mean * size
                torch.testing.assert_close(used, total / mean_batch_size + noise)
    assert set(sizes) == {4, 2} if not poisson_sampling else len(set(sizes)) > 3
    mechanism = run.recorder.ledger.mechanism
    assert mechanism.num_steps == len(sizes)
    assert mechanism.noise_std == pytest.approx(0.5 * mean_batch_size)
    assert mechanism.sample_rate == pytest.approx(1 / 6)
    assert mechanism.sampling == ("poisson" if poisson_sampling else "fixed")


def test_the_noise_generator_makes_runs_repeatable_and_spares_the_global_one():
    def trained(seed):
        torch.manual_seed(0)
        run = monitored(
            poisson_sampling=False, noise_generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(11)
        train(run)
        return [p.detach().clone() for p in run.module.parameters()], torch.rand(())

    first, again, other = trained(1), trained(1), trained(2)
    assert all(map(torch.equal, first[0], again[0]))
    assert not any(map(torch.equal, first[0], other[0]))
    assert first[1] == other[1]  # what comes next from the global generator
    torch.manual_seed(11)
    for _ in DataLoader(linear_data(), batch_size=4, shuffle=True):
        pass
    assert torch.rand(()) == first[1]


def test_empty_batches_are_updates_of_noise_alone():
    data = linear_data(8)
    run = monitored(
        data_set=data,
        data_loader=DataLoader(data),
        noise_generator=torch.Generator().manual_seed(7),
    )
    by_hand = torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    sizes = []
    for _ in range(4):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            cross_entropy(run.module(x), y).backward()
            if len(y) == 0:
                for gradient in gradients(run):  # as some layers leave them
                    gradient.fill_(torch.nan)
            before = [g.clone() for g in gradients(run)]
            run.optimizer.step()
            sizes.append(len(y))
            for used, mean in zip(gradients(run), before, strict=True):
                noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
                wanted = mean * len(y) + noise if len(y) else noise
                torch.testing.assert_close(used, wanted)
    assert sizes.count(0) >= 3 and max(sizes) >= 2
    mechanism = run.recorder.ledger.mechanism
    assert mechanism.num_steps == len(sizes) == 32
    assert mechanism.noise_std == 0.5


def test_parameters_without_a_gradient_stay():
    model = small()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    run = monitored(model)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.module(x), y).backward()
        run.optimizer.step()
    assert torch.equal(model.unused, torch.ones(3))
    assert run.recorder.ledger.num_rows == 1


# --------------------------------------------------------------------------- the record


def test_rows_are_written_where_promised_in_the_units_of_the_mechanism():
    num_steps = 18
    recorder = Recorder.evenly_spaced(5, num_steps=num_steps, mode="swept")
    run = monitored(recorder=recorder, noise_std=0.5)
    train(run, 3)
    ledger = recorder.ledger
    assert ledger.steps.tolist() == [round(18 * (i + 1) / 5) for i in range(5)]
    assert ledger.source == "swept" and ledger.num_examples == N
    assert ledger.data_set.startswith(f"TensorDataset:{N}:")
    wanted = ledger.grad_norms.astype(np.float64) / (N / 6 * 0.5)
    np.testing.assert_allclose(ledger.ratios(), wanted, rtol=1e-15)
    for measured in (ledger.confidences, ledger.errors, ledger.correct):
        assert measured.shape == (5, N)


def test_swept_rows_are_the_norms_at_their_weights(tmp_path):
    data = Augmented(9)
    data.__class__ = type("Plain", (Augmented,), {"__getitem__": plain_item})
    model = net()
    recorder = Recorder("swept", every=[2, 5], weights_dir=tmp_path, batch_size=4)
    run = monitored(
        model,
        data,
        recorder=recorder,
        data_loader=DataLoader(data, batch_size=3, shuffle=True),
        poisson_sampling=False,
    )
    train(run, 2)
    reference = net().eval()
    for row, step in enumerate([2, 5]):
        reference.load_state_dict(
            load_file(tmp_path / f"weights-{step:08d}.safetensors")
        )
        wanted = [autograd_norm(reference, *data[i]) for i in range(len(data))]
        np.testing.assert_allclose(recorder.ledger.grad_norms[row], wanted, rtol=1e-5)


def plain_item(self, index):
    return self.images[index], self.targets[index]


def autograd_norm(model, x, y):
    loss = cross_entropy(model(x[None]), y[None])
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([p.flatten() for p in parts]).norm().item()


def test_a_killed_run_resumes_to_the_same_ledger():
    def begun():
        return monitored(recorder=Recorder("swept", every=0.75))

    torch.manual_seed(0)
    whole = begun()
    train(whole, 3)
    torch.manual_seed(0)
    first = begun()
    train(first)
    kept = copy.deepcopy(
        {
            "model": first.module.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "recorder": first.recorder.state_dict(),
            "random": torch.get_rng_state(),
        }
    )
    second = begun()
    second.module.load_state_dict(kept["model"])
    second.optimizer.load_state_dict(kept["optimizer"])
    second.recorder.load_state_dict(kept["recorder"])
    torch.set_rng_state(kept["random"])
    train(second, 2)
    ledgers = [run.recorder.ledger for run in (whole, second)]
    assert ledgers[0].mechanism == ledgers[1].mechanism
    assert ledgers[0].steps.tolist() == ledgers[1].steps.tolist() == [5, 9, 14, 18]
    for name in ("grad_norms", "confidences", "errors", "correct"):
        assert np.array_equal(*(getattr(ledger, name) for ledger in ledgers))


# ----------------------------------------------------------- loops as people write them


def test_looking_at_batches_without_training_on_them_changes_nothing():
    run = monitored()
    next(iter(run.loader))
    for _ in range(2):
        train(run)
        run.module.eval()
        with torch.no_grad():
            for x, _ in run.loader:
                run.module(x)
    assert run.recorder.ledger.mechanism.num_steps == 12


def test_copies_of_batches_are_recognised():
    run = monitored(noise_generator=torch.Generator().manual_seed(7))
    by_hand = torch.Generator().manual_seed(7)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.module(x.clone()), y).backward()
        before = [p.grad.clone() for p in run.module.parameters()]
        run.optimizer.step()
        for used, mean in zip(gradients(run), before, strict=True):
            noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
            torch.testing.assert_close(used, mean * len(y) / (N / 6) + noise)
    assert run.recorder.ledger.num_rows == 1


def test_a_second_call_replaces_the_first():
    run = monitored()
    train(run)
    again = monitored(
        run.module,
        optimizer=run.optimizer,
        noise_generator=torch.Generator().manual_seed(7),
    )
    by_hand = torch.Generator().manual_seed(7)
    for before, size in epoch(again):
        for used, mean in zip(gradients(again), before, strict=True):
            noise = torch.normal(0.0, 0.5, mean.shape, generator=by_hand)
            torch.testing.assert_close(used, mean * size / (N / 6) + noise)
    assert run.recorder.num_steps == again.recorder.num_steps == 6
    silent = monitored(run.module, optimizer=run.optimizer, noise_std=0)
    assert not run.module._forward_hooks
    train(silent)
    assert silent.recorder.num_steps == 6 and again.recorder.num_steps == 6


def test_the_model_can_be_copied_and_saved():
    run = monitored()
    train(run)
    for twin in (copy.deepcopy(run.module), pickle.loads(pickle.dumps(run.module))):
        x = torch.randn(2, 4)
        assert torch.equal(twin(x), run.module(x))
    assert set(run.module.state_dict()) == set(small().state_dict())


def test_poisson_sampling_is_opacus_own():
    data = linear_data()
    user = DataLoader(data, batch_size=5, shuffle=True)
    run = monitored(data_set=data, data_loader=user)
    assert type(user) is DataLoader and isinstance(run.loader, DPDataLoader)
    model = small()
    _, _, theirs = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=user,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    drawn = []
    for loader in (run.loader, theirs):
        torch.manual_seed(4)
        drawn.append([y for _, y in loader])
    assert len(drawn[0]) == len(drawn[1]) == 5
    assert all(map(torch.equal, *drawn))


def test_poisson_sampling_can_have_its_own_generator():
    runs = [
        monitored(sampling_generator=torch.Generator().manual_seed(9)) for _ in range(2)
    ]
    drawn = [[y for _, y in run.loader] for run in runs]
    assert all(map(torch.equal, *drawn))


def test_sweeps_use_the_loaders_collation_and_the_recorders_batch_size():
    def doubled(examples):
        x, y = torch.utils.data.default_collate(examples)
        return 2 * x, y

    sizes = []

    def criterion(outputs, targets):
        sizes.append(len(targets))
        return cross_entropy(outputs, targets, reduction="none")

    data = linear_data()
    run = monitored(
        data_set=data,
        data_loader=DataLoader(data, batch_size=4, collate_fn=doubled),
        criterion=criterion,
        recorder=Recorder("swept", every=[1], batch_size=9),
    )
    next(epoch(run))
    assert max(sizes) == 9 and sizes.count(9) >= 2
    wanted = [autograd_norm(run.module, 2 * x, y) for x, y in data]
    np.testing.assert_allclose(run.recorder.ledger.grad_norms[0], wanted, rtol=1e-5)


def test_draws():
    data = linear_data()
    assert draws_of(DataLoader(data, batch_size=100)).mean_batch_size == N
    assert draws_of(DataLoader(data, batch_size=4)).mean_batch_size == 4
    dropping = draws_of(DataLoader(data, batch_size=4, drop_last=True))
    assert dropping.sample_rate == 1 / 5
    poisson = draws_of(DPDataLoader.from_data_loader(DataLoader(data, batch_size=4)))
    assert poisson.sample_rate == 1 / 6
    assert poisson.mean_batch_size == pytest.approx(N / 6)


@pytest.mark.parametrize("poisson_sampling", [True, False])
@pytest.mark.parametrize("noise_std", [0, 2.0])
def test_through_the_engine(noise_std, poisson_sampling):
    model = small()
    engine = RecordingEngine(accountant="rdp")
    module, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(linear_data(), batch_size=4, shuffle=True),
        noise_std=noise_std,
        criterion=nn.CrossEntropyLoss(),
        poisson_sampling=poisson_sampling,
    )
    train(SimpleNamespace(module=module, optimizer=optimizer, loader=loader), 2)
    ledger = engine.ledger
    assert (ledger.source, ledger.steps.tolist()) == ("swept", [6, 12])
    if noise_std == 0:
        with pytest.raises(ValueError, match=r"\.with_noise_std\(sigma\)"):
            engine.privacy_losses(order=8)
        ledger = ledger.with_noise_std(2.0 * 4)
    losses = privacy_losses(ledger, 8)
    assert losses.shape == (N,) and (losses > 0).all() and np.isfinite(losses).all()
    if noise_std:
        assert np.array_equal(engine.privacy_losses(order=8), losses)


# --------------------------------------------------- training goes on, without a ledger


def refused(run, match):
    with pytest.raises(AccountingError, match=match):
        _ = run.recorder.ledger


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_a_prefetcher_that_looks_ahead_changes_nothing(poisson_sampling, copies):
    def train_on(run, batches):
        for x, y in batches:
            run.optimizer.zero_grad()
            cross_entropy(run.module(x), y).backward()
            run.optimizer.step()

    def two_ahead(loader):
        held = []
        for x, y in loader:
            held.append((x.clone(), y) if copies else (x, y))
            if len(held) > 2:
                yield held.pop(0)
        yield from held

    runs = [
        monitored(
            poisson_sampling=poisson_sampling,
            noise_generator=torch.Generator().manual_seed(7),
            sampling_generator=torch.Generator().manual_seed(8),
        )
        for _ in range(2)
    ]
    for run, ahead in zip(runs, (lambda loader: loader, two_ahead), strict=True):
        torch.manual_seed(9), np.random.seed(9), random.seed(9)
        train_on(run, ahead(run.loader))
        assert run.recorder.ledger.mechanism.num_steps == len(run.loader)
    # of a last batch that is smaller, too
    pairs = zip(*(run.module.parameters() for run in runs), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_part_of_a_batch_is_refused():
    run = monitored(poisson_sampling=False)
    x, y = next(iter(run.loader))
    cross_entropy(run.module(x[::2]), y[::2]).backward()
    run.optimizer.step()
    refused(run, "Of update 1 ")


def test_accumulated_gradients_are_refused_and_left_as_they_are():
    run = monitored(
        poisson_sampling=False, noise_generator=torch.Generator().manual_seed(7)
    )
    batches = iter(run.loader)
    for _ in range(2):
        x, y = next(batches)
        cross_entropy(run.module(x), y).backward()
    before = [p.grad.clone() for p in run.module.parameters()]
    with pytest.warns(UserWarning, match="Of update 1 it is not known how many"):
        run.optimizer.step()
    by_hand = torch.Generator().manual_seed(7)
    for used, total in zip(gradients(run), before, strict=True):
        noise = torch.normal(0.0, 0.5, total.shape, generator=by_hand)
        torch.testing.assert_close(used, total + noise)
    assert run.recorder.num_steps == 1
    refused(run, "Of update 1 .*larger batch size")


def test_batches_from_elsewhere_are_refused():
    run = monitored()
    train(run)
    x, y = next(iter(DataLoader(linear_data(), batch_size=4)))
    cross_entropy(run.module(x + 1), y).backward()
    run.optimizer.step()
    refused(run, "Of update 7")


def test_a_model_in_evaluation_mode_is_refused():
    run = monitored()
    run.module.eval()
    x, y = next(iter(run.loader))
    cross_entropy(run.module(x), y).backward()
    run.optimizer.step()
    refused(run, "in training mode")


def test_a_step_without_gradients_is_refused():
    run = monitored()
    run.optimizer.step()
    refused(run, "Update 1 had no gradients for the noise")


def test_strict_raises_at_the_step():
    run = monitored(recorder=Recorder("swept", strict=True))
    with pytest.raises(AccountingError, match="Update 1 had no gradients"):
        run.optimizer.step()


@pytest.mark.parametrize("noise_std", [0, 0.5])
@pytest.mark.parametrize(
    "sampler", [WeightedRandomSampler([1.0] * N, N), RandomSampler(range(N), True)]
)
def test_a_sampler_with_replacement_is_refused_unless_replaced(sampler, noise_std):
    loader = DataLoader(linear_data(), batch_size=4, sampler=sampler)
    options = {"data_loader": loader, "noise_std": noise_std}
    run = monitored(**options, poisson_sampling=False)
    train(run)
    refused(run, f"How often {type(sampler).__name__} draws")
    run = monitored(**options, poisson_sampling=True)
    train(run)
    assert run.recorder.ledger.num_rows == 1


# ---------------------------------------------------------------------------- bad input


def test_a_closure_would_overwrite_the_noise():
    run = monitored()
    for call in (
        lambda: run.optimizer.step(lambda: 0.0),
        lambda: run.optimizer.step(closure=lambda: 0.0),
    ):
        with pytest.raises(ValueError, match="without a closure.*noise_std=0"):
            call()
    assert run.recorder.num_steps == 0


def test_scaled_gradients_are_refused():
    run = monitored()
    run.optimizer.grad_scale = torch.tensor(1024.0)
    with pytest.raises(ValueError, match=r"scaler\.unscale_\(optimizer\) first"):
        run.optimizer.step()


class Stream(IterableDataset):
    def __len__(self):
        return N

    def __iter__(self):
        return iter(linear_data())


class Endless(Dataset):
    def __getitem__(self, index):
        return torch.zeros(4), 0


def scalar_criterion(outputs, targets):
    return cross_entropy(outputs, targets)


def wrapped(model):
    engine = PrivacyEngine()
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(linear_data(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: {"noise_std": -0.1}, "noise_std=-0.1 to be finite and at least 0"),
        (lambda m: {"noise_std": float("nan")}, "noise_std=nan"),
        (lambda m: {"noise_std": float("inf")}, "noise_std=inf"),
        (lambda m: {"recorder": Recorder()}, r"mode='observed'.*Recorder\(mode="),
        (lambda m: {"criterion": scalar_criterion}, 'criterion.*reduction="none"'),
        (lambda m: {"data_loader": DataLoader(Stream())}, "Stream to have a length"),
        (
            lambda m: {"data_loader": DataLoader(Endless(), sampler=[0, 1])},
            "Endless to have a length",
        ),
        (
            lambda m: {"data_loader": DataLoader(linear_data(2), 4, drop_last=True)},
            "at least one batch",
        ),
        (lambda m: {"module": wrapped(m)[0]}, r"module=.*to_standard_module\(\)"),
        (lambda m: {"optimizer": wrapped(m)[1]}, "optimizer=DP.*original_optimizer"),
        (
            lambda m: {"optimizer": torch.optim.SGD(small().parameters(), lr=1)},
            "optimizer=SGD to hold parameters of module",
        ),
        (lambda m: {"module": nn.Module()}, "optimizer=SGD to hold parameters"),
    ],
)
def test_bad_input_changes_nothing(change, match):
    model = small()
    changes = change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder("swept")
    options = {"optimizer": optimizer, "recorder": recorder, **changes}
    with pytest.raises(ValueError, match=match):
        monitored(model, **options)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(AccountingError, match="Nothing is being recorded"):
        _ = recorder.ledger


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (nn.parallel.DistributedDataParallel, "noise_std=0.5 to be 0 under Distr"),
        (DPDDP, "Spread to be trained by one process or under DistributedDataParallel"),
    ],
)
def test_a_distributed_module_is_refused(kind, match):
    class Spread(kind):
        def __init__(self):
            nn.Module.__init__(self)

    optimizer = torch.optim.SGD(small().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        monitored(module=Spread(), optimizer=optimizer)


def secure_engine(seed):
    """An engine in secure mode whose source of random numbers is a seeded one."""
    engine = RecordingEngine(accountant="rdp")
    engine.secure_mode, engine.secure_rng = True, torch.Generator().manual_seed(seed)
    return engine


def secure_run(seed, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    data_set = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    model, optimizer, loader = secure_engine(seed).make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set, batch_size=4),
        noise_std=0.5,
        criterion=nn.CrossEntropyLoss(),
        **options,
    )
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.weight.detach().clone()


def test_secure_mode_draws_noise_and_batches_from_the_engines_source():
    assert torch.equal(secure_run(1), secure_run(1))
    assert not torch.equal(secure_run(1), secure_run(2))


@pytest.mark.parametrize("name", ["noise_generator", "sampling_generator"])
def test_secure_mode_takes_no_other_generator(name):
    with pytest.raises(ValueError, match=f"{name}.*secure_mode"):
        secure_run(1, **{name: torch.Generator()})
