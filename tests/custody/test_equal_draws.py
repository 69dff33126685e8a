"""Draws of a Poisson loader that come again, which no chance explains."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_pi import AccountingError
from opacus_pi.custody import Chain
from opacus_pi.custody.draws import DrawLink
from tests.private_training import CLASSES, Training, data

AGAIN = "examples of an update are those of an earlier one"


class Batch:
    """The part of a delivery that the link looks at."""

    num_updates, draw = 1, 0

    def __init__(self, indices):
        self.index_array = None if indices is None else np.array(indices, np.int64)


def _is_broken(draws, num_examples, is_poisson=True):
    chain = Chain()
    link = DrawLink(chain, is_poisson=is_poisson, num_examples=num_examples)
    for batches in draws:
        link.update_was_made([Batch(indices) for indices in batches])
    return chain.is_broken("draw")


def _poisson(n, rate, count, seed=0):
    generator = np.random.default_rng(seed)
    return [[np.flatnonzero(generator.random(n) < rate)] for _ in range(count)]


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
def test_draws_that_come_again_are_found():
    draws = _poisson(200, 0.1, 50)
    assert _is_broken([*draws, draws[7]], 200)
    assert not _is_broken([*draws, draws[7]], 200, is_poisson=False)


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
def test_in_a_small_data_set_one_equal_draw_is_not_enough():
    draws = _poisson(24, 0.5, 12)
    assert not _is_broken([*draws, draws[2]], 24)
    assert _is_broken([*draws, *draws], 24)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "rate"), [(3, 0.5), (8, 0.3), (16, 0.5), (30, 0.1)])
def test_independent_draws_are_left_alone(n, rate, seed):
    assert not _is_broken(_poisson(n, rate, 4000, seed), n)


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
def test_the_batches_of_one_update_count_together():
    halves = [[one[:4], one[4:]] for (one,) in _poisson(200, 0.1, 20)]
    assert not _is_broken(halves, 200)
    assert _is_broken([*halves, halves[3]], 200)
    tails = [[one, [199]] for (one,) in _poisson(199, 0.1, 20)]
    assert not _is_broken(tails, 200)


def test_unknown_and_empty_draws_say_nothing():
    assert not _is_broken([[None]] * 20 + [[[]]] * 20 + [[]] * 20, 200)


def test_draws_that_are_not_known_are_not_compared():
    unknown, padding = [[-1] * 12], [[-2] * 3]
    assert not _is_broken([unknown, padding] * 20 + [padding] * 20, 200)
    assert not _is_broken([[[3, 5, -1, 8, 9, 11, 12, 13]]] * 20, 200)


def test_items_that_cannot_be_matched_are_the_reason():
    """Their draws were all taken for empty ones, and so for equal ones."""

    class Sequences(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return {"text": "1 " * (1 + index % 7), "label": index % CLASSES}

    def sorted_and_padded(items):
        items = sorted(items, key=lambda item: -len(item["text"]))
        tokens = [torch.tensor(list(map(int, i["text"].split()))) for i in items]
        labels = torch.tensor([item["label"] for item in items])
        return nn.utils.rnn.pad_sequence(tokens, batch_first=True), labels

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(3, 4), nn.Linear(4, CLASSES)

        def forward(self, tokens):
            return self.out(self.embedding(tokens).mean(1))

    loader = DataLoader(Sequences(), batch_size=6, collate_fn=sorted_and_padded)
    training = Training(module=Words(), data_set=loader.dataset, loader=loader)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.train(3)
    with pytest.raises(AccountingError) as error:
        training.engine.ledger.num_examples  # noqa: B018
    assert AGAIN not in str(error.value) and "unattributed" in str(error.value)


def test_a_generator_of_the_loader_that_is_seeded_in_every_epoch():
    generator = torch.Generator()
    loader = DataLoader(data(), batch_size=6, generator=generator)
    training = Training(loader=loader)
    for seed in range(3):
        generator.manual_seed(seed)
        training.train(1)
    assert training.engine.ledger.num_examples == 24
    generator.manual_seed(1)
    with pytest.warns(UserWarning, match=AGAIN):
        training.train(1)
    with pytest.raises(AccountingError, match=AGAIN):
        training.engine.ledger.num_examples  # noqa: B018
