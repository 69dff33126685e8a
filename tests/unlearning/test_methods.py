"""Each method's update against slow, independent arithmetic."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi.unlearning import FineTune, L1Sparse, Langevin, Method, Task, Unlearner
from opacus_pi.unlearning.methods import clipped_loss, expected_batch_size, mean_loss

CRITERION = nn.CrossEntropyLoss()
METHODS = [FineTune(), Langevin(0.1), Langevin(0.1, max_grad_norm=1.0), L1Sparse(1e-3)]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))


def data(n=24, seed=1):
    torch.manual_seed(seed)
    return torch.utils.data.TensorDataset(torch.randn(n, 5), torch.arange(n) % 3)


def loader(n=24, batch_size=8):
    order = torch.Generator().manual_seed(3)
    return torch.utils.data.DataLoader(
        data(n), batch_size=batch_size, shuffle=True, generator=order
    )


def trained(method, num_steps=7, **options):
    """The weights after some updates, and the generator's state."""
    generator = torch.Generator().manual_seed(5)
    unlearner = Unlearner(
        net(), criterion=CRITERION, method=method, generator=generator, **options
    )
    torch.manual_seed(11)  # dropout
    list(unlearner.run(loader(), num_steps))
    weights = [p.detach().clone() for p in unlearner.model.parameters()]
    return weights, generator.get_state()


@pytest.mark.parametrize(
    "method",
    [
        Langevin(0.0),
        Langevin.from_weight_noise(0.0, 0.1),
        L1Sparse(0.0),
        L1Sparse(0.0, schedule="constant"),
    ],
)
def test_methods_at_zero_are_fine_tuning_bit_for_bit(method):
    expected, untouched = trained(FineTune())
    weights, state = trained(method)
    assert torch.equal(state, untouched)
    for a, b in zip(weights, expected, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_fine_tune_is_a_plain_loop():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(11)
    batches = [batch for own in [loader()] for _ in range(3) for batch in own]
    for x, y in batches[:7]:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    weights, _ = trained(FineTune())
    for a, b in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-7)


def test_langevin_noise_has_the_stated_spread():
    params = [nn.Parameter(torch.zeros(300, 100)), nn.Parameter(torch.zeros(20_000))]
    params[0].grad = torch.full((300, 100), 2.0)
    Langevin(0.3).perturb_(params, torch.Generator().manual_seed(0))
    noise = torch.cat([(params[0].grad - 2).flatten(), params[1].grad])
    size = noise.numel()
    assert abs(noise.mean()) < 4 * 0.3 / math.sqrt(size)
    assert abs(noise.std() / 0.3 - 1) < 4 / math.sqrt(2 * size)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(size)


def test_weight_noise_moves_the_weights_by_its_own_spread():
    rate, std = 0.04, 0.5
    params = [nn.Parameter(torch.zeros(40_000))]
    Langevin.from_weight_noise(std, rate).perturb_(params, torch.Generator())
    torch.optim.SGD(params, lr=rate).step()
    assert params[0].detach().std() == pytest.approx(
        math.sqrt(2 * rate) * std, rel=0.02
    )


