"""Losses that a model returns are compared with those of halves of the batch."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.custody.chain import Chain
from opacus_pi.custody.looks import few_updates
from opacus_pi.custody.model_loss import ModelLossProbe

NUM_EXAMPLES, LENGTH, CLASSES = 12, 5, 4


class Tagger(nn.Module):
    """A model that returns logits and the loss of its labels."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES)
        )

    def forward(self, x, labels=None, num_items_in_batch=None):
        logits = self.net(x)
        if labels is None:
            return logits
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none"
        )
        num_labels = (labels != -100).sum(1)
        own = losses.sum(1) / num_labels
        if self.kind == "items":
            return logits, losses.sum() / num_items_in_batch
        return logits, {
            "own": lambda: own.mean(),
            "sum": lambda: own.sum(),
            "tokens": lambda: losses.sum() / num_labels.sum(),
            "largest": lambda: own.topk(len(own) // 2).values.mean(),
            "spread": lambda: own.mean() + (own[:, None] - own).square().mean(),
        }[self.kind]()


class WholeBatch(Tagger):
    """One that cannot run on a part of a batch."""

    size = None

    def forward(self, x, labels=None, num_items_in_batch=None):
        WholeBatch.size = WholeBatch.size or len(x)
        if len(x) < WholeBatch.size // 2 + 2:
            raise RuntimeError("too small")
        return super().forward(x, labels, num_items_in_batch)


def examples(lengths=None):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(NUM_EXAMPLES):
        x = torch.randn(LENGTH, 3, generator=generator)
        labels = torch.randint(CLASSES, (LENGTH,), generator=generator)
        labels[(1 + i % LENGTH) if lengths is None else lengths :] = -100
        found.append((x, labels))
    return found


def trained(model, data=None, items=None, use=True, *, options=(), probe=True):
    """An engine after eight updates, in fixed batches of six examples."""
    engine = PrivacyEngine(recorder=Recorder(probe_model=probe))
    hooks, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(data or examples(), batch_size=6),
        noise_multiplier=0.1,
        max_grad_norm=1.0,
        poisson_sampling=False,
        wrap_model=False,
        **dict(options),
    )
    torch.manual_seed(1)
    for _ in range(4):
        for x, labels in loader:
            optimizer.zero_grad()
            given = {} if items is None else {"num_items_in_batch": items(labels)}
            logits, loss = model(x, labels, **given)
            if not use:
                mask = labels != -100
                loss = (logits.logsumexp(-1) * mask).sum() / len(x)
            loss.backward()
            optimizer.step()
    hooks.cleanup()
    return engine


def loss_link(engine):
    custody = engine.recorder.chain.custody()
    return next(link for link in custody.links if link.name == "loss")


def test_a_mean_of_own_losses_is_seen():
    link = loss_link(trained(Tagger("own")))
    assert link.state == "unchecked" and "In 4 update(s)" in link.sentence


@pytest.mark.parametrize("kind", ["tokens", "largest", "spread", "sum"])
def test_a_loss_that_couples_examples_is_refused(kind):
    link = loss_link(trained(Tagger(kind)))
    assert link.state == "broken" and "losses of its halves" in link.sentence


def test_a_sum_is_right_where_a_sum_was_announced():
    options = {"loss_reduction": "sum"}
    assert loss_link(trained(Tagger("sum"), options=options)).state == "unchecked"
    assert loss_link(trained(Tagger("own"), options=options)).state == "broken"


def test_examples_with_equal_numbers_of_labels_have_losses_of_their_own():
    assert loss_link(trained(Tagger("tokens"), examples(3))).state == "unchecked"


def test_a_loss_that_is_not_used_is_not_looked_at():
    link = loss_link(trained(Tagger("tokens"), use=False))
    assert "does not see the loss" in link.sentence


@pytest.mark.parametrize(
    ("items", "state"),
    [
        (len, "unchecked"),
        (lambda labels: (labels != -100).sum(), "broken"),
    ],
)
def test_the_number_of_items_is_looked_at(items, state):
    assert loss_link(trained(Tagger("items"), items=items)).state == state


def test_a_model_that_fails_on_a_part_leaves_the_link_unchecked():
    WholeBatch.size = None
    with pytest.warns(UserWarning, match="too small"):
        link = loss_link(trained(WholeBatch("own")))
    assert link.state == "unchecked" and "too small" in link.sentence


def test_training_stays_as_it_is():
    models = [Tagger("own"), Tagger("own")]
    for model, probe in zip(models, (True, False), strict=True):
        trained(model, probe=probe)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


def test_a_probe_leaves_model_gradients_and_random_state():
    model = Tagger("own").train()
    chain = Chain()
    probe = ModelLossProbe(lambda: model, chain)
    x, labels = (torch.stack(column) for column in zip(*examples(), strict=True))
    outputs = model(x, labels)
    probe.saw((x, labels), {}, outputs)
    outputs[1].backward()
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    probe.run()
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
    assert all(torch.equal(before[0][k], v) for k, v in model.state_dict().items())
    assert torch.equal(before[1], torch.get_rng_state()) and model.training
    assert "In 1 update(s)" in chain.custody().links[5].sentence


def test_the_updates_rise_and_spread():
    updates = few_updates(random.Random(0))
    assert updates == sorted(updates) and len(updates) == 7
    np.testing.assert_array_equal(
        np.digitize(updates, [4, 10, 100, 1_000]), [0] * 3 + [1, 2, 3, 4]
    )
