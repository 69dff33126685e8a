"""Loops that clear gradients in other ways than ``optimizer.zero_grad()``.

A sum that is left over would enter the next update once more, and the same noise would
have to hide it. Every mode either raises an error where Opacus does, or trains as it
does after ``optimizer.zero_grad()``.
"""

import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from tests.private_training import ADAPTIVE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Ss]ecure RNG turned off"),
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.filterwarnings("ignore:Full backward hook"),
    pytest.mark.filterwarnings("ignore:This run has no ledger"),
    pytest.mark.filterwarnings("ignore:.*samples are unattributed"),
]

MODES = {
    "hooks": {},
    "functorch": {},
    "ew": {},
    "ghost": {},
    "fast": {},
    "per_layer": {"clipping": "per_layer", "max_grad_norm": [0.5] * 4},
    "adaptive": {"clipping": "adaptive", **ADAPTIVE},
}
LOOPS = ("poisson", "shuffled", "parts", "not wrapped", "with empty batches")
NOT_IN_OPACUS = {"not wrapped": ("ew",), "with empty batches": ("ew", "adaptive")}


def _set_to_none(name):
    def clear(model, net, optimizer):
        for parameter in net.parameters():
            setattr(parameter, name, None)

    return clear


WAYS = {
    "optimizer": lambda model, net, optimizer: optimizer.zero_grad(),
    "to none": lambda model, net, optimizer: optimizer.zero_grad(set_to_none=True),
    "inner": lambda model, net, optimizer: optimizer.original_optimizer.zero_grad(),
    "model": lambda model, net, optimizer: model.zero_grad(),
    "hooks": lambda model, net, optimizer: model.set_grad_sample_to_none(),
    "net": lambda model, net, optimizer: net.zero_grad(),
    "grad": _set_to_none("grad"),
    "grad_sample": _set_to_none("grad_sample"),
    "nothing": lambda model, net, optimizer: None,
}


def _trained(engine, mode, loop, clear):
    """The weights after two epochs; the error where there is one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        2 * torch.randn(24, 6, generator=generator), torch.arange(24) % 3
    )
    size = 1 if loop == "with empty batches" else 8
    is_mode = mode in ("hooks", "functorch", "ew", "ghost", "fast")
    model, optimizer, *middle, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        data_loader=DataLoader(data, batch_size=size),
        criterion=criterion,
        noise_multiplier=1.0,
        noise_generator=torch.Generator().manual_seed(1),
        grad_sample_mode=mode if is_mode else "hooks",
        poisson_sampling=loop != "shuffled",
        wrap_model=loop != "not wrapped",
        **{"max_grad_norm": 1.0, **MODES.get(mode, {})},
    )
    criterion = middle[0] if middle else criterion

    def train(batches):
        for x, y in batches:
            clear(model, net, optimizer)
            criterion((net if loop == "not wrapped" else model)(x), y).backward()
            optimizer.step()

    torch.manual_seed(5)
    try:
        for _ in range(2):
            if loop == "parts":
                with BatchMemoryManager(
                    data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
                ) as parts:
                    train(parts)
            else:
                train(loader)
    except (ValueError, RuntimeError, AttributeError) as error:
        return error
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_left_over_are_an_error_or_enter_no_update(mode, loop):
    if mode in NOT_IN_OPACUS.get(loop, ()):
        pytest.skip("Opacus does not support it")
    right = _trained(PrivacyEngine(), mode, loop, WAYS["optimizer"])
    assert isinstance(right, torch.Tensor), right
    # Opacus has no fast mode: its sums are those of hooks up to rounding
    close = {"rtol": 0, "atol": 1e-5 if mode == "fast" else 0}
    as_opacus = "hooks" if mode == "fast" else mode
    for name, clear in WAYS.items():
        if loop == "with empty batches" and name not in ("to none", "model"):
            continue
        ours = _trained(PrivacyEngine(), mode, loop, clear)
        theirs = _trained(opacus.PrivacyEngine(), as_opacus, loop, clear)
        assert type(ours) is type(theirs), (name, ours, theirs)
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, **close)
            torch.testing.assert_close(ours, right, rtol=0, atol=0)
        elif mode != "fast":
            assert str(ours) == str(theirs), name


@pytest.mark.filterwarnings("ignore:There is no formula")
def test_a_failed_clipping_leaves_no_sum_behind():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    data = TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    model, optimizer, _ = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="fast",
    )
    x, y = data.tensors
    nn.functional.cross_entropy(model(x[:4]), y[:4]).backward()
    loss = nn.functional.cross_entropy(model(x[4:]), y[4:])
    (loss + net.weight.square().sum()).backward()
    with pytest.raises(ValueError, match="Running the model again"):
        optimizer.step()
    assert all(p.summed_grad is None for p in net.parameters())
