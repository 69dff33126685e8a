"""Architectures that Opacus cannot train as they are, made ready for it."""

import copy
import pickle
import warnings

import numpy as np
import opacus
import pytest
import torch
import torchvision
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.gradients import norm_sweep
from opacus_pi.integration.compatible import make_compatible
from tests.private_training import Log, one_at_a_time

MODELS = [
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
]


class Residual(nn.Module):
    """Every way in which a hooked layer's output may be overwritten."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(64, 3)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        identity = out
        out = self.norm2(self.conv2(out))
        out += identity
        out = nn.functional.relu(self.conv2(out), inplace=True)
        out = self.conv2(out)
        out *= 2.0
        out = self.conv2(out)
        out -= identity
        return self.fc(out.flatten(1))


class InPlace(nn.Module):
    """An operation on the output of a layer, whose result is not used by itself."""

    def __init__(self, operation):
        super().__init__()
        self.fc, self.operation = nn.Linear(3, 3), operation

    def forward(self, x):
        out = self.fc(x)
        alias = out
        self.operation(out)
        return out + alias


def add_method(out):
    out.add_(1.0)


def clamp_method(out):
    out.clamp_(min=0.0)


def relu_function(out):
    nn.functional.relu(out, inplace=True)


def set_column(out):
    out[:, 1] = 0.5


class Widening(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        out = self.fc(x)
        out += torch.ones(3, dtype=torch.float64)
        return out


def images(num_examples=6, size=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_examples, 3, size, size, generator=generator)
    return x, torch.arange(num_examples) % 3


def torchvision_model(name):
    """A small-headed one without anything random."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=3)
    if name.startswith("vgg"):
        model.classifier, model.avgpool = nn.Linear(512, 3), nn.AdaptiveAvgPool2d(1)
    for layer in model.modules():
        if type(layer).__name__ in ("Dropout", "StochasticDepth"):
            layer.p = 0.0
    return model


def named_layers(model):
    return {name: type(layer).__name__ for name, layer in model.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_per_example_gradients_of_torchvision_models(name):
    model = make_compatible(torchvision_model(name)).double()
    x, y = images(2, 64)
    x = x.double()
    expected = one_at_a_time(model, x, y)
    hooked = GradSampleModule(model)
    nn.functional.cross_entropy(hooked(x), y).backward()
    squares = [p.grad_sample.flatten(1).square().sum(1) for p in model.parameters()]
    found = torch.stack(squares).sum(0).sqrt()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_only_norm_layers_and_inplace_flags_change(name):
    model = torchvision_model(name)
    before, weights = named_layers(model), copy.deepcopy(model.state_dict())
    made = make_compatible(model)
    assert isinstance(made, type(model)) and named_layers(model) == before
    assert any(getattr(layer, "inplace", False) for layer in model.modules())
    assert not any(getattr(layer, "inplace", False) for layer in made.modules())
    after = named_layers(made)
    replaced = {name for name in before if before[name] != after[name]}
    assert {before[name] for name in replaced} == {"BatchNorm2d"}
    assert {after[name] for name in replaced} == {"GroupNorm"}
    kept = made.state_dict()
    dropped = {key.rpartition(".")[2] for key in set(weights) - set(kept)}
    assert dropped == {"running_mean", "running_var", "num_batches_tracked"}
    assert set(kept) < set(weights)
    for key, value in kept.items():
        if key.rpartition(".")[0] not in replaced:
            assert torch.equal(value, weights[key]), key


def test_outputs_are_those_of_the_model_as_it_was_written():
    torch.manual_seed(0)
    model, (x, _) = Residual().eval(), images()
    model.norm1, model.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
    made = make_compatible(model)
    assert torch.equal(made(x), model(x))
    assert torch.equal(GradSampleModule(made)(x), model(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_stay_compatible(copied):
    made = make_compatible(make_compatible(Residual()))
    twin = copied(made)
    assert type(twin) is type(made) and isinstance(twin, Residual)
    x, y = images()
    nn.functional.cross_entropy(GradSampleModule(twin)(x), y).backward()
    assert torch.equal(twin(x), made(x))


def train(model, mode, engine, **options):
    x, y = images()
    criterion, plain = nn.CrossEntropyLoss(), copy.deepcopy(model)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=3),
        criterion=criterion,
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
        **options,
    )
    hooked, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else criterion
    expected = []
    for inputs, labels in loader:
        plain.load_state_dict(model.state_dict())
        expected += one_at_a_time(plain, inputs, labels)
        optimizer.zero_grad()
        criterion(hooked(inputs), labels).backward()
        optimizer.step()
    return expected


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_training_records_norms_of_one_example_at_a_time(mode):
    torch.manual_seed(0)
    plain = Residual()
    engine = PrivacyEngine(recorder=Log())
    model = engine.get_compatible_module(plain)
    before = copy.deepcopy(model.state_dict())
    expected = train(model, mode, engine)
    assert [i for i, _ in engine.recorder.observed] == list(range(6))
    found = [norm for _, norm in engine.recorder.observed]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not torch.equal(before["fc.weight"], model.fc.weight)


def test_sweeps_measure_a_compatible_model():
    torch.manual_seed(0)
    model, (x, y) = make_compatible(Residual()), images()
    found = norm_sweep(model, nn.CrossEntropyLoss(), TensorDataset(x, y))
    np.testing.assert_allclose(found, one_at_a_time(model, x, y), rtol=1e-5)


def made_private(model, wrap_model):
    """What ``make_private`` returns for a model: it wrapped, or hooks beside it."""
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*images()), batch_size=3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=wrap_model,
    )[0]


