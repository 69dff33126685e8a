"""A training loop as data, and what runs it.

A ``Loop`` names its parts: how it samples, how items become a batch, what the loop does
to the batch, what the model is given, the loss, when it steps, and the mode. The
``Run`` of a loop trains with the engine, and keeps a copy of everything that entered a
backward pass: weights, the tensors of the batch and the loss. ``oracle`` computes the
norms from these copies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine, Recorder
from tests.custody import hidden_ids, models

EACH_UPDATE = tuple(range(1, 60))
LARGE = 1e3  # a clip norm that clips nothing


def untouched(run, batch):
    return batch


def one_input(model, batch):
    return model(batch[0])


def last_tensor(batch):
    return batch[-1]


def apply_criterion(criterion, outputs, targets):
    return criterion(outputs, targets)


def plain_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.02)


def every_batch(run):
    """Two epochs, one update for each batch."""
    for _ in range(2):
        for batch in run.loader:
            run.train(batch)


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Args:
        name: What is special about it.
        data: Makes the data set.
        sampling: ``"poisson"`` or ``"fixed"``.
        loader: Options of the user's ``DataLoader``.
        transform: ``(run, batch) -> batch``, what the loop does to a delivered batch.
        forward: ``(model, batch) -> outputs``.
        targets: ``batch -> targets``.
        model: Makes the model.
        criterion: Makes the criterion.
        loss: ``(criterion, outputs, targets) -> loss``, how the loop uses it.
        optimizer: ``module -> optimizer``, the user's.
        updates: ``(run)``, iterates over the loader and steps.
        setup: ``(run)``, what the program does right after ``make_private``.
        private: Options of ``make_private``.
        breaks: The link of the chain of custody that the loop breaks, where no norm
            is right for every example; empty where there are right norms.
        control: Whether it is an ordinary loop, which must be recorded in full and
            without a word.
        mode: ``grad_sample_mode``, ``"swept"``, or ``"monitored"`` for training without
            clipping.
        engine: Makes the engine, with the options of ``PrivacyEngine``.
        every: When a row of the ledger is written.
    """

    name: str
    data: Callable[[], Any] = hidden_ids.vector_data
    sampling: str = "poisson"
    loader: dict[str, Any] = field(default_factory=dict)
    transform: Callable[..., Any] = untouched
    forward: Callable[..., Any] = one_input
    targets: Callable[..., Any] = last_tensor
    model: Callable[[], nn.Module] = models.perceptron
    criterion: Callable[[], Any] = nn.CrossEntropyLoss
    loss: Callable[..., Any] = apply_criterion
    optimizer: Callable[[nn.Module], Any] = plain_sgd
    updates: Callable[..., None] = every_batch
    setup: Callable[..., None] | None = None
    private: dict[str, Any] = field(default_factory=dict)
    breaks: str = ""
    control: bool = False
    mode: str = "hooks"
    engine: Callable[..., Any] = PrivacyEngine
    every: Any = EACH_UPDATE

    def __str__(self):
        return f"{self.name}-{self.mode}"

    def having(self, **changes):
        return replace(self, **changes)


@dataclass(frozen=True)
class Pass:
    """One backward pass: what is needed to compute it again, one example at a time.

    Args:
        tensors: Copies of the batch's tensors; samples along the first dimension.
        weights: Copies of all parameters, by name.
        trained: Names of the parameters that the update changes.
        scale: A factor of the loss.
    """

    tensors: tuple[torch.Tensor, ...]
    weights: dict[str, torch.Tensor]
    trained: frozenset[str]
    scale: float = 1.0


