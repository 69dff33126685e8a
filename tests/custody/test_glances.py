"""A loop that changes its loss after the updates that are compared whole is refused.

Every loop audits a plain cross entropy and uses it in the first updates. The whole
comparisons of later updates are switched off here, so only glances are left.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opacus_pi.custody import looks
from opacus_pi.integration import loop_loss
from tests.custody import hidden_ids, loop_list, loop_parts, models, oracle
from tests.custody.loops import Loop
from tests.custody.test_generated_loops import REFUSED, RIGHT, trained, verdict
from tests.custody.test_loop_loss import FREE, audited, losses_of, state_of_loss


@pytest.fixture(autouse=True)
def only_three_whole_comparisons(monkeypatch):
    first = looks.few_updates
    monkeypatch.setattr(loop_loss, "few_updates", lambda draws: first(draws)[:3])


def epochs(number):
    def updates(run):
        for _ in range(number):
            for batch in run.loader:
                run.train(batch)

    return updates


def since(update, loss):
    """A loss that the loop computes from an update on; before, the criterion."""

    class Switched:
        def __init__(self):
            self.num_calls = 0

        def __call__(self, criterion, outputs, targets):
            self.num_calls += 1
            is_late = self.num_calls >= update and len(targets)
            return (loss if is_late else plain)(criterion, outputs, targets)

    return Switched()


def plain(criterion, outputs, targets):
    return criterion(outputs, targets)


def hardest_half(_, outputs, targets):
    return losses_of(outputs, targets).topk(max(1, len(targets) // 2)).values.mean()


def weighted_by_hardness(_, outputs, targets):
    losses = losses_of(outputs, targets)
    return (losses * losses.detach().softmax(0)).sum()


def of_centred_outputs(_, outputs, targets):
    return F.cross_entropy(outputs - outputs.mean(0), targets)


def with_the_next_targets(_, outputs, targets):
    return F.cross_entropy(outputs, targets.roll(1))


def smoothed(_, outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def with_a_penalty_of_the_batch(criterion, outputs, targets):
    return criterion(outputs, targets) + 0.1 * outputs.mean(0).square().sum()


def divided_by_its_value(_, outputs, targets):
    loss = F.cross_entropy(outputs, targets)
    return loss / loss.detach()


def divided_by_its_root(_, outputs, targets):
    return F.cross_entropy(outputs, targets).sqrt()


def summed(_, outputs, targets):
    return 0.1 * F.cross_entropy(outputs, targets, reduction="sum")


def turned(criterion, outputs, targets):
    return -criterion(outputs, targets)


OTHERS = (
    hardest_half,
    weighted_by_hardness,
    of_centred_outputs,
    with_the_next_targets,
    smoothed,
    with_a_penalty_of_the_batch,
)


@pytest.mark.parametrize("mode", FREE)
@pytest.mark.parametrize("loss", OTHERS)
def test_another_loss_later_is_refused(loss, mode):
    run = trained(Loop("late", loss=since(5, loss), setup=audited, mode=mode))
    assert verdict(run, "no norm of it is right")[0] == REFUSED
    had = "examples had no gradient" if loss is hardest_half else "outputs were not"
    assert had in run.refusal


@pytest.mark.parametrize("mode", FREE)
def test_another_sign_later_is_said(mode):
    run = trained(Loop("late", loss=since(5, turned), setup=audited, mode=mode))
    assert run.refusal == "" and state_of_loss(run) == "unchecked"
    assert "multiplies its loss or its gradients by a factor" in run.said[-1]


@pytest.mark.parametrize("mode", FREE)
@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (divided_by_its_value, "its loss"),
        (divided_by_its_root, "its loss"),
        (summed, "the number of its samples"),
    ],
)
def test_a_factor_that_follows_the_batch_is_refused(loss, what, mode):
    loop = Loop("late", loss=since(5, loss), setup=audited, mode=mode)
    run = trained(loop.having(updates=epochs(4)))
    assert f"followed the batch: it depended on {what}" in run.refusal


class Scheduled:
    """A loss that is multiplied by a factor of the number of the update."""

    def __init__(self, factor):
        self.factor, self.num_calls = factor, 0

    def __call__(self, criterion, outputs, targets):
        self.num_calls += 1
        return self.factor(self.num_calls) * criterion(outputs, targets)


SCHEDULES = {
    "warm-up": lambda k: min(1.0, k / 8),
    "slow": lambda k: min(1.0, k / 1000),
    "decay": lambda k: 0.97**k,
    "doubled": lambda k: 2.0 ** (k // 5),
    "cyclic": lambda k: 1.5 + math.sin(k),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("mode", "sampling"), [("hooks", "poisson"), ("fast", "fixed")]
)
def test_a_factor_of_the_number_of_the_update_is_said(name, mode, sampling):
    options = {**MANY, "sampling": sampling, "setup": audited, "mode": mode}
    run = trained(Loop(name, loss=Scheduled(SCHEDULES[name]), **options))
    assert run.refusal == "" and state_of_loss(run) == "unchecked"
    assert "a factor that changes" in run.said[-1] and len(run.said) <= 2
    assert "a factor that changes" in sentence_of_loss(run)
    assert "Put the factor into the criterion" not in sentence_of_loss(run)


def sentence_of_loss(run):
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    return link.sentence


def test_a_grad_scaler_that_grows_is_said():
    def updates(run):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
        for batch in run.loader:
            run.zero_grad()
            run.keep(tuple(batch))
            loss = run.criterion(run.model(batch[0]), batch[1])
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()

    run = trained(Loop("scaler", updates=updates, setup=audited, sampling="fixed"))
    assert run.refusal == "" and state_of_loss(run) == "unchecked"
    assert "GradScaler" in run.said[-1]


def test_a_loss_that_changes_for_good_is_found_within_fifteen_updates():
    for start in (65, 72, 79):
        loop = Loop("late", loss=since(start, hardest_half), setup=audited)
        run = trained(loop.having(updates=epochs(24), sampling="fixed"))
        assert len(run.updates) == 96
        assert "examples had no gradient" in run.refusal, start


@pytest.mark.parametrize("place", [None, *range(4)])
def test_one_physical_batch_of_an_update_is_enough(place):
    options = {"loader": {"batch_size": 2}, "sampling": "fixed", "setup": audited}
    run = trained(Loop("physical", updates=four_passes(wrong=place), **options))
    if place is None:
        assert run.said == [] and state_of_loss(run) == "checked"
    else:
        assert "outputs were not those" in run.refusal


def four_passes(*, wrong):
    """Updates of four passes, one of which has another loss from the seventh on."""

    def updates(run):
        for epoch in range(6):
            for number, batch in enumerate(run.loader):
                is_wrong = epoch >= 3 and number % 4 == wrong
                run.keep(tuple(batch))
                loss = of_centred_outputs if is_wrong else plain
                outputs = run.model(batch[0])
                loss(run.criterion, outputs, batch[1]).backward()
                run.optimizer.signal_skip_step(number % 4 < 3)
                run.step()
                run.optimizer.zero_grad()

    return updates


# ------------------------------------------------------------- loops that are all right
def by_hand(_, outputs, targets):
    return -outputs.log_softmax(1).gather(1, targets[:, None]).mean()


def from_probabilities(_, outputs, targets):
    chosen = outputs.softmax(1).gather(1, targets[:, None])
    return -chosen.log().mean()


def rounded_outputs(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(batch[0])


def averaged_over_two(run):
    for _ in range(6):
        for number, batch in enumerate(run.loader):
            run.backward(batch, 0.5)
            if number % 2:
                run.step()
                run.zero_grad()


MANY = {"updates": epochs(20), "every": tuple(range(1, 100)), "sampling": "fixed"}
CONTROLS = [
    (Loop("plain", **MANY), loop_list.MOST),
    (Loop("by_hand", loss=by_hand, **MANY), FREE),
    (Loop("probabilities", loss=from_probabilities, **MANY), ("hooks",)),
    (Loop("permuted", transform=loop_parts.permuted, **MANY), FREE),
    (Loop("half", transform=loop_parts.every_other, **MANY), ("hooks",)),
    (Loop("ahead", updates=loop_parts.two_batches_ahead), FREE),
    (Loop("dropout", model=models.with_dropout, **MANY), FREE),
    (Loop("memory_managed", updates=loop_parts.memory_managed), FREE),
    (
        Loop(
            "summed",
            criterion=models.summed_cross_entropy,
            private={"loss_reduction": "sum"},
            **MANY,
        ),
        FREE,
    ),
    (
        Loop(
            "each",
            criterion=lambda: nn.CrossEntropyLoss(reduction="none"),
            loss=lambda c, o, t: c(o, t).mean() if len(t) else c(o, t).sum(),
            **MANY,
        ),
        FREE,
    ),
]


@pytest.mark.parametrize("loop", loop_list.with_modes(CONTROLS), ids=str)
def test_a_loop_that_keeps_its_loss_is_recorded_without_a_word(loop):
    run = trained(loop.having(setup=audited))
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == [] and state_of_loss(run) == "checked"


class Sure(nn.Module):
    """Knows the class of every example, up to a probability of exp(-confidence)."""

    def __init__(self, confidence):
        super().__init__()
        self.layer = nn.Linear(hidden_ids.ENTRIES, hidden_ids.CLASSES)
        with torch.no_grad():
            self.layer.weight.zero_()
            own = self.layer.weight[: hidden_ids.NUM_EXAMPLES, hidden_ids.WIDTH :]
            own.copy_(confidence * torch.eye(hidden_ids.NUM_EXAMPLES))

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("confidence", [6, 9, 12, 16, 20])
@pytest.mark.parametrize("loss", [plain, by_hand, from_probabilities])
def test_a_model_that_knows_every_example_raises_no_alarm(loss, confidence):
    """Its gradients are differences of numbers near 1, so rounding is all of them."""
    options = {"private": {"noise_multiplier": 1e-9}, "setup": audited}
    loop = Loop("sure", model=lambda: Sure(confidence), loss=loss, **MANY, **options)
    run = trained(loop)
    assert run.said == [] and state_of_loss(run) == "checked"


def test_samples_that_look_alike_are_left_out():
    data = hidden_ids.Shaped(lambda x, y: (torch.ones_like(x), 0 * y))
    run = trained(Loop("alike", data=lambda: data, setup=audited, **MANY))
    assert run.refusal == "" and run.said == []


def test_mixed_precision_and_averages_raise_no_alarm():
    run = trained(Loop("mixed", forward=rounded_outputs, setup=audited, **MANY))
    assert run.said == [] and run.refusal == ""
    options = {"sampling": "fixed", "setup": audited}
    run = trained(Loop("averaged", updates=averaged_over_two, **options))
    assert run.said == [] and state_of_loss(run) == "checked"


def test_glances_leave_no_trace():
    def seeded(run):
        torch.manual_seed(7)

    def audited_and_seeded(run):
        audited(run)
        torch.manual_seed(7)

    one, other = (
        trained(Loop("plain", model=models.with_dropout, setup=setup, **MANY))
        for setup in (seeded, audited_and_seeded)
    )
    weights = one.module.parameters(), other.module.parameters()
    assert all(map(torch.equal, *weights))
    assert state_of_loss(other) == "checked"
