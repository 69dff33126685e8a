"""Examples with equal inputs and different targets, in loops that permute them."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.accounting import RenyiFilter

CROSS_ENTROPY = nn.CrossEntropyLoss()


def permuted(x, y):
    order = torch.randperm(len(x))
    return x[order], y[order]


def cloned(x, y):
    return x.clone(), y.clone()


def permuted_in_place(x, y):
    order = torch.randperm(len(x))
    x.copy_(x[order].clone())
    y.copy_(y[order].clone())
    return x, y


class Training:
    """One epoch over inputs of a few kinds, each with labels of its own."""

    def __init__(self, seed, *, change, mode="hooks", audit=False, apart=False):
        torch.manual_seed(seed)
        size = 4 if apart else 3  # of a batch
        num = 3 * size
        kind = torch.randint(3, (num,))
        if apart:  # batches have no input in common
            kind += 3 * (torch.arange(num) // size)
        data = TensorDataset(torch.randn(9, 6)[kind], torch.arange(num))
        module = nn.Linear(6, num)
        self.engine = PrivacyEngine(recorder=Recorder(every=[1, 2, 3]))
        self.model, self.optimizer, *criterion, loader = self.engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
            data_loader=DataLoader(data, batch_size=size),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            **({"criterion": CROSS_ENTROPY} if mode == "ghost" else {}),
        )
        if audit:
            assert self.engine.audit(CROSS_ENTROPY).passed
        self.true = np.full((3, num), np.nan)
        for update, (x, y) in enumerate(loader):
            x, y = change(x, y)
            self.note(update, module, x, y)
            self.optimizer.zero_grad()
            loss = criterion[0] if criterion else CROSS_ENTROPY
            loss(self.model(x), y).backward()
            self.optimizer.step()

    def note(self, update, module, x, y):
        own = nn.Linear(module.in_features, module.out_features)
        own.load_state_dict(copy.deepcopy(module.state_dict()))
        for one, label in zip(x, y, strict=True):
            loss = CROSS_ENTROPY(own(one[None]), label[None])
            gradients = torch.autograd.grad(loss, list(own.parameters()))
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            self.true[update, int(label)] = float(norm)


@pytest.mark.parametrize("audit", [False, True], ids=["", "audited"])
@pytest.mark.parametrize("change", [permuted, permuted_in_place, cloned])
def test_no_example_is_charged_less_than_its_norm(change, audit):
    num_given = 0
    for seed in range(12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Training(seed, change=change, audit=audit)
        try:
            ledger = run.engine.ledger
        except AccountingError as error:
            assert "equal in all entries" in str(error)  # samples of two batches do
            continue
        num_given += 1
        known = ~np.isnan(run.true)
        assert (ledger.grad_norms[known] >= run.true[known] * (1 - 1e-4)).all()
        is_exact = np.allclose(ledger.grad_norms[known], run.true[known], rtol=1e-4)
        unchecked = {link.name: link.sentence for link in ledger.custody.unchecked}
        assert is_exact or "equal inputs" in unchecked["identity"]
    assert num_given > 3


@pytest.mark.parametrize("change", [permuted, permuted_in_place])
def test_ghost_clipping_distinguishes_by_the_targets(change):
    for seed in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Training(seed, change=change, mode="ghost", apart=True)
        known = ~np.isnan(run.true)
        ledger = run.engine.ledger
        np.testing.assert_allclose(ledger.grad_norms[known], run.true[known], rtol=1e-4)
        names = {link.name for link in ledger.custody.unchecked}
        assert not names & {"identity", "rows"}


def test_a_filter_leaves_them_out():
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    x[6] = x[7]
    data, module = TensorDataset(x, torch.arange(8)), nn.Linear(6, 8)
    budgets = RenyiFilter(order=8.0, budget=1e6)
    engine = PrivacyEngine(renyi_filter=budgets)
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    with pytest.warns(UserWarning, match="a RenyiFilter leaves them out"):
        for a, b in loader:
            order = torch.tensor([0, 1, 2, 3, 4, 7, 6, 5])
            optimizer.zero_grad()
            CROSS_ENTROPY(model(a[order]), b[order]).backward()
            optimizer.step()
    assert (budgets.spent > 0).tolist() == [True] * 6 + [False] * 2
