"""Tensors outside of the model that are trained on the raw gradients of its loss."""

import copy
import gc
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.data import TensorDataset

from opacus_pi._torch_compat import run_backward_in_modes, starts_of_backward
from tests.private_training import prepared

N, D = 32, 6
MODES = ("hooks", "functorch", "ew", "fast")


def prepare(model, mode="hooks", *, criterion=None):
    """Prepare a run of four updates; return engine, model, optimizer, loss and loader.

    In ghost clipping the loss is a wrapper of ``criterion``.
    """
    torch.manual_seed(0)
    x, y = torch.randn(N, D), torch.arange(N) % 3
    return prepared(model, TensorDataset(x, y), mode, criterion=criterion)


def classifier():
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))


class OwnHead:
    """A head on a private encoder, with an optimizer of its own."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(D, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.own = torch.optim.SGD(self.head.parameters(), lr=0.1)

    def loss(self, outputs, labels):
        return F.cross_entropy(self.head(outputs), labels)

    def after(self, loss):
        self.own.step()
        self.own.zero_grad()


class Centres(OwnHead):
    """Trained centres of the classes in the loss."""

    def __init__(self):
        self.model = classifier()
        self.centres = nn.Parameter(torch.randn(3, 3))
        self.own = torch.optim.Adam([self.centres], lr=0.1)

    def loss(self, outputs, labels):
        pull = (outputs - self.centres[labels]).square().sum(1).mean()
        return F.cross_entropy(outputs, labels) + pull


class Temperature:
    """A temperature that the loop writes past torch's counts of writes."""

    def __init__(self):
        self.model, self.value = classifier(), torch.ones((), requires_grad=True)

    def loss(self, outputs, labels):
        return F.cross_entropy(outputs / self.value, labels)

    def after(self, loss):
        self.value.data -= 0.1 * self.value.grad
        self.value.grad = None


class FunctionalTemperature(Temperature):
    """A temperature that is another tensor in each update."""

    def after(self, loss):
        new = self.value - 0.1 * self.value.grad
        self.value = new.detach().requires_grad_()


class OwnEncoder(OwnHead):
    """An encoder before the private model, with an optimizer of its own."""

    def __init__(self):
        encoder = nn.Linear(D, D)
        self.model, self.encoder = classifier(), encoder
        self.own = torch.optim.SGD(encoder.parameters(), lr=0.1)

    def loss(self, outputs, labels):
        return F.cross_entropy(outputs, labels)

    def inputs(self, x):
        return self.encoder(x)


class Constant(Temperature):
    """A temperature with gradients that nobody uses."""

    def after(self, loss):
        self.value.grad = None


class InputGradients(Constant):
    """Inputs that require gradients, new ones in each batch."""

    def inputs(self, x):
        return x.requires_grad_()


class Frozen(OwnHead):
    """A constant head."""

    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)

    def after(self, loss):
        pass


def train(case, mode):
    engine, model, optimizer, _, loader = prepare(case.model, mode)
    inputs = getattr(case, "inputs", lambda x: x)
    for x, y in loader:
        optimizer.zero_grad()
        loss = case.loss(model(inputs(x)), y)
        loss.backward()
        optimizer.step()
        case.after(loss)
    return weights_link(engine)


