"""Gradients that a loop changes between backward and step are named, without an audit.

Each loop trains as usual, and changes what the backward pass has left: per-example
gradients, or, with ghost clipping, the sum of clipped ones. The controls only read
them, or clear them by hand.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.custody import hidden_ids, loop_list, loop_parts, models, oracle
from tests.custody.loops import Loop
from tests.custody.test_generated_loops import RIGHT, trained, verdict

PER_EXAMPLE = loop_list.PER_EXAMPLE
FIXED = {"sampling": "fixed"}
SAYS = "between backward() and step()"
SUM = "sum of clipped gradients"


def before_each_step(change):
    """Return a loop that calls ``change(run)`` after every backward pass."""

    def updates(run):
        for batch in run.loader:
            run.zero_grad()
            run.backward(batch)
            change(run)
            run.step()

    return updates


def replacing(change):
    def all_of_them(run):
        for p in run.module.parameters():
            p.grad_sample = change(p.grad_sample)

    return all_of_them


def in_place(change):
    def all_of_them(run):
        for p in run.module.parameters():
            change(p.grad_sample)

    return all_of_them


def of_one_parameter(run):
    next(iter(run.module.parameters())).grad_sample *= 3


def copied_deeply(run):
    for p in run.module.parameters():
        p.grad_sample = copy.deepcopy(p.grad_sample)


def by_a_view(run):
    for p in run.module.parameters():
        p.grad_sample[:1].view(-1).zero_()


CHANGES = {
    "normalised": replacing(lambda g: g / g.norm()),
    "rows_of_one_norm": replacing(lambda g: F.normalize(g.flatten(1)).view_as(g)),
    "rows_permuted": replacing(lambda g: g.roll(1, 0)),
    "centred": replacing(lambda g: g - g.mean(0)),
    "cloned": replacing(torch.clone),
    "divided_in_place": in_place(lambda g: g.div_(g.norm() + 1)),
    "row_zeroed": in_place(lambda g: g[:1].zero_()),
    "clamped": in_place(lambda g: g.clamp_(-1e-3, 1e-3)),
    "by_out": in_place(lambda g: torch.mul(g, 2, out=g)),
    "copied_into": in_place(lambda g: g.copy_(g.flip(0))),
    "of_one_parameter": of_one_parameter,
    "copied_deeply": copied_deeply,
    "by_a_view": by_a_view,
}


@pytest.mark.parametrize("mode", PER_EXAMPLE)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_per_example_gradients_are_named(name, mode):
    loop = Loop(name, updates=before_each_step(CHANGES[name]), mode=mode, **FIXED)
    run = trained(loop)
    (text,) = run.said
    assert SAYS in text
    (link,) = [x for x in run.ledger.custody.links if x.name == "loss"]
    assert link.state == "unchecked" and SAYS in link.sentence


def between_passes(change):
    """Return a loop that accumulates two passes, and calls ``change`` in between."""

    def updates(run):
        batches = list(run.loader)
        for one, other in zip(batches[::2], batches[1::2], strict=False):
            run.zero_grad()
            run.backward(one)
            change(run, 0)
            run.backward(other)
            change(run, 1)
            run.step()

    return updates


def first_doubled(run, number):
    if number == 0:
        for p in run.module.parameters():
            p.grad_sample.mul_(2)


def order_reversed(run, number):
    if number == 1:
        for p in run.module.parameters():
            p.grad_sample.reverse()


def second_doubled(run, number):
    if number == 1:
        for p in run.module.parameters():
            p.grad_sample[1].mul_(2)


def second_put_in_twice(run, number):
    if number == 1:
        for p in run.module.parameters():
            p.grad_sample = [p.grad_sample[1], p.grad_sample[1]]


def joined_by_hand(run, number):
    if number == 1:
        for p in run.module.parameters():
            p.grad_sample = torch.cat([2 * p.grad_sample[0], p.grad_sample[1]])


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize(
    "change",
    [
        first_doubled,
        order_reversed,
        second_doubled,
        second_put_in_twice,
        joined_by_hand,
    ],
)
def test_changes_of_accumulated_gradients_are_named(change, mode):
    run = trained(Loop("x", updates=between_passes(change), mode=mode, **FIXED))
    assert any(SAYS in text for text in run.said), run.said


def changing_hooks(run):
    """Changes gradients during the backward pass, right after Opacus's hook."""

    def double(layer, *_):
        layer.weight.grad_sample.mul_(2)

    for layer in run.module.modules():
        if list(layer.parameters(recurse=False)):
            layer.register_full_backward_hook(double)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_changes_by_a_later_backward_hook_are_named(mode):
    run = trained(Loop("hook", setup=changing_hooks, mode=mode))
    assert any(SAYS in text for text in run.said), run.said


