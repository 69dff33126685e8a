"""Small networks, data, ledgers and unlearners."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.accounting import GradNormLedger, NoisySGD, fingerprint
from opacus_pi.unlearning import Unlearner

CRITERION = nn.CrossEntropyLoss()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n=30):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 5), torch.arange(n) % 3)


def ledger_of(train_set, noise_std=2.0, clip=1.0, seed=0, **facts):
    norms = np.random.default_rng(seed).gamma(2.0, 0.2, size=(3, len(train_set)))
    mechanism = NoisySGD(30, 0.1, noise_std, clip)
    facts = {"data_set": fingerprint(train_set)} | facts
    return GradNormLedger(mechanism, [10, 20, 30], norms, **facts)


def unlearner(model=None, seed=0, **options):
    return Unlearner(
        net() if model is None else model,
        criterion=CRITERION,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def state_bytes(model):
    return {k: v.numpy().tobytes() for k, v in model.state_dict().items()}


def beside_data(guarantee):
    """Everything in a guarantee but who established which data set it is about.

    A plan gets no data set, so there it is declared.
    """
    about = "the data set and its order"
    kept = [str(one) for one in guarantee.assumptions if about not in one.statement]
    assert len(kept) == len(guarantee.assumptions) - 1
    facts = guarantee._facts()
    return {**facts, "assumptions": kept}
