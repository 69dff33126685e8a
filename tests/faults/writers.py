"""Everything that the library writes: how to write it, and how to read it again.

A writer's ``write(folder, value)`` puts the old (0) or the new (1) value there;
``read(folder)`` says which of them is there, and fails for anything else.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.report import write_json
from opacus_pi.accounting import GradNormLedger, GramLedger, NoisySGD
from opacus_pi.evaluation import OracleCache, UnlearningTrace
from opacus_pi.recording.weights import load_weights_, save_weights, saved_weights
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from tests.private_training import Training


@dataclass(frozen=True)
class Writer:
    """One kind of file.

    Args:
        write: ``(folder, value)``.
        read: ``(folder) -> value``.
        names: Files that it leaves.
    """

    write: Callable[[Any, int], None]
    read: Callable[[Any], int]
    names: tuple[str, ...]


def mechanism():
    return NoisySGD(10, 0.5, noise_std=1.0, max_grad_norm=1.0)


def ledger(value):
    return GradNormLedger(mechanism(), [10], np.full((1, 5000), 1.0 + value))


def write_ledger(folder, value):
    ledger(value).save(folder / "run")


def read_ledger(folder):
    norms = GradNormLedger.load(folder / "run").grad_norms
    value = int(norms[0, 0]) - 1
    assert (norms == ledger(value).grad_norms).all()
    return value


def gram(value):
    return GramLedger(mechanism(), [10], np.eye(50)[None] * (1 + value))


def write_gram(folder, value):
    gram(value).save(folder / "gram")


def read_gram(folder):
    grams = GramLedger.load(folder / "gram").grams
    value = int(grams[0, 0, 0]) - 1
    assert (grams == gram(value).grams).all()
    return value


def net(value):
    torch.manual_seed(0)
    model = nn.Linear(200, 20)
    with torch.no_grad():
        model.weight.fill_(float(value))
    return model


def write_weights(folder, value):
    save_weights(folder, 7, net(value).state_dict(), "toy")


def read_weights(folder):
    (path,) = saved_weights(folder).values()
    model = net(5)
    load_weights_(model, path, "toy")
    value = int(model.weight[0, 0].item())
    assert (model.weight == value).all()
    return value


DATA = torch.utils.data.TensorDataset(torch.zeros(6, 2), torch.arange(6) % 2)


def oracle(folder, recipe):
    (model,) = OracleCache(folder).train(
        recipe,
        key={},
        data_set=DATA,
        forget_indices=[1],
        seeds=[1],
        model_factory=lambda: net(5),
        progress=False,
    )
    return model


def write_oracle(folder, value):
    """There is no old oracle: what is there is trained, or it is trained again."""
    if value:
        oracle(folder, lambda retain, seed: net(1))


def read_oracle(folder):
    trained = []

    def recipe(retain, seed):
        trained.append(seed)
        return net(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a part of a file would be one
        model = oracle(folder, recipe)
    assert (model.weight == 1).all()
    if trained:
        for path in folder.glob("oracle-*"):
            path.unlink()
    return 0 if trained else 1


def write_trace(folder, value):
    metrics = {"a": [float(value)] * 500}
    UnlearningTrace(list(range(500)), metrics).save(folder / "trace")


def read_trace(folder):
    (value,) = set(UnlearningTrace.load(folder / "trace").metrics["a"])
    return int(value)


def write_result(folder, value):
    write_json(folder / "results.json", [value] * 3000)


def read_result(folder):
    (value,) = set(json.loads((folder / "results.json").read_text()))
    return value


_TRAINED = []


def training(value):
    """A run with ``value`` epochs, made once: children have a copy."""
    while len(_TRAINED) <= value:
        _TRAINED.append(Training().train(len(_TRAINED)))
    return _TRAINED[value]


def write_checkpoint(folder, value):
    run = training(value)
    run.engine.save_checkpoint(
        path=folder / "checkpoint.pt",
        module=run.model,
        optimizer=run.optimizer,
        checkpoint_dict={"epoch": value},
    )


def read_checkpoint(folder):
    fresh = Training()
    own = fresh.engine.load_checkpoint(
        path=folder / "checkpoint.pt", module=fresh.model, optimizer=fresh.optimizer
    )
    assert fresh.recorder.num_steps == 4 * own["epoch"]
    if own["epoch"]:
        assert (fresh.engine.ledger.steps == [4]).all()
    return own["epoch"]


def write_log(folder, value):
    log = DeletionLog(folder / "deletions")
    if value or not [*log.entries()]:
        log.append("request", {"indices": list(range(2000))}, name=str(value))


def read_log(folder):
    """The entries of before are there, and at most the new one; the chain goes on."""
    log = DeletionLog(folder / "deletions")
    entries = [*log.entries()]
    assert [e.name for e in entries] in (["0"], ["0", "1"])
    assert verify(folder / "deletions").head == log.head
    return len(entries) - 1


WRITERS = {
    "ledger": Writer(write_ledger, read_ledger, ("run",)),
    "gram": Writer(write_gram, read_gram, ("gram",)),
    "weights": Writer(write_weights, read_weights, ("weights-00000007.safetensors",)),
    "oracle": Writer(write_oracle, read_oracle, ()),
    "trace": Writer(write_trace, read_trace, ("trace",)),
    "result": Writer(write_result, read_result, ("results.json",)),
    "checkpoint": Writer(write_checkpoint, read_checkpoint, ("checkpoint.pt",)),
    "log": Writer(write_log, read_log, ("deletions",)),
}
