import copy

import numpy as np
import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn

from opacus_pi.accounting import RenyiFilter
from opacus_pi.attribution import LEFT_OUT, UNATTRIBUTED, Tracker
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.filtering import FilterGate
from opacus_pi.recording import AccountingError
from tests.integration.filtered_training import filtered
from tests.private_training import Training, data, one_at_a_time

N = 24


def positions(training, x):
    """Which examples a batch holds, by looking for them."""
    everyone = training.data_set.tensors[0]
    return [int((everyone == one).flatten(1).all(1).nonzero()) for one in x]


# --------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.7},
        {"max_grad_norm": 0.7, "loss_reduction": "sum", "poisson_sampling": False},
        {"max_grad_norm": 0.7, "grad_sample_mode": "functorch", "batch_size": 12},
        {"max_grad_norm": [0.3] * 6, "clipping": "per_layer"},
        {"max_grad_norm": 0.7, "wrap_model": False},
        {"max_grad_norm": 0.7, "managed": True},
    ],
    ids=str,
)
def test_no_example_exceeds_its_budget_by_a_recomputation(options):
    managed = options.pop("managed", False)
    budget, order, multiplier = 2.2, 6.0, 1.3
    training = filtered(
        budget, order, noise_multiplier=multiplier, seed=3, lr=0.3, **options
    )
    clip = float(np.linalg.norm(options["max_grad_norm"]))
    noise = ExponentialNoise(training.optimizer, gamma=0.97)
    clips = ExponentialGradClip(training.optimizer, gamma=1.02)
    if "clipping" in options:  # Opacus clips to its own list, whatever is scheduled
        clips = None
    paid, drawn, update = [[] for _ in range(N)], [0] * N, 0

    def note(x, y):
        norms = one_at_a_time(training.plain_copy(), x, y) if len(x) else []
        bound = clip * (1.02**update if clips else 1)
        std = multiplier * 0.97**update * bound
        for i, norm in zip(positions(training, x), norms, strict=True):
            drawn[i] += 1
            charge = order * (min(norm, bound) / std) ** 2 / 2
            if sum(paid[i]) + charge <= budget:
                paid[i].append(charge)

    for _ in training.memory_managed(4) if managed else [0]:
        for _ in range(6):
            for x, y in training.loader:
                note(x, y)
                before = len(training.recorder.updates)
                training.batch(x, y)
                if len(training.recorder.updates) > before:
                    update += 1
                    noise.step()
                    if clips:
                        clips.step()
    spent = training.engine.renyi_filter.spent
    np.testing.assert_allclose(spent, [sum(p) for p in paid], rtol=2e-5)
    assert spent.max() <= budget
    taken = np.array([len(p) for p in paid])
    assert 0 < taken.sum() < sum(drawn)  # some took part, some were left out
    # the record: what entered, and 0 where nothing did
    entered = [norm > 0 for _, norm in training.recorder.observed]
    assert len(entered) == sum(drawn) and sum(entered) == taken.sum()
    assert (training.engine.privacy_losses(order) >= 0).all()


def test_without_limit_training_is_bit_identical():
    def run(engine):
        training = Training(
            engine=engine, grad_sample_mode="hooks", noise_multiplier=0.8
        )
        training.train(2)
        return training, torch.get_rng_state()

    (one, state), (other, other_state) = (
        run(PrivacyEngine(accountant="rdp", **extra))
        for extra in ({}, {"renyi_filter": RenyiFilter(np.inf)})
    )
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, other_state)
    ledgers = one.engine.ledger, other.engine.ledger
    np.testing.assert_array_equal(*(ledger.grad_norms for ledger in ledgers))
    assert one.engine.get_epsilon(1e-5) == other.engine.get_epsilon(1e-5)
    assert (other.engine.renyi_filter.spent > 0).any()


def test_each_example_is_dropped_at_the_predicted_draw():
    order, multiplier = 8.0, 2.0
    charge = order / multiplier**2 / 2  # every norm is clipped
    allowed = np.arange(N) % 5  # draws that the budget is enough for
    training = filtered(
        (allowed + 0.5) * charge,
        order,
        noise_multiplier=multiplier,
        max_grad_norm=1e-3,
        batch_size=N,
        poisson_sampling=False,
    ).train(6)
    norms = training.engine.ledger.grad_norms
    assert norms.shape == (6, N)
    np.testing.assert_array_equal(norms > 0, np.arange(6)[:, None] < allowed)
    np.testing.assert_allclose(training.engine.renyi_filter.spent, allowed * charge)
    bound = training.engine.renyi_filter.epsilons(1e-5)
    assert bound.shape == (N,) and (np.diff(bound[:5]) > 0).all()


# -------------------------------------------------------------- what enters the update


def summed(training):
    """Clip and add up as step() does, without noise."""
    training.optimizer.clip_and_accumulate()
    return [p.summed_grad.clone() for p in training.net.parameters()]


def backward(training, x, y):
    training.criterion(training.forward(x), y).backward()


