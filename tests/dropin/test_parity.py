"""The same seeded training with both engines: nothing a caller can see differs."""

import copy
import inspect
import io
import pickle

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from tests.private_training import ADAPTIVE, Training

ENGINES = (opacus.PrivacyEngine, PrivacyEngine)


class Dropping(nn.Module):
    """A network with dropout, so that the order of random numbers matters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.drop(self.norm(self.conv(x))).flatten(1))


def trained(engine_class, *, workers=0, managed=False, epochs=2, **options):
    """Two epochs by one of the engines, and the random state they end in."""
    torch.manual_seed(3)
    x, y = torch.randn(24, 2, 6), torch.randint(3, (24,))
    given = DataLoader(
        TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers
    )
    training = Training(
        engine=engine_class(accountant="rdp"),
        module=Dropping(),
        loader=given,
        noise_multiplier=0.7,
        seed=4,
        **options,
    )
    for _ in training.memory_managed(3) if managed else [0]:
        training.train(epochs)
    training.random_state = torch.get_rng_state()
    training.given = given
    return training


def states_equal(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(j == k and torch.equal(a, b) for (j, a), (k, b) in pairs)


CASES = [
    {"grad_sample_mode": mode, "poisson_sampling": poisson, **more}
    for mode in ("hooks", "ghost")
    for poisson in (True, False)
    for more in ({}, {"managed": True}, {"workers": 2}, {"wrap_model": False})
] + [
    {"grad_sample_mode": "functorch"},
    {"grad_sample_mode": "ew", "poisson_sampling": False},
    {"clipping": "per_layer", "max_grad_norm": [1.0] * 6},
    {"clipping": "adaptive", **ADAPTIVE},
    {"loss_reduction": "sum"},
    {"rand_on_empty": True, "workers": 0},
]


def label(case):
    return "-".join(f"{key}:{value}" for key, value in case.items())[:70]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_training_is_bit_identical(case):
    theirs, ours = (trained(engine, **case) for engine in ENGINES)
    assert states_equal(theirs.net, ours.net)
    assert torch.equal(theirs.random_state, ours.random_state)
    accountants = [t.engine.accountant for t in (theirs, ours)]
    assert accountants[0].history == accountants[1].history
    assert accountants[0].state_dict() == accountants[1].state_dict()
    assert theirs.engine.get_epsilon(1e-5) == ours.engine.get_epsilon(1e-5)

    assert type(ours.model) is type(theirs.model)
    assert isinstance(ours.optimizer, type(theirs.optimizer))
    assert type(ours.optimizer).__name__ == type(theirs.optimizer).__name__
    assert isinstance(ours.criterion, type(theirs.criterion))
    assert type(ours.criterion).__name__ == type(theirs.criterion).__name__
    assert isinstance(ours.loader, type(theirs.loader))
    assert (ours.loader is ours.given) == (theirs.loader is theirs.given)
    assert ours.loader.dataset is ours.given.dataset
    assert type(ours.loader.batch_sampler) is type(theirs.loader.batch_sampler)
    assert len(ours.loader) == len(theirs.loader)
    assert repr(ours.model) == repr(theirs.model) or not case.get("wrap_model", True)
    kept, ours_kept = theirs.optimizer.state_dict(), ours.optimizer.state_dict()
    assert kept.keys() == ours_kept.keys()
    assert ours.engine.ledger.num_examples == 24  # and it was recorded


def test_signatures():
    assert issubclass(PrivacyEngine, opacus.PrivacyEngine)
    for name, theirs in inspect.getmembers(opacus.PrivacyEngine, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(PrivacyEngine, name))
            assert ours == inspect.signature(theirs), name
    assert PrivacyEngine(accountant="gdp", secure_mode=False).secure_mode is False
    with pytest.raises(TypeError):
        PrivacyEngine("rdp")  # keywords only, as in Opacus
    with pytest.raises(TypeError, match="accountent"):
        PrivacyEngine(accountent="rdp")


@pytest.mark.parametrize("reader", ENGINES)
@pytest.mark.parametrize("writer", ENGINES)
def test_checkpoints_cross_between_the_engines(writer, reader):
    one, other = trained(writer), trained(reader, epochs=1)
    file = io.BytesIO()
    one.engine.save_checkpoint(
        path=file,
        module=one.model,
        optimizer=one.optimizer,
        checkpoint_dict={"mine": 1},
    )
    file.seek(0)
    checkpoint = other.engine.load_checkpoint(
        path=file, module=other.model, optimizer=other.optimizer
    )
    assert checkpoint["mine"] == 1
    assert states_equal(one.net, other.net)
    assert one.engine.accountant.state_dict() == other.engine.accountant.state_dict()


HANDLED = {
    "pickled model": lambda t: pickle.loads(pickle.dumps(t.model)),
    "copied model": lambda t: copy.deepcopy(t.model),
    "saved model": lambda t: torch.save(t.model, io.BytesIO()),
    "pickled loader": lambda t: list(pickle.loads(pickle.dumps(t.loader))),
    "copied loader": lambda t: list(copy.copy(t.loader)),
    "deeply copied loader": lambda t: list(copy.deepcopy(t.loader)),
    "standard module": lambda t: t.model.to_standard_module(),
}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("what", HANDLED)
def test_pickles_and_copies(what, mode):
    outcomes = []
    for engine in ENGINES:
        training = trained(engine, epochs=1, grad_sample_mode=mode)
        try:
            HANDLED[what](training)
            outcomes.append(None)
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_the_standard_module_has_no_hooks_left():
    ours = trained(PrivacyEngine, epochs=1)
    plain = ours.model.to_standard_module()
    assert plain is ours.net
    assert not any(m._forward_hooks or m._backward_hooks for m in plain.modules())


@pytest.mark.parametrize("second", ENGINES)
@pytest.mark.parametrize("first", ENGINES)
def test_what_one_engine_made_the_other_can_take(first, second):
    made = trained(first, epochs=1)
    engine = second(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=made.model,
        optimizer=made.optimizer,
        data_loader=made.loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert engine.get_epsilon(1e-5) > 0
    if second is PrivacyEngine:
        assert engine.ledger.num_examples == 24
        assert engine.attribution["unattributed"] == 0


def test_make_private_with_epsilon_finds_the_same_noise():
    found = []
    for engine_class in ENGINES:
        torch.manual_seed(0)
        net = Dropping()
        _, optimizer, _ = engine_class(accountant="rdp").make_private_with_epsilon(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(24, 2, 6)), batch_size=8),
            target_epsilon=8.0,
            target_delta=1e-5,
            epochs=2,
            max_grad_norm=1.0,
        )
        found.append(optimizer.noise_multiplier)
    assert found[0] == found[1]
