"""Own losses honour the criterion's reduction, or the criterion is refused.

The oracle calls the user's criterion, with the reduction that trains, on one example
after the other.
"""

import pytest
import torch
from torch import nn

from opacus_pi import FineTune, PrivacyEngine, Recorder, Unlearner
from opacus_pi.gradients import norm_sweep, per_example_grad_norms
from opacus_pi.gradients.gram import gradient_gram
from opacus_pi.models.own_losses import CoupledLoss, per_example_criterion

GENERATOR = torch.Generator().manual_seed(0)
SIZE, CLASSES, LENGTH = 6, 4, 5
SCORES = torch.randn(SIZE, CLASSES, generator=GENERATOR).double()
LABELS = torch.tensor([0, 1, 2, 3, 3, 0])
MATRIX = torch.rand(SIZE, CLASSES, generator=GENERATOR).double()
SEQUENCES = torch.randn(SIZE, CLASSES, LENGTH, generator=GENERATOR).double()
TOKENS = torch.randint(0, CLASSES, (SIZE, LENGTH), generator=GENERATOR)
LAST_IGNORED = TOKENS.clone()
LAST_IGNORED[:, -1] = -100
PADDED = TOKENS.clone()
for i in range(SIZE):
    PADDED[i, 1 + i % LENGTH :] = -100
WEIGHTS = torch.tensor([0.1, 1.0, 10.0, 3.0]).double()
EQUAL = torch.full_like(WEIGHTS, 2.5)


class Focal(nn.Module):
    """A user's loss module with a reduction."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs, targets):
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        losses = (1 - (-losses).exp()) ** 2 * losses
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class OverSquareRoot(Focal):
    """Divides by something of the batch, although its reduction is a mean."""

    def forward(self, outputs, targets):
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        if self.reduction == "none":
            return losses
        return losses.sum() / len(losses) ** 0.5


HONOURED = {
    "mean": (nn.CrossEntropyLoss(), SCORES, LABELS),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), SCORES, LABELS),
    "none": (nn.CrossEntropyLoss(reduction="none"), SCORES, LABELS),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), SCORES, LABELS),
    "weighted sum": (nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), SCORES, LABELS),
    "equally weighted mean": (nn.CrossEntropyLoss(EQUAL), SCORES, LABELS),
    "equally weighted NLL": (nn.NLLLoss(EQUAL), SEQUENCES, LAST_IGNORED),
    "equally weighted, smoothed": (
        nn.CrossEntropyLoss(EQUAL, label_smoothing=0.2),
        SCORES,
        LABELS,
    ),
    "weighted, soft targets": (nn.CrossEntropyLoss(WEIGHTS), SCORES, MATRIX),
    "nll of sequences": (nn.NLLLoss(reduction="sum"), SEQUENCES, PADDED),
    "square, mean": (nn.MSELoss(), SCORES, MATRIX),
    "square, sum": (nn.MSELoss(reduction="sum"), SCORES, MATRIX),
    "huber": (nn.HuberLoss(), SCORES, MATRIX),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), SCORES, MATRIX),
    "KL, batchmean": (nn.KLDivLoss(reduction="batchmean"), SCORES, MATRIX),
    "KL, mean": (nn.KLDivLoss(reduction="mean"), SCORES, MATRIX),
    "sequences": (nn.CrossEntropyLoss(), SEQUENCES, TOKENS),
    "sequences, last ignored": (nn.CrossEntropyLoss(), SEQUENCES, LAST_IGNORED),
    "sequences, padded, sum": (
        nn.CrossEntropyLoss(reduction="sum"),
        SEQUENCES,
        PADDED,
    ),
    "module of the user": (Focal(), SCORES, LABELS),
    "module of the user, sum": (Focal("sum"), SCORES, LABELS),
}


@pytest.mark.parametrize("name", HONOURED)
def test_losses_are_those_of_single_examples(name):
    criterion, outputs, targets = HONOURED[name]
    found = per_example_criterion(criterion)(outputs, targets)
    alone = [
        criterion(outputs[i : i + 1], targets[i : i + 1]).reshape(()) for i in range(6)
    ]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-12, atol=0)


def contrastive(outputs, targets):
    similar = outputs @ outputs.T
    partners = torch.arange(len(outputs)).roll(1)
    return nn.functional.cross_entropy(similar, partners, reduction="none")


def robust(outputs, targets):
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses.detach().softmax(0) * losses


def relative_to_largest(outputs, targets):
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses / losses.max()


COUPLED = {
    "weighted mean": (nn.CrossEntropyLoss(WEIGHTS), SCORES, LABELS, "class|weights"),
    "weighted mean of NLL": (nn.NLLLoss(WEIGHTS), SCORES, LABELS, "weights"),
    "weighted mean of sequences": (
        nn.CrossEntropyLoss(WEIGHTS),
        SEQUENCES,
        TOKENS,
        "weights",
    ),
    "padded mean": (nn.CrossEntropyLoss(), SEQUENCES, PADDED, "ignore_index=-100"),
    "ignored classes": (
        nn.CrossEntropyLoss(ignore_index=0),
        SCORES,
        LABELS,
        "ignore_index=0",
    ),
    "own denominator": (OverSquareRoot(), SCORES, LABELS, "returned .* but the mean"),
    "broadcast squares": (nn.MSELoss(), SCORES[:, :1], MATRIX[:, 0], "for the others"),
    "contrastive": (contrastive, SCORES, LABELS, "contrastive returned for the others"),
    "group robust": (robust, SCORES, LABELS, "compares the examples"),
    "relative": (relative_to_largest, SCORES, LABELS, "compares the examples"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_examples_are_refused_with_a_remedy(name):
    criterion, outputs, targets, message = COUPLED[name]
    with pytest.raises(CoupledLoss, match=message) as error:
        per_example_criterion(criterion)(outputs, targets)
    assert "Pass a function" in str(error.value) or "pass a function" in str(
        error.value
    )


def test_several_losses_of_an_example_without_a_reduction_are_refused():
    criterion = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match="5 losses for each example.*reduction="):
        per_example_criterion(criterion)(SEQUENCES, TOKENS)


def test_a_random_loss_is_not_taken_for_a_coupled_one():
    def noisy(outputs, targets):
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return losses * torch.rand(len(losses))

    state = torch.get_rng_state()
    with torch.random.fork_rng():
        expected = noisy(SCORES, LABELS), torch.rand(3)
    found = per_example_criterion(noisy)(SCORES, LABELS), torch.rand(3)
    assert all(map(torch.equal, expected, found))
    torch.set_rng_state(state)


def data_set():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 5, generator=generator)
    return torch.utils.data.TensorDataset(inputs, torch.arange(12) % CLASSES)


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def alone_norms(model, criterion, examples):
    """The norm of each example's gradient under the trained criterion, one by one."""
    norms = []
    for x, y in examples:
        loss = criterion(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(norms).double()


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.MSELoss(reduction="sum"), MATRIX),
        (nn.MSELoss(), MATRIX),
        (nn.KLDivLoss(reduction="batchmean"), MATRIX),
        (nn.CrossEntropyLoss(WEIGHTS.float(), reduction="sum"), LABELS),
        (nn.CrossEntropyLoss(label_smoothing=0.3), LABELS),
    ],
    ids=["square sum", "square mean", "batchmean", "weighted sum", "smoothed"],
)
def test_swept_norms_and_gram_matrices_are_those_of_the_trained_loss(
    criterion, targets
):
    inputs = [x for x, _ in data_set()][:SIZE]
    targets = targets.float() if targets.is_floating_point() else targets
    examples = list(zip(inputs, targets, strict=True))
    expected = alone_norms(net(), criterion, examples)
    swept = norm_sweep(net(), criterion, examples, progress=False)
    torch.testing.assert_close(swept, expected, rtol=1e-5, atol=0)
    gram = gradient_gram(net(), criterion, examples, range(SIZE))
    torch.testing.assert_close(gram.diagonal().sqrt(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "measure",
    [
        lambda m, c, d: norm_sweep(m, c, d, progress=False),
        lambda m, c, d: gradient_gram(m, c, d, range(len(d))),
        lambda m, c, d: per_example_grad_norms(m, c, *d[:]),
        lambda m, c, d: Unlearner(m, criterion=c, method=FineTune()).unlearn(
            d, [0], num_epochs=1
        ),
    ],
    ids=["sweep", "gram", "norms", "unlearner"],
)
@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(torch.rand(CLASSES)), nn.CrossEntropyLoss(ignore_index=1)],
    ids=["weighted", "ignored"],
)
def test_whatever_needs_own_losses_refuses_coupled_ones(measure, criterion):
    with pytest.raises(CoupledLoss, match="no example has a loss of its own"):
        measure(net(), criterion, data_set())


