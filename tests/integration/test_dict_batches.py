"""Dict batches, as in Hugging Face, give the same results as pairs (x, y)."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from opacus_pi import FineTune, Langevin, Unlearner
from opacus_pi.evaluation import evaluate, loss_barrier
from opacus_pi.gradients import gradient_gram, norm_sweep
from opacus_pi.models.batches import inputs_and_targets
from opacus_pi.unlearning.rivals import SCRUB, SSD, NegGradPlus, RandomLabels, SalUn

NUM_EXAMPLES, LENGTH, CLASSES = 20, 5, 3
CRITERION = nn.CrossEntropyLoss()


class Reader(nn.Module):
    """A bag of tokens; its outputs have the requested type."""

    def __init__(self, named):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(6))
        self.named = named

    def forward(self, input_ids, attention_mask):
        words = self.table(input_ids) * attention_mask[..., None]
        logits = self.out(torch.tanh(words.mean(1)) * self.scale.exp())
        return {"hidden": words, "logits": logits} if self.named else logits


class Examples(Dataset):
    """Token ids with masks, as dicts or as pairs."""

    def __init__(self, as_dicts):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(11, (NUM_EXAMPLES, LENGTH), generator=generator)
        self.labels = torch.arange(NUM_EXAMPLES) % CLASSES
        self.as_dicts = as_dicts

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, i):
        x = {"input_ids": self.ids[i], "attention_mask": (self.ids[i] > 2).float()}
        return x | {"labels": self.labels[i]} if self.as_dicts else (x, self.labels[i])


def both_ways(function):
    """The results of a function of model and data on pairs, and on dicts."""
    results = []
    for as_dicts in (False, True):
        torch.manual_seed(0)
        results.append(function(Reader(named=as_dicts), Examples(as_dicts)))
    return results


def test_norm_sweep():
    pairs, dicts = both_ways(lambda model, data: norm_sweep(model, CRITERION, data))
    assert torch.equal(pairs, dicts) and (pairs > 0).all()


def test_gradient_gram():
    pairs, dicts = both_ways(
        lambda model, data: gradient_gram(model, CRITERION, data, [1, 4, 5])
    )
    assert torch.equal(pairs, dicts) and pairs.shape == (3, 3)


@pytest.mark.parametrize(
    "method",
    [
        FineTune(),
        Langevin(noise_std=0.01, max_grad_norm=1.0),
        RandomLabels(),
        NegGradPlus(),
        SCRUB(),
        SalUn(),
        SSD(selection_weight=0.5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_unlearning(method):
    def weights(model, data):
        unlearner = Unlearner(model, criterion=CRITERION, method=method)
        result = unlearner.unlearn(data, [0, 3, 7], num_epochs=2, batch_size=4)
        return nn.utils.parameters_to_vector(result.model.parameters())

    pairs, dicts = both_ways(weights)
    torch.manual_seed(0)
    before = nn.utils.parameters_to_vector(Reader(named=True).parameters())
    assert torch.equal(pairs, dicts) and not torch.equal(pairs, before)


def test_evaluation():
    def numbers(model, data):
        parts = [Subset(data, range(k, k + 6)) for k in (0, 6, 12)]
        return evaluate(
            model,
            CRITERION,
            **dict(zip(("forget", "retain", "test"), parts, strict=True)),
        )

    pairs, dicts = both_ways(numbers)
    assert pairs == dicts


def test_loss_barrier():
    def barrier(model, data):
        other = Reader(named=model.named)
        return loss_barrier(model, other, data, CRITERION)

    pairs, dicts = both_ways(barrier)
    assert pairs == dicts


def test_a_batch_without_targets_is_refused():
    with pytest.raises(ValueError, match=r'pair \(x, y\) or .*"labels", got a dict'):
        inputs_and_targets({"input_ids": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"a pair \(x, y\) or .*, got a Tensor"):
        norm_sweep(Reader(named=False), CRITERION, torch.ones(4, 3, dtype=torch.long))
