"""The fast mode trains as hooks mode does, and as single examples say."""

import copy

import numpy as np
import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from tests.integration.fast.models import CLASSES, MODELS, MORE, mlp
from tests.integration.fast.training import SLOW, assert_alike, both, training
from tests.private_training import Training, one_at_a_time

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*samples are unattributed",
    "ignore:Optimal order is the largest alpha",
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:Secure RNG turned off",
)


def clipped_sum(model, x, y, max_grad_norm):
    """The clipped gradients of single examples, added up."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for one, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for sum_, g in zip(total, grads, strict=True):
            sum_ += g * min(1.0, max_grad_norm / (norm + 1e-6))
    return total


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize("name", {**MODELS, **MORE})
def test_clipped_sums_are_those_of_single_examples(name):
    build, _ = {**MODELS, **MORE}[name]
    one = training("fast", name, kind=torch.float64, num=8, poisson_sampling=False)
    plain = build().double()
    plain.load_state_dict(one.net.state_dict())
    for p, q in zip(plain.parameters(), one.net.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    x, y = one.data_set.tensors
    one.criterion(one.model(x), y).backward()
    assert all(p.grad is None for p in one.optimizer.params) or name in MORE
    one.optimizer.clip_and_accumulate()
    truth = clipped_sum(plain, x, y, 0.5)
    for p, sum_ in zip(one.optimizer.params, truth, strict=True):
        torch.testing.assert_close(p.summed_grad, sum_, rtol=1e-9, atol=1e-12)
    norms = one_at_a_time(plain, x, y)
    assert min(norms) < 0.5 < max(norms) or min(norms) > 0.5
    found = one.optimizer.per_sample_gradient_norms
    np.testing.assert_allclose(found, norms, rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_ledger_are_those_of_hooks(name):
    ours, theirs, start = both(name)
    assert_alike(ours, theirs, start)
    assert ours.engine.get_epsilon(1e-5) == theirs.engine.get_epsilon(1e-5)
    indices, norms = zip(*ours.recorder.observed, strict=True)
    others = dict(theirs.recorder.observed)
    assert len(indices) == len(theirs.recorder.observed) > 10
    first = dict(zip(indices, norms, strict=True))
    np.testing.assert_allclose(
        [first[i] for i in others], list(others.values()), rtol=2e-5
    )
    counts = ours.engine.attribution
    assert counts["by_storage"] == len(indices) == sum(counts.values())
    assert ours.engine.ledger.mechanism.num_steps == len(ours.loader)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_reduction": "sum", "lr": 0.05},
        {"poisson_sampling": False},
        {"wrap_model": False},
        {"batch_size": 1, "name": "mlp"},  # many empty batches
    ],
    ids=str,
)
def test_the_engines_options(options):
    ours, theirs, start = both(epochs=2, **options)
    assert_alike(ours, theirs, start)
    if options.get("batch_size") == 1:
        entered = len(ours.recorder.observed)
        assert entered < ours.engine.ledger.mechanism.num_steps * 2


def test_physical_batches():
    pair = [training(mode, batch_size=12) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        for _ in one.memory_managed(5):
            one.train(2)
    assert_alike(*pair, start)
    assert len(pair[0].recorder.updates) == 4
    assert pair[0].recorder.updates == pair[1].recorder.updates


def accumulate(one, joined=False):
    """Two backward passes, or one of two losses, before each step."""
    batches = list(one.loader)
    for (x, y), (v, w) in zip(batches[::2], batches[1::2], strict=True):
        one.optimizer.zero_grad()
        if joined:
            loss = one.criterion(one.model(x), y) + one.criterion(one.model(v), w)
            loss.backward()
        else:
            one.criterion(one.model(x), y).backward()
            one.criterion(one.model(v), w).backward()
        one.optimizer.step()


@pytest.mark.parametrize("joined", [False, True])
def test_several_passes_before_a_step(joined):
    pair = [training(mode, poisson_sampling=False) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        accumulate(one, joined)
    assert_alike(*pair, start)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: ExponentialNoise(optimizer, gamma=0.7),
        lambda optimizer: ExponentialGradClip(optimizer, gamma=0.7),
    ],
)
def test_schedules(schedule):
    pair = [training(mode) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        scheduler = schedule(one.optimizer)
        for x, y in one.loader:
            one.batch(x, y)
            scheduler.step()
    assert_alike(*pair, start)
    stds = [[u["noise_std"] for u in one.recorder.updates] for one in pair]
    assert stds[0] == stds[1] and len(set(stds[0])) == 4


def test_with_epsilon_and_checkpoints_of_the_other_mode(tmp_path):
    made = []
    for mode in ("fast", "hooks"):
        torch.manual_seed(0)
        net, engine = mlp(), PrivacyEngine(accountant="rdp")
        data_set = TensorDataset(torch.randn(24, 12), torch.randint(0, 3, (24,)))
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=net,
            optimizer=torch.optim.Adam(net.parameters()),
            data_loader=DataLoader(data_set, batch_size=6),
            target_epsilon=4.0,
            target_delta=1e-3,
            epochs=2,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        made.append((engine, model, optimizer))
    for (engine, model, optimizer), (other, loaded, optimizer_2) in (made, made[::-1]):
        path = tmp_path / "checkpoint"
        engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
        other.load_checkpoint(path=path, module=loaded, optimizer=optimizer_2)
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
        assert engine.accountant.history == other.accountant.history


def test_dropout_and_evaluation_mode():
    torch.manual_seed(0)
    net = nn.Sequential(mlp(), nn.Dropout(0.5))
    one = training("fast", "mlp")
    one = Training(module=net, data_set=one.data_set, grad_sample_mode="fast")
    start = [p.detach().clone() for p in net.parameters()]
    one.model.eval()
    one.model(one.data_set.tensors[0]).sum().backward()  # in no training
    assert not one.model.taps.caches
    one.model.train()
    stale = one.model(one.data_set.tensors[0][:3])  # without a backward pass
    one.train(1)
    assert stale.shape == (3, CLASSES)
    for p, before in zip(net.parameters(), start, strict=True):
        assert not torch.equal(p, before)


def test_half_precision_activations():
    one = training("fast", "mlp")
    x, y = one.data_set.tensors
    norms = torch.tensor(one_at_a_time(copy.deepcopy(one.net), x, y))
    with torch.autocast("cpu", torch.bfloat16):
        loss = one.criterion(one.model(x), y)
    loss.backward()
    one.optimizer.clip_and_accumulate()
    found = one.optimizer.per_sample_gradient_norms
    torch.testing.assert_close(found, norms.double(), rtol=0.1, atol=0)
    assert {p.summed_grad.dtype for p in one.optimizer.params} == {torch.float32}


def test_half_precision_of_the_loop_reaches_no_norm():
    """Backward pass and step within autocast: what is clipped is what is added."""
    found = []
    for within in (False, True):
        one = training("fast", "mlp")
        x, y = one.data_set.tensors
        with torch.autocast("cpu", torch.bfloat16):
            loss = one.criterion(one.model(x), y)
            if within:
                loss.backward()
                one.optimizer.clip_and_accumulate()
        if not within:
            loss.backward()
            one.optimizer.clip_and_accumulate()
        found.append([p.summed_grad for p in one.optimizer.params])
        found[-1].append(one.optimizer.per_sample_gradient_norms)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("length", [1e3, 1e5])
def test_no_example_adds_more_than_the_clip_norm(length):
    """Tokens that are long and alike, and pull in opposite directions."""
    torch.manual_seed(0)
    unit = nn.functional.normalize
    base = length * unit(torch.randn(1, 1, 64), dim=2)
    x = torch.cat([base, base + unit(torch.randn(1, 1, 64), dim=2)], 1)
    y = torch.randn(1, 1, 64) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    layer = nn.Linear(64, 64, bias=False)
    model, optimizer, _ = PrivacyEngine().make_private(
        module=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, y)),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="fast",
    )
    (model(x) * y).sum().backward()
    optimizer.clip_and_accumulate()
    (added,) = (p.summed_grad for p in optimizer.params)
    assert 0 < added.norm() <= 1 + 1e-3
