"""Parts of loops: collates, transforms of a batch, ways to use a loader, oddities.

Every function is written as a program would write it. Whether a part leaves every row
with one example is found out by the oracle, not declared here.
"""

import itertools

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from tests.custody.hidden_ids import CLASSES, NUM_EXAMPLES, PADDING, WIDTH


# -------------------------------------------------------------------------- collates
def stacked(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.stack(y)


def reversed_rows(items):
    return default_collate(items[::-1])


def sorted_by_size(items):
    return default_collate(sorted(items, key=lambda item: -float(item[0].norm())))


def shuffled_rows(items):
    order = torch.randperm(len(items)).tolist()
    return default_collate([items[k] for k in order])


def refilled(items):
    """Drops some items, as unreadable files, and repeats the last one instead."""
    kept = [item for item in items if item[1] % 4] or items[:1]
    return default_collate((kept + [kept[-1]] * len(items))[: len(items)])


def without_some(items):
    """Drops some items, so that batches become smaller."""
    return default_collate([item for item in items if item[1] % 4] or items)


def each_twice(items):
    return default_collate([item for item in items for _ in range(2)])


def each_twice_in_blocks(items):
    return default_collate([*items, *items])


def mixed_up(items):
    x, y = default_collate(items)
    return 0.7 * x + 0.3 * x.roll(1, 0), y


def centred(items):
    x, y = default_collate(items)
    return x - x.mean(0), y


def noisy(items):
    x, y = default_collate(items)
    return x + 0.001 * torch.randn(x.shape), y


def cropped(items):
    """Sets some features to zero, another set for each item."""
    x, y = default_collate(items)
    keep = torch.ones(x.shape)
    keep[:, :WIDTH] = (torch.rand(len(x), WIDTH) > 0.3).float()
    return x * keep, y


def inputs_sorted_only(items):
    x, y = default_collate(items)
    return x[x.norm(dim=1).argsort()], y


def with_negatives(items):
    """Gives each item another one's input as a negative."""
    x, y = default_collate(items)
    return x, x.roll(1, 0), y


def padded(items):
    x, y = zip(*items, strict=True)
    return pad_sequence(x, batch_first=True, padding_value=PADDING), torch.stack(y)


def padded_sorted(items):
    """Sorts by length, as ``pack_padded_sequence`` asks for."""
    return padded(sorted(items, key=lambda item: -len(item[0])))


def padded_to_multiple(items):
    x, y = padded(items)
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8), value=PADDING), y


def padded_with_lengths(items):
    x, y = padded(items)
    lengths = torch.tensor([[float(len(item[0]))] for item in items])
    return x, lengths, y


def truncated(items):
    """Cuts all sequences to the shortest of the batch."""
    x, y = zip(*items, strict=True)
    shortest = min(map(len, x))
    return torch.stack([row[:shortest] for row in x]), torch.stack(y)


# ------------------------------------------------------------------------ transforms
def _order(run, batch):
    """A permutation that moves every row."""
    shift = 1 + int(torch.randint(len(batch[1]) - 1, (), generator=run.rng))
    return torch.arange(len(batch[1])).roll(shift)


def cloned(run, batch):
    return tuple(tensor.clone() for tensor in batch)


def through_numpy(run, batch):
    return tuple(torch.from_numpy(tensor.numpy().copy()) for tensor in batch)


def to_double_and_back(run, batch):
    return batch[0].double().float(), batch[1]


def viewed(run, batch):
    return batch[0].flatten(1).unflatten(1, batch[0].shape[1:]), batch[1]


def permuted(run, batch):
    order = _order(run, batch)
    return batch[0][order], batch[1][order]


def sorted_rows(run, batch):
    order = batch[0].flatten(1).norm(dim=1).argsort()
    return batch[0][order], batch[1][order]


def every_other(run, batch):
    return batch[0][::2], batch[1][::2]


def first_rows(run, batch):
    return batch[0][:2].clone(), batch[1][:2]


def doubled(run, batch):
    return batch[0] * 2, batch[1]


def noised(run, batch):
    noise = 0.001 * torch.randn(batch[0].shape, generator=run.rng)
    return batch[0] + noise, batch[1]


def features_flipped(run, batch):
    x = batch[0].clone()
    x[:, :WIDTH] = x[:, :WIDTH].flip(1)
    return x, batch[1]


def permuted_and_doubled(run, batch):
    order = _order(run, batch)
    return 2 * batch[0][order], batch[1][order]


def permuted_and_noised(run, batch):
    return noised(run, permuted(run, batch))


def attacked(run, batch):
    """An adversarial step of the inputs, by the gradient for them."""
    x = batch[0].clone().requires_grad_(True)
    run.model.disable_hooks()
    loss = torch.nn.functional.cross_entropy(run.model(x), batch[1])
    (slope,) = torch.autograd.grad(loss, x)
    run.model.enable_hooks()
    return (x + 0.01 * slope.sign()).detach(), batch[1]


def doubled_in_place(run, batch):
    return batch[0].mul_(2), batch[1]


