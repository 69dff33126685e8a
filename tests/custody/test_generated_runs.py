"""Loops of monitored training, of derived engines, and with schedules.

The first part is as in ``test_generated_loops``: norms are right, or refused, or the
cause is said. Under fixed sampling the counted participations are compared with what
entered the passes; with a schedule, the noise and the clip norm of every row are
compared with those of the optimizer at the time.
"""

import warnings

import numpy as np
import opacus
import pytest
import torch
from opacus import schedulers
from opacus.optimizers import DPOptimizer
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine
from opacus_pi.integration.mixin import PerInstanceMixin
from tests.custody import hidden_ids, loop_list, loop_parts, models, oddities, oracle
from tests.custody.loops import Loop
from tests.custody.test_generated_loops import (
    REFUSED,
    RIGHT,
    SAID,
    SILENT,
    trained,
    verdict,
)

FIXED = {"sampling": "fixed"}
collated, transforming = loop_list.collated, loop_list.transforming
using, of_model, odd = loop_list.using, loop_list.of_model, loop_list.odd


def counted(run):
    """How often every example entered an update, from the tensors of the passes."""
    counts = np.zeros(hidden_ids.NUM_EXAMPLES, int)
    for passes in run.updates:
        for kept in passes:
            for ids in hidden_ids.ids_of_batch(kept.tensors):
                counts[list(ids)] += 1
    return counts


def require_counts(run):
    """Compare counted participations with those of the loop."""
    if run.loop.sampling == "fixed":
        counts = counted(run)
        np.testing.assert_array_equal(run.ledger.participations.sum(axis=0), counts)
        assert run.ledger.mechanism.max_participations == counts.max()


# ------------------------------------------------------------------ monitored training
def some_skipped(run):
    for _ in range(2):
        for number, batch in enumerate(run.loader):
            if number % 2:
                run.train(batch)


def restarted(run):
    for _ in range(6):
        run.train(next(iter(run.loader)))


def left_early(run):
    for _ in range(4):
        for number, batch in enumerate(run.loader):
            if number == 2:
                break
            run.train(batch)


def twice_each(run):
    for batch in run.loader:
        run.train(batch)
        run.train(batch)


