"""The fast mode adds Opacus's noise in place: the same bits, from the same draws."""

import functools

import pytest
import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers import optimizer as opacus_optimizer
from torch import nn
from torch.overrides import TorchFunctionMode

from opacus_pi import AccountingError
from opacus_pi.integration import opacus_compat
from opacus_pi.integration.fast.optimizer import _ClippingFromCache, clip_from_cache
from tests.integration.fast.training import training

SHAPES = [(), (1,), (7,), (3, 5), (40, 33), (2, 3, 3, 3), (4, 1, 6), (0, 3)]
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
IN_PLACE = ["normal", "add_", "view_as"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Optimal order is the largest alpha", "ignore:Secure RNG turned off"
)


class Calls(TorchFunctionMode):
    """The names of the functions of torch that are called, and what ``normal`` made."""

    def __init__(self):
        super().__init__()
        self.names, self.noises = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("zeros", "zeros_like", "normal", "add", "add_", "view_as"):
            self.names.append(name)
        if name == "normal":
            self.noises.append(result)
        return result


def sums(kind=torch.float32):
    """Sums of clipped gradients, negative zeros and infinities among them."""
    generator = torch.Generator().manual_seed(5)
    found = [torch.randn(shape, generator=generator).to(kind) for shape in SHAPES]
    found[3][0] = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), 1e-7])
    return found


def made(in_place, values, *, kind=DPOptimizer, generator=None, **options):
    """An optimizer with these sums, of the fast mode or as Opacus makes it."""
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in values]
    options = {"noise_multiplier": 1.3, "max_grad_norm": 0.7, **options}
    optimizer = kind(
        torch.optim.SGD(parameters),
        expected_batch_size=4,
        generator=generator,
        **options,
    )
    if in_place:
        clip_from_cache(optimizer, None)  # nothing is clipped here
    for parameter, value in zip(parameters, values, strict=True):
        own = value.detach().clone()
        parameter.summed_grad = own.requires_grad_(value.requires_grad)
    return optimizer


def noised(optimizer, seed=3):
    """Add noise; return gradients, sums, states of both generators, and calls."""
    torch.manual_seed(seed)
    with Calls() as calls:
        optimizer.add_noise()
    own = optimizer.generator
    states = [torch.get_rng_state(), None if own is None else own.get_state()]
    grads = [p.grad for p in optimizer.params]
    return grads, [p.summed_grad for p in optimizer.params], states, calls.names


def same_bits(one, other):
    """Whether two tensors agree in type, layout, history and every bit."""
    if one is None or other is None:
        return one is other
    bits = [t.detach().reshape(-1).view(torch.uint8) for t in (one, other) if t.numel()]
    kinds, others = (
        (type(t), t.dtype, t.shape, t.stride(), t.requires_grad) for t in (one, other)
    )
    return kinds == others and (not bits or bool(bits[0].equal(bits[1])))


def require_opacus_bits(ours, theirs):
    """Return the calls of ours, if all that noise leaves behind is the same."""
    (*found, calls), (*expected, _) = noised(ours), noised(theirs)
    for one, other in zip(found, expected, strict=True):
        assert all(map(same_bits, one, other))
    assert all(p.summed_grad._processed for p in ours.params)
    return calls


def seeded(has_own):
    return torch.Generator().manual_seed(9) if has_own else None


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("has_own", [False, True])
def test_noise_is_opacus_s_to_the_bit(kind, has_own):
    pair = [made(it, sums(kind), generator=seeded(has_own)) for it in (True, False)]
    before = sums(kind)
    assert require_opacus_bits(*pair) == IN_PLACE * len(SHAPES)
    for p, sum_ in zip(pair[0].params, before, strict=True):
        assert same_bits(p.summed_grad, sum_)
        assert not p.numel() or p.grad.data_ptr() != p.summed_grad.data_ptr()


@pytest.mark.parametrize("has_own", [False, True])
def test_without_noise_nothing_is_drawn(has_own):
    options = {"noise_multiplier": 0.0}
    pair = [
        made(it, sums(), generator=seeded(has_own), **options) for it in (True, False)
    ]
    assert "normal" not in require_opacus_bits(*pair)
    grads, sums_, states, _ = noised(made(True, sums(), **options), seed=4)
    assert torch.equal(states[0], torch.manual_seed(4).get_state())
    assert all(map(torch.equal, grads, sums_))


def test_secure_mode_is_opacus_s_own():
    pair = [
        made(it, sums(), generator=seeded(True), secure_mode=True)
        for it in (True, False)
    ]
    calls = require_opacus_bits(*pair)
    assert calls.count("normal") == 5 * len(SHAPES)


# ---------------------------------------------------------- where Opacus's method runs
class PerParameter(DPOptimizer):
    """Its noise multiplier is another one whenever it is read."""

    reads = 0

    @property
    def noise_multiplier(self):
        self.reads += 1
        return float(self.reads)

    @noise_multiplier.setter
    def noise_multiplier(self, value):
        pass


class Doubled(DPOptimizer):
    def add_noise(self):
        super().add_noise()
        for p in self.params:
            p.grad = 2 * p.grad


def test_a_noise_multiplier_is_read_for_each_parameter():
    pair = [made(it, sums(), kind=PerParameter) for it in (True, False)]
    assert require_opacus_bits(*pair) == IN_PLACE * len(SHAPES)