def test_training_goes_on_without_a_ledger_if_a_sweep_finds_a_coupled_loss():
    """The first two examples, which are measured beforehand, show nothing."""
    data, model = data_set(), net()
    plain = net()
    criterion = nn.CrossEntropyLoss(ignore_index=3)
    engine = PrivacyEngine(recorder=Recorder("swept"))
    _, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_std=0.0,
        criterion=criterion,
        poisson_sampling=False,
    )
    with pytest.warns(UserWarning, match="no longer has a ledger.*ignore_index=3"):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    step = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, y in torch.utils.data.DataLoader(data, batch_size=4):
        step.zero_grad()
        criterion(plain(x), y).backward()
        step.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    with pytest.raises(RuntimeError, match="ignore_index=3"):
        _ = engine.ledger


@pytest.mark.parametrize("weight", [None, WEIGHTS.float()], ids=["plain", "weighted"])
def test_a_sweep_measures_what_ghost_clipping_trains(weight):
    """Ghost clipping averages the weighted losses; no example's share has a divisor."""
    engine, model = PrivacyEngine(), net()
    criterion = nn.CrossEntropyLoss(weight)
    model, _, ghost, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=criterion,
        data_loader=torch.utils.data.DataLoader(data_set(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    each = nn.CrossEntropyLoss(weight, reduction="sum")
    swept = norm_sweep(model, ghost, data_set(), progress=False)
    expected = alone_norms(net(), each, data_set())
    torch.testing.assert_close(swept, expected, rtol=1e-5, atol=0)


def hardest_half(outputs, targets):
    """One loss per example, 0 for the easier half of the batch."""
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    hardest = losses.topk(len(losses) // 2).indices
    return losses * torch.zeros_like(losses).index_fill(0, hardest, 1.0)


def test_a_loss_of_the_hardest_half_is_found_in_most_batches_of_16():
    found = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        outputs = torch.randn(16, 5, generator=generator)
        targets = torch.randint(5, (16,), generator=generator)
        try:
            per_example_criterion(hardest_half)(outputs, targets)
        except CoupledLoss:
            found += 1
    assert found >= 45