def noised_in_place(run, batch):
    noise = 0.001 * torch.randn(batch[0].shape, generator=run.rng)
    return batch[0].add_(noise), batch[1]


def permuted_in_place(run, batch):
    order = _order(run, batch)
    return batch[0].copy_(batch[0][order]), batch[1].copy_(batch[1][order])


def permuted_by_assignment(run, batch):
    order = _order(run, batch)
    batch[0][:], batch[1][:] = batch[0][order].clone(), batch[1][order].clone()
    return batch


def permuted_by_data(run, batch):
    order = _order(run, batch)
    for tensor in batch:
        tensor.data.copy_(tensor.data[order].clone())
    return batch


def permuted_by_numpy(run, batch):
    order = _order(run, batch).numpy()
    for tensor in batch:
        array = tensor.numpy()
        array[:] = array[order].copy()
    return batch


def permuted_and_doubled_in_place(run, batch):
    order = _order(run, batch)
    return batch[0].copy_(2 * batch[0][order]), batch[1][order]


def two_swapped_by_numpy(run, batch):
    for tensor in batch:
        array = tensor.numpy()
        array[[0, 1]] = array[[1, 0]]
    return batch


def row_overwritten(run, batch):
    """One row replaces another, input and label."""
    for tensor in batch:
        tensor[0] = tensor[1]
    return batch


def row_overwritten_by_numpy(run, batch):
    for tensor in batch:
        tensor.numpy()[0] = tensor.numpy()[1]
    return batch


def new_memory_by_data(run, batch):
    """Gives the delivered tensor other memory, with the rows permuted."""
    order = _order(run, batch)
    for tensor in batch:
        tensor.data = tensor.data[order].clone()
    return batch


def mixed(run, batch):
    order = _order(run, batch)
    return 0.7 * batch[0] + 0.3 * batch[0][order], batch[1]


def mixed_in_place(run, batch):
    order = _order(run, batch)
    return batch[0].mul_(0.7).add_(batch[0][order], alpha=0.3 / 0.7), batch[1]


def mixed_by_numpy(run, batch):
    array = batch[0].numpy()
    array *= 0.7
    array += 0.3 * array[_order(run, batch).numpy()]
    return batch


def mixed_by_data(run, batch):
    x = batch[0].data
    x.mul_(0.7).add_(x[_order(run, batch)].clone(), alpha=0.3)
    return batch


def cut_and_mixed_in_place(run, batch):
    order = _order(run, batch)
    batch[0][..., -NUM_EXAMPLES:-4] += batch[0][order][..., -NUM_EXAMPLES:-4]
    return batch


def centred_by_batch(run, batch):
    return batch[0] - batch[0].mean(0), batch[1]


def centred_by_batch_in_place(run, batch):
    return batch[0].sub_(batch[0].mean(0)), batch[1]


def labels_permuted(run, batch):
    return batch[0], batch[1][_order(run, batch)]


def labels_permuted_in_place(run, batch):
    return batch[0], batch[1].copy_(batch[1][_order(run, batch)])


def labels_copied(run, batch):
    return batch[0], batch[1].clone()


def labels_widened(run, batch):
    return batch[0], batch[1].to(torch.int32).long()


def labels_as_column(run, batch):
    return batch[0], batch[1].unsqueeze(1)


def squeezed(batch):
    return batch[-1].squeeze(1)


def labels_as_probabilities(run, batch):
    return batch[0], torch.nn.functional.one_hot(batch[1], CLASSES).float()


def labels_smoothed(run, batch):
    return batch[0], 0.9 * labels_as_probabilities(run, batch)[1] + 0.1 / CLASSES


def inputs_permuted(run, batch):
    return batch[0][_order(run, batch)], batch[1]


def first_row_twice(run, batch):
    rows = torch.tensor([0, 0, *range(2, len(batch[1]))])
    return batch[0][rows], batch[1][rows]


def first_row_only(run, batch):
    """Copies of one row, as many as the batch has."""
    x, y = batch
    return torch.cat([x[:1]] * len(x)), torch.cat([y[:1]] * len(y))


def batch_twice(run, batch):
    return torch.cat([batch[0], batch[0]]), torch.cat([batch[1], batch[1]])


def drawn_with_replacement(run, batch):
    rows = torch.randint(len(batch[1]), (len(batch[1]),), generator=run.rng)
    rows[1] = rows[0]
    return batch[0][rows], batch[1][rows]


def differences(run, batch):
    return batch[0] - batch[0].roll(1, 0), batch[1]


def with_earlier_batch(run, batch):
    """Half of the rows are the batch before, as in a small memory of rehearsal."""
    before, run.before = getattr(run, "before", batch), batch
    pairs = zip(batch, before, strict=True)
    return tuple(torch.cat([new[:1], old[:1]]) for new, old in pairs)


def other_order_as_second_input(run, batch):
    return batch[0], batch[0][_order(run, batch)], batch[1]


def earlier_batch_as_second_input(run, batch):
    before, run.before = getattr(run, "before", batch[0]), batch[0]
    rows = torch.arange(len(batch[1])) % len(before)
    return batch[0], before[rows], batch[1]


