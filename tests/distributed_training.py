"""What each of two processes does, and how a single process repeats it."""

import io
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from opacus_pi.accounting import privacy_losses
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError, Recorder

NUM_EXAMPLES, BATCH, NUM_PROCESSES = 45, 15, 2
EVERY = (1, 4, 5)  # a row across epochs, and updates after the last one
CRITERION = nn.CrossEntropyLoss()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_EXAMPLES, 5, generator=generator)
    return TensorDataset(x, torch.randint(3, (NUM_EXAMPLES,), generator=generator))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Run:
    """A run that this process takes part in.

    Args:
        wrap: What makes a model distributed.
        poisson: Whether batches are drawn by Opacus; else by a DistributedSampler.
        monitored: Whether to train without clipping.
        recorder: How to record.
        **options: Of make_private.
    """

    def __init__(self, wrap, poisson=True, monitored=False, recorder=None, **options):
        self.recorder = recorder or Recorder(every=EVERY)
        self.engine = PrivacyEngine(accountant="rdp", recorder=self.recorder)
        module = wrap(network())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
        sampler = None if poisson else DistributedSampler(data())
        size = BATCH if poisson else BATCH // NUM_PROCESSES
        generator = torch.Generator().manual_seed(dist.get_rank())
        prepare = {
            "module": module,
            "optimizer": optimizer,
            "data_loader": DataLoader(
                data(), size, sampler=sampler, generator=generator
            ),
            "poisson_sampling": poisson,
        }
        if monitored:
            made = self.engine.make_monitored(
                **prepare, noise_std=0.0, criterion=CRITERION, **options
            )
        else:
            made = self.engine.make_private(
                **prepare,
                criterion=CRITERION,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                **options,
            )
        self.module, (self.model, self.optimizer, *rest) = module, made
        self.loader = rest[-1]
        self.criterion = rest[0] if len(rest) == 2 else CRITERION
        self.updates, self.weights = [], []

    def train(self, epochs=(0, 1), before_update=lambda step: None):
        x = data().tensors[0]
        for epoch in epochs:
            sampler = self.loader.batch_sampler
            getattr(sampler, "sampler", sampler).set_epoch(epoch)
            for inputs, labels in self.loader:
                before_update(len(self.updates) + 1)
                self.weights.append(self.full_weights())
                self.optimizer.zero_grad()
                self.criterion(self.model(inputs), labels).backward()
                self.optimizer.step()
                rows = (inputs[:, None] == x[None]).all(2).nonzero()[:, 1]
                self.updates.append(rows.tolist())
        self.weights.append(self.full_weights())
        return self

    def full_weights(self):
        parameters = self.module.parameters()
        whole = [
            p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters
        ]
        return [p.detach().clone() for p in whole]

    def facts(self):
        """What the parent compares: own batches, weights, ledger, counts."""
        self.recorder.merge()
        ledger = self.engine.ledger
        return {
            "updates": self.updates,
            "weights": self.weights,
            "norms": ledger.grad_norms,
            "correct": ledger.correct,
            "steps": ledger.steps,
            "mechanism": ledger.mechanism,
            "attribution": self.engine.attribution,
            "losses": self.losses(),
        }

    def losses(self):
        if self.engine.ledger.mechanism.noise_std == 0:
            return None
        return self.engine.privacy_losses(2)


def ddp(**options):
    return Run(DistributedDataParallel, **options)


def dpddp(**options):
    return Run(DifferentiallyPrivateDistributedDataParallel, **options)


def fsdp(**options):
    def sharded(model):
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        return fully_shard(model)

    return Run(sharded, **options)


def swept(**options):
    return Recorder("swept", EVERY, criterion=CRITERION, batch_size=7, **options)


CASES = {
    "dpddp hooks": lambda folder: dpddp(),
    "dpddp functorch": lambda folder: dpddp(grad_sample_mode="functorch"),
    "dpddp ghost": lambda folder: dpddp(grad_sample_mode="ghost"),
    "ddp hooks": lambda folder: ddp(),
    "fixed": lambda folder: dpddp(poisson=False),
    "swept": lambda folder: dpddp(recorder=swept(weights_dir=f"{folder}/weights")),
    "monitored": lambda folder: ddp(monitored=True, poisson=False, recorder=swept()),
}

if hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6 shards models on GPUs only
    CASES["fsdp ghost"] = lambda folder: fsdp(grad_sample_mode="ghost_fsdp")


def refused():
    """The texts of errors."""
    texts = {}
    try:
        fsdp(recorder=swept(), grad_sample_mode="ghost_fsdp")
    except ValueError as error:
        texts["fsdp swept"] = str(error)
    module = DifferentiallyPrivateDistributedDataParallel(network())
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data(), BATCH, shuffle=True),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    try:
        _ = engine.ledger
    except AccountingError as error:
        texts["overlapping"] = str(error)
    return texts


def one_refuses(rank):
    """If one process refuses the record, all do, and training goes on."""
    run = dpddp()
    run.train(
        before_update=lambda step: rank == step == 1 and run.recorder.refuse("no")
    )
    try:
        return run.engine.ledger
    except AccountingError as error:
        return len(run.updates), str(error)


def resumed():
    """An uninterrupted run, and one resumed from each process's own checkpoint."""
    torch.manual_seed(dist.get_rank())
    whole, file = dpddp().train([0]), io.BytesIO()
    parts = {"module": whole.model, "optimizer": whole.optimizer}
    whole.engine.save_checkpoint(path=file, **parts)
    file.seek(0)
    wanted = whole.train([1]).facts()
    again = dpddp()
    parts = {"module": again.model, "optimizer": again.optimizer}
    again.engine.load_checkpoint(path=file, restore_rng=True, **parts)
    return wanted, again.train([1]).facts()


def dead(rank, folder, results):
    """Process 1 dies before update 6; what process 0 still has."""
    run = dpddp()

    def die(step):
        if rank == 1 and step == 6:
            torch.save(results, Path(folder, "1.pt"))
            os._exit(0)

    try:
        run.train(before_update=die)
    except RuntimeError:  # gloo has lost its peer
        ledger = run.engine.ledger
        return {
            "steps": ledger.steps,
            "norms": ledger.grad_norms,
            "losses": privacy_losses(ledger, 2),
        }
    return None


def process(rank, folder):
    """All cases in one process; rank 1 dies at last."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init, rank=rank, world_size=NUM_PROCESSES)
    torch.manual_seed(100 + rank)
    results = {name: make(folder).train().facts() for name, make in CASES.items()}
    results["one refuses"] = one_refuses(rank)
    results["refused"] = refused()
    results["resumed"] = resumed()
    results["dead"] = dead(rank, folder, results)
    torch.save(results, Path(folder, "0.pt"))
    os._exit(0)  # the group cannot be left in order any more
