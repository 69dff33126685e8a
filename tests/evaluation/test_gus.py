import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.evaluation.gus import GaussianPoison, gaussian_unlearning_score

CE = nn.CrossEntropyLoss()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def examples(m=17, shape=(5,), seed=1):
    x = torch.randn(m, *shape, generator=generator(seed))
    y = torch.randint(0, 3, (m,), generator=generator(seed + 1))
    return x, y, 0.3 * torch.randn(m, *shape, generator=generator(seed + 2))


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def score_by_loop(model, x, y, noise):
    model = model.eval().double()
    scores = []
    for i in range(len(x)):
        one = x[i : i + 1].double().requires_grad_()
        loss = nn.functional.cross_entropy(model(one), y[i : i + 1])
        (gradient,) = torch.autograd.grad(loss, one)
        inner = (gradient * noise[i]).sum()
        scores.append(float(inner / gradient.norm()))
    return np.mean(scores)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_score_equals_a_loop_over_examples(batch_size):
    x, y, noise = examples(shape=(2, 5, 5))
    got = gaussian_unlearning_score(
        conv_net().train(), CE, x, y, noise, batch_size=batch_size
    )
    assert got == pytest.approx(score_by_loop(conv_net(), x, y, noise), rel=1e-5)


def test_closed_form_of_a_linear_classifier():
    """The input gradient of softmax regression is Wᵀ(p - one-hot)."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x, y, noise = (t.double() if t.is_floating_point() else t for t in examples())
    p = model(x).softmax(1).detach() - nn.functional.one_hot(y, 3)
    direction = p @ model.weight.detach()
    direction /= direction.norm(dim=1, keepdim=True)
    want = float((direction * noise).sum(1).mean())
    got = gaussian_unlearning_score(model, CE, x, y, noise)
    assert got == pytest.approx(want, rel=1e-12)


def test_fresh_noise_has_mean_zero_and_the_stated_spread():
    x, y, _ = examples(40, (2, 5, 5))
    scores = [
        gaussian_unlearning_score(
            conv_net(), CE, x, y, 0.3 * torch.randn(x.shape, generator=generator(s))
        )
        for s in range(200)
    ]
    spread = 0.3 / np.sqrt(40)
    assert abs(np.mean(scores)) < 4 * spread / np.sqrt(200)
    assert np.std(scores) == pytest.approx(spread, rel=0.2)


def test_a_model_that_was_trained_on_the_noise_remembers_it():
    x, y, _ = examples(30, (40,))
    poisoned = GaussianPoison(TensorDataset(x, y), range(30), 0.5, generator(9))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ((batch, labels),) = DataLoader(poisoned, batch_size=30)
    for _ in range(200):
        optimizer.zero_grad()
        CE(model(batch), labels).backward()
        optimizer.step()
    clean, labels = poisoned.clean()
    got = gaussian_unlearning_score(model, CE, clean, labels, poisoned.noise)
    assert abs(got) > 5 * 0.5 / np.sqrt(30)


def test_well_fitted_examples_keep_their_direction():
    """In float32 softmax - one-hot is exactly 0 here."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[25.0, 0.0], [0.0, 0.0]])
    noise = torch.tensor([[0.7, 5.0]])
    got = gaussian_unlearning_score(
        model, CE, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), noise
    )
    assert got == pytest.approx(-0.7)  # the loss falls along the first input


def test_no_direction_counts_as_zero():
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)
    assert gaussian_unlearning_score(model, CE, *examples()) == 0


def test_a_wrapped_model_in_training_is_left_as_it_was():
    x, y, noise = examples()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    want = gaussian_unlearning_score(plain, CE, x, y, noise)
    wrapped = GradSampleModule(plain).train()
    state = torch.get_rng_state()
    assert gaussian_unlearning_score(wrapped, CE, x, y, noise) == want
    assert wrapped.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.grad_sample is None for p in plain.parameters())


def test_poison_changes_the_chosen_inputs_only():
    x, y, _ = examples(10)
    data = TensorDataset(x, y)
    poisoned = GaussianPoison(data, [7, 2], 0.25, generator(4))
    assert len(poisoned) == 10
    assert poisoned.forget_indices.tolist() == [2, 7]
    for i in range(10):
        noise = {2: poisoned.noise[0], 7: poisoned.noise[1]}.get(i, 0)
        assert torch.equal(poisoned[i][0], x[i] + noise)
        assert poisoned[i][1] == y[i]
    clean, labels = poisoned.clean()
    assert torch.equal(clean, x[[2, 7]])
    assert torch.equal(labels, y[[2, 7]])
    again = GaussianPoison(data, [2, 7], 0.25, generator(4))
    assert torch.equal(again.noise, poisoned.noise)


def test_poison_has_the_variance_asked_for():
    data = TensorDataset(torch.zeros(400, 50), torch.zeros(400).long())
    noise = GaussianPoison(data, range(400), 0.062**0.5, generator()).noise
    assert float(noise.var()) == pytest.approx(0.062, rel=0.05)


X, Y, NOISE = examples()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gaussian_unlearning_score(nn.Linear(5, 3), CE, X, Y, NOISE[:3]),
            r"shapes \[\(17, 5\), \(17,\), \(3, 5\)\]",
        ),
        (
            lambda: gaussian_unlearning_score(nn.Linear(5, 3), CE, X[:0], Y[:0], X[:0]),
            "with m > 0",
        ),
        (
            lambda: gaussian_unlearning_score(
                nn.Embedding(9, 3), CE, Y[:, None], Y, Y[:, None]
            ),
            "clean_inputs must have a floating-point dtype, got torch.int64",
        ),
        (
            lambda: gaussian_unlearning_score(
                nn.Linear(5, 3), lambda o, t: o.sum(), X, Y, NOISE
            ),
            'reduction="none"',
        ),
        (
            lambda: GaussianPoison(TensorDataset(X, Y), [], 1, generator()),
            r"must contain an example, got \[\]",
        ),
        (
            lambda: GaussianPoison(TensorDataset(X, Y), [17], 1, generator()),
            "must be in .*, got 17",
        ),
        (
            lambda: GaussianPoison(TensorDataset(X, Y), [1], 0, generator()),
            "noise_std must be above 0, got 0.0",
        ),
        (
            lambda: GaussianPoison(TensorDataset(Y, Y), [1], 1, generator()),
            "must be a tensor with a floating-point dtype",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
