"""Each rival's update against its paper's formula, computed by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.unlearning import (
    SCRUB,
    SSD,
    FineTune,
    NegGradPlus,
    RandomLabels,
    SalUn,
    Unlearner,
)
from opacus_pi.unlearning.rivals.paired import other_labels

CRITERION = nn.CrossEntropyLoss()
RIVALS = [NegGradPlus(), RandomLabels(), SalUn(), SCRUB(), SSD()]
LR = 0.1


def net(num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, num_classes))


def batch(n, seed, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(num_classes, (n,), generator=generator)
    return torch.randn(n, 4, generator=generator), y


def sgd(params, **options):
    return torch.optim.SGD(params, lr=LR, **options)


def run(method, retain, forget, num_steps, model=None, optimizer=sgd):
    unlearner = Unlearner(
        model or net(),
        criterion=CRITERION,
        method=method,
        optimizer=optimizer,
        generator=torch.Generator().manual_seed(1),
    )
    steps = list(unlearner.run(retain, num_steps, forget_loader=forget))
    return unlearner.model, len(steps)


def descend(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p -= LR * g


def close(model, expected):
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


def same(model, expected):
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_neg_grad_plus_descends_and_ascends():
    retain, forget = [batch(5, 1), batch(5, 2)], [batch(3, 3)]
    model, _ = run(NegGradPlus(0.8), retain, forget, 2)
    hand = net()
    for x, y in retain:
        keep = CRITERION(hand(x), y)
        drop = CRITERION(hand(forget[0][0]), forget[0][1])
        descend(hand, 0.8 * keep - 0.2 * drop)
    assert close(model, hand)


def test_neg_grad_plus_at_one_is_fine_tuning():
    retain, forget = [batch(5, 1)], [batch(3, 3)]
    model, _ = run(NegGradPlus(1.0), retain, forget, 3)
    plain, _ = run(FineTune(), retain, None, 3)
    assert close(model, plain)


def test_random_labels_with_two_classes_flips_them():
    retain, forget = [batch(5, 1, 2)], [batch(3, 3, 2)]
    model, _ = run(RandomLabels(0.5), retain, forget, 1, net(2))
    hand = net(2)
    flipped = CRITERION(hand(forget[0][0]), 1 - forget[0][1])
    descend(hand, flipped + 0.5 * CRITERION(hand(retain[0][0]), retain[0][1]))
    assert close(model, hand)


def test_wrong_labels_are_uniform_over_the_others():
    y = torch.arange(4).repeat(3000)
    drawn = other_labels(y, 4, torch.Generator().manual_seed(0))
    counts = np.zeros((4, 4))
    np.add.at(counts, (y.numpy(), drawn.numpy()), 1)
    assert not counts.diagonal().any()
    others = counts[~np.eye(4, dtype=bool)]
    assert np.abs(others - 1000).max() < 4.5 * np.sqrt(3000 * (1 / 3) * (2 / 3))


def test_random_labels_need_classes():
    forget = [(torch.randn(3, 4), torch.randn(3, 1))]
    unlearner = Unlearner(net(1), criterion=nn.MSELoss(), method=RandomLabels())
    with pytest.raises(ValueError, match="classifiers"):
        next(unlearner.run(forget, 1, forget_loader=forget))


@pytest.mark.parametrize("kept", [0.01, 0.3, 1.0])
def test_salun_changes_the_salient_weights_only(kept):
    retain, forget = [batch(5, 1)], [batch(3, 3), batch(2, 4)]
    start = net()
    x, y = (torch.cat(parts) for parts in zip(*forget, strict=True))
    grads = torch.autograd.grad(CRITERION(start(x), y), list(start.parameters()))
    flat = torch.cat([g.abs().flatten() for g in grads])
    num_kept = max(1, round(kept * len(flat)))
    threshold = flat.sort(descending=True).values[num_kept - 1]

    def decaying(params):
        return sgd(params, momentum=0.9, weight_decay=0.1)

    model, _ = run(SalUn(salient_share=kept), retain, forget, 3, net(), decaying)
    everywhere, _ = run(RandomLabels(), retain, forget, 1, net())
    moved = 0
    for a, b, g in zip(model.parameters(), start.parameters(), grads, strict=True):
        mask = g.abs() >= threshold
        assert torch.equal(a[~mask], b[~mask])
        moved += (a != b).sum().item()
    assert moved == num_kept
    one_step, _ = run(SalUn(salient_share=kept), retain, forget, 1, net())
    for a, b, c, g in zip(
        one_step.parameters(),
        start.parameters(),
        everywhere.parameters(),
        grads,
        strict=True,
    ):
        mask = g.abs() >= threshold
        torch.testing.assert_close(a, torch.where(mask, c, b))


def test_salun_of_everything_is_random_labels():
    retain, forget = [batch(5, 1)], [batch(3, 3)]
    first, _ = run(SalUn(salient_share=1.0), retain, forget, 4)
    second, _ = run(RandomLabels(), retain, forget, 4)
    assert same(first, second)


def test_scrub_alternates_and_then_repairs():
    retain, forget = [batch(5, 1), batch(5, 2)], [batch(3, 3)]
    method = SCRUB(num_max_passes=2, kl_weight=0.3, loss_weight=0.7, temperature=2.0)
    # 2 passes of (1 max + 2 min) steps and one of 2 min steps
    model, num_steps = run(method, retain, forget, 8)
    assert num_steps == 8
    teacher, hand = net(), net()

    def distance(x):
        student = functional.log_softmax(hand(x) / 2.0, dim=1)
        target = functional.softmax(teacher(x) / 2.0, dim=1).detach()
        return (target * (target.log() - student)).sum() * 4.0 / len(x)

    for num_pass in range(3):
        if num_pass < 2:
            for x, _ in forget:
                descend(hand, -distance(x))
        for x, y in retain:
            descend(hand, 0.3 * distance(x) + 0.7 * CRITERION(hand(x), y))
    assert close(model, hand)


def test_the_scrub_teacher_is_the_model_before():
    retain, forget = [batch(5, 1)], [batch(3, 3)]
    # the student starts at the teacher: KL has gradient 0 there, so nothing moves
    model, _ = run(SCRUB(loss_weight=0.0), retain, forget, 1)
    assert close(model, net())


@pytest.mark.parametrize("selection, dampening", [(0.9, 0.5), (0.5, 1.5)])
def test_ssd_dampens_by_the_ratio_of_importances(selection, dampening):
    retain, forget = [batch(5, 1), batch(5, 2)], [batch(4, 3)]
    method = SSD(selection, dampening)
    model, num_steps = run(method, retain, forget, 100)
    assert num_steps == 1
    start = net()

    def importance(batches):
        squares = [
            [
                g**2
                for g in torch.autograd.grad(
                    CRITERION(start(x), y), list(start.parameters())
                )
            ]
            for x, y in batches
        ]
        return [sum(parts) / len(batches) for parts in zip(*squares, strict=True)]

    touched = 0
    for a, b, f, d in zip(
        model.parameters(),
        start.parameters(),
        importance(forget),
        importance(retain + forget),
        strict=True,
    ):
        expected = b.detach().clone()
        for i in np.ndindex(*b.shape):
            if f[i] > selection * d[i]:
                expected[i] *= min(dampening * (d[i] / f[i]).item(), 1.0)
                touched += 1
        torch.testing.assert_close(a.detach(), expected)
    assert 0 < touched < sum(p.numel() for p in start.parameters())


def test_ssd_leaves_the_other_weights_alone_whatever_the_optimizer():
    retain, forget = [batch(5, 1)], [batch(4, 3)]

    def decaying(params):
        return torch.optim.AdamW(params, lr=1.0, weight_decay=0.5)

    model, _ = run(SSD(selection_weight=1e9), retain, forget, 3, None, decaying)
    assert same(model, net())


@pytest.mark.parametrize("method", RIVALS, ids=str)
def test_end_to_end(method):
    x, y = batch(40, 5)
    train_set = TensorDataset(x, y)
    model = net()
    unlearner = Unlearner(model, criterion=CRITERION, method=method)
    before = copy.deepcopy(model.state_dict())
    looks = []

    def evaluate(model):
        looks.append(1)
        with torch.no_grad():
            return {"forget_loss": CRITERION(model(x[:8]), y[:8]).item()}

    result = unlearner.unlearn(
        train_set, np.arange(8), num_epochs=3, evaluate=evaluate, batch_size=10
    )
    times = [0, 1] if isinstance(method, SSD) else [0, 1, 2, 3]
    assert result.trace.times == times
    assert result.guarantee.kind == "empirical"
    assert any(
        "never looks at the forget set" in a.statement for a in result.guarantee.unmet
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert str(method) == result.record["method"]


@pytest.mark.parametrize("method", RIVALS, ids=str)
def test_a_forget_loader_is_asked_for(method):
    unlearner = Unlearner(net(), criterion=CRITERION, method=method)
    with pytest.raises(ValueError, match="forget_loader"):
        unlearner.run(DataLoader(TensorDataset(*batch(5, 1))), 3)


def test_an_empty_forget_loader_is_refused():
    unlearner = Unlearner(net(), criterion=CRITERION, method=NegGradPlus())
    with pytest.raises(ValueError, match="forget_loader"):
        next(unlearner.run([batch(5, 1)], 3, forget_loader=[]))


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: NegGradPlus(1.1), "retain_weight must .*got 1.1"),
        (lambda: RandomLabels(-1.0), "retain_weight must .*got -1"),
        (lambda: SalUn(salient_share=0.0), "salient_share must .*got 0"),
        (lambda: SalUn(salient_share=1.5), "salient_share must .*got 1.5"),
        (lambda: SCRUB(temperature=0.0), "temperature must .*got 0"),
        (lambda: SCRUB(kl_weight=-1.0), "kl_weight must .*got -1"),
        (lambda: SSD(selection_weight=0.0), "selection_weight must .*got 0"),
        (lambda: SSD(dampening=-1.0), "dampening must .*got -1"),
    ],
)
def test_bad_settings_are_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build()
