"""Writes of a training loop to the buffers of its model are reported."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.custody.buffers import BufferLink
from opacus_pi.custody.chain import Chain


class Centred(nn.Module):
    """A linear layer on centred inputs, with a buffer for each way to write one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("num_passes", torch.tensor(0), persistent=False)
        self.register_buffer("later", None)
        self.offset = torch.zeros(5)

    def forward(self, x):
        self.num_passes += 1
        shift = 0.0 if self.later is None else self.later
        return self.linear(x - self.mean - self.offset - shift)


def private(module, weights, **options):
    """Return an engine, and what it prepared for 24 examples in batches of 6."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5), torch.randint(0, 3, (24,)))
    engine = PrivacyEngine()
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(weights, lr=0.1),
        data_loader=DataLoader(data, 6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    return engine, *made


def trained(write):
    """Train for four updates; ``write`` gets the module and inputs before each."""
    torch.manual_seed(0)
    module = Centred()
    engine, model, optimizer, loader = private(
        module, module.parameters(), poisson_sampling=False
    )
    for x, y in loader:
        write(module, x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return engine, module, optimizer


def weights_link(engine):
    return next(k for k in engine.ledger.custody.links if k.name == "weights")


def in_place(module, x):
    module.mean.mul_(0.9).add_(0.1 * x.mean(0))


def through_data(module, x):
    module.mean.data.copy_(x.mean(0))


def through_numpy(module, x):
    module.mean.numpy()[:] = x.mean(0).numpy()


def replaced(module, x):
    module.mean = 0.9 * module.mean + 0.1 * x.mean(0)


def first_value(module, x):
    module.later = x.mean(0)


def other_attribute(module, x):
    module.offset = x.mean(0)


def other_attribute_in_place(module, x):
    module.offset += x.mean(0)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (in_place, "The buffer 'mean'"),
        (through_data, "A buffer of the model"),
        (through_numpy, "A buffer of the model"),
        (replaced, "The buffer 'mean'"),
        (first_value, "The buffer 'later'"),
        (other_attribute, "The buffer 'offset'"),
        (other_attribute_in_place, "The buffer 'offset'"),
    ],
)
def test_writes_of_the_loop_are_said(write, name):
    with pytest.warns(UserWarning, match=f"{name}.*outside of the model's forward"):
        engine, _, _ = trained(write)
    link = weights_link(engine)
    assert link.state == "unchecked"
    assert name in link.sentence


def test_a_write_after_the_last_update_is_said():
    engine, module, optimizer = trained(nothing)
    module.mean += 1
    with pytest.warns(UserWarning, match="'mean'"):
        link = weights_link(engine)
    assert link.state == "unchecked"


def nothing(module, x):
    pass


def same_values(module, x):
    module.mean = module.mean.clone()


def evaluated(module, x):
    module.eval()
    with torch.no_grad():
        module(x)
    module.train()


def failed_pass(module, x):
    with pytest.raises(RuntimeError):
        module(x[:, :2])


def state_loaded(module, x):
    own = copy.deepcopy(module.state_dict())
    module.load_state_dict({**own, "mean": own["mean"] + 1})  # to evaluate others
    module.load_state_dict(own)


def in_vmap(module, x):
    tensors = dict(module.named_parameters()), dict(module.named_buffers())
    stacked = {name: torch.stack([b, b]) for name, b in tensors[1].items()}

    def call(buffers):
        return torch.func.functional_call(module, (tensors[0], buffers), (x,))

    module.eval()
    with torch.no_grad():
        torch.func.vmap(call)(stacked)
    module.train()


@pytest.mark.parametrize(
    "write", [nothing, same_values, evaluated, failed_pass, state_loaded, in_vmap]
)
def test_writes_of_the_forward_pass_and_equal_values_are_not(write):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*outside of the model's forward")
        engine, module, optimizer = trained(write)
        assert weights_link(engine).state == "checked"
    assert module.num_passes >= 4
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    copied.mean += 1
    copied.eval()(torch.zeros(2, 5))
    assert weights_link(engine).state == "checked"


def prepared(module):
    data = DataLoader(TensorDataset(torch.randn(8, 5)), 4)
    return PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def hooks_on_buffers(module):
    """Return the hooks before a model's passes that do not count its calls."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if "_Call" not in repr(hook)]


def test_a_model_that_is_prepared_again_has_one_hook_before_its_passes():
    module = Centred()
    for _ in range(2):
        model, *_ = prepared(module)
        assert len(hooks_on_buffers(module)) == 1
        module = copy.deepcopy(model.to_standard_module())


def test_a_model_without_other_tensors_has_none():
    module = nn.Sequential(nn.Linear(5, 3))  # a layer may be watched itself
    prepared(module)
    assert not hooks_on_buffers(module)


