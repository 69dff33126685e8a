"""One good file of each format."""

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.accounting import GradNormLedger, GramLedger, NoisySGD, RenyiFilter
from opacus_pi.evaluation import OracleCache, UnlearningTrace
from opacus_pi.files.checksummed_state import with_checksum
from opacus_pi.integration.checkpoints import RunState
from opacus_pi.integration.filtering import saved_charges
from opacus_pi.recording import Recorder
from opacus_pi.recording.participation_log import ParticipationLog
from opacus_pi.recording.run import UpdateSettings
from opacus_pi.recording.weights import save_weights
from opacus_pi.unlearning import Unlearner
from opacus_pi.unlearning.requests import DeletionRequests

NUM_EXAMPLES = 6
DATA = TensorDataset(torch.arange(12.0).reshape(6, 2) / 12, torch.arange(6) % 2)


def content_of(write, name="file"):
    """What a function writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path)
        return path.read_bytes()


def ledger():
    chance = np.random.default_rng(0)
    norms = chance.exponential(size=(3, NUM_EXAMPLES)).astype(np.float32)
    norms[1, 2] = np.nan
    return GradNormLedger(
        NoisySGD(30, 0.5, noise_std=[1.0, 1.5, 2.0], max_grad_norm=1.0),
        [10, 20, 30],
        norms,
        source="observed",
        example_ids=[3, 1, 4, 0, 5, 9],
        data_set="digits",
        weights=f"sha256:{'0d' * 32}",
        confidences=chance.random((3, NUM_EXAMPLES)),
    )


def gram(kind):
    rows = np.random.default_rng(1).normal(size=(2, 3, 5))
    grams = rows @ rows.transpose(0, 2, 1)
    mechanism = NoisySGD(30, 0.5, noise_std=1.0, max_grad_norm=1.0)
    if kind == "minibatch":
        return GramLedger(mechanism, [10, 30], grams[:, None], kind=kind)
    return GramLedger(mechanism, [10, 30], grams, example_ids=[1, 2, 5], data_set="d")


def participations(path):
    """The block of a run of three updates, written to its place."""
    facts = {"num_examples": NUM_EXAMPLES, "sampling": "poisson", "sample_rate": 0.5}
    log = ParticipationLog(path.parent, {**facts, "data_set": "d", "run": "0d"})
    chance = np.random.default_rng(2)
    for step in (1, 2, 3):
        indices = chance.permutation(NUM_EXAMPLES)[:3]
        norms = chance.exponential(size=3).astype(np.float32)
        log.add(indices, norms, np.full(3, step))
        log.count_step(UpdateSettings(2.0, 1.0, 0.5), (0.1,))
    log.add_unattributed(2, 1)
    log.write((0, 2), "sha256:0d")


def trace():
    metrics = {"forget_loss": [0.1, 0.5, 0.9], "test_accuracy": [0.9, 0.8, 0.85]}
    return UnlearningTrace([0, 1, 2.5], metrics, cost={"seconds": 3.5})


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def unlearner():
    generator = torch.Generator().manual_seed(2)
    return Unlearner(net(), criterion=nn.CrossEntropyLoss(), generator=generator)


def requests_about(path):
    return DeletionRequests(path, NUM_EXAMPLES)


def deletions(path):
    """A log of which a part was carried out, and its weights."""
    mine = requests_about(path)
    mine.submit("a", indices=[4, 1])
    mine.submit("b", indices=[2])
    mine.process(unlearner(), DATA, num_epochs=1, batch_size=6)
    mine.submit("c", indices=[5])


def oracle_of(recipe, folder, **options):
    key = {"key": {"lr": 0.1}, "data_set": DATA, "forget_indices": [3, 0]}
    if recipe is None:
        return OracleCache(folder).path(**key, seed=1)
    return OracleCache(folder).train(
        recipe, **key, seeds=[1], model_factory=net, progress=False, **options
    )


def oracle(path):
    oracle_of(lambda retain, seed: net(), path.parent)
    oracle_of(None, path.parent).rename(path)


def weights(path):
    save_weights(path.parent, 20, net().state_dict(), "digits")
    (path.parent / "weights-00000020.safetensors").rename(path)


def recorder(mode="observed"):
    """A recorder that has begun its run; a swept one has measures of every kind."""
    recorder = Recorder(mode, every=[2, 4], criterion=nn.CrossEntropyLoss())
    chance = torch.Generator().manual_seed(3)

    class Measured:
        grad_norms = torch.rand(NUM_EXAMPLES, generator=chance)
        confidences = torch.rand(NUM_EXAMPLES, generator=chance)

    recorder.begin(
        num_examples=NUM_EXAMPLES,
        sample_rate=0.5,
        sampling="poisson",
        data_set="digits",
        sweep=Measured,
    )
    return recorder


def recorded(mode="observed"):
    """A recorder with rows and an open interval."""
    mine = recorder(mode)
    for step in range(5):
        rows = torch.tensor([step, (step + 2) % NUM_EXAMPLES])
        mine.observe(rows, torch.tensor([0.5 + step, 2.0]))
        mine.step(noise_std=1.0 + step, max_grad_norm=1.0)
    return mine


def loader():
    sampling = torch.Generator().manual_seed(4)
    return DataLoader(DATA, batch_size=2, shuffle=True, generator=sampling)


def run_state():
    """The run state within a pass over a loader; the pass goes on while it is held."""
    mine = loader()
    state = RunState(mine)
    batches = iter(mine)
    next(batches)
    return state, batches, mine


def renyi_filter():
    mine = RenyiFilter(1.0)
    mine.begin(NUM_EXAMPLES, "digits")
    mine.admit([0, 3], [0.1, 0.2])
    return mine


def checkpoint_key(mode="observed"):
    """What our key in a checkpoint holds."""
    state, *_held = run_state()
    found = {f"run_state.{n}": v for n, v in state.state_dict().items()}
    return with_checksum({**recorded(mode).state_dict(), **found})


def filter_key():
    """What the filter's key in a checkpoint holds."""
    return with_checksum(saved_charges(renyi_filter()))


def as_file(state):
    """A state dict as ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