# --------------------------------------------------------- sums of clipped gradients
def sum_scaled(run):
    for p in run.module.parameters():
        p.grad.mul_(10)


def sum_replaced(run):
    for p in run.module.parameters():
        p.grad = p.grad / p.grad.norm()


def sum_limited(run):
    torch.nn.utils.clip_grad_norm_(run.module.parameters(), 1e-3)


def regulariser_added(run):
    sum(p.square().sum() for p in run.module.parameters()).backward()


@pytest.mark.parametrize(
    "change", [sum_scaled, sum_replaced, sum_limited, regulariser_added]
)
def test_changed_sums_of_ghost_clipping_are_named(change):
    run = trained(Loop("sum", updates=before_each_step(change), mode="ghost"))
    assert any(SUM in text and "p.grad" in text for text in run.said), run.said


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
@pytest.mark.parametrize("in_place", [True, False])
def test_changed_sums_of_physical_batches_are_named(mode, in_place):
    def updates(run):
        with run.memory_managed() as loader:
            for batch in loader:
                run.zero_grad()
                run.backward(batch)
                run.step()
                for p in run.module.parameters():
                    if run.optimizer._is_last_step_skipped and in_place:
                        p.summed_grad.mul_(3)
                    elif run.optimizer._is_last_step_skipped:
                        p.summed_grad = 3 * p.summed_grad

    run = trained(Loop("sums", updates=updates, mode=mode))
    assert any(SUM in text and "p.summed_grad" in text for text in run.said), run.said


# ---------------------------------------------------------------------------- controls
def looked_at(run):
    for p in run.module.parameters():
        if getattr(p, "grad_sample", None) is not None:
            run.norms = p.grad_sample.flatten(1).norm(dim=1), p.grad_sample.mean(0)
        if p.grad is not None:
            run.grad = p.grad.norm()


def cleared_by_hand(run):
    for batch in run.loader:
        for p in run.module.parameters():
            p.grad_sample = p.grad = p.summed_grad = None
        run.passes = []
        run.backward(batch)
        run.step()


def cleared_with_zeros(run):
    for batch in run.loader:
        run.passes = []
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(batch)
        run.step()


def interrupted(run):
    """An exception between two physical batches; training goes on afterwards."""
    for number, batch in enumerate(run.loader):
        run.zero_grad()
        if number == 1:
            with pytest.raises(RuntimeError):
                run.model(torch.zeros(2, 3)).sum().backward()
            run.zero_grad()
        run.backward(batch)
        run.step()


CONTROLS = [
    (Loop("looked_at", updates=before_each_step(looked_at)), loop_list.ALL),
    (Loop("memory_managed", updates=loop_parts.memory_managed), loop_list.MOST),
    (Loop("accumulated", updates=loop_parts.accumulated, **FIXED), loop_list.FREE),
    (Loop("cleared", updates=cleared_by_hand), ("hooks", "functorch", "ew")),
    (Loop("zeros", updates=cleared_with_zeros), loop_list.ALL),
    (Loop("interrupted", updates=interrupted), loop_list.MOST),
    (Loop("frozen", model=models.with_frozen_layer), loop_list.MOST),
    (
        Loop("recurrent", model=models.Recurrent, data=hidden_ids.sequence_data),
        ("hooks", "functorch"),
    ),
    (
        Loop("attentive", model=models.Attentive, data=hidden_ids.sequence_data),
        ("hooks", "functorch"),
    ),
]


@pytest.mark.parametrize("loop", loop_list.with_modes(CONTROLS), ids=str)
def test_loops_that_change_no_gradient_are_recorded_without_a_word(loop):
    run = trained(loop)
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == []
