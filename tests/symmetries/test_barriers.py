import copy

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.symmetries.barriers import loss_barrier, path_losses

CE = nn.CrossEntropyLoss()


def net(seed, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] * norm + [nn.ReLU()]
    model = nn.Sequential(nn.Linear(4, 8), *middle, nn.Linear(8, 3))
    if norm:  # running statistics of its own
        model.train()(3 * torch.randn(50, 4) + seed)
    return model


def data(n=60):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def loss_at(alpha, a, b, examples):
    """Mean loss of the mixed model, by hand."""
    mixed = copy.deepcopy(a)
    with torch.no_grad():
        for m, p, q in zip(
            mixed.parameters(), a.parameters(), b.parameters(), strict=True
        ):
            m.copy_(alpha * p + (1 - alpha) * q)
        for m, p, q in zip(mixed.buffers(), a.buffers(), b.buffers(), strict=True):
            m.copy_(alpha * p + (1 - alpha) * q if p.is_floating_point() else p)
        x, y = examples.tensors
        return float(CE(mixed.eval()(x).double(), y))


@pytest.mark.parametrize("norm", [False, True])
def test_barrier_equals_the_definition_on_the_grid(norm):
    a, b, examples = net(1, norm), net(2, norm), data()
    alphas = np.linspace(0, 1, 11)
    losses = np.array([loss_at(alpha, a, b, examples) for alpha in alphas])
    want = max(
        loss - alpha * losses[-1] - (1 - alpha) * losses[0]
        for alpha, loss in zip(alphas, losses, strict=True)
    )
    assert loss_barrier(a, b, examples, CE) == pytest.approx(want, abs=1e-6)
    np.testing.assert_allclose(
        path_losses(a, b, examples, CE, alphas), losses, rtol=1e-6
    )


@pytest.mark.parametrize("reset_bn", [False, True])
@pytest.mark.parametrize("refine", [False, True])
def test_a_model_has_no_barrier_to_itself(reset_bn, refine):
    for norm in (False, True):
        model = net(3, norm)
        got = loss_barrier(model, model, data(), CE, reset_bn=reset_bn, refine=refine)
        assert got == 0


def test_symmetric_and_never_negative():
    for seed in range(5):
        a, b = net(seed), net(seed + 10)
        got = loss_barrier(a, b, data(), CE)
        assert got >= 0
        assert got == pytest.approx(loss_barrier(b, a, data(), CE), abs=1e-9)


def test_a_convex_loss_has_no_barrier():
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    assert loss_barrier(a, b, data(), CE, refine=True) == pytest.approx(0, abs=1e-9)


class Well(nn.Module):
    """Loss (w² - 1)²: minima at ±1, height 1 between."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(float(w), dtype=torch.float64))

    def forward(self, x):
        return ((self.w**2 - 1) ** 2).expand(len(x))


def output(outputs, labels):
    return outputs


def well_barrier(a, b, **more):
    batches = [(torch.zeros(2, 1), torch.zeros(2))]
    return loss_barrier(Well(a), Well(b), batches, output, **more)


@pytest.mark.parametrize("num_points", [2, 3, 10, 11])
def test_double_well_in_closed_form_with_the_middle_always_on_the_grid(num_points):
    assert well_barrier(-1, 1, num_points=num_points) == pytest.approx(1)


def test_refinement_finds_the_maximum_between_grid_points():
    """From -1 to 1.4 the ends differ and the top is off the grid."""
    alphas = np.linspace(0, 1, 200_001)
    w = -alphas + 1.4 * (1 - alphas)
    want = ((w**2 - 1) ** 2 - (1.4**2 - 1) ** 2 * (1 - alphas)).max()
    coarse = well_barrier(-1, 1.4, num_points=2)
    fine = well_barrier(-1, 1.4, num_points=2, refine=True)
    assert fine == pytest.approx(want, rel=1e-4)
    assert coarse < fine * 0.99


def test_reset_recomputes_the_statistics_at_every_point():
    a, b, examples = net(1, norm=True), net(2, norm=True), data()
    x, y = examples.tensors
    mixed = copy.deepcopy(a)
    with torch.no_grad():
        for m, p, q in zip(
            mixed.parameters(), a.parameters(), b.parameters(), strict=True
        ):
            m.copy_((p + q) / 2)
        hidden = mixed[0](x)
        mixed[1].running_mean.copy_(hidden.mean(0))
        mixed[1].running_var.copy_(hidden.var(0))
        want = float(CE(mixed.eval()(x), y))
    got = path_losses(a, b, examples, CE, [0.5], reset_bn=True)
    assert got[0] == pytest.approx(want, rel=1e-5)


def test_any_batching_gives_the_same_number_and_leaves_the_models_alone():
    a, b = net(1, norm=True).train(), net(2, norm=True)
    states = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    sources = [data(), DataLoader(data(), 7), iter(DataLoader(data(), 50))]
    rng = torch.get_rng_state()
    got = {round(loss_barrier(a, b, source, CE), 9) for source in sources}
    assert len(got) == 1
    assert a.training
    assert torch.equal(torch.get_rng_state(), rng)
    for model, state in zip((a, b), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_wrapped_model_counts_as_what_it_wraps():
    a, b = net(1), net(2)
    want = loss_barrier(a, b, data(), CE)
    assert loss_barrier(GradSampleModule(a), b, data(), CE) == want


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_barrier(net(1), nn.Linear(4, 3), data(), CE), "same arch"),
        (lambda: loss_barrier(net(1), net(2), [], CE), r"data_loader must .*got \[\]"),
        (
            lambda: loss_barrier(net(1), net(2), data(), CE, num_points=1),
            "num_points must .*got 1",
        ),
        (
            lambda: path_losses(net(1), net(2), data(), CE, [1.2]),
            r"alphas must be in .*, got 1.2",
        ),
        (
            lambda: loss_barrier(net(1), net(2), data(), lambda o, t: o.sum()),
            'reduction="none"',
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