def summed(_, outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")


def halved(criterion, outputs, targets):
    return 0.5 * criterion(outputs, targets)


def smoothed(_, outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.3)


def hardest_half(_, outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def with_penalty(criterion, outputs, targets):
    return criterion(outputs, targets) + 0.1 * outputs.square().mean()


def with_batch_penalty(criterion, outputs, targets):
    return criterion(outputs, targets) + outputs.mean(0).square().sum()


def of_rolled_targets(criterion, outputs, targets):
    return criterion(outputs, targets.roll(1))


def changing_gradients(change):
    def updates(run):
        for _ in range(2):
            for batch in run.loader:
                run.zero_grad()
                run.backward(batch)
                for p in run.module.parameters():
                    if p.grad is not None:
                        change(p)
                run.step()

    return updates


def doubled(p):
    p.grad.mul_(2)


def signed(p):
    p.grad = p.grad.sign()


def forgotten(p):
    p.grad = None


def total_norm_clipped(run):
    for _ in range(2):
        for batch in run.loader:
            run.zero_grad()
            run.backward(batch)
            torch.nn.utils.clip_grad_norm_(run.module.parameters(), 1e-3)
            run.step()


def gradients_never_cleared(run):
    for _ in range(2):
        for batch in run.loader:
            run.backward(batch)
            run.step()


def stepped_twice(run):
    for _ in range(2):
        for batch in run.loader:
            run.zero_grad()
            run.backward(batch)
            run.step()
            run.step()


MONITORED_CONTROLS = [
    Loop("plain"),
    Loop("shuffled", **FIXED),
    Loop("in_order", loader={"shuffle": False}, **FIXED),
    Loop("last_dropped", loader={"batch_size": 5, "drop_last": True}, **FIXED),
    Loop("images", data=hidden_ids.image_data, model=models.convolutional, **FIXED),
    Loop("linear", model=models.linear_without_bias),
    Loop("adam", optimizer=oddities.adam, **FIXED),
    Loop("momentum", optimizer=oddities.with_momentum),
    transforming(loop_parts.cloned, **FIXED),
    transforming(loop_parts.permuted, **FIXED),
    transforming(loop_parts.viewed),
    collated(loop_parts.stacked, **FIXED),
    collated(loop_parts.reversed_rows, **FIXED),
    using(loop_parts.evaluated_between, **FIXED),
    using(loop_parts.two_batches_ahead, **FIXED),
    using(loop_parts.all_listed, **FIXED),
    using(some_skipped, **FIXED),
    using(restarted, **FIXED),
    using(left_early, **FIXED),
    using(twice_each, **FIXED),
    odd(oddities.falling_learning_rate, **FIXED),
]
MONITORED_OTHERS = [
    *(
        Loop(loss.__name__, loss=loss, **sampling)
        for loss in (
            summed,
            halved,
            smoothed,
            hardest_half,
            with_penalty,
            with_batch_penalty,
            of_rolled_targets,
        )
        for sampling in ({}, FIXED)
    ),
    *(
        Loop(change.__name__, updates=changing_gradients(change))
        for change in (doubled, signed, forgotten)
    ),
    using(total_norm_clipped),
    using(gradients_never_cleared, **FIXED),
    using(stepped_twice, **FIXED),
    transforming(loop_parts.labels_permuted, **FIXED),
    transforming(loop_parts.inputs_permuted, **FIXED),
    transforming(loop_parts.batch_twice, **FIXED),
    transforming(loop_parts.first_row_twice, **FIXED),
    transforming(loop_parts.mixed, **FIXED),
    transforming(loop_parts.doubled, **FIXED),
    transforming(loop_parts.every_other, **FIXED),
    transforming(loop_parts.with_earlier_batch, **FIXED),
    using(loop_parts.own_loader, **FIXED),
    using(loop_parts.own_indices, **FIXED),
    using(loop_parts.whole_data_set, **FIXED),
    using(loop_parts.weights_stepped_by_data, **FIXED),
    using(loop_parts.same_batch_twice_in_an_update, **FIXED),
    *(
        of_model(model)
        for model in (
            models.Centred,
            models.FunctionalBatchNorm,
            models.Rolled,
            models.ScaledByBatch,
        )
    ),
]


def monitored(loop):
    return trained(loop.having(mode="monitored"))


@pytest.mark.parametrize("loop", MONITORED_CONTROLS, ids=str)
def test_an_ordinary_monitored_loop_is_recorded_without_a_word(loop):
    run = monitored(loop)
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == []
    require_counts(run)


@pytest.mark.parametrize("loop", MONITORED_OTHERS, ids=str)
def test_an_odd_monitored_loop_is_right_or_refused_or_said(loop):
    run = monitored(loop)
    outcome, _ = verdict(run, oracle.true_norms(run))
    assert outcome != SILENT
    if outcome == RIGHT:
        require_counts(run)


# ---------------------------------------------------------------------- derived engines
class Renamed(PrivacyEngine):
    pass


class WithDefaults(PrivacyEngine):
    def make_private(self, **options):
        return super().make_private(**{**options, "noise_multiplier": 2e-4})


class ReturnsADict(PrivacyEngine):
    """What it returns is taken apart again by the user's program."""

    def make_private(self, **options):
        self.parts = super().make_private(**options)
        return list(self.parts)


class CallsOpacus(PerInstanceMixin, opacus.PrivacyEngine):
    def make_private(self, **options):
        return opacus.PrivacyEngine.make_private(self, **options)


class Reporting:
    def make_private(self, **options):
        self.prepared_with = sorted(options)
        return super().make_private(**options)


class MixedIn(Reporting, PrivacyEngine):
    pass


class OwnOptimizer(PrivacyEngine):
    """Its optimizer is of a class derived from Opacus's."""

    kind = DPOptimizer

    def _prepare_optimizer(self, **options):
        made = super()._prepare_optimizer(**options)
        made.__class__ = self.kind
        return made


class CountsSteps(DPOptimizer):
    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        return super().step(closure)


class ClipsByValue(DPOptimizer):
    """Its step limits every entry of the per-example gradients first."""

    def pre_step(self, closure=None):
        for p in self.params:
            p.grad_sample.clamp_(-1e-3, 1e-3)
        return super().pre_step(closure)


class NormalisesFirst(DPOptimizer):
    def pre_step(self, closure=None):
        for p in self.params:
            p.grad_sample = p.grad_sample / p.grad_sample.norm()
        return super().pre_step(closure)


class OwnClipping(DPOptimizer):
    def clip_and_accumulate(self):
        for p in self.params:
            p.summed_grad = p.grad_sample.sum(0)
        for p in self.params:
            p.grad_sample._processed = True


class HalfTheNoise(DPOptimizer):
    def add_noise(self):
        full, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 2
        super().add_noise()
        self.noise_multiplier = full


class AddsAfterNoise(DPOptimizer):
    def scale_grad(self):
        super().scale_grad()
        for p in self.params:
            p.grad += p.grad_sample.sum(0)


class SumsDoubled(DPOptimizer):
    def add_noise(self):
        for p in self.params:
            p.summed_grad = 2 * p.summed_grad
        super().add_noise()


def with_optimizer(kind):
    return type(f"Engine{kind.__name__}", (OwnOptimizer,), {"kind": kind})


class OwnLoader(PrivacyEngine):
    """It draws from a loader of its own, whatever it was given."""

    def _prepare_data_loader(self, data_loader, **_):
        return DataLoader(data_loader.dataset, batch_size=4, shuffle=True)


ENGINES_THAT_ARE_RECORDED = (
    Renamed,
    WithDefaults,
    ReturnsADict,
    CallsOpacus,
    MixedIn,
    OwnOptimizer,
    with_optimizer(CountsSteps),
)
ENGINES_THAT_CHANGE_UPDATES = (
    with_optimizer(ClipsByValue),
    with_optimizer(NormalisesFirst),
    with_optimizer(OwnClipping),
    with_optimizer(HalfTheNoise),
    with_optimizer(AddsAfterNoise),
    with_optimizer(SumsDoubled),
)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "fast"])
@pytest.mark.parametrize("engine", ENGINES_THAT_ARE_RECORDED)
def test_derived_engines_are_recorded(engine, mode):
    run = trained(Loop(engine.__name__, engine=engine, mode=mode, **FIXED))
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == []
    require_counts(run)
    noise = float(run.optimizer.noise_multiplier * run.optimizer.max_grad_norm)
    np.testing.assert_allclose(run.ledger.mechanism.noise_std, noise)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("engine", ENGINES_THAT_CHANGE_UPDATES)
