"""After an audit, a loop that computes another loss is refused, or it is said.

The loops below audit a plain cross entropy and then train on something else. The
controls train on what was audited, and must stay recorded in full and without a word.
"""

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.custody import hidden_ids, loop_list, loop_parts, models, oracle
from tests.custody.loops import Loop
from tests.custody.test_generated_loops import (
    REFUSED,
    RIGHT,
    SAID,
    trained,
    verdict,
)

FREE, ALL = ("hooks", "functorch", "ew", "fast"), loop_list.ALL
PER_EXAMPLE = loop_list.PER_EXAMPLE


def audited(run):
    assert run.engine.audit(run.criterion).passed


def losses_of(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


# ------------------------------------------- losses that are not the audited criterion
def hardest_half(_, outputs, targets):
    return losses_of(outputs, targets).topk(max(1, len(targets) // 2)).values.mean()


def above_the_median(_, outputs, targets):
    losses = losses_of(outputs, targets)
    return (losses * (losses >= losses.median())).mean()


def weighted_by_hardness(_, outputs, targets):
    losses = losses_of(outputs, targets)
    return (losses * losses.detach().softmax(0)).sum()


def class_weighted(_, outputs, targets):
    return F.cross_entropy(outputs, targets, weight=models.class_weights())


def balanced_in_the_batch(_, outputs, targets):
    groups = targets % 2  # every example of the data has a label of its own
    counts = torch.bincount(groups, minlength=2)
    return (losses_of(outputs, targets) / counts[groups]).mean()


def even_classes_ignored(_, outputs, targets):
    return F.cross_entropy(outputs, targets.masked_fill(targets % 2 == 0, -100))


def divided_by_the_largest(_, outputs, targets):
    losses = losses_of(outputs, targets)
    return (losses / losses.max()).mean()


def divided_by_its_value(_, outputs, targets):
    loss = F.cross_entropy(outputs, targets)
    return loss / loss.detach()


def summed(_, outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")


def of_centred_outputs(_, outputs, targets):
    return F.cross_entropy(outputs - outputs.mean(0), targets)


def with_a_contrastive_term(_, outputs, targets):
    spread = (outputs[:, None] - outputs[None]).square().mean()
    return F.cross_entropy(outputs, targets) - 0.1 * spread


def of_mean_targets(_, outputs, targets):
    hot = F.one_hot(targets, outputs.shape[1]).float()
    return F.cross_entropy(outputs, 0.8 * hot + 0.2 * hot.mean(0))


def with_the_next_targets(_, outputs, targets):
    return F.cross_entropy(outputs, targets.roll(1))


# ------------------------------------------------ per-example gradients that it changes
def changing(change):
    def updates(run):
        for batch in run.loader:
            run.zero_grad()
            run.backward(batch)
            for parameter in run.module.parameters():
                parameter.grad_sample = change(parameter.grad_sample)
            run.step()

    return updates


def changed_in_place(run):
    for batch in run.loader:
        run.zero_grad()
        run.backward(batch)
        for parameter in run.module.parameters():
            parameter.grad_sample.div_(parameter.grad_sample.norm())
        run.step()


def other_loss_later(run):
    for _ in range(2):
        for batch in run.loader:
            run.zero_grad()
            run.keep(tuple(batch))
            outputs = run.model(batch[0])
            is_late = len(run.updates) > 2 and len(outputs)
            half = hardest_half(None, outputs, batch[1]) if is_late else None
            loss = run.criterion(outputs, batch[1]) if half is None else half
            loss.backward()
            run.step()


LOSSES = (
    hardest_half,
    above_the_median,
    weighted_by_hardness,
    class_weighted,
    balanced_in_the_batch,
    even_classes_ignored,
    divided_by_the_largest,
    divided_by_its_value,
    summed,
    of_centred_outputs,
    with_a_contrastive_term,
    of_mean_targets,
    with_the_next_targets,
)
CHANGES = {
    "normalised": lambda g: g / g.norm(),
    "rows_of_one_norm": lambda g: F.normalize(g.flatten(1), dim=1).view_as(g),
    "rows_permuted": lambda g: g.roll(1, 0),
    "centred": lambda g: g - g.mean(0),
}
FOOLING = [
    *(Loop(f.__name__, loss=f, mode=m) for f in LOSSES for m in FREE),
    *(
        Loop(name, updates=changing(change), mode=mode)
        for name, change in CHANGES.items()
        for mode in PER_EXAMPLE
    ),
    *(Loop("in_place", updates=changed_in_place, mode=mode) for mode in PER_EXAMPLE),
    *(
        Loop(f.__name__, transform=f, mode=mode)
        for f in (
            loop_parts.labels_permuted,
            loop_parts.labels_permuted_in_place,
            loop_parts.inputs_permuted,
        )
        for mode in FREE
    ),
]


@pytest.mark.parametrize("loop", FOOLING, ids=str)
def test_a_loop_with_another_loss_is_refused_or_said(loop):
    run = trained(loop.having(setup=audited))
    outcome, reason = verdict(run, "no norm of it is right")
    assert outcome in (REFUSED, SAID)
    assert "update" in reason


def test_a_loop_that_changes_its_loss_later_is_refused():
    run = trained(Loop("later", updates=other_loss_later, setup=audited))
    assert verdict(run, "separability")[0] == REFUSED
    assert "had no gradient" in run.refusal


def autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(batch[0]).float()


def constant_factor(criterion, outputs, targets):
    return 0.5 * criterion(outputs, targets)


def sign_of_the_batch(criterion, outputs, targets):
    is_even = int(targets.sum()) % 2 == 0
    return criterion(outputs, targets) * (1.0 if is_even else -1.0)


class Physical:
    """Updates of several physical batches, one of which has a coupled loss."""

    def __init__(self, num, wrong):
        self.num, self.wrong = num, wrong

    def __call__(self, run):
        for number, batch in enumerate(run.loader):
            place = number % self.num
            run.keep(tuple(batch))
            loss = of_centred_outputs if place == self.wrong else None
            outputs = run.model(batch[0])
            (loss or run.loop.loss)(run.criterion, outputs, batch[1]).backward()
            run.optimizer.signal_skip_step(place < self.num - 1)
            run.step()
            run.optimizer.zero_grad()


def averaged(number):
    """Updates of so many backward passes, each divided by their number."""

    def updates(run):
        for _ in range(2):
            run.zero_grad()
            batches = list(run.loader)
            for place, batch in enumerate(batches):
                run.backward(batch, 1 / number)
                if place % number == number - 1 or place == len(batches) - 1:
                    run.step()
                    run.zero_grad()

    return updates


@pytest.mark.parametrize("wrong", range(4))
def test_every_physical_batch_of_an_update_is_compared(wrong):
    small = {"loader": {"batch_size": 2}, "sampling": "fixed"}
    run = trained(Loop("physical", updates=Physical(4, wrong), setup=audited, **small))
    assert "In an update, the norms" in run.refusal
    run = trained(Loop("physical", updates=Physical(4, -1), setup=audited, **small))
    assert run.said == []
    assert state_of_loss(run) == "checked"


def test_of_many_physical_batches_four_are_drawn():
    options = {"loader": {"batch_size": 2}, "sampling": "fixed", "setup": audited}

    def updates(run):
        for _ in range(3):
            Physical(8, 7)(run)

    run = trained(Loop("many", updates=updates, **options))
    assert "In an update, the norms" in run.refusal


@pytest.mark.parametrize("mode", FREE)
def test_a_sign_that_depends_on_the_batch_is_said(mode):
    run = trained(Loop("sign", loss=sign_of_the_batch, setup=audited, mode=mode))
    assert state_of_loss(run) == "unchecked"
    assert "multiplies its loss or its gradients by a factor" in run.said[-1]


def turned_by_a_hook(criterion, outputs, targets):
    if int(targets.sum()) % 2:
        outputs.register_hook(lambda gradient: -gradient)
    return criterion(outputs, targets)


@pytest.mark.parametrize("mode", FREE)
def test_a_hook_that_turns_some_gradients_is_seen(mode):
    run = trained(Loop("turned", loss=turned_by_a_hook, setup=audited, mode=mode))
    assert state_of_loss(run) == "unchecked"
    assert "multiplies its loss or its gradients by a factor" in run.said[-1]


def test_each_row_has_the_direction_of_its_own_gradient():
    def mirrored(_, outputs, targets):
        signs = 1.0 - 2.0 * (torch.arange(len(targets)) % 2)
        return (losses_of(outputs, targets) * signs).mean()

    run = trained(Loop("mirrored", loss=mirrored, setup=audited))
    assert "although their norms were" in run.refusal


@pytest.mark.parametrize("number", [2, 4])
def test_losses_divided_by_the_number_of_passes_are_said(number):
    options = {"loader": {"batch_size": 3}, "sampling": "fixed", "setup": audited}
    run = trained(Loop("averaged", updates=averaged(number), **options))
    assert run.said == []
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    assert link.state == "checked"
    assert f"were {1 / number:.4g} times those" in link.sentence


@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_updates_before_the_audit_are_not_covered_by_it(mode):
    def late(run):
        for number, batch in enumerate(run.loader):
            if number == 2:
                audited(run)
            run.train(batch)

    run = trained(Loop("late", updates=late, mode=mode))
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    assert link.state == "unchecked"
    assert link.sentence.startswith("The loss of the first 2 update(s) was not")
    assert run.said == []

    def twice(run):
        for number, batch in enumerate(run.loader):
            if number in (0, 3):
                audited(run)
            run.train(batch)

    assert state_of_loss(trained(Loop("twice", updates=twice, mode=mode))) == "checked"


@pytest.mark.parametrize("parts", [1, 2], ids=["one batch", "two batches"])
def test_an_update_that_began_before_the_audit_is_not_covered(parts):
    def updates(run):
        for number, batch in enumerate(run.loader):
            wrong = number == 0
            run.keep(tuple(batch))
            loss = of_centred_outputs if wrong else run.loop.loss
            outputs = run.model(batch[0])
            loss(run.criterion, outputs, batch[1]).backward()
            if wrong and parts == 1:
                audited(run)
            run.optimizer.signal_skip_step(number % parts < parts - 1)
            run.step()
            if wrong and parts == 2:
                audited(run)
            run.optimizer.zero_grad()

    run = trained(Loop("begun", updates=updates, sampling="fixed"))
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    assert link.state == "unchecked"
    assert link.sentence.startswith("The loss of the first 1 update(s) was not")


FIXED = {"sampling": "fixed"}
SUM = {"private": {"loss_reduction": "sum"}}
CONTROLS = [
    (Loop("plain"), ALL),
    (Loop("shuffled", **FIXED), ALL),
    (Loop("small_batches", loader={"batch_size": 2}), ("hooks", "ghost")),
    (Loop("dropout", model=models.with_dropout), ALL),
    (Loop("summed", criterion=models.summed_cross_entropy, **SUM), ALL),
    (Loop("smoothed", criterion=models.smoothed_cross_entropy), ALL),
    (Loop("focal", criterion=models.Focal), ("hooks", "ghost")),
    (Loop("memory_managed", updates=loop_parts.memory_managed), loop_list.MOST),
    (Loop("accumulated", updates=loop_parts.accumulated, **FIXED), ("hooks", "fast")),
    (Loop("in_chunks", updates=loop_parts.in_chunks, **FIXED), ("hooks", "fast")),
    (Loop("ahead", updates=loop_parts.two_batches_ahead), ("hooks", "ghost")),
    (Loop("evaluated", updates=loop_parts.evaluated_between), loop_list.MOST),
    (Loop("looked_at", updates=loop_parts.training_loss_looked_at), loop_list.MOST),
    (Loop("cloned", transform=loop_parts.cloned), loop_list.MOST),
    (Loop("permuted", transform=loop_parts.permuted), loop_list.MOST),
    (Loop("half", transform=loop_parts.every_other), ("hooks", "ghost")),
    (Loop("frozen", model=models.with_frozen_layer), loop_list.MOST),
    (
        Loop("images", model=models.convolutional, data=hidden_ids.image_data),
        ("hooks", "ghost"),
    ),
]


@pytest.mark.parametrize("loop", loop_list.with_modes(CONTROLS), ids=str)
def test_a_loop_with_the_audited_loss_is_recorded_without_a_word(loop):
    run = trained(loop.having(setup=audited))
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == []
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    # a criterion that is not torch's may couple examples in some batches
    is_own = loop.criterion is models.Focal
    assert link.state == ("unchecked" if is_own else "checked"), link.sentence


def test_automatic_mixed_precision_is_repeated():
    run = trained(Loop("autocast", forward=autocast, setup=audited))
    assert run.said == [] and run.refusal == ""
    assert state_of_loss(run) == "checked"


def state_of_loss(run):
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    return link.state


def test_a_constant_factor_is_said_and_the_norms_are_right():
    run = trained(Loop("constant", loss=constant_factor, setup=audited))
    assert state_of_loss(run) == "unchecked"
    (text,) = run.said
    assert "were 0.5 times those of the audited criterion" in text


def test_an_audit_without_a_later_update_says_so():
    loop = Loop("audited afterwards")
    run = trained(loop)
    audited(run)
    (link,) = [x for x in run.engine.ledger.custody.links if x.name == "loss"]
    assert link.state == "unchecked"
    assert "no update was made since the audit" in link.sentence


@pytest.mark.parametrize("mode", ALL)
def test_comparisons_leave_no_trace(mode):
    def seeded(run):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)

    def audited_and_seeded(run):
        audited(run)
        seeded(run)

    found = []
    for setup in (seeded, audited_and_seeded):
        loop = Loop("plain", model=models.with_dropout, setup=setup, mode=mode)
        run = trained(loop)
        drawn = torch.rand(3), random.random(), np.random.rand()
        found.append((run, drawn))
    (plain, before), (other, after) = found
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    weights = plain.module.parameters(), other.module.parameters()
    assert all(map(torch.equal, *weights))
    np.testing.assert_array_equal(plain.ledger.grad_norms, other.ledger.grad_norms)
    assert state_of_loss(other) == "checked"


# ---------------------------------- ghost clipping, which knows the criterion by itself
def times_the_inverse_loss(criterion, outputs, targets):
    value = F.cross_entropy(outputs.detach(), targets) if len(targets) else 1.0
    return criterion(outputs, targets) / float(value)


def times_own_weights(criterion, outputs, targets):
    return criterion(outputs, targets) * losses_of(outputs.detach(), targets).softmax(0)


def times_the_harder_half(criterion, outputs, targets):
    losses = losses_of(outputs.detach(), targets)
    is_hard = losses >= losses.median() if len(losses) else losses
    return criterion(outputs, targets) * is_hard


def divided_by_the_size(criterion, outputs, targets):
    return criterion(outputs, targets) / max(1, len(targets))


def without_the_wrapper(_, outputs, targets):
    return F.cross_entropy(outputs, targets)


def plus_one_of_centred_outputs(criterion, outputs, targets):
    loss = criterion(outputs, targets)
    return loss + criterion(outputs - outputs.mean(0), targets)


def centred_outputs(criterion, outputs, targets):
    return criterion(outputs - outputs.mean(0), targets)


def normalised_on_the_way_back(model, batch):
    outputs = model(batch[0])
    if outputs.requires_grad:
        outputs.register_hook(lambda g: g / g.norm().clamp(min=1e-9))
    return outputs


def hooked_parameters(run):
    for parameter in run.module.parameters():
        parameter.register_hook(lambda g: 10 * g)


WITHOUT_AUDIT = [
    *(
        Loop(f.__name__, loss=f, mode="ghost")
        for f in (
            times_the_inverse_loss,
            times_own_weights,
            times_the_harder_half,
            divided_by_the_size,
            without_the_wrapper,
        )
    ),
    Loop("output_hook", forward=normalised_on_the_way_back, mode="ghost"),
    Loop("parameter_hook", setup=hooked_parameters, mode="ghost"),
]
IN_THE_LEDGER = [
    Loop(f.__name__, loss=f, mode="ghost")
    for f in (plus_one_of_centred_outputs, centred_outputs)
]


@pytest.mark.parametrize("loop", WITHOUT_AUDIT, ids=str)
def test_ghost_clipping_says_without_an_audit_what_the_loop_adds(loop):
    run = trained(loop)
    assert verdict(run, "no norm of it is right")[0] in (REFUSED, SAID)


@pytest.mark.parametrize("loop", IN_THE_LEDGER, ids=str)
def test_ghost_clipping_leaves_losses_of_other_tensors_unchecked(loop):
    assert state_of_loss(trained(loop)) == "unchecked"


def both(*setups):
    def setup(run):
        for one in setups:
            one(run)

    return setup


@pytest.mark.parametrize("loop", [*WITHOUT_AUDIT, *IN_THE_LEDGER], ids=str)
def test_ghost_clipping_after_an_audit(loop):
    setups = [audited] if loop.setup is None else [audited, loop.setup]
    run = trained(loop.having(setup=both(*setups)))
    assert run.refusal or run.said


def summed_twice(criterion, outputs, targets):
    return criterion(outputs, targets) + criterion(outputs, targets)


@pytest.mark.parametrize("loss", [constant_factor, summed_twice])
def test_constant_factors_of_ghost_clipping_need_no_word(loss):
    run = trained(Loop("constant", loss=loss, mode="ghost"))
    assert run.said == [] and state_of_loss(run) == "checked"


# ----------------------------------------------------- batches that are no plain pairs
class Item(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


class ByName(nn.Module):
    """A model with an input called ``values``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(hidden_ids.ENTRIES, hidden_ids.CLASSES)

    def forward(self, values):
        return self.layer(values)


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(hidden_ids.ENTRIES, hidden_ids.CLASSES)
        self.two = nn.Linear(hidden_ids.ENTRIES, hidden_ids.CLASSES)

    def forward(self, one, two):
        return self.one(one) + self.two(two)


class OfADict(OfTwo):
    def forward(self, parts):
        return super().forward(parts["one"], parts["two"])


def shaped(make):
    return lambda: hidden_ids.Shaped(make)


# the data set, the model, and (model, batch) -> outputs and targets
BATCHES = {
    "dict": (
        shaped(lambda x, y: {"values": x, "labels": y}),
        ByName,
        lambda model, b: (model(values=b["values"]), b["labels"]),
    ),
    "named tuple": (
        shaped(lambda x, y: Item(x, y)),
        models.perceptron,
        lambda model, b: (model(b.inputs), b.targets),
    ),
    "pair of inputs": (
        shaped(lambda x, y: ((x, 0.5 * x), y)),
        OfTwo,
        lambda model, b: (model(*b[0]), b[1]),
    ),
    "nested dict": (
        shaped(lambda x, y: {"parts": {"one": x, "two": 0.5 * x}, "labels": y}),
        OfADict,
        lambda model, b: (model(b["parts"]), b["labels"]),
    ),
}


def plain(criterion, outputs, targets):
    return criterion(outputs, targets)


def rolled(criterion, outputs, targets):
    return criterion(outputs, targets.roll(1))


def by_parts(parts, loss):
    def updates(run):
        for batch in run.loader:
            run.optimizer.zero_grad()
            outputs, targets = parts(run.model, batch)
            loss(run.train_criterion, outputs, targets).backward()
            run.optimizer.step()

    return updates


def of_batches(name, loss, mode):
    data, model, parts = BATCHES[name]
    updates = by_parts(parts, loss)
    return Loop(name, data=data, model=model, updates=updates, setup=audited, mode=mode)


@pytest.mark.parametrize("mode", loop_list.MOST)
@pytest.mark.parametrize("loss", [hardest_half, rolled, centred_outputs])
@pytest.mark.parametrize("name", BATCHES)
def test_other_losses_of_batches_that_are_no_pairs_are_refused(name, loss, mode):
    run = trained(of_batches(name, loss, mode))
    if mode == "ghost" and loss is hardest_half:  # it is not the wrapped criterion
        assert "not computed by the criterion which" in run.refusal
    else:
        assert "criterion" in run.refusal


@pytest.mark.parametrize("mode", loop_list.MOST)
@pytest.mark.parametrize("name", BATCHES)
def test_the_audited_loss_of_batches_that_are_no_pairs_is_checked(name, mode):
    run = trained(of_batches(name, plain, mode))
    assert run.said == [] and run.refusal == ""
    assert state_of_loss(run) == "checked"
