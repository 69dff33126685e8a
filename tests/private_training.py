"""Small private trainings: an engine, a loop, and norms by one backward pass each."""

import copy

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder

NUM_EXAMPLES, CLASSES = 24, 3
ADAPTIVE = {
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 1e8,
    "min_clipbound": 1e-3,
    "unclipped_num_std": 2.0,
}


class Log(Recorder):
    """A recorder of a row for each epoch that also keeps what it was told."""

    def __init__(self, *args, every=1, **options):
        super().__init__(*args, every=every, **options)
        self.observed, self.updates = [], []

    def report(self, indices, grad_norms):
        self.observed += zip(map(int, indices), grad_norms.tolist(), strict=True)
        super().report(indices, grad_norms)

    def step(self, **facts):
        self.updates.append(facts)
        super().step(**facts)


class Net(nn.Module):
    """A convolution, a norm layer and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.conv(x))).flatten(1))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_EXAMPLES, 2, 6, generator=generator)
    return TensorDataset(
        x, torch.randint(CLASSES, (NUM_EXAMPLES,), generator=generator)
    )


def one_at_a_time(model, x, y):
    """Norms of the gradients of each example's own loss over trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for one, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        grads = torch.autograd.grad(loss, parameters)
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    return norms


class Training:
    """What ``make_private`` returned, and a loop that checks nothing by itself."""

    def __init__(
        self,
        *,
        engine=None,
        module=None,
        data_set=None,
        loader=None,
        batch_size=6,
        accountant="rdp",
        recorder=None,
        lr=0.1,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        loss_reduction="mean",
        shuffle=True,
        seed=0,
        **options,
    ):
        torch.manual_seed(seed)
        self.net = Net() if module is None else module
        self.data_set = data() if data_set is None else data_set
        self.recorder = Log() if recorder is None else recorder
        if engine is None:
            engine = PrivacyEngine(accountant=accountant, recorder=self.recorder)
        self.engine = engine
        if loader is None:
            loader = DataLoader(self.data_set, batch_size=batch_size, shuffle=shuffle)
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        criterion = nn.CrossEntropyLoss(reduction=loss_reduction)
        self.model, self.optimizer, *middle, self.loader = engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(parameters, lr=lr, momentum=0.9),
            data_loader=loader,
            criterion=criterion,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            loss_reduction=loss_reduction,
            **options,
        )
        self.criterion = middle[0] if middle else criterion
        self.forward = self.model if options.get("wrap_model", True) else self.net

    def batch(self, x, y):
        self.optimizer.zero_grad()
        self.criterion(self.forward(x), y).backward()
        self.optimizer.step()

    def train(self, num_epochs=2, before_batch=lambda x, y: None):
        for _ in range(num_epochs):
            for x, y in self.loader:
                before_batch(x, y)
                self.batch(x, y)
        return self

    def memory_managed(self, size=2):
        """Train one epoch in physical batches."""
        managed = BatchMemoryManager(
            data_loader=self.loader,
            max_physical_batch_size=size,
            optimizer=self.optimizer,
        )
        with managed as loader:
            whole, self.loader = self.loader, loader
            yield self
            self.loader = whole

    def plain_copy(self):
        """The model of now, without Opacus."""
        fresh = Net()
        fresh.load_state_dict(copy.deepcopy(self.net.state_dict()))
        return fresh


def prepared(model, data_set, mode="hooks", *, criterion=None):
    """Prepare a run in batches of eight; return engine, model, optimizer, loss, loader.

    In ghost clipping the loss is a wrapper of ``criterion``.
    """
    engine = PrivacyEngine()
    options = {} if criterion is None else {"criterion": criterion}
    found = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **options,
    )
    return engine, found[0], found[1], found[2], found[-1]