class Observing(nn.Module):
    """A linear layer between whose outputs and the loss a buffer is written."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(5, 3), how
        self.register_buffer("state", torch.tensor(0.5))

    def forward(self, x):
        z = self.linear(x)
        if self.training and len(x):
            if self.how == "largest":
                self.state = torch.maximum(self.state, z.detach().abs().max())
            elif self.how == "largest in place":
                self.state.copy_(torch.maximum(self.state, z.detach().abs().max()))
            elif self.how == "schedule":
                self.state *= 0.99
            elif self.how == "constant":
                self.state = torch.tensor(0.5)
        return z / (1 + self.state)


def observed(module, mode="hooks"):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 5), torch.arange(60) % 3)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, 12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {k.name: k.sentence for k in engine.ledger.custody.unchecked}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["largest", "largest in place"])
def test_a_buffer_that_may_keep_data_is_said(how):
    assert "write to the buffer 'state'" in observed(Observing(how))["model"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["schedule", "constant", "none"])
def test_a_buffer_that_changes_by_itself_is_not(how):
    assert "model" not in observed(Observing(how))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_is_said_if_the_user_declares_the_model():
    class Silent(Observing):
        pass

    link = BufferLink(module := Silent("largest"), chain := Chain())
    for _ in range(2):
        link.before_pass()
        module(torch.randn(4, 5))
        link.after_pass(is_training=True)
    assert not chain.doubts()


class Holder(nn.Module):
    """Holds a tensor, as a metric does."""

    def __init__(self, kind):
        super().__init__()
        if kind == "attribute":
            self.state = torch.zeros(5)
        else:
            self.register_buffer("state", torch.zeros(5), persistent=kind == "saved")

    def add(self, x):
        self.state = self.state + x.sum(0)

    def add_in_place(self, x):
        self.state += x.sum(0)


def not_read(state, x, is_training):
    return x


def read(state, x, is_training):
    return x - state


def read_in_evaluation(state, x, is_training):
    return x if is_training else x - state


def read_as_a_number(state, x, is_training):
    return x - float(state[0])


def read_by_numpy(state, x, is_training):
    return x - torch.from_numpy(state.numpy())


def read_as_data(state, x, is_training):
    return x - state.data


def read_by_normalisation(state, x, is_training):
    return nn.functional.batch_norm(x, state, torch.ones(5))


class Measured(nn.Module):
    """A linear layer beside a held tensor."""

    def __init__(self, use, kind):
        super().__init__()
        self.use, self.held, self.linear = use, Holder(kind), nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(self.use(self.held.state, x, self.training))


def link_of(module, add):
    engine, model, optimizer, loader = private(
        module, module.parameters(), poisson_sampling=False
    )
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        add(module.held, x)
        loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weights_link(engine)


READS = [
    read,
    read_in_evaluation,
    read_as_a_number,
    read_by_numpy,
    read_as_data,
    read_by_normalisation,
]


@pytest.mark.parametrize("add", [Holder.add, Holder.add_in_place])
@pytest.mark.parametrize("kind", ["attribute", "not saved"])
def test_the_state_of_a_metric_is_not_reported(kind, add):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Full backward hook|This run|Secure RNG")
        assert link_of(Measured(not_read, kind), add).state == "checked"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("add", [Holder.add, Holder.add_in_place])
@pytest.mark.parametrize(
    ("use", "kind"),
    [(not_read, "saved"), *[(r, k) for r in READS for k in ("attribute", "not saved")]],
)
def test_a_tensor_that_is_saved_or_read_in_any_way_is_reported(use, kind, add):
    link = link_of(Measured(use, kind), add)
    assert link.state == "unchecked"
    assert "The buffer 'held.state' of the model was changed" in link.sentence


@pytest.mark.filterwarnings("ignore")
def test_a_write_to_a_read_tensor_is_reported_beside_a_metric():
    module = Measured(not_read, "attribute")
    module.register_buffer("mean", torch.zeros(5))

    def add(held, x):
        held.add(x)
        module.mean += x.mean(0)

    link = link_of(module, add)
    assert "The buffer 'mean' of the model was changed" in link.sentence
    assert "held.state" not in link.sentence


class Hidden(nn.Module):
    """A head on an encoder that the model does not register."""

    def __init__(self, place):
        super().__init__()
        self.linear, encoder = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 5))
        if place == "list":
            self.encoders = [encoder]
        elif place == "dictionary":
            self.encoders = {0: encoder}
        elif place == "frozen":
            self.encoders = [encoder.requires_grad_(False)]
        elif place == "registered, too":
            self.encoder = encoder.requires_grad_(False)
            self.encoders = [encoder, self.linear]
        else:
            object.__setattr__(self, "encoders", encoder)
        self.found = encoder

    def __setattr__(self, name, value):
        if name == "found":  # for the tests; the model does not register it
            value = lambda encoder=value: encoder  # noqa: E731
        super().__setattr__(name, value)

    def forward(self, x):
        return self.linear(self.found()(x).detach())


def weights_after(module, change):
    engine, model, optimizer, loader = private(module, module.linear.parameters())
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        change(module.found(), x)
    return weights_link(engine)


def train_openly(encoder, x):
    (encoder(x) - x).square().mean().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter -= 0.1 * parameter.grad


def leave(encoder, x):
    pass


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("list", "encoders[0].0.weight"),
        ("dictionary", "encoders[0].0.weight"),
        ("attribute", "encoders.0.weight"),
    ],
)
def test_a_network_that_the_model_does_not_register_is_watched(place, name):
    link = weights_after(Hidden(place), train_openly)
    assert link.state == "unchecked"
    assert f"The weight {name!r}, which is not among" in link.sentence
    assert weights_after(Hidden(place), leave).state == "checked"


@pytest.mark.parametrize("place", ["frozen", "registered, too"])
def test_lists_of_registered_or_frozen_layers_raise_no_alarm(place):
    assert weights_after(Hidden(place), leave).state == "checked"
