"""Training loops as users write them."""

from collections import UserDict

import torch
from torch.utils.data import DataLoader

from tests.attribution.runs import criterion


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
        run.num_samples += len(x)
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
            run.num_samples -= len(x)


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
        run.num_samples += len(x)
        run.optimizer.step()


def two_batches_in_one_loss(run):
    before = None
    for x, y in run.loader:
        if before is not None:
            run.optimizer.zero_grad()
            u, v = before
            loss = criterion(run.model(x), y) + criterion(run.model(u), v)
            loss.backward()
            run.num_samples += len(x)
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
        run.num_samples += len(x)
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