@pytest.mark.parametrize("wrap_model", [True, False])
def test_an_in_place_operation_is_explained_where_it_fails(wrap_model):
    model = opacus.validators.ModuleValidator.fix(Residual())
    hooks = made_private(model, wrap_model)
    with pytest.raises(RuntimeError, match="BackwardHookFunction") as caught:
        (hooks if wrap_model else model)(images()[0])
    notes = getattr(caught.value, "__notes__", map(str, caught.value.args))
    assert sum("make_compatible(module)" in note for note in notes) == 1
    assert "make_compatible" not in str(pickle.dumps(model))


def test_other_errors_stay_as_they_are():
    model = make_compatible(Residual())
    made_private(model, wrap_model=False)
    with pytest.raises(RuntimeError, match="size|shape") as caught:
        model(torch.zeros(1, 5, 5, 5))
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    "operation", [add_method, clamp_method, relu_function, torch.relu_, set_column]
)
def test_in_place_operations_have_their_effect(operation):
    model = make_compatible(InPlace(operation)).double()
    x, y = torch.randn(4, 3).double(), torch.arange(4) % 3
    plain, expected = model(x), one_at_a_time(model, x, y)
    hooked = GradSampleModule(model)
    outputs = hooked(x)
    assert torch.equal(outputs, plain)
    nn.functional.cross_entropy(outputs, y).backward()
    squares = [p.grad_sample.flatten(1).square().sum(1) for p in model.parameters()]
    np.testing.assert_allclose(torch.stack(squares).sum(0).sqrt(), expected, rtol=1e-9)


def square_then_overwrite(out):
    square = out * out  # autograd saves out for the gradient of this
    out += square


def test_a_tensor_that_autograd_has_saved_is_refused_by_torch_and_explained():
    """The plain model fails too, in its backward pass."""
    model = make_compatible(InPlace(square_then_overwrite))
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()
    made_private(model, wrap_model=False)
    with pytest.raises(RuntimeError, match="modified inplace") as caught:
        model(x)
    assert "overwrites the output" in str(getattr(caught.value, "__notes__", caught))


def test_augmented_assignment_keeps_the_type_as_in_place_operations_do():
    assert GradSampleModule(make_compatible(Widening()))(torch.ones(2, 3)).dtype is (
        torch.float32
    )


def test_a_layer_alone_keeps_its_class():
    layer = nn.Linear(2, 2)
    assert type(make_compatible(layer)) is nn.Linear


def test_options_reach_opacus():
    assert make_compatible(Residual(), num_groups=1).norm1.num_groups == 1


def test_a_group_norm_whose_outputs_are_constant_is_warned_of():
    model = make_compatible(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)))
    with pytest.warns(UserWarning, match="do not depend .*LayerNorm.8. before"):
        outputs = model(torch.randn(4, 3))
    torch.testing.assert_close(outputs, torch.zeros(4, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(8), (4, 8, 5)),
        (nn.BatchNorm1d(64), (4, 64)),
        (nn.BatchNorm2d(8), (4, 8, 2, 2)),
        (nn.BatchNorm2d(8), (0, 8, 2, 2)),
        (nn.GroupNorm(8, 8), (4, 8)),  # the user's own replaced nothing
    ],
)
def test_other_group_norms_are_not_warned_of(layer, shape):
    model = make_compatible(nn.Sequential(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(shape))