def test_derived_engines_that_change_updates_are_refused_or_said(engine, mode):
    run = trained(Loop(engine.__name__, engine=engine, mode=mode))
    assert verdict(run, "no norm of it is right")[0] in (REFUSED, SAID)


@pytest.mark.parametrize("mode", loop_list.MOST)
def test_an_engine_with_a_loader_of_its_own_is_counted(mode):
    run = trained(Loop("loader", engine=OwnLoader, mode=mode, **FIXED))
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    require_counts(run)


# --------------------------------------------------------------------------- schedules
def scheduling(make):
    """Return a set-up after which a scheduler steps before every update but the first.

    Args:
        make: ``optimizer -> scheduler``.
    """

    def setup(run):
        scheduler = make(run.optimizer)

        def step(number):
            run.settings.append(settings_of(run.optimizer))
            if number:
                scheduler.step()
                run.settings[-1] = settings_of(run.optimizer)

        run.settings, run.between = [], step

    return setup


def settings_of(optimizer):
    clip_norm = float(optimizer.max_grad_norm)
    return optimizer.noise_multiplier * clip_norm, clip_norm


def by_hand(change):
    """Return a scheduler that changes the optimizer's attributes itself."""

    class ByHand:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            change(self.optimizer)

    return ByHand


def both_raised(optimizer):
    optimizer.max_grad_norm *= 1.5
    optimizer.noise_multiplier *= 1.1


