"""Passes without a backward pass, and losses that are not those of the update."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError

N, D = 24, 6
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % 3


class Failing(nn.Module):
    """A model whose next forward pass fails half-way if ``fails`` is set."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, 8), nn.Linear(8, 3)
        self.fails = False

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.fails:
            self.fails = False
            raise MemoryError
        return self.second(hidden)


class Run:
    def __init__(self, mode, wrap=None):
        torch.manual_seed(0)
        self.net, self.engine = Failing(), PrivacyEngine()
        self.net = self.net if wrap is None else wrap(self.net)
        self.plain = nn.CrossEntropyLoss()
        options = {"criterion": self.plain} if mode == "ghost" else {}
        found = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(self.net.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            **options,
        )
        self.model, self.optimizer, self.loader = found[0], found[1], found[-1]
        self.criterion = found[2] if mode == "ghost" else self.plain

    def epoch(self, before=lambda run, x: None, after=lambda run: None):
        for x, y in self.loader:
            self.optimizer.zero_grad()
            before(self, x)
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()
            after(self)
        return self

    def links(self):
        return {link.name: link for link in self.engine.ledger.custody.links}


def unused_pass(run, x):
    run.model(x)


def repeated_pass(run, x):
    run.net.fails = True
    with pytest.raises(MemoryError):
        run.model(x)


@pytest.mark.parametrize("before", [unused_pass, repeated_pass])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_the_error_says_that_a_pass_had_no_backward_pass(mode, before):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The library assumes")
        with pytest.raises((ValueError, NotImplementedError)) as found:
            Run(mode).epoch(before)
    notes = getattr(found.value, "__notes__", found.value.args)
    assert "waits for the backward pass" in notes[-1]
    assert "had no backward pass" in notes[-1] and "half-way" in notes[-1]


class Twice(nn.Module):
    """Calls its layers twice in one forward pass."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + self.net(2 * x)


@pytest.mark.filterwarnings("ignore")
def test_ghost_clipping_names_the_pass_that_waits_for_its_backward_pass():
    run, kept = Run("ghost"), []
    with pytest.raises(NotImplementedError) as found:
        run.epoch(lambda run, x: kept.append(run.model(x)))
    (note,) = getattr(found.value, "__notes__", found.value.args[1:])
    assert "outputs of an earlier forward pass still exist" in note
    assert "half-way" not in note and "checkpointing" not in note


@pytest.mark.filterwarnings("ignore")
def test_ghost_clipping_names_a_model_that_calls_a_layer_twice():
    with pytest.raises(NotImplementedError) as found:
        Run("ghost", Twice).epoch()
    (note,) = getattr(found.value, "__notes__", found.value.args[1:])
    assert "calls a layer more than once" in note and "half-way" not in note


class Checkpointed(nn.Module):
    """Its first layers are called again during the backward pass."""

    def __init__(self, net):
        super().__init__()
        self.net, self.last = net, nn.Linear(3, 3)

    def forward(self, x):
        return self.last(checkpoint(self.net, x, use_reentrant=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_the_error_names_activation_checkpointing(mode, is_whole):
    run = Run(mode, None if is_whole else Checkpointed)
    if is_whole:
        model = run.model
        run.model = lambda x: checkpoint(model, x, use_reentrant=False)
    with pytest.raises((ValueError, NotImplementedError)) as found:
        run.epoch()
    (note,) = getattr(found.value, "__notes__", found.value.args[1:])
    assert "checkpointing" in note and 'grad_sample_mode="fast"' in note
    assert (mode == "ghost") == ("during the backward pass" in note)


@pytest.mark.filterwarnings("ignore")
def test_the_fast_mode_trains_with_activation_checkpointing():
    assert Run("fast", Checkpointed).epoch().links()["norm"].state == "checked"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before", [unused_pass, repeated_pass])
def test_the_fast_mode_trains_on_after_a_pass_without_backward(before):
    links = Run("fast").epoch().epoch(before).links()
    assert links["norm"].state == links["identity"].state == "checked"


def validate_without_gradients(run):
    run.model.eval()
    with torch.no_grad():
        run.criterion(run.model(INPUTS), LABELS)
    run.model.train()


def validate_with_gradients(run):
    run.model.eval()
    run.criterion(run.model(INPUTS), LABELS)
    run.model.train()


def validate_on_softened_outputs(run):
    with torch.no_grad():
        run.criterion(2 * run.model(INPUTS), LABELS)


@pytest.mark.parametrize(
    "after",
    [
        validate_without_gradients,
        validate_with_gradients,
        validate_on_softened_outputs,
    ],
)
def test_a_validation_with_the_criterion_of_ghost_clipping_says_nothing(after):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The library assumes")
        links = Run("ghost").epoch(after=after).links()
    assert {links[name].state for name in ("loss", "rows", "norm")} == {"checked"}


@pytest.mark.filterwarnings("ignore")
def test_the_criterion_that_was_passed_to_ghost_clipping_clips_nothing():
    run = Run("ghost")
    for x, y in run.loader:
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    with pytest.raises(AccountingError, match="not computed by the criterion which"):
        _ = run.engine.ledger


@pytest.mark.parametrize("owner", ["optimizer", "model", "net"])
def test_another_loss_whose_gradients_are_cleared_is_allowed(owner):
    def score(run, x):
        F.cross_entropy(run.model(x), LABELS[:6]).backward()
        getattr(run, owner).zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The library assumes")
        links = Run("ghost").epoch(score).links()
    assert links["norm"].state == links["loss"].state == "checked"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "fast"])
@pytest.mark.parametrize("weighted", [True, False])
def test_weighted_losses_of_unequal_parts_are_named(mode, weighted):
    run = Run(mode)
    run.engine.audit(run.plain)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, None)):
            loss = run.plain(run.model(x[part]), y[part])
            share = len(x[part]) / len(x)
            (share * loss if weighted else loss).backward()
        run.optimizer.step()
    if not weighted:
        assert run.links()["loss"].state == "checked"
        return
    with pytest.raises(AccountingError, match=r"multiples are 0\.333 to 0\.667"):
        _ = run.engine.ledger


@pytest.mark.filterwarnings("ignore")
def test_another_loss_after_that_of_ghost_clipping_is_refused():
    run = Run("ghost")
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.criterion(run.model(x), y).backward()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    with pytest.raises(AccountingError, match="not computed by the criterion which"):
        _ = run.engine.ledger