def test_stationary_variance_on_a_quadratic():
    # w <- (1 - ηm) w - η N(0, s²): variance η s² / (m (2 - ηm)), from w' = cw + noise
    rate, curvature, std, size = 0.2, 1.5, 0.7, 4000
    model = nn.Linear(size, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def criterion(_, y):
        return 0.5 * curvature * model_weight().pow(2).sum() * torch.ones(len(y))

    unlearner = Unlearner(
        model,
        criterion=criterion,
        method=Langevin(std),
        optimizer=lambda p: torch.optim.SGD(p, lr=rate),
        generator=torch.Generator().manual_seed(2),
    )

    def model_weight():
        return unlearner.model.weight

    variances = []
    for step in unlearner.run([(torch.zeros(1, size), torch.zeros(1))], 60):
        if step > 30:
            variances.append(unlearner.model.weight.detach().var().item())
    expected = rate * std**2 / (curvature * (2 - rate * curvature))
    assert np.mean(variances) == pytest.approx(expected, rel=0.03)


def task_of(model, batches=()):
    criterion = nn.CrossEntropyLoss(reduction="none")
    return Task(model, criterion, batches or loader(), None, torch.Generator())


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.7, 1.2, 1e6])
def test_clipping_equals_a_loop_over_examples(max_grad_norm):
    model = net().double()
    x, y = data(8).tensors
    x = x.double()
    params = list(model.parameters())
    clipped_loss(task_of(model), (x, y), max_grad_norm).backward()
    found = [p.grad.clone() for p in params]
    model.eval()
    expected = [torch.zeros_like(p) for p in params]
    for i in range(len(x)):
        grads = torch.autograd.grad(
            CRITERION(model(x[i : i + 1]), y[i : i + 1]), params
        )
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for total, g in zip(expected, grads, strict=True):
            total += g * min(1.0, max_grad_norm / norm.item())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b / 8, rtol=1e-9, atol=1e-15)


def test_clipping_divides_by_the_expected_batch_size():
    model = net()
    x, y = data(8).tensors
    clipped_loss(task_of(model), (x[:4], y[:4]), 0.1).backward()
    half = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    clipped_loss(task_of(model, loader(batch_size=4)), (x[:4], y[:4]), 0.1).backward()
    for a, p in zip(half, model.parameters(), strict=True):
        torch.testing.assert_close(2 * a, p.grad)


