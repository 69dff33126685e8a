"""Examples of a batch, whichever dimension of a tensor they are along."""

import torch

from opacus_pi.models.batches import rows_of

SIZE, CHOSEN = 4, [2, 0, 2]


def by_hand(tensor, dim):
    """The chosen examples, one after another."""
    return torch.stack([tensor.select(dim, i) for i in CHOSEN], dim)


def test_examples_are_taken_along_their_own_dimension():
    batch = {
        "first": torch.randn(SIZE, 3),
        "second": torch.randn(3, SIZE),
        "both": torch.randn(SIZE, SIZE),
        "shared": (torch.randn(3), torch.tensor(1.0), "a text"),
    }
    for dim in (0, 1):
        taken = rows_of(batch, CHOSEN, SIZE, dim)
        assert torch.equal(taken["first"], by_hand(batch["first"], 0))
        assert torch.equal(taken["second"], by_hand(batch["second"], 1))
        assert torch.equal(taken["both"], by_hand(batch["both"], dim))
        assert taken["shared"] == batch["shared"]


def test_a_tensor_without_the_dimension_is_shared_if_it_must_be_there():
    table, x = torch.randn(3, SIZE), torch.randn(SIZE, 3)
    kept, taken = rows_of((table, x), CHOSEN, SIZE, elsewhere=False)
    assert kept is table and torch.equal(taken, by_hand(x, 0))