def noise_and_clip(optimizer):
    noise = schedulers.StepNoise(optimizer, step_size=2, gamma=0.5)
    clip = schedulers.StepGradClip(optimizer, step_size=3, gamma=0.5)

    def step():
        noise.step()
        clip.step()

    return type("Both", (), {"step": staticmethod(step)})()


LEARNING_RATES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 50),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=60),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
NOISE = {
    "noise exponential": lambda o: schedulers.ExponentialNoise(o, gamma=0.9),
    "noise step": lambda o: schedulers.StepNoise(o, step_size=2, gamma=2.0),
    "noise lambda": lambda o: schedulers.LambdaNoise(
        o, noise_lambda=lambda n: 1 / (n + 1)
    ),
}
CLIP = {
    "clip exponential": lambda o: schedulers.ExponentialGradClip(o, gamma=0.5),
    "clip step": lambda o: schedulers.StepGradClip(o, step_size=2, gamma=0.1),
    "clip lambda": lambda o: schedulers.LambdaGradClip(
        o, scheduler_function=lambda n: 1 + n % 3
    ),
    "both": noise_and_clip,
    "by hand": by_hand(both_raised),
}


def scheduled(name, make, **options):
    return Loop(name, setup=scheduling(make), **options)


SCHEDULED = [
    *(
        (scheduled(n, make, **FIXED), loop_list.MOST)
        for n, make in LEARNING_RATES.items()
    ),
    *((scheduled(n, make, **FIXED), loop_list.MOST) for n, make in NOISE.items()),
    *((scheduled(n, make), ("hooks", "fast")) for n, make in CLIP.items()),
    *((scheduled(n, make, **FIXED), ("hooks", "ew")) for n, make in CLIP.items()),
]


@pytest.mark.parametrize("loop", loop_list.with_modes(SCHEDULED), ids=str)
def test_schedules_are_recorded_update_by_update(loop):
    run = trained(loop)
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == []
    require_counts(run)
    noise, clip_norms = np.array(run.settings).T
    mechanism = run.ledger.mechanism
    np.testing.assert_allclose(np.broadcast_to(mechanism.noise_std, len(noise)), noise)
    np.testing.assert_allclose(
        np.broadcast_to(mechanism.max_grad_norm, len(noise)), clip_norms
    )


@pytest.mark.parametrize("name", CLIP)
def test_clip_schedules_with_ghost_clipping_are_refused(name):
    """They change the optimizer's clip norm, and not that of the model."""
    run = trained(scheduled(name, CLIP[name], mode="ghost"))
    assert "clip" in run.refusal


@pytest.mark.parametrize("mode", ["hooks", "fast"])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_clip_norm_that_changes_within_an_update_is_charged_at_its_largest(
    mode, factor
):
    """Contributions of the first batch were clipped by another norm than the last's."""

    def updates(run):
        """Every second physical batch has another clip norm."""
        numbers = iter(range(1000))
        for _ in range(2):
            with run.memory_managed() as loader:
                for batch in loader:
                    limit = 1.0 if next(numbers) % 2 else factor
                    run.optimizer.max_grad_norm = limit
                    run.zero_grad()
                    run.backward(batch)
                    run.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = Loop("within", updates=updates, mode=mode)
        run = trained(loop)
    ledger = run.ledger
    assert ledger is not None, run.refusal
    largest = np.asarray(ledger.mechanism.max_grad_norm).max()
    assert largest == max(1.0, factor)