def by_hand(training, x, y, allowed, max_grad_norm):
    """Sum of the allowed examples' clipped gradients, one at a time."""
    model = training.plain_copy()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for one, label, may in zip(x, y, allowed, strict=True):
        if may:
            loss = nn.functional.cross_entropy(model(one[None]), label[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            factor = (max_grad_norm / norm).clamp(max=1.0)
            total = [t + factor * g for t, g in zip(total, grads, strict=True)]
    return total


def assert_close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_the_sum_is_that_of_the_others(mode):
    rich = np.arange(N) % 3 > 0
    training = filtered(
        np.where(rich, np.inf, 1e-9),
        grad_sample_mode=mode,
        max_grad_norm=0.5,
        batch_size=N,
        poisson_sampling=False,
    )
    x, y = next(iter(training.loader))
    allowed = rich[positions(training, x)]
    backward(training, x, y)
    assert_close(summed(training), by_hand(training, x, y, allowed, 0.5))
    observed = dict(training.recorder.observed)
    assert {i for i, norm in observed.items() if norm == 0} == set(
        np.flatnonzero(~rich)
    )


def test_nothing_enters_when_every_budget_is_spent():
    training = filtered(1e-9)
    x, y = next(iter(training.loader))
    backward(training, x, y)
    assert len(x) and all((g == 0).all() for g in summed(training))
    assert (training.engine.renyi_filter.spent == 0).all()


def test_accumulated_passes_are_left_out_sample_by_sample():
    rich = np.arange(N) % 2 > 0
    training = filtered(
        np.where(rich, np.inf, 1e-9), max_grad_norm=0.5, poisson_sampling=False
    )
    batches = list(zip(range(2), training.loader, strict=False))
    for _, (x, y) in batches:
        backward(training, x, y)
    x, y = (torch.cat(parts) for parts in zip(*(b for _, b in batches), strict=True))
    allowed = rich[positions(training, x)]
    assert_close(summed(training), by_hand(training, x, y, allowed, 0.5))


def test_an_example_enters_an_update_once():
    training = filtered(np.inf, max_grad_norm=0.5, poisson_sampling=False)
    x, y = next(iter(training.loader))
    backward(training, x, y)
    backward(training, x, y)
    expected = by_hand(training, x, y, [True] * len(x), 0.5)
    training.optimizer.step()
    assert_close([p.summed_grad for p in training.net.parameters()], expected)
    assert (training.engine.renyi_filter.spent > 0).sum() == len(x)
    assert training.engine.ledger.num_rows == 1  # and the record stays good


def test_unattributed_samples_are_left_out():
    training = filtered(np.inf, poisson_sampling=False)
    batches = iter(training.loader)
    (x, y), (u, v) = next(batches), next(batches)
    both = training.criterion(training.forward(x), y)
    with pytest.warns(UserWarning, match="unattributed"):
        (both + training.criterion(training.forward(u), v)).backward()
        assert all((g == 0).all() for g in summed(training))
    assert (training.engine.renyi_filter.spent == 0).all()


def test_a_gradient_that_is_no_number_is_left_out():
    data_set = data()
    data_set.tensors[0][5, 0, 0] = np.nan
    training = filtered(
        np.inf, data_set=data_set, batch_size=N, poisson_sampling=False, shuffle=False
    )
    training.train(1)
    assert all(p.isfinite().all() for p in training.net.parameters())
    assert np.flatnonzero(training.engine.renyi_filter.spent == 0).tolist() == [5]


def gate(budget=np.inf, num_examples=4, **options):
    made = RenyiFilter(budget)
    made.begin(num_examples)
    tracker = options.get("tracker", Tracker())
    return FilterGate(made, tracker, options.get("batch_norms", []))


def test_padding_is_left_out_and_shared_storage_left_alone():
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    shared = torch.tensor([[3.0, 4.0]]).expand(4, 2)  # one row in memory for all
    one.grad_sample, other.grad_sample = shared, [shared[:1, :1], shared[1:, :1]]
    rows = np.array([2, LEFT_OUT, UNATTRIBUTED, 0])
    entered, norms = gate().admit(
        [one, other], rows, torch.full((4,), 5.0), noise_std=1.0, max_grad_norm=1.0
    )
    assert entered.tolist() == rows.tolist() and norms.tolist() == [5.0, 0, 0, 5.0]
    wanted = torch.tensor([[3.0, 4.0], [0, 0], [0, 0], [3.0, 4.0]])
    assert torch.equal(one.grad_sample, wanted)
    assert [len(g) for g in other.grad_sample] == [1, 3]
    assert torch.equal(torch.cat(other.grad_sample), wanted[:, :1])
    assert torch.equal(shared, torch.tensor([[3.0, 4.0]]).expand(4, 2))


# -------------------------------------------------------------------------- refusals


def test_gradients_that_were_used_stay_used():
    training = filtered(1e-9)
    x, y = next(iter(training.loader))
    backward(training, x, y)
    training.optimizer.signal_skip_step()  # a physical batch
    training.optimizer.step()
    with pytest.warns(UserWarning, match="unattributed"):
        with pytest.raises(ValueError, match="haven't been cleared"):
            training.optimizer.step()


def test_unverified_samples_stop_the_training_before_anything_is_released():
    training = filtered(1.0)
    x, y = next(iter(training.loader))
    before = copy.deepcopy(training.net.state_dict())
    with pytest.warns(UserWarning, match="without verification"):
        with pytest.raises(AccountingError, match="with certainty.*collate_fn"):
            training.batch(torch.sin(x), y)
    assert (training.engine.renyi_filter.spent == 0).all()
    for name, value in training.net.state_dict().items():
        assert torch.equal(value, before[name])


def test_noise_that_is_lowered_within_an_update():
    training = filtered(1.0, noise_multiplier=2.0)
    with pytest.raises(AccountingError, match="lowered between the physical batches"):
        for _ in training.memory_managed(2):
            for x, y in training.loader:
                training.batch(x, y)
                training.optimizer.noise_multiplier *= 0.9


def test_mixed_examples_and_missing_noise():
    step = {"noise_std": 1.0, "max_grad_norm": 1.0}
    with pytest.raises(AccountingError, match="BatchNorm"):
        mixing = gate(batch_norms=[nn.BatchNorm1d(2)])
        mixing.admit([], np.array([0]), torch.ones(1), **step)
    with pytest.raises(ValueError, match="noise_std must .*got 0"):
        step["noise_std"] = 0.0
        gate().admit([], np.array([0]), torch.ones(1), **step)