class Run:
    """A loop that trains with the engine."""

    def __init__(self, loop):
        self.loop = loop
        self.rng = torch.Generator().manual_seed(5)
        self.passes, self.entered = [], []
        self.updates, self.weights_after = [], []
        self.gradient_factor = 1.0  # of per-example gradients, before they are clipped
        self.has_harmless_writes = False  # the loop writes weights, without data
        self.data_set = loop.data()
        torch.manual_seed(3)
        self.module = loop.model()
        self.criterion = loop.criterion()
        options = {"batch_size": 4, "shuffle": True, **loop.loader}
        if "batch_sampler" in options:
            del options["batch_size"], options["shuffle"]
        generator = torch.Generator().manual_seed(11)
        self.user_loader = DataLoader(self.data_set, generator=generator, **options)
        self.inner_optimizer = loop.optimizer(self.module)
        self.engine = loop.engine(accountant="rdp", recorder=self._recorder())
        self._prepare()
        self.between = lambda number: None
        if loop.setup is not None:
            loop.setup(self)

    def _recorder(self):
        if self.loop.mode in ("swept", "monitored"):
            criterion = self.loop.criterion()
            return Recorder("swept", self.loop.every, criterion=criterion)
        return Recorder(every=self.loop.every)

    def _prepare(self):
        loop = self.loop
        if loop.mode == "monitored":
            self._prepare_monitored()
            return
        mode = "hooks" if loop.mode == "swept" else loop.mode
        ghost = {"criterion": self.criterion} if mode == "ghost" else {}
        torch.manual_seed(17)
        self.model, self.optimizer, *middle, self.loader = self.engine.make_private(
            module=self.module,
            optimizer=self.inner_optimizer,
            data_loader=self.user_loader,
            poisson_sampling=loop.sampling == "poisson",
            grad_sample_mode=mode,
            **{"max_grad_norm": LARGE, "noise_multiplier": 1e-4, **loop.private},
            **ghost,
        )
        self.train_criterion = middle[0] if middle else self.criterion

    def _prepare_monitored(self):
        self.train_criterion = self.criterion
        torch.manual_seed(17)
        self.model, self.optimizer, self.loader = self.engine.make_monitored(
            module=self.module,
            optimizer=self.inner_optimizer,
            data_loader=self.user_loader,
            poisson_sampling=self.loop.sampling == "poisson",
            criterion=self.loop.criterion(),
            **{"noise_std": 1e-4, **self.loop.private},
        )

    # ------------------------------------------------------- what a loop is made of
    def backward(self, batch, scale=1.0):
        """Transform a batch, compute its loss and run the backward pass."""
        batch = self.loop.transform(self, batch)
        batch = tuple(batch.values()) if isinstance(batch, dict) else tuple(batch)
        self.keep(batch, scale)
        outputs = self.loop.forward(self.model, batch)
        loss = self.loop.loss(self.train_criterion, outputs, self.loop.targets(batch))
        (loss if scale == 1.0 else scale * loss).backward()

    def keep(self, tensors, scale=1.0):
        """Keep copies for the oracle: these tensors are about to enter a pass."""
        copies = tuple(tensor.detach().clone() for tensor in tensors)
        self.passes.append(Pass(copies, *self.weights_now(), scale))

    def weights_now(self):
        """Return copies of the parameters, and the names of those that are trained."""
        held = {p for g in self.inner_optimizer.param_groups for p in g["params"]}
        named = dict(self.module.named_parameters())
        trained = {n for n, p in named.items() if p in held and p.requires_grad}
        return {n: p.detach().clone() for n, p in named.items()}, frozenset(trained)

    def zero_grad(self):
        self.passes = []
        self.optimizer.zero_grad()

    def step(self):
        """Step the optimizer; an update is over when the weights have changed."""
        before, _ = self.weights_now()
        self.optimizer.step()
        self.entered += self.passes
        self.passes = []
        after, trained = self.weights_now()
        if any(not torch.equal(before[name], after[name]) for name in after):
            self.updates.append(self.entered)
            self.weights_after.append((after, trained))
            self.entered = []

    def train(self, batch):
        """Make one update with one batch."""
        self.between(len(self.updates))
        self.zero_grad()
        self.backward(batch)
        self.step()

    def memory_managed(self, size=2):
        return BatchMemoryManager(
            data_loader=self.loader,
            max_physical_batch_size=size,
            optimizer=self.optimizer,
        )
