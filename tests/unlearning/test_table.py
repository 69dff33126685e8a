"""Every method on every kind of model, end to end on real data."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.common.data import load
from benchmarks.common.models import mlp
from benchmarks.common.resnet import resnet18
from benchmarks.common.transformer import vit
from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.difficulty.forget_sets import top_k
from opacus_pi.evaluation import evaluate, time_to_unlearn
from opacus_pi.unlearning import (
    SCRUB,
    SSD,
    FineTune,
    L1Sparse,
    Langevin,
    NegGradPlus,
    RandomLabels,
    SalUn,
    Unlearner,
)

SHAPE, NUM_TRAIN, NUM_FORGET, BATCH = (1, 8, 8), 160, 16, 32
CRITERION = nn.CrossEntropyLoss()
METHODS = (
    FineTune(),
    Langevin(0.01),
    Langevin(0.01, max_grad_norm=1.0, projection_radius=100.0),
    L1Sparse(1e-4),
    RandomLabels(),
    NegGradPlus(),
    SCRUB(),
    SalUn(),
    SSD(selection_weight=1.0),
)


def cnn(shape):
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": lambda shape: resnet18(shape, norm="batch", width=4),
    "vit": lambda shape: vit(shape, dim=16, depth=2, num_heads=2),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on several."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def digits():
    images = load("digits", num_train=NUM_TRAIN)
    test = TensorDataset(*(array[:NUM_TRAIN] for array in images.test.tensors))
    return images.train, test


@pytest.fixture(scope="module", params=MODELS)
def trained(request, digits):
    """A model, its engine, and the hardest examples of its training."""
    torch.manual_seed(0)
    model = MODELS[request.param](SHAPE)
    loader = DataLoader(digits[0], BATCH, shuffle=True)
    num_steps = 12 * len(loader)
    engine = PrivacyEngine(
        recorder=Recorder.evenly_spaced(3, num_steps=num_steps, mode="swept")
    )
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        data_loader=loader,
        noise_std=0.001,
        criterion=CRITERION,
        poisson_sampling=False,
    )
    for _ in range(12):
        for x, y in loader:
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    return model, engine, top_k(engine.privacy_losses(order=8), NUM_FORGET)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_end_to_end(trained, method, digits):
    model, engine, forget = trained
    train_set, test = digits
    retain = Subset(train_set, np.setdiff1d(np.arange(NUM_TRAIN), forget))
    parts = {"forget": Subset(train_set, forget), "retain": retain, "test": test}

    def measure(net):
        return evaluate(net, CRITERION, **parts)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    unlearner = Unlearner(
        model,
        criterion=CRITERION,
        method=method,
        ledger=engine.ledger,
        generator=torch.Generator().manual_seed(0),
    )
    result = unlearner.unlearn(train_set, forget, 1, measure, batch_size=BATCH)

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pairs = zip(result.model.parameters(), model.parameters(), strict=True)
    changed = [not torch.equal(a, b) for a, b in pairs]
    assert any(changed)
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())

    trace = result.trace
    assert trace.times == [0, 1]
    assert trace["retain_accuracy"][0] > 0.5  # there is something to forget
    for name in trace.metrics:
        assert np.isfinite(trace[name]).all()
    for name in ("unlearning_accuracy", "test_accuracy", "membership_inference"):
        assert ((trace[name] >= 0) & (trace[name] <= 1)).all()
    after = trace["unlearning_accuracy"][-1]
    arrival = time_to_unlearn(trace, after, metric="unlearning_accuracy")
    assert arrival in (0, 1)

    record = json.loads(json.dumps(result.record))
    assert record["forget_indices"] == forget.tolist()
    assert record["num_steps"] >= 1
    assert result.guarantee.kind == "empirical"
    assert unlearner.plan(forget).percentile > 50