def mean_as_second_input(run, batch):
    mean = batch[0].mean(0, keepdim=True).expand(len(batch[0]), -1)
    return batch[0], mean.clone(), batch[1]


def half_as_second_input(run, batch):
    return batch[0], 0.5 * batch[0], batch[1]


def noise_as_second_input(run, batch):
    noise = torch.randn(len(batch[1]), 24, generator=run.rng)
    noise[:, WIDTH:] = 0
    return batch[0], noise, batch[1]


def second_input_permuted(run, batch):
    return batch[0], batch[1][_order(run, batch)], batch[2]


# -------------------------------------------------------------- what the model is given
def two_inputs(model, batch):
    return model(batch[0], batch[1])


def input_and_keyword(model, batch):
    return model(batch[0], other=batch[1])


def keyword_only(model, batch):
    return model(x=batch[0])


def two_views(model, batch):
    """The mean of the outputs for two views of each example, from two passes."""
    return (model(batch[0]) + model(0.5 * batch[0])) / 2


def same_input_twice(model, batch):
    return model(batch[0], batch[0])


def bag_of_tokens(model, batch):
    """Gives ``nn.EmbeddingBag`` all tokens in one row, and where each bag begins."""
    length = batch[0].shape[1]
    return model(batch[0].flatten(), torch.arange(0, batch[0].numel(), length))


# ----------------------------------------------------------------- ways to use a loader
def accumulated(run):
    for k, batch in enumerate(itertools.chain(run.loader, run.loader)):
        if k % 2 == 0:
            run.zero_grad()
        run.backward(batch, scale=0.5)
        if k % 2:
            run.step()


def in_chunks(run):
    for x, y in run.loader:
        run.zero_grad()
        for part in reversed(list(zip(x.chunk(2), y.chunk(2), strict=True))):
            run.backward(part)
        run.step()


def memory_managed(run):
    with run.memory_managed() as loader:
        for batch in loader:
            run.train(batch)


def cleared_afterwards(run):
    for batch in run.loader:
        run.backward(batch)
        run.step()
        run.zero_grad()


def evaluated_between(run):
    for batch in run.loader:
        run.model.eval()
        with torch.no_grad():
            run.model(batch[0].flip(0))
        run.model.train()
        run.train(batch)


def training_loss_looked_at(run):
    for batch in run.loader:
        run.train(batch)
        with torch.no_grad():
            run.model(batch[0])


def some_discarded(run):
    for k, batch in enumerate(run.loader):
        run.zero_grad()
        run.backward(batch)
        if k % 3 == 1:  # the loss was not finite, say: a choice that depends on data
            continue
        run.step()


def same_batch_twice_in_an_update(run):
    for batch in run.loader:
        run.zero_grad()
        run.backward(batch)
        run.backward(batch)
        run.step()


def overlapping_parts(run):
    for x, y in run.loader:
        run.zero_grad()
        run.backward((x[:2], y[:2]))
        run.backward((x[1:], y[1:]))
        run.step()


def two_batches_ahead(run):
    """A prefetcher that holds a batch back."""
    held = []
    for batch in run.loader:
        held.append(batch)
        if len(held) > 1:
            run.train(held.pop(0))
    for batch in held:
        run.train(batch)


def all_listed(run):
    for batch in list(run.loader):
        run.train(batch)


def listed_backwards(run):
    for batch in reversed(list(run.loader)):
        run.train(batch)


def own_loader(run):
    for batch in run.user_loader:
        run.train(batch)


def whole_data_set(run):
    x, y = run.data_set.tensors
    for _ in range(4):
        run.train((x, y))


def own_indices(run):
    x, y = run.data_set.tensors
    for _ in range(4):
        rows = torch.randperm(len(x), generator=run.rng)[:4]
        run.train((x[rows], y[rows]))


def loader_and_public_data(run):
    """Rows of no example are added to every batch."""
    for x, y in run.loader:
        public = torch.zeros(2, x.shape[1])
        of_no_example = torch.full((2,), CLASSES - 1)
        run.train((torch.cat([x, public]), torch.cat([y, of_no_example])))


def _raw_gradient(run, batch):
    """The plain gradient of the batch's loss, from a copy of the model."""
    plain = run.loop.model()
    plain.load_state_dict(run.module.state_dict())
    loss = torch.nn.functional.cross_entropy(plain(batch[0]), batch[1])
    return torch.autograd.grad(loss, list(plain.parameters()))


def _move(run, slopes, factor):
    pairs = zip(run.module.parameters(), slopes, strict=True)
    for parameter, slope in pairs:
        parameter.data.add_(slope, alpha=factor)


def weights_stepped_by_data(run):
    """A second step on the weights without noise, past the optimizer."""
    for batch in run.loader:
        run.train(batch)
        _move(run, _raw_gradient(run, batch), -0.1)


def sharpness_aware(run):
    """The gradient is taken at weights that a raw gradient has moved."""
    for batch in run.loader:
        slopes = _raw_gradient(run, batch)
        _move(run, slopes, 0.05)
        run.zero_grad()
        run.backward(batch)
        _move(run, slopes, -0.05)
        run.step()
