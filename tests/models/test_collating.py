"""Where no batch can be made of items, the error names the argument at fault."""

import pytest
import torch
from torch import nn

from opacus_pi import FineTune, Unlearner
from opacus_pi.evaluation import evaluate, predict
from opacus_pi.gradients import norm_sweep
from opacus_pi.unlearning.heads.features import extract_features

CRITERION = nn.CrossEntropyLoss()


class Bag(nn.Module):
    """A classifier of bags of words; the padding 0 counts for nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Embedding(9, 2, padding_idx=0)

    def forward(self, ids):
        return self.net(ids).sum(1)


def items(text=False):
    more = {"text": "a b", "author": "x"} if text else {}
    return [
        {"ids": torch.arange(1, 2 + i % 4), "labels": torch.tensor(i % 2), **more}
        for i in range(8)
    ]


class Items(torch.utils.data.Dataset):
    def __init__(self, text=False):
        self.items = items(text)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def padded(batch):
    ids = nn.utils.rnn.pad_sequence([item["ids"] for item in batch], batch_first=True)
    return {"ids": ids, "labels": torch.stack([item["labels"] for item in batch])}


def strict(batch):
    """As a collator that makes a tensor of every column."""
    found = padded(batch)
    for name in batch[0]:
        if name not in found:
            raise ValueError(f"Unable to create tensor of `{name}`")
    return found


def unlearned(data, **options):
    unlearner = Unlearner(Bag(), criterion=CRITERION, method=FineTune())
    return unlearner.unlearn(data, [0], num_epochs=1, batch_size=4, **options)


def evaluated(data, **options):
    sets = dict.fromkeys(("forget", "retain", "test"), data)
    return evaluate(Bag(), CRITERION, **sets, **options)


USES = {
    "unlearn": unlearned,
    "predict": lambda data, **o: predict(Bag(), data, CRITERION, **o),
    "evaluate": evaluated,
    "features": lambda data, **o: extract_features(Bag(), data, **o),
    "sweep": lambda data, **o: norm_sweep(Bag(), CRITERION, data, **o),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES)
def test_the_argument_and_the_columns_are_named(use):
    with pytest.raises(ValueError, match="No collate_fn was given.*DataCollatorWith"):
        USES[use](Items())
    with pytest.raises(ValueError, match=r"remove_columns\(\['text', 'author'\]\)"):
        USES[use](Items(text=True), collate_fn=strict)
    USES[use](Items(), collate_fn=padded)


def test_batches_that_differ_in_nothing_but_their_making_give_the_same_numbers():
    own = predict(Bag(), Items(), CRITERION, collate_fn=padded)
    loader = torch.utils.data.DataLoader(Items(), 3, collate_fn=padded)
    other = predict(Bag(), loader, CRITERION)
    torch.testing.assert_close(own.losses, other.losses)
