"""Training loops as users write them, on data whose gradient norms tell who is who.

With learning rate 0 and no noise the weights never move, so the norm of an example's
gradient is a fact about the example. Norms of all examples differ, so a norm recorded
under a wrong index is noticed.
"""

from collections import UserDict

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from opacus_pi.privacy_engine import PrivacyEngine
from opacus_pi.recorder import Recorder

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
        self.num_rows = 0

    def backward(self, x, y, **keywords):
        self.num_rows += len(x)
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


def plain(run):
    for _ in range(2):
        for x, y in run.loader:
            run.step(x, y)


def stop_early(run):
    for _ in range(3):
        for i, (x, y) in enumerate(run.loader):
            run.step(x, y)
            if i == 1:
                break


def skip_some(run):
    for _ in range(2):
        for i, (x, y) in enumerate(run.loader):
            if i % 3:
                run.step(x, y)


def peek(run):
    next(iter(run.loader))
    for x, y in run.loader:
        next(iter(run.loader))
        run.step(x, y)


def listed_first(run):
    for x, y in list(run.loader):
        run.step(x, y)


def interleaved(run):
    for (x, y), (u, v) in zip(run.loader, run.loader, strict=False):
        run.step(u, v)
        run.step(x, y)


def interleaved_transformed(run):
    for (x, y), (u, v) in zip(run.loader, run.loader, strict=False):
        run.step(x * 2, y)
        run.step(u * 2, v)


def listed_first_transformed(run):
    for x, y in list(run.loader):
        run.step(x * 2, y)


def memory_manager(run):
    with run.memory_managed() as loader:
        for x, y in loader:
            run.step(x, y)


def memory_manager_left_early(run):
    for _ in range(2):
        with run.memory_managed() as loader:
            for i, (x, y) in enumerate(loader):
                run.step(x, y)
                if i == 2:
                    break


def keywords(run):
    for batch in run.loader:
        run.step(batch["x"], batch["y"])


def user_dict(run):
    for batch in run.loader:
        wrapped = UserDict(batch)
        run.step(wrapped["x"].clone(), wrapped["y"], mask=torch.ones(1))


def masked_copies(run):
    for batch in run.loader:
        run.step(batch["x"].clone(), batch["y"], mask=batch["mask"].clone())


def masked_copies_permuted(run):
    for batch in run.loader:
        order = torch.randperm(len(batch["x"]))
        run.step(batch["x"][order], batch["y"][order], mask=batch["mask"][order])


def copied(run):
    for x, y in run.loader:
        run.step(x.clone(), y)


def widened(run):
    for x, y in run.loader:
        run.step(x.double().clone().float(), y)


def permuted(run):
    for x, y in run.loader:
        order = torch.randperm(len(x))
        run.step(x[order], y[order])


def permuted_in_place(run):
    for x, y in run.loader:
        order = torch.randperm(len(x))
        x.copy_(x[order])
        run.step(x, y[order])


def half_batches(run):
    for x, y in run.loader:
        run.step(x[::2], y[::2])
        run.step(x[1:], y[1:])


def half_batches_copied(run):
    for x, y in run.loader:
        run.step(x[::2].clone(), y[::2])


def chunks_accumulated(run):
    for x, y in run.loader:
        run.optimizer.zero_grad()
        for u, v in zip(reversed(x.chunk(2)), reversed(y.chunk(2)), strict=True):
            run.backward(u, v)
        run.optimizer.step()


def accumulated(run):
    for i, (x, y) in enumerate(run.loader):
        if i % 3 == 0:
            run.optimizer.zero_grad()
        run.backward(x, y)
        if i % 3 == 2:
            run.optimizer.step()


def _ahead(loader, prepare):
    """A prefetcher that is one batch ahead."""
    batches = iter(loader)
    held = [prepare(*b) for _, b in zip(range(1), batches, strict=False)]
    for batch in batches:
        held.append(prepare(*batch))
        yield held.pop(0)
    yield from held


def look_ahead(run):
    for _ in range(2):
        for x, y in _ahead(run.loader, lambda x, y: (x, y)):
            run.step(x, y)


def look_ahead_copies(run):
    for _ in range(2):
        for x, y in _ahead(run.loader, lambda x, y: (x.clone(), y.clone())):
            run.step(x, y)


def look_ahead_transformed(run):
    for _ in range(2):
        for x, y in _ahead(run.loader, lambda x, y: (x * 2, y)):
            run.step(x, y)


def transformed(run):
    for _ in range(2):
        for x, y in run.loader:
            run.step(x * 2, y)


def transformed_after_peek(run):
    next(iter(run.loader))
    transformed(run)


def transformed_after_skip(run):
    for _ in range(2):
        for i, (x, y) in enumerate(run.loader):
            if i != 1:
                run.step(x * 2, y)


def sometimes_transformed(run):
    for _ in range(2):
        for i, (x, y) in enumerate(run.loader):
            run.step(x * 2 if i % 2 else x, y)


def normalised_in_place(run):
    for x, y in run.loader:
        run.step(x.mul_(2), y)


def zero_grad_between(run):
    for x, y in run.loader:
        out = run.model(x)
        run.num_rows += len(x)
        run.optimizer.zero_grad()
        run.criterion(out, y).backward()
        run.optimizer.step()


def zero_grad_after(run):
    for x, y in run.loader:
        run.backward(x, y)
        run.optimizer.step()
        run.optimizer.zero_grad()


def looks_between(run):
    for x, y in run.loader:
        run.model.eval()
        run.model(x.flip(0))
        run.model.train()
        with torch.no_grad():
            run.model(x.flip(0))
        run.step(x, y)


def discarded(run):
    for i, (x, y) in enumerate(run.loader):
        run.optimizer.zero_grad()
        run.backward(x, y)
        if i % 2:
            run.optimizer.step()
        else:
            run.num_rows -= len(x)


def attacked(run):
    for x, y in run.loader:
        probe = x.clone().requires_grad_(True)
        criterion(run.model(probe), y).backward()
        run.step(x, y)


def closures(run):
    for x, y in run.loader:

        def closure(x=x, y=y):
            run.optimizer.zero_grad()
            run.backward(x, y)

        run.optimizer.step(closure)


def two_views(run):
    for x, y in run.loader:
        run.optimizer.zero_grad()
        loss = (criterion(run.model(x), y) + criterion(run.model(x), y)) / 2
        loss.backward()
        run.num_rows += len(x)
        run.optimizer.step()


def two_batches_in_one_loss(run):
    before = None
    for x, y in run.loader:
        if before is not None:
            run.optimizer.zero_grad()
            u, v = before
            loss = criterion(run.model(x), y) + criterion(run.model(u), v)
            loss.backward()
            run.num_rows += len(x)
            run.optimizer.step()
        before = (x, y)


def two_batches_in_one_input(run):
    before = None
    for x, y in run.loader:
        if before is not None:
            run.step(torch.cat([x[:2], before[:2]]), y)
        before = x


def inner_layers_only(run):
    for x, y in run.loader:
        run.optimizer.zero_grad()
        inner = run.model._module
        criterion(inner.b(torch.tanh(inner.a(x))), y).backward()
        run.num_rows += len(x)
        run.optimizer.step()


def other_loader(run):
    for x, y in DataLoader(run.data_set, batch_size=4):
        run.step(x.clone() + 1, y)


def errors_caught(run):
    batches = iter(run.loader)
    while True:
        try:
            x, y = next(batches)
        except StopIteration:
            break
        except OSError:
            continue
        run.step(x, y)


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