def test_the_method_of_a_derived_class_runs():
    pair = [made(it, sums(), kind=Doubled) for it in (True, False)]
    assert "zeros" in require_opacus_bits(*pair)


def plain_noise(optimizer):
    for p in optimizer.params:
        p.grad = (p.summed_grad + 1).view_as(p)
        p.summed_grad._processed = True


def half(*arguments, generate=opacus_optimizer._generate_noise, **options):
    return generate(*arguments, **options) / 2


def wrapped(original):
    @functools.wraps(original)
    def add_noise(self):
        original(self)
        for p in self.params:
            p.grad.mul_(3)

    return add_noise


@pytest.mark.parametrize(
    "owner, name, replacement",
    [
        (DPOptimizer, "add_noise", plain_noise),
        (DPOptimizer, "add_noise", wrapped(DPOptimizer.add_noise)),
        (opacus_optimizer, "_generate_noise", half),
        (opacus_compat, "_release", "1.6.1"),
    ],
    ids=["method", "wrapper", "function", "release"],
)
def test_what_other_code_put_in_place_runs(monkeypatch, owner, name, replacement):
    pair = [made(it, sums(), generator=seeded(True)) for it in (True, False)]
    monkeypatch.setattr(owner, name, replacement)
    assert require_opacus_bits(*pair) != IN_PLACE * len(SHAPES)


def test_a_method_on_the_object_runs():
    optimizer = made(True, sums())
    optimizer.add_noise = lambda: plain_noise(optimizer)
    optimizer.add_noise()
    for p in optimizer.params:
        assert torch.equal(p.grad, p.summed_grad + 1)


class Marked(torch.Tensor):
    """A tensor of another type, which sums keep."""


@pytest.mark.parametrize(
    "unusual",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: t.as_subclass(Marked),
        lambda t: t.clone().requires_grad_(),
    ],
    ids=["strides", "type", "history"],
)
def test_sums_that_are_not_plain_tensors(unusual):
    values = sums()
    values[4] = unusual(values[4])
    pair = [made(it, values) for it in (True, False)]
    assert "zeros" in require_opacus_bits(*pair)


@pytest.mark.parametrize("missing", [0, 4])
def test_errors_are_opacus_s(missing):
    texts, states = [], []
    for in_place in (True, False):
        optimizer = made(in_place, sums())
        optimizer.params[missing].summed_grad = None
        torch.manual_seed(0)
        with pytest.raises(AttributeError) as caught:
            optimizer.add_noise()
        texts.append(str(caught.value))
        states.append(torch.get_rng_state())
    assert texts[0] == texts[1] and torch.equal(*states)


def test_noise_is_added_once():
    optimizer = made(True, sums())
    optimizer.add_noise()
    before = [p.grad.clone() for p in optimizer.params]
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.add_noise()
    assert all(map(same_bits, before, [p.grad for p in optimizer.params]))


# ------------------------------------------------------------------- whole trainings
@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_trainings_are_the_same_to_the_bit(monkeypatch, name, has_own):
    found = []
    for in_place in (True, False):
        if not in_place:
            monkeypatch.delattr(_ClippingFromCache, "add_noise")
        one = training("fast", name, batch_size=12)
        if not has_own:
            one.optimizer.generator = None
        torch.manual_seed(3)
        with Calls() as calls:
            for _ in one.memory_managed(5):
                one.train(2)
        assert ("zeros" in calls.names) != in_place
        state = one.optimizer.generator.get_state() if has_own else None
        values = [p.detach() for p in one.net.parameters()]
        found.append([*values, state, torch.get_rng_state()])
    assert all(map(same_bits, *found))


# ------------------------------------------------- loops that take the noise out again
def step_with(one, hook):
    one.optimizer.attach_step_hook(hook)
    one.train(1)


def noise_link(one):
    links = one.engine.ledger.custody.links
    return next(link for link in links if link.name == "noise")


def test_noise_is_said_to_be_drawn_once():
    one = training("fast", "mlp").train(1)
    assert noise_link(one).state == "checked"


@pytest.mark.parametrize("how", ["cleared", "subtracted", "swapped"])
def test_a_loop_that_keeps_the_noise_and_takes_it_out(how):
    """The tensor that ``torch.normal`` returned is now the memory of the gradient."""
    one = training("fast", "mlp")

    def take_out(optimizer):
        newest = calls.noises[-len(optimizer.params) :]
        for p, noise in zip(optimizer.params, newest, strict=True):
            if how == "cleared":
                noise.copy_(p.summed_grad / optimizer.expected_batch_size)
            elif how == "subtracted":
                noise.sub_(noise - p.summed_grad / optimizer.expected_batch_size)
            else:
                noise.set_((p.summed_grad / optimizer.expected_batch_size).clone())
                p.grad = noise.view_as(p)

    with Calls() as calls, pytest.warns(UserWarning, match="changed after noise"):
        step_with(one, take_out)
    assert noise_link(one).state == "unchecked"


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize("is_class", [False, True])
def test_a_method_that_leaves_out_noise_is_refused(monkeypatch, is_class):
    one = training("fast", "mlp")
    optimizer = one.optimizer
    if is_class:
        monkeypatch.setattr(type(optimizer), "add_noise", plain_noise)
    else:
        optimizer.add_noise = lambda: plain_noise(optimizer)
    one.train(1)
    with pytest.raises(AccountingError, match="noise"):
        _ = one.engine.ledger
