"""A training that may be killed at any moment and is then started again."""

import random
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder

NUM_EXAMPLES, BATCH, CLASSES, NUM_EPOCHS = 48, 6, 3, 5  # 40 updates


class Jittered(Dataset):
    """Examples that draw from all three global generators when they are loaded."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_EXAMPLES, 5, generator=generator)
        self.y = torch.randint(CLASSES, (NUM_EXAMPLES,), generator=generator)

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        shift = torch.randn(()) + np.random.randn() + random.gauss(0, 1)
        return self.x[index] + 0.01 * shift.float(), self.y[index]


def network():
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
    )


def prepared(
    kind,
    *,
    num_workers=0,
    own_generators=False,
    recorder=None,
    renyi_filter=None,
    **options,
):
    """Engine, model, optimizer and loader of a run from its beginning."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    generators = [
        torch.Generator().manual_seed(s) if own_generators else None for s in (7, 8)
    ]
    module, data = network(), Jittered()
    prepare = {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9),
        "data_loader": DataLoader(
            data,
            batch_size=BATCH,
            shuffle=True,
            num_workers=num_workers,
            generator=generators[0],
        ),
        "noise_generator": generators[1],
        **options,
    }
    if kind == "monitored":
        engine = PrivacyEngine(recorder=recorder)
        prepare = {"criterion": nn.CrossEntropyLoss(), "noise_std": 0.05, **prepare}
        return engine, *engine.make_monitored(**prepare)
    engine = PrivacyEngine(
        accountant="rdp",
        recorder=recorder or Recorder(every=0.5),
        renyi_filter=renyi_filter,
    )
    prepare = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **prepare}
    return engine, *engine.make_private(**prepare)


def update(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def train(
    folder,
    kind,
    save_every=None,
    report=lambda step: None,
    num_epochs=NUM_EPOCHS,
    **options,
):
    """The user's program: resume if there is a checkpoint, train, save.

    Args:
        folder: Of the checkpoint.
        kind: ``"private"`` or ``"monitored"``.
        save_every: Updates between checkpoints; None: one after each epoch.
        report: Called with the number of each update.
        num_epochs: When to stop.
        **options: Of ``prepared``.
    """
    warnings.simplefilter("ignore")
    path = Path(folder, "checkpoint.pt")
    engine, model, optimizer, loader = prepared(kind, **options)
    parts = {"module": model, "optimizer": optimizer}
    epoch = step = 0
    if path.exists():
        own = engine.load_checkpoint(path=path, restore_rng=True, **parts)
        epoch, step = own["epoch"], own["step"]
    model.train()
    for number in range(epoch, num_epochs):
        for x, y in loader:
            update(model, optimizer, x, y)
            step += 1
            if save_every and step % save_every == 0:
                own = {"epoch": number, "step": step}
                engine.save_checkpoint(path=path, checkpoint_dict=own, **parts)
            report(step)
        if save_every is None:
            own = {"epoch": number + 1, "step": step}
            engine.save_checkpoint(path=path, checkpoint_dict=own, **parts)
    return engine, model


def outcome(engine, model):
    """All that must be equal: weights, ledger, and what the generators give next."""
    ledger = engine.ledger
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        "norms": ledger.grad_norms,
        "steps": ledger.steps,
        "mechanism": ledger.mechanism,
        "next": (torch.rand(3).tolist(), np.random.rand(), random.random()),
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name in ("mechanism", "next"):
            assert value == other[name], name
        else:
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def child(folder, kind, save_every, connection):
    """A process that trains, tells of every update, and at last leaves its outcome."""
    torch.set_num_threads(1)

    def report(step):
        connection.send(step)
        connection.recv()  # go on: one update at most is unknown to the parent

    done = train(folder, kind, save_every, report=report)
    torch.save(outcome(*done), Path(folder, "outcome.pt"))
    connection.send("done")