def test_no_update_of_a_clipped_run_moves_further_than_its_clip_norm():
    unlearner = Unlearner(
        net(),
        criterion=CRITERION,
        method=Langevin(0.0, max_grad_norm=0.05),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    before = (
        nn.utils.parameters_to_vector(unlearner.model.parameters()).detach().clone()
    )
    for _ in unlearner.run(loader(), 6):
        after = nn.utils.parameters_to_vector(unlearner.model.parameters()).detach()
        assert (after - before).norm() <= 0.05 * (1 + 1e-6)
        before = after.clone()


def test_projection_keeps_the_weights_in_the_ball():
    unlearner = Unlearner(
        net(), criterion=CRITERION, method=Langevin(1.0, projection_radius=2.0)
    )
    norms = []
    for _ in unlearner.run(loader(), 8):
        weights = nn.utils.parameters_to_vector(unlearner.model.parameters())
        norms.append(weights.norm().item())
    assert max(norms) <= 2.0 * (1 + 1e-6)
    assert sum(abs(n - 2.0) < 1e-5 for n in norms) > 2  # it did bind
    inside = [torch.tensor([0.3, 0.4])]
    Langevin(1.0, projection_radius=2.0).project_(inside)
    assert torch.equal(inside[0], torch.tensor([0.3, 0.4]))


def test_expected_batch_size_of_loaders():
    assert expected_batch_size(loader(24, 8)) == 8

    class Poisson:
        sample_rate, dataset = 0.25, range(40)

    assert expected_batch_size(Poisson()) == 10
    with pytest.raises(ValueError, match="batch_size or a sample_rate"):
        expected_batch_size([1])


def test_l1_penalty_as_released():
    params = [torch.tensor([1.0, -2.0]), torch.tensor([[-3.0]])]
    method = L1Sparse(0.5)
    assert method.penalty(params, 0.0) == pytest.approx(3.0)
    assert method.penalty(params, 0.25) == pytest.approx(3.0 * 0.75)
    assert L1Sparse(0.5, schedule="constant").penalty(params, 0.9) == pytest.approx(3.0)
    assert L1Sparse(0.0).penalty(params, 0.0) is None


def test_l1_strength_falls_from_pass_to_pass():
    seen = []

    class Spy(L1Sparse):
        def penalty(self, params, progress):
            seen.append(self.strength * (1 - progress))
            return super().penalty(params, progress)

    unlearner = Unlearner(net(), criterion=CRITERION, method=Spy(1.0))
    list(unlearner.run(loader(), 12))  # 4 passes of 3 batches
    assert seen == [1.0] * 3 + [0.75] * 3 + [0.5] * 3 + [0.25] * 3


def test_l1_update_by_hand():
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    unlearner = Unlearner(
        model,
        criterion=lambda out, y: (out**2).sum(1) / 2,
        method=L1Sparse(0.3),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    list(unlearner.run([(torch.ones(1, 1), torch.zeros(1))], 1))
    # w - 0.1 (w + 0.3 sign(w))
    expected = torch.tensor([[1 - 0.1 * 1.3], [-2 + 0.1 * 2.3]])
    torch.testing.assert_close(unlearner.model.weight.detach(), expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_empty_batch_is_an_update_with_gradient_zero(method):
    empty = torch.empty(0, 5), torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(4)
    unlearner = Unlearner(
        net(),
        criterion=CRITERION,
        method=method,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        generator=generator,
    )
    before = [p.detach().clone() for p in unlearner.model.parameters()]
    assert list(unlearner.run([empty], 1)) == [1]
    moved = [
        a - p.detach()
        for a, p in zip(before, unlearner.model.parameters(), strict=True)
    ]
    size = torch.cat([m.flatten() for m in moved])
    if isinstance(method, Langevin):
        assert size.std() == pytest.approx(0.1, rel=0.3)
    elif isinstance(method, L1Sparse):
        assert torch.allclose(size.abs().max(), torch.tensor(1e-3))
    else:
        assert not size.any()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_same_seed_same_weights(method):
    first, _ = trained(method)
    second, _ = trained(method)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Watching(Method):
    """Needs the forget set, and says nothing else."""

    needs_forget_set = True

    def __init__(self):
        self.seen = []

    def loss(self, task, retain, forget):
        self.seen.append(tuple(len(batch[1]) for batch in (retain, forget)))
        return super().loss(task, retain, forget)


def test_a_method_that_only_needs_the_forget_set_gets_its_batches():
    unlearner = Unlearner(net(), criterion=CRITERION, method=Watching())
    result = unlearner.unlearn(data(), [1, 2, 3], 2, batch_size=8)
    assert unlearner.method.seen == [(8, 3), (8, 3), (5, 3)] * 2
    assert result.guarantee.kind == "empirical"


class Mistaken(Method):
    def loss(self, task, retain, forget):
        return mean_loss(task, forget)


def test_a_loss_on_a_batch_that_the_update_has_not_says_what_to_declare():
    unlearner = Unlearner(net(), criterion=CRITERION, method=Mistaken())
    with pytest.raises(ValueError, match="needs_forget_set = True in the method"):
        unlearner.unlearn(data(), [1], 1)


def test_a_method_of_ones_own():
    class Freeze(Method):
        def perturb_(self, params, generator):
            params[0].grad.zero_()

    start = [p.detach() for p in net().parameters()]
    weights, _ = trained(Freeze())
    assert torch.equal(weights[0], start[0])
    assert not torch.equal(weights[1], start[1])


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: Langevin(-0.1), "noise_std must .*got -0.1"),
        (lambda: Langevin(math.nan), "noise_std must .*got nan"),
        (lambda: Langevin(math.inf), "noise_std must .*got inf"),
        (lambda: Langevin(0.1, max_grad_norm=0.0), "max_grad_norm must .*got 0"),
        (
            lambda: Langevin(0.1, projection_radius=-1.0),
            "projection_radius must .*got -1",
        ),
        (lambda: Langevin.from_weight_noise(0.1, 0.0), "learning_rate must .*got 0"),
        (lambda: Langevin.from_weight_noise(-1.0, 0.1), "noise_std must .*got -1"),
        (lambda: L1Sparse(-1e-3), "strength must .*got -0.001"),
        (lambda: L1Sparse(1e-3, schedule="cosine"), "schedule must .*got 'cosine'"),
    ],
)
def test_bad_settings_are_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build()
