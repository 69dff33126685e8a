"""Unlearning from a model that two processes trained together."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from opacus import GradSampleModule
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from opacus_pi.unlearning import Langevin, Unlearner

CRITERION = nn.CrossEntropyLoss()


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, 5, generator=generator), torch.arange(24) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def unlearner(model):
    return Unlearner(
        model,
        criterion=CRITERION,
        method=Langevin(0.1, max_grad_norm=1.0),
        generator=torch.Generator().manual_seed(3),
    )


def unlearned(model):
    return unlearner(model).unlearn(data(), [2, 5], 2, batch_size=8).model


def retain_set():
    return Subset(data(), [i for i in range(24) if i not in (2, 5)])


def unlearned_together():
    """Each process makes its half of every batch of 8, and DDP averages."""
    shared = unlearner(net())
    shared.model = DistributedDataParallel(shared.model)
    sampler = DistributedSampler(retain_set(), shuffle=False)
    for _ in shared.run(DataLoader(retain_set(), 4, sampler=sampler), num_steps=5):
        pass
    return shared.model.module


def train_(model, rank):
    """Two updates, each process on its half of the data."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = (array[rank::2] for array in data().tensors)
    for _ in range(2):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()


def process(rank, folder):
    """Train under DDP, unlearn, and leave the weights of each stage."""
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init, rank=rank, world_size=2)
    model = DistributedDataParallel(net())
    train_(model, rank)
    before = copy.deepcopy(model.module.state_dict())
    private = GradSampleModule(DifferentiallyPrivateDistributedDataParallel(net()))
    stages = {
        "trained": before,
        "unlearned": unlearned(model).state_dict(),
        "still trained": model.module.state_dict(),
        "private": unlearned(private).state_dict(),
        "together": unlearned_together().state_dict(),
    }
    torch.save(stages, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_under_ddp_every_process_unlearns_as_a_single_one(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for stage in first:
        assert equal(first[stage], second[stage]), stage
    assert equal(first["trained"], first["still trained"])
    assert not equal(first["trained"], net().state_dict())
    alone = net()
    alone.load_state_dict(first["trained"])
    assert equal(first["unlearned"], unlearned(alone).state_dict())
    assert equal(first["private"], unlearned(net()).state_dict())
    together = unlearner(net())
    for _ in together.run(DataLoader(retain_set(), 8), num_steps=5):
        pass
    expected = together.model.state_dict()
    for name, value in first["together"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not equal(expected, net().state_dict())