def weights_link(engine):
    links = engine.ledger.custody.links
    return next(link for link in links if link.name == "weights")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (OwnHead, "(3, 8)"),
        (Centres, "(3, 3)"),
        (Temperature, "()"),
        (FunctionalTemperature, "()"),
        (OwnEncoder, "(6, 6)"),
    ],
)
def test_trained_tensors_are_reported(case, shape, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        link = train(case(), mode)
    assert link.state == "unchecked"
    assert "outside of the model got gradients" in link.sentence
    assert shape in link.sentence


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [Constant, InputGradients, Frozen])
def test_nothing_is_said_of_tensors_that_are_not_trained(case, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The library assumes")
        assert train(case(), mode).state == "checked"


@pytest.mark.filterwarnings("ignore")
def test_a_criterion_of_ghost_clipping_with_trained_centres_is_reported():
    case = Centres()

    def criterion(outputs, labels):
        pull = (outputs - case.centres[labels]).square().sum(1)
        return F.cross_entropy(outputs, labels, reduction="none") + pull

    engine, model, optimizer, loss_of, loader = prepare(
        case.model, "ghost", criterion=criterion
    )
    for x, y in loader:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        case.own.step()
        case.own.zero_grad()
    assert weights_link(engine).state == "unchecked"


@pytest.mark.filterwarnings("ignore")
def test_one_update_is_enough_where_the_head_steps_first():
    case = OwnHead()
    engine, model, optimizer, _, loader = prepare(case.model)
    x, y = next(iter(loader))
    case.loss(model(x), y).backward()
    case.own.step()
    optimizer.step()
    assert weights_link(engine).state == "unchecked"


def test_the_generator_of_a_gan_is_not_reported():
    critic = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1))
    generator = nn.Linear(4, D)
    own = torch.optim.Adam(generator.parameters(), lr=0.1)
    engine, model, optimizer, _, loader = prepare(critic)
    for x, _ in loader:
        optimizer.zero_grad()
        F.softplus(-model(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        own.zero_grad()
        F.softplus(-model(generator(torch.randn(8, 4)))).mean().backward()
        own.step()
    assert weights_link(engine).state == "checked"


def clears(own, to_none):
    own.zero_grad(set_to_none=to_none)


def clears_after_a_step(own, to_none):
    own.step()
    own.zero_grad(set_to_none=to_none)


def clears_after_a_write(own, to_none):
    for p in own.param_groups[0]["params"]:
        p.data -= 0.1 * p.grad
    own.zero_grad(set_to_none=to_none)


def accumulates(own, to_none):
    pass


def accumulates_in_another_tensor(own, to_none):
    for p in own.param_groups[0]["params"]:
        p.grad = None if p.grad is None else 0.5 * p.grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize(
    ("before", "state"),
    [
        (clears, "checked"),
        (clears_after_a_step, "unchecked"),
        (clears_after_a_write, "unchecked"),
        (accumulates, "unchecked"),
        (accumulates_in_another_tensor, "unchecked"),
    ],
)
def test_a_generator_is_reported_unless_its_gradients_were_cleared(
    before, state, to_none
):
    critic = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1))
    generator = nn.Linear(4, D)
    own = torch.optim.Adam(generator.parameters(), lr=0.1)
    engine, model, optimizer, _, loader = prepare(critic)
    for x, _ in loader:
        optimizer.zero_grad()
        fake = generator(torch.randn(8, 4))  # without detach
        (F.softplus(-model(x)) + F.softplus(model(fake))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before(own, to_none)
        F.softplus(-model(generator(torch.randn(8, 4)))).mean().backward()
        own.step()
    assert weights_link(engine).state == state
    pickle.dumps(generator), copy.deepcopy(generator)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [OwnHead, Constant])
def test_a_pass_whose_graph_is_not_known_is_reported(case, mode):
    case = case()
    engine, model, optimizer, _, loader = prepare(case.model, mode)
    with pytest.warns(UserWarning, match="the graph of its loss could not be followed"):
        for x, y in loader:
            optimizer.zero_grad()
            loss = case.loss(model(x), y)
            run_backward_in_modes([loss], [torch.ones_like(loss)])
            optimizer.step()
            case.after(loss)
    assert weights_link(engine).state == "unchecked"


def test_the_graph_of_a_pass_in_another_thread_is_not_taken_for_that_of_the_loss():
    case, link = OwnHead(), []

    def step(_):
        engine, model, optimizer, _, loader = prepare(case.model)
        x, y = next(iter(loader))
        loss = case.loss(model(x), y)
        run_backward_in_modes([loss], [torch.ones_like(loss)])
        optimizer.step()
        link.append(weights_link(engine))

    def wait(_):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(step, None).result()

    other = torch.ones(3, requires_grad=True).sum()
    other.register_hook(wait)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.backward()
    assert link[0].state == "unchecked"
    assert "could not be followed" in link[0].sentence


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "begin",
    [
        lambda loss: torch.autograd.backward(get_gradient_edge(loss)),
        lambda loss: torch.autograd.backward([loss, 0.0 * loss]),
    ],
    ids=["edge", "two losses"],
)
def test_a_pass_may_begin_at_edges_and_at_several_losses(begin):
    case = OwnHead()
    engine, model, optimizer, _, loader = prepare(case.model)
    for x, y in loader:
        optimizer.zero_grad()
        loss = case.loss(model(x), y)
        begin(loss)
        optimizer.step()
        case.after(loss)
    sentence = weights_link(engine).sentence
    assert "got gradients" in sentence
    assert "could not be followed" not in sentence


def test_a_checked_pass_keeps_nothing_of_the_loop():
    class Batch:
        pass

    def step():
        batch, x = Batch(), torch.ones(3, requires_grad=True)
        loss, seen = (2 * x).sum(), []
        loss.register_hook(lambda _: seen.append(len(starts_of_backward())))
        loss.backward()
        assert seen == [1]
        return weakref.ref(batch)

    gc.collect()
    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()
