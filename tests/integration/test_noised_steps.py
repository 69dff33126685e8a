"""Steps that use gradients without noise, by hooks or by the optimizer's own class."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.integration.raw_gradients import (
    raw_gradients_read_by,
    raw_gradients_read_in,
)
from tests.private_training import Training

CHANGED = "changed after noise"


def link(engine, name="noise"):
    links = engine.ledger.custody.links
    return next(link for link in links if link.name == name)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---------------------------------------------------------------- hooks after the noise
def replaced(optimizer, args, kwargs):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)


def written(optimizer, args, kwargs):
    for p in optimizer.param_groups[0]["params"]:
        p.grad.mul_(2)


def written_by_data(optimizer, args, kwargs):
    for p in optimizer.param_groups[0]["params"]:
        p.grad.data.mul_(2)


def harmless(optimizer, args, kwargs):
    return [float(p.grad.norm()) for p in optimizer.param_groups[0]["params"]] and None


@pytest.mark.parametrize("hook", [replaced, written, written_by_data])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_a_hook_of_the_inner_optimizer_changes_gradients(mode, hook):
    training = Training(grad_sample_mode=mode)
    training.optimizer.original_optimizer.register_step_pre_hook(hook)
    with pytest.warns(UserWarning, match=CHANGED):
        training.train(1)
    assert link(training.engine).state == "unchecked"


def test_a_hook_that_comes_later_in_training():
    training = Training().train(1)
    assert link(training.engine).state == "checked"
    training.optimizer.original_optimizer.register_step_pre_hook(replaced)
    with pytest.warns(UserWarning, match=CHANGED):
        training.train(1)


def test_a_hook_that_writes_weights():
    training = Training()

    def write(optimizer, args, kwargs):
        for p in optimizer.param_groups[0]["params"]:
            p.data.add_(1)

    training.optimizer.original_optimizer.register_step_pre_hook(write)
    with pytest.warns(UserWarning, match="Weights were changed between two updates"):
        training.train(1)


def test_a_hook_that_gives_the_step_a_closure():
    training = Training()

    def with_closure(optimizer, args, kwargs):
        return args, {"closure": lambda: torch.zeros(())}

    training.optimizer.original_optimizer.register_step_pre_hook(with_closure)
    with pytest.warns(UserWarning, match="closure"):
        training.train(1)


def test_harmless_hooks_stay_silent():
    training, plain = Training(), Training()
    inner = training.optimizer.original_optimizer
    inner.register_step_pre_hook(harmless)
    inner.register_step_post_hook(harmless)
    handle = register_optimizer_step_pre_hook(harmless)
    torch.manual_seed(5)
    training.train(2)
    handle.remove()
    torch.manual_seed(5)
    plain.train(2)
    assert link(training.engine).state == link(plain.engine).state == "checked"
    assert torch.equal(weights(training.net), weights(plain.net))


def test_hooks_keep_their_order():
    training, calls = Training(), []
    inner = training.optimizer.original_optimizer
    for name in "abc":
        inner.register_step_pre_hook(lambda *_, name=name: calls.append(name))
    training.train(1)
    assert calls[:6] == ["a", "b", "c"] * 2


# -------------------------------------------------------------- gradients that are read
class ReadsSums(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(0.01 * p.summed_grad.view_as(p))


class ReadsInHelper(torch.optim.SGD):
    def step(self, closure=None):
        return self._direction() or super().step(closure)

    def _direction(self):
        return [getattr(p, "grad_sample", None) for p in self.param_groups[0]["params"]]


class Frees(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad_sample = None
        return super().step(closure)


class DecaysInPlace(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.add_(p.detach(), alpha=0.1)
        return super().step(closure)


class Counts(torch.optim.SGD):
    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        return super().step(closure)


def with_optimizer(cls):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=cls(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return engine


@pytest.mark.filterwarnings("ignore:The library assumes")
@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (ReadsSums, "ReadsSums reads p.summed_grad"),
        (ReadsInHelper, "ReadsInHelper reads p.grad_sample"),
        (DecaysInPlace, "step of DecaysInPlace"),
    ],
)
def test_an_optimizer_class_that_uses_other_gradients(cls, sentence):
    with pytest.warns(UserWarning, match=sentence):
        engine = with_optimizer(cls)
    found = link(engine)
    assert found.state == "unchecked"
    assert sentence in found.sentence


@pytest.mark.parametrize(
    "cls",
    [
        Counts,
        torch.optim.Adam,
        torch.optim.Rprop,
        torch.optim.Adafactor,
        torch.optim.NAdam,
        partial(torch.optim.AdamW, fused=True),
        partial(torch.optim.SGD, foreach=True, weight_decay=0.1, maximize=True),
        partial(torch.optim.Rprop, foreach=True),
    ],
)
def test_usual_optimizers_stay_silent(cls):
    assert link(with_optimizer(cls)).state == "checked"


def test_an_optimizer_that_frees_gradients_stays_silent():
    assert raw_gradients_read_in(Frees) is None


def reads(optimizer, args, kwargs):
    return [p.summed_grad for p in optimizer.param_groups[0]["params"]] and None


class Reader:
    def __call__(self, optimizer, args, kwargs):
        return self.look(optimizer)

    def look(self, optimizer):
        reads(optimizer, (), {})


@pytest.mark.parametrize("hook", [reads, partial(reads), Reader(), Reader().__call__])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_that_reads_gradients_without_noise(hook, kind):
    training = Training()
    inner = training.optimizer.original_optimizer
    getattr(inner, f"register_step_{kind}_hook")(hook)
    with pytest.warns(UserWarning, match=r"reads p\.summed_grad, the sum"):
        training.train(1)
    assert link(training.engine).state == "unchecked"


def test_code_that_is_searched():
    def outer():
        return lambda p: [g for g in p.grad_sample]

    def recursive(p):
        return recursive(p.grad)

    assert raw_gradients_read_by(outer) == "grad_sample"
    assert raw_gradients_read_by(recursive) is None
    assert raw_gradients_read_by(3) is None
    assert raw_gradients_read_by(len) is None


# ------------------------------------------------------------------- monitored training
def monitored(noise_std=0.05, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    criterion = nn.CrossEntropyLoss()
    engine = PrivacyEngine(recorder=Recorder("swept", criterion=criterion))
    model, optimizer, loader = engine.make_monitored(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, torch.arange(20) % 3), batch_size=5),
        noise_std=noise_std,
        criterion=criterion,
        **options,
    )

    def train(before_step=lambda: None):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            before_step()
            optimizer.step()

    return engine, optimizer, train


@pytest.mark.parametrize("hook", [replaced, written, written_by_data])
def test_a_later_hook_of_a_monitored_step_changes_gradients(hook):
    engine, optimizer, train = monitored()
    train()
    assert link(engine).state == "checked"
    optimizer.register_step_pre_hook(hook)
    with pytest.warns(UserWarning, match=CHANGED):
        train()
    assert link(engine).state == "unchecked"


@pytest.mark.parametrize("noise_std", [0.0, 0.05])
def test_a_harmless_hook_of_a_monitored_step(noise_std):
    engine, optimizer, train = monitored(noise_std)
    optimizer.register_step_pre_hook(harmless)
    train()
    assert link(engine).state == "checked"


def test_a_hook_between_forward_pass_and_monitored_step():
    engine, optimizer, train = monitored()
    with pytest.warns(UserWarning, match="between a forward pass and the step"):
        train(lambda: optimizer.register_step_pre_hook(harmless))
    assert link(engine).state == "unchecked"
