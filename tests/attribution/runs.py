"""Private trainings on data whose gradient norms identify them.

With learning rate 0 and no noise the weights never move, so the norm of an example's
gradient is a fact about the example. Norms of all examples differ, so a norm recorded
under a wrong index is noticed.
"""

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder

NUM_EXAMPLES, WIDTH, CLASSES = 24, 5, 3


criterion = nn.CrossEntropyLoss()


class Log(Recorder):
    """A recorder that also keeps every report."""

    def __init__(self, **options):
        super().__init__(**options)
        self.reports = []

    def report(self, indices, grad_norms):
        self.reports += zip(map(int, indices), grad_norms.tolist(), strict=True)
        super().report(indices, grad_norms)


class Net(nn.Module):
    """A small network that also takes keywords and an optional mask."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, x, mask=None):
        return self.b(torch.tanh(self.a(x)))


def tensors():
    generator = torch.Generator().manual_seed(52)
    x = torch.randn(NUM_EXAMPLES, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (NUM_EXAMPLES,), generator=generator)


def net():
    torch.manual_seed(3)
    return Net()


def true_norms(x, y, model=None):
    """Norms by one backward pass per example."""
    model = model or net()
    norms = []
    for one, label in zip(x, y, strict=True):
        loss = criterion(model(one[None]), label[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    return norms


class AsDicts(Dataset):
    def __init__(self, x, y, mask=False):
        self.x, self.y, self.mask = x, y, mask

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        item = {"x": self.x[i], "y": self.y[i]}
        return {**item, "mask": torch.ones(WIDTH)} if self.mask else item


class Fails(Dataset):
    """Raises for one example."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == 7:
            raise OSError("unreadable")
        return self.x[i], self.y[i]


class Run:
    """An engine, what it returned, and steps over a batch."""

    def __init__(
        self,
        *,
        mode="hooks",
        poisson=True,
        data_set=None,
        strict=False,
        verify=True,
        loader=None,
        batch_size=4,
        **options,
    ):
        self.data_set = TensorDataset(*tensors()) if data_set is None else data_set
        self.net = net()
        loader_options = {
            k: options.pop(k)
            for k in list(options)
            if k in DataLoader.__init__.__code__.co_varnames
        }
        if loader is None:
            if "batch_sampler" not in loader_options:
                defaults = {"batch_size": batch_size, "shuffle": True}
                loader_options = {**defaults, **loader_options}
            loader = DataLoader(self.data_set, **loader_options)
        self.recorder = Log(strict=strict, verify=verify)
        self.engine = PrivacyEngine(accountant="rdp", recorder=self.recorder)
        torch.manual_seed(11)
        self.model, self.optimizer, *middle, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(self.net.parameters(), lr=0.0),
            data_loader=loader,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
            grad_sample_mode=mode,
            **options,
        )
        self.criterion = middle[0] if middle else criterion
        self.ghost = bool(middle)
        self.num_samples = 0

    def backward(self, x, y, **keywords):
        self.num_samples += len(x)
        self.criterion(self.model(x, **keywords), y).backward()

    def step(self, x, y, **keywords):
        self.optimizer.zero_grad()
        self.backward(x, y, **keywords)
        self.optimizer.step()

    def memory_managed(self, size=2):
        return BatchMemoryManager(
            data_loader=self.loader,
            max_physical_batch_size=size,
            optimizer=self.optimizer,
        )


def keyed_data():
    x, y = tensors()
    return Subset(TensorDataset(x, y), list(range(1, NUM_EXAMPLES, 2)))


def joined_data():
    x, y = tensors()
    return ConcatDataset([TensorDataset(x[:9], y[:9]), TensorDataset(x[9:], y[9:])])


class Weird:
    """A batch sampler of one's own: sizes vary, examples repeat between batches."""

    def __iter__(self):
        return iter([[3, 1], [5, 3, 8], [0], [23, 1, 2, 3]])

    def __len__(self):
        return 4
