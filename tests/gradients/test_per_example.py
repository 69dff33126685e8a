import copy
import types

import pytest
import torch
from opacus import grad_sample
from torch import nn

from opacus_pi.gradients import per_example_grad_norms

from .cases import CASES, make
from .oracle import double, loop_norms

CRITERION = nn.CrossEntropyLoss()
LOSSES = nn.CrossEntropyLoss(reduction="none")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_equals_loop_in_float32(name):
    model, x, y = make(name)
    norms = per_example_grad_norms(model, CRITERION, x, y)
    assert norms.dtype == torch.float64 and norms.shape == y.shape
    assert not norms.requires_grad
    torch.testing.assert_close(
        norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_equals_loop_in_float64(name):
    model, x, y = make(name, seed=1)
    model, x = model.double(), double(x)
    torch.testing.assert_close(
        per_example_grad_norms(model, CRITERION, x, y),
        loop_norms(model, LOSSES, x, y),
        rtol=1e-10,
        atol=0,
    )


WRAPPERS = {
    "plain": lambda model: model,
    "data-parallel": nn.DataParallel,
    "hooks": grad_sample.GradSampleModule,
    "functorch": lambda m: grad_sample.GradSampleModule(m, force_functorch=True),
    "ew": grad_sample.GradSampleModuleExpandedWeights,
    "ghost": grad_sample.GradSampleModuleFastGradientClipping,
    "twice": lambda m: grad_sample.GradSampleModule(nn.DataParallel(m)),
}


@pytest.mark.parametrize("mode", WRAPPERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_model_wrapped_by_opacus_in_the_middle_of_training(mode):
    model, x, y = make("conv-mixed")
    plain = copy.deepcopy(model)
    wrapper = WRAPPERS[mode](model)
    CRITERION(wrapper(x), y).backward()  # leaves grad_samples behind
    if mode != "ew":  # (which allows one forward pass only)
        wrapper(x)  # and activations
    torch.testing.assert_close(
        per_example_grad_norms(wrapper, CRITERION, x, y),
        loop_norms(plain, LOSSES, x, y),
        rtol=1e-5,
        atol=0,
    )


def test_weighted_and_smoothed_criterion():
    model, x, y = make("mlp")
    weight = torch.rand(5)
    criterion = nn.CrossEntropyLoss(weight, reduction="sum", label_smoothing=0.1)
    losses = nn.CrossEntropyLoss(weight.double(), reduction="none", label_smoothing=0.1)
    norms = per_example_grad_norms(model, criterion, x, y)
    torch.testing.assert_close(
        norms, loop_norms(model, losses, x, y), rtol=1e-5, atol=0
    )


def test_criterion_that_refuses_float64_is_called_in_float32():
    model, x, y = make("mlp")
    weight = torch.rand(5)

    def criterion(outputs, y):
        return nn.functional.cross_entropy(outputs, y, weight, reduction="none")

    with pytest.warns(UserWarning, match="refused float64"):
        norms = per_example_grad_norms(model, criterion, x, y)
    losses = nn.CrossEntropyLoss(weight.double(), reduction="none")
    torch.testing.assert_close(
        norms, loop_norms(model, losses, x, y), rtol=1e-5, atol=0
    )


def test_small_gradients_of_a_trained_network():
    torch.manual_seed(0)
    x, y = torch.randn(256, 20), torch.randint(0, 4, (256,))
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    norms = per_example_grad_norms(model, CRITERION, x, y)
    truth = loop_norms(model, LOSSES, x, y)
    assert truth.quantile(0.1) < 0.1 * truth.max()  # there are small ones
    assert ((norms / truth - 1).abs()).quantile(0.99) < 1e-5


def test_tiny_gradients_do_not_underflow():
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    norms = per_example_grad_norms(model, CRITERION, x, y)
    tiny = per_example_grad_norms(model, lambda o, t: LOSSES(o, t) * 1e-30, x, y)
    torch.testing.assert_close(tiny * 1e30, norms, rtol=1e-5, atol=0)


def test_zero_gradients_are_zero():
    model = nn.Linear(3, 2)
    norms = per_example_grad_norms(
        model, lambda o, t: o.sum(1) * t, torch.randn(2, 3), torch.tensor([0, 1])
    )
    assert norms[0] == 0 and norms[1] > 0


def test_parameter_without_influence_counts_nothing():
    model, x, y = make("mlp")
    before = per_example_grad_norms(model, CRITERION, x, y)
    model.unused = nn.Linear(3, 3)
    model.raw = nn.Parameter(torch.ones(3))
    model.forward = types.MethodType(lambda self, x: self[:7](x), model)
    assert torch.equal(per_example_grad_norms(model, CRITERION, x, y), before)


def test_user_hooks_that_compute_are_kept():
    model, x, y = make("mlp")
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    model[3].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    torch.testing.assert_close(
        per_example_grad_norms(model, CRITERION, x, y),
        loop_norms(model, LOSSES, x, y),
        rtol=1e-5,
        atol=0,
    )


class Mixed(nn.Module):
    def forward(self, x):
        return x + x.mean(0)


class Noisy(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x)  # on in evaluation mode too


def test_examples_that_interact_are_taken_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Mixed(), nn.Linear(4, 5))
    x, y = torch.randn(6, 3), torch.randint(0, 5, (6,))
    with pytest.warns(UserWarning, match="influence each other"):
        norms = per_example_grad_norms(model, CRITERION, x, y)
    torch.testing.assert_close(
        norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


def test_random_model_warns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), Noisy(), nn.Linear(40, 5))
    with pytest.warns(UserWarning, match="random in evaluation mode"):
        per_example_grad_norms(model, CRITERION, torch.randn(5, 3), torch.arange(5))


@pytest.mark.parametrize(
    "criterion", [lambda o, y: LOSSES(o, y).mean(), lambda o, y: LOSSES(o, y)[:2]]
)
def test_criterion_without_one_loss_per_example_is_refused(criterion):
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match='Pass a criterion with reduction="none"'):
        per_example_grad_norms(model, criterion, x, y)


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="BatchNorm1d '1' without running statistics"):
        per_example_grad_norms(model, CRITERION, torch.randn(4, 2), torch.zeros(4))


def test_nothing_trainable_is_refused():
    model = nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        per_example_grad_norms(model, CRITERION, torch.randn(4, 2), torch.zeros(4))


def test_closure_over_the_live_model_is_refused():
    model, x, y = make("mlp")
    inner = model[1]
    inner.forward = lambda x: nn.functional.linear(x, inner.weight, inner.bias)
    with pytest.raises(
        ValueError, match="computes with the parameters of the original"
    ):
        per_example_grad_norms(model, CRITERION, x, y)
