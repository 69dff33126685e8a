"""Gradients of losses by outputs: the closed form equals automatic differentiation."""

import mpmath
import pytest
import torch
from torch import nn

from opacus_pi.models import losses as losses_module
from opacus_pi.models.losses import float64_losses, unit_cotangents

LOGITS = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 3, 0])


def differentiated(criterion, outputs, targets):
    """The same by autograd: a function has no closed form."""
    return unit_cotangents(
        float64_losses(lambda o, y: criterion(o, y)), outputs, targets
    )


def each(**options):
    return nn.CrossEntropyLoss(reduction="none", **options)


@pytest.mark.parametrize(
    ("options", "labels", "is_known"),
    [
        ({}, LABELS, True),
        ({}, torch.tensor([0, 1, -100, 3, -100, 0]), False),  # ignored
        ({"ignore_index": 3}, LABELS, False),
        ({"label_smoothing": 0.1}, LABELS, False),
        ({"weight": torch.rand(4).double()}, LABELS, False),
        ({}, LOGITS.double().softmax(0), False),  # soft targets
    ],
)
def test_closed_form_of_cross_entropy(options, labels, is_known):
    criterion = each(**options)
    known = float64_losses(criterion).closed_form(LOGITS, labels)
    assert (known is not None) == is_known
    outputs = LOGITS.clone().requires_grad_().double()
    units, scales = unit_cotangents(float64_losses(criterion), outputs, labels)
    expected = differentiated(criterion, outputs, labels)
    torch.testing.assert_close(units[0], expected[0][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(scales, expected[1], rtol=1e-12, atol=1e-14)
    assert not (units[0].requires_grad or scales.requires_grad)


def test_hooked_criteria_are_called():
    criterion = each()
    criterion.register_forward_hook(lambda module, args, losses: 2 * losses)
    _, scales = unit_cotangents(float64_losses(criterion), LOGITS, LABELS)
    _, single = unit_cotangents(float64_losses(each()), LOGITS, LABELS)
    torch.testing.assert_close(scales, 2 * single)


def test_label_out_of_range_is_refused_as_torch_does():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        unit_cotangents(float64_losses(each()), LOGITS, LABELS + 1)


def test_nearly_certain_examples_keep_their_digits():
    """At logit 50 the probability is 1 in float64, and 1 minus it cancels."""
    outputs = torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64)
    units, scales = unit_cotangents(float64_losses(each()), outputs, LABELS[:1])
    rest = torch.tensor(-50.0, dtype=torch.float64).exp()
    torch.testing.assert_close(scales, (rest * 6**0.5)[None], rtol=1e-12, atol=0)
    direction = torch.tensor([[-2.0, 1.0, 1.0]], dtype=torch.float64) / 6**0.5
    torch.testing.assert_close(units[0], direction, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gap", [100.0, 380.0, 500.0, 720.0, 740.0, 800.0])
@pytest.mark.parametrize("closed", [True, False])
def test_examples_beyond_doubt_have_units_and_lengths(gap, closed):
    """exp(-gap) is tiny, its square is not even a number, and then neither is."""
    logits = torch.tensor([[gap, 0.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    find = (
        float64_losses(each()) if closed else float64_losses(lambda o, y: each()(o, y))
    )
    units, scales = unit_cotangents(find, logits, torch.tensor([0, 2]))
    unit = units[0]
    assert torch.isfinite(unit).all() and (unit.norm(dim=1) < 1 + 1e-12).all()
    torch.testing.assert_close(unit[1].norm(), torch.ones((), dtype=torch.float64))
    if closed and gap < 700:
        exact = mpmath.sqrt(6) * mpmath.exp(-gap) / (1 + 2 * mpmath.exp(-gap))
        assert float(scales[0]) == pytest.approx(float(exact), rel=1e-12)
        torch.testing.assert_close(unit[0].norm(), torch.ones((), dtype=torch.float64))


def rows_of_words(outputs, targets):
    """The mean over each example's words, by a function."""
    each = nn.functional.cross_entropy(outputs.mT, targets, reduction="none")
    return each.mean(1)


@pytest.mark.parametrize("part", [1, 25, 60])
@pytest.mark.parametrize("kind", ["words", "transposed", "function", "labels"])
def test_large_outputs_are_differentiated_in_parts(kind, part, monkeypatch):
    torch.manual_seed(0)
    outputs, targets = torch.randn(7, 3, 4), torch.randint(4, (7, 3))
    criterion = rows_of_words if kind == "function" else nn.CrossEntropyLoss()
    if kind == "transposed":
        outputs = outputs.mT
    elif kind == "words":
        outputs = outputs.mT.contiguous()
    elif kind == "labels":
        outputs, targets = outputs[:, 0].contiguous(), targets[:, 0]
    losses = float64_losses(criterion)
    whole, scales = unit_cotangents(losses, outputs, targets)
    seen = []
    plain = losses_module._of_batch
    monkeypatch.setattr(losses_module, "_CPU_PART", part)
    monkeypatch.setattr(
        losses_module,
        "_of_batch",
        lambda losses, x, y: seen.append(len(x)) or plain(losses, x, y),
    )
    units, lengths = unit_cotangents(losses, outputs, targets)
    rows, entries = len(outputs), outputs[0].numel()
    if kind in ("words", "transposed") and entries > part:  # label by label
        rows, entries = targets.numel(), outputs.shape[1]
    assert max(seen) == max(1, part // entries) or part >= outputs.numel()
    assert sum(seen) == rows
    torch.testing.assert_close(units[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(lengths, scales, rtol=1e-14, atol=0)
    assert units[0].stride() == outputs.stride()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_of_large_examples_are_differentiated_in_parts(reduction, monkeypatch):
    """Logits of the first example are far apart: some labels are nearly certain."""
    torch.manual_seed(0)
    outputs, targets = torch.randn(3, 5, 2, 2).double(), torch.randint(5, (3, 2, 2))
    outputs[0] *= 100
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    known = float64_losses(criterion).closed_form(outputs, targets)
    monkeypatch.setattr(losses_module, "_CPU_PART", 10)
    units, lengths = unit_cotangents(float64_losses(criterion), outputs, targets)
    found = units[0] * lengths.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, known, rtol=1e-13, atol=0)
    torch.testing.assert_close(units[0].flatten(1).norm(dim=1), torch.ones(3).double())
    targets[:, 0, 0] = -100  # ignored, so that there is no closed form
    units, lengths = unit_cotangents(float64_losses(criterion), outputs, targets)
    found = units[0] * lengths.view(-1, 1, 1, 1)
    leaf = outputs.clone().requires_grad_()
    for i in range(3):
        loss = criterion(leaf[i : i + 1], targets[i : i + 1])
        (truth,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(found[i], truth[i], rtol=1e-12, atol=1e-14)


def test_the_first_batch_of_an_unknown_criterion_is_not_split(monkeypatch):
    monkeypatch.setattr(losses_module, "_CPU_PART", 1)
    outputs, targets = torch.randn(4, 3), torch.zeros(4)
    couples = float64_losses(lambda outputs, _: outputs[:, 0] - outputs.mean())
    with pytest.raises(ValueError, match="compares the examples"):
        unit_cotangents(couples, outputs, targets)


def test_different_numbers_of_labels_in_several_parts_are_refused(monkeypatch):
    monkeypatch.setattr(losses_module, "_CPU_PART", 1)
    targets = torch.tensor([[0, 1], [1, -100]])
    with pytest.raises(ValueError, match="ignored"):
        unit_cotangents(
            float64_losses(nn.CrossEntropyLoss()), torch.randn(2, 3, 2), targets
        )


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("transposed", [False, True])
def test_closed_form_of_several_labels(shape, reduction, transposed):
    torch.manual_seed(0)
    outputs, targets = torch.randn(5, 4, *shape).double(), torch.randint(4, (5, *shape))
    if transposed:
        outputs = outputs.movedim(1, -1).contiguous().movedim(-1, 1)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    known = float64_losses(criterion).closed_form(outputs, targets)
    leaf = outputs.clone().requires_grad_()
    for i in range(5):
        loss = criterion(leaf[i : i + 1], targets[i : i + 1])
        (truth,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(known[i], truth[i], rtol=1e-12, atol=1e-15)
    units, lengths = unit_cotangents(float64_losses(criterion), outputs, targets)
    found = units[0] * lengths.view(-1, *[1] * (outputs.dim() - 1))
    torch.testing.assert_close(found, known)
    assert float64_losses(each()).closed_form(outputs, targets) is None
