"""Tiny data sets in which every example carries its own index.

The tests read from the tensors that a model was given which examples they come from,
independently of how the package attributes samples. An item is a tensor of 24 numbers,
``WIDTH`` features and then one column for each example, with a 1 in the column of its
own; tokens have the index as their first token. The label of example k is k. Whatever
a loop does to a batch with linear operations, these columns show which examples a row
was made of.
"""

import torch
from torch.utils.data import Dataset, TensorDataset

NUM_EXAMPLES, WIDTH = 16, 8
ENTRIES = WIDTH + NUM_EXAMPLES
CLASSES = NUM_EXAMPLES + 1  # the last one is of no example
PADDING = 2 * NUM_EXAMPLES  # token
VOCABULARY = PADDING + 1
LONGEST = 6  # tokens
_VISIBLE = 0.02  # a smaller entry of an index column is noise of a loop


def vectors():
    """Float tensors ``(n, ENTRIES)`` of all examples, whose sizes differ."""
    generator = torch.Generator().manual_seed(52)
    features = torch.randn(NUM_EXAMPLES, WIDTH, generator=generator)
    features = features * torch.linspace(0.5, 2.0, NUM_EXAMPLES)[:, None]
    return torch.cat([features, torch.eye(NUM_EXAMPLES)], dim=1)


def labels():
    return torch.arange(NUM_EXAMPLES)


class Tokens(Dataset):
    """Sequences of 3 to 6 tokens; the first one is the index of the example."""

    def __init__(self, *, repeats=False):
        generator = torch.Generator().manual_seed(7)
        shape = NUM_EXAMPLES, LONGEST
        tokens = torch.randint(NUM_EXAMPLES, PADDING, shape, generator=generator)
        if repeats:
            tokens[:, 2] = tokens[:, 1]
        tokens[:, 0] = torch.arange(NUM_EXAMPLES)
        self.items = [row[: 3 + k % 4] for k, row in enumerate(tokens)]

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, k):
        return self.items[k], torch.tensor(k)


class Shaped(Dataset):
    """The vectors in another shape, or in another kind of item."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, k):
        return self.make(vectors()[k], labels()[k])


def vector_data():
    return TensorDataset(vectors(), labels())


def sequence_data():
    return TensorDataset(vectors().reshape(-1, 4, 6), labels())


def image_data():
    return TensorDataset(vectors().reshape(-1, 1, 4, 6), labels())


def soft_label_data():
    """The label is a probability for each class."""
    return TensorDataset(vectors(), torch.eye(NUM_EXAMPLES, CLASSES))


def dict_data():
    return Shaped(lambda x, y: {"x": x, "y": y})


def tripled_data():
    """Items with a second input, which belongs to the same example."""
    return Shaped(lambda x, y: (x, 0.5 * x, y))


def ids_of_rows(tensor):
    """Return for each row the set of examples that it was made of.

    Args:
        tensor: Floats with the index columns at the end of each row, whole labels
            ``(b,)``, tokens ``(b, length)``, or anything else, which has no examples.
    """
    start = {ENTRIES: WIDTH, CLASSES: 0}.get(tensor[0].numel())
    if tensor.is_floating_point() and start is not None:
        columns = tensor.detach().flatten(1)[:, start : start + NUM_EXAMPLES]
        return [set(r.nonzero().flatten().tolist()) for r in columns.abs() > _VISIBLE]
    if not tensor.is_floating_point() and tensor.dim() in (1, 2):
        first = tensor if tensor.dim() == 1 else tensor[:, 0]
        return [{k} if 0 <= k < NUM_EXAMPLES else set() for k in first.tolist()]
    return [set() for _ in tensor]


def ids_of_batch(tensors):
    """Return for each row of a batch the examples that any of its tensors shows.

    Args:
        tensors: Tensors of one batch, the samples along their first dimension.
    """
    by_tensor = [ids_of_rows(tensor) for tensor in tensors if len(tensor)]
    return [set().union(*of_row) for of_row in zip(*by_tensor, strict=True)]
