"""Engines that derive from ours, or are mixed with others, and override methods."""

import inspect

import numpy as np
import opacus
import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi.accounting import RenyiFilter
from opacus_pi.integration.engine import PerInstanceMixin, PrivacyEngine
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import Net, Training


# ------------------------------------------------------- overrides that change nothing
class Counting(DPOptimizer):
    """An optimizer that counts its steps."""

    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        return super().step(closure)


class OwnOptimizer:
    def _prepare_optimizer(
        self,
        *,
        optimizer,
        noise_multiplier,
        max_grad_norm,
        expected_batch_size,
        loss_reduction="mean",
        **_,
    ):
        return Counting(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
        )


class OwnModel:
    def _prepare_model(self, module, *, loss_reduction="mean", **_):
        return GradSampleModule(module, loss_reduction=loss_reduction)


class OwnLoader:
    def _prepare_data_loader(self, data_loader, **_):
        return DPDataLoader.from_data_loader(data_loader)


class OwnParts(OwnOptimizer, OwnModel, OwnLoader):
    pass


class OwnMakePrivate(OwnParts):
    """As programs write it that need another flow: nothing of Opacus's is called."""

    def make_private(
        self, module, optimizer, data_loader, noise_multiplier, max_grad_norm, **options
    ):
        model = self._prepare_model(module)
        loader = self._prepare_data_loader(data_loader)
        rate = 1 / len(loader)
        private = self._prepare_optimizer(
            optimizer=optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=int(len(loader.dataset) * rate),
        )
        private.attach_step_hook(self.accountant.get_optimizer_hook_fn(rate))
        return model, private, loader


class Logging:
    """Calls Opacus's, before and after."""

    def make_private(self, *args, **options):
        self.log = ["before"]
        result = super().make_private(*args, **options)
        self.log.append("after")
        return result

    def _prepare_optimizer(self, **options):
        self.log.append("optimizer")
        return super()._prepare_optimizer(**options)


OVERRIDES = (OwnOptimizer, OwnModel, OwnLoader, OwnParts, OwnMakePrivate, Logging)


def derived(override):
    """Four ways in which a client's class and ours are put together."""
    theirs = type("Theirs", (override, opacus.PrivacyEngine), {})

    class WithoutOurs(override, opacus.PrivacyEngine):
        def __init__(self, mechanism="rdp", **_):
            opacus.PrivacyEngine.__init__(self, accountant=mechanism)

    return {
        "derived": type("Engine", (override, PrivacyEngine), {}),
        "ours first": type("Engine", (PrivacyEngine, theirs), {}),
        "ours last": type("Engine", (theirs, PrivacyEngine), {}),
        "mixin": type("Engine", (PerInstanceMixin, theirs), {}),
        "without our __init__": type("Engine", (WithoutOurs, PrivacyEngine), {}),
    }


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("how", sorted(derived(Logging)))
def test_derived_engines_record(override, how):
    cls = derived(override)[how]
    training = Training(engine=cls(accountant="rdp")).train(2)
    plain = Training(recorder=Recorder()).train(2)
    found, expected = training.engine.ledger, plain.engine.ledger
    np.testing.assert_array_equal(found.grad_norms, expected.grad_norms)
    assert found.mechanism == expected.mechanism
    np.testing.assert_array_equal(
        training.engine.epsilons(1e-3), plain.engine.epsilons(1e-3)
    )
    for one, other in zip(
        training.net.parameters(), plain.net.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_with_epsilon_is_recorded_too():
    engine = derived(OwnParts)["ours last"]()
    net, plain = Net(), Training()
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(plain.data_set, batch_size=6),
        target_epsilon=5.0,
        target_delta=1e-3,
        epochs=1,
        max_grad_norm=1.0,
    )
    assert type(optimizer).__name__ == "Counting"
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert engine.ledger.mechanism.num_steps == 4
    assert engine.epsilons(1e-3).max() <= engine.get_epsilon(1e-3)


def test_an_override_that_returns_another_optimizer():
    class Engine(PrivacyEngine):
        def make_private(self, **options):
            model, optimizer, loader = super().make_private(**options)
            other = Counting(
                optimizer.original_optimizer,
                noise_multiplier=optimizer.noise_multiplier,
                max_grad_norm=optimizer.max_grad_norm,
                expected_batch_size=optimizer.expected_batch_size,
            )
            other.attach_step_hook(optimizer.step_hook)
            return model, other, loader

    training = Training(engine=Engine(accountant="rdp")).train(2)
    plain = Training(recorder=Recorder()).train(2).engine
    assert training.optimizer.num_steps == 8
    found = training.engine.ledger
    np.testing.assert_array_equal(found.grad_norms, plain.ledger.grad_norms)
    assert found.mechanism == plain.ledger.mechanism


@pytest.mark.parametrize("override", [OwnParts, OwnMakePrivate])
def test_derived_engines_are_audited(override):
    training = Training(engine=derived(override)["ours last"]())
    audit = training.engine.audit(nn.functional.cross_entropy)
    assert audit.passed and "norms" in str(audit)


def test_the_signature_of_an_override_stays():
    cls = derived(OwnMakePrivate)["derived"]
    assert list(inspect.signature(cls.make_private).parameters)[1:4] == [
        "module",
        "optimizer",
        "data_loader",
    ]
    ours = inspect.signature(PrivacyEngine.make_private)
    assert ours == inspect.signature(opacus.PrivacyEngine.make_private)


def test_an_epsilon_of_their_own_limits_nothing():
    class Engine(PrivacyEngine):
        def get_epsilon(self, delta, *, note=""):
            return 0.0, note

    training = Training(engine=Engine(accountant="rdp")).train(1)
    plain = Training(recorder=Recorder()).train(1).engine
    np.testing.assert_array_equal(training.engine.epsilons(1e-3), plain.epsilons(1e-3))


# -------------------------------------------------------------- nothing can be recorded
class FromElsewhere(PrivacyEngine):
    """Has another engine prepare the run."""

    def make_private(self, **options):
        other = opacus.PrivacyEngine()
        other.accountant = self.accountant
        _, optimizer, _ = other.make_private(**options)
        self.trained = optimizer
        return {"optimizer": optimizer}


def test_the_reason_names_what_is_missing():
    engine = FromElsewhere()
    message = (
        "FromElsewhere.make_private was called.*a model that Opacus has prepared and "
        "an optimizer of Opacus and a data loader"
    )
    net = Net()
    with pytest.warns(UserWarning, match=message):
        engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=Training().loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    for ask in (
        lambda: engine.ledger,
        lambda: engine.epsilons(1e-3),
        lambda: engine.privacy_losses(2),
    ):
        with pytest.raises(AccountingError, match=message):
            ask()


def test_updates_that_only_the_accountant_knows():
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises(AccountingError, match="Call make_private"):
        _ = engine.ledger
    engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(AccountingError, match="has counted 1 updates, but none"):
        _ = engine.ledger
    with pytest.raises(AccountingError, match="has counted 1 updates, but none"):
        engine.epsilons(1e-3)


def test_an_optimizer_in_a_wrapper_is_recorded():
    class Engine(PrivacyEngine):
        def make_private(self, **options):
            model, optimizer, loader = super().make_private(**options)
            self.wrapped = optimizer
            return model, Wrapper(optimizer), loader

    class Wrapper:
        def __init__(self, optimizer):
            self.zero_grad, self.step = optimizer.zero_grad, optimizer.step

    training = Training(engine=Engine()).train(1)
    assert training.engine.ledger.mechanism.num_steps == 4


# ------------------------------------------------------------------- rules of their own
class Automatic(DPOptimizer):
    """Every example contributes nearly the clip norm, whatever its gradient is."""

    def clip_and_accumulate(self):
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in self.grad_samples], 1)
        factor = self.max_grad_norm / (norms.norm(dim=1) + 0.01)
        for p in self.params:
            p.summed_grad = torch.einsum(
                "i,i...", factor, self._get_flat_grad_sample(p)
            )


class Logged(DPOptimizer):
    """Calls Opacus's, which cannot be known from outside."""

    def clip_and_accumulate(self):
        super().clip_and_accumulate()


class Halved(DPOptimizer):
    @property
    def grad_samples(self):
        return [0.5 * g for g in super().grad_samples]


class Flat(DPOptimizer):
    def _get_flat_grad_sample(self, p):
        return 3 * super()._get_flat_grad_sample(p)


class Correlated(DPOptimizer):
    def add_noise(self):
        torch.manual_seed(7)
        super().add_noise()


OWN_RULES = {
    Automatic: "clip_and_accumulate",
    Logged: "clip_and_accumulate",
    Halved: "grad_samples",
    Flat: "_get_flat_grad_sample",
    Correlated: "add_noise",
}


def engine_with(optimizer_class, base=PrivacyEngine):
    class Engine(base):
        def _prepare_optimizer(
            self,
            *,
            optimizer,
            noise_multiplier,
            max_grad_norm,
            expected_batch_size,
            loss_reduction="mean",
            **_,
        ):
            return optimizer_class(
                optimizer,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                expected_batch_size=expected_batch_size,
                loss_reduction=loss_reduction,
            )

    return Engine


def require_refused(training, match):
    for ask in (
        lambda: training.engine.ledger,
        lambda: training.engine.epsilons(1e-3),
        lambda: training.engine.privacy_losses(2),
    ):
        with pytest.raises(AccountingError, match=match):
            ask()
    assert training.engine.get_epsilon(1e-3) > 0


@pytest.mark.parametrize("optimizer_class", OWN_RULES)
@pytest.mark.parametrize("mixed", [False, True])
def test_own_rules_are_trained_and_not_accounted(optimizer_class, mixed):
    theirs = engine_with(optimizer_class, opacus.PrivacyEngine)
    cls = engine_with(optimizer_class)
    if mixed:
        cls = type("Mixed", (PerInstanceMixin, theirs), {})
    with pytest.warns(UserWarning, match="no longer has a ledger"):
        training = Training(engine=cls())
    training.train(2)
    name = optimizer_class.__name__
    require_refused(
        training, f"{name} has a method {OWN_RULES[optimizer_class]} of its own"
    )
    plain = Training(engine=theirs()).train(2)
    for one, other in zip(
        training.net.parameters(), plain.net.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_own_rules_raise_at_once_where_the_recorder_is_strict():
    cls = engine_with(Automatic)
    with pytest.raises(AccountingError, match="Automatic has a method"):
        Training(engine=cls(recorder=Recorder(strict=True)))


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["clip_and_accumulate", "add_noise"])
def test_methods_of_the_object(name, before):
    class Engine(PrivacyEngine):
        def _prepare_optimizer(self, **options):
            optimizer = super()._prepare_optimizer(**options)
            if before:
                setattr(optimizer, name, getattr(optimizer, name))
            return optimizer

    training = Training(engine=Engine(recorder=Recorder(every=1)))
    if not before:
        training.train(1)
        assert training.engine.ledger.num_rows == 1
        setattr(training.optimizer, name, getattr(training.optimizer, name))
    training.train(1)
    if name == "add_noise" and not before:
        return  # it still calls ours
    require_refused(training, f"DPOptimizer object has a method {name} of its own")


def take_plain_gradients(optimizer, *_):
    """Give the parameters the mean gradient, neither clipped nor noised."""
    for parameter in optimizer.params:
        if isinstance(parameter.grad_sample, torch.Tensor):
            parameter.grad = parameter.grad_sample.mean(0)
    return True


def step_plainly(optimizer, *_):
    take_plain_gradients(optimizer)
    optimizer.original_optimizer.step()


def leave_out_noise(optimizer):
    for parameter in optimizer.params:
        parameter.grad = parameter.summed_grad.view_as(parameter).clone()


UNNOISED = {
    "step": step_plainly,
    "pre_step": take_plain_gradients,
    "add_noise": leave_out_noise,
}


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize("has_scheduler", [False, True])
@pytest.mark.parametrize("name", UNNOISED)
def test_the_reason_names_the_method_that_leaves_out_noise(name, has_scheduler):
    training = Training()
    optimizer = training.optimizer
    if has_scheduler:  # it wraps ``step``
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    setattr(optimizer, name, lambda *arguments: UNNOISED[name](optimizer, *arguments))
    training.train(1)
    with pytest.raises(
        AccountingError, match=f"DPOptimizer object has a method {name}"
    ):
        _ = training.engine.ledger


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize("name", ["step", "pre_step"])
def test_the_reason_names_the_class_that_leaves_out_noise(name):
    own = type("Plain", (DPOptimizer,), {name: UNNOISED[name]})
    training = Training(engine=engine_with(own)()).train(1)
    with pytest.raises(AccountingError, match=f"Plain has a method {name} of its own"):
        _ = training.engine.ledger


@pytest.mark.parametrize("is_class", [False, True])
def test_a_scaling_that_may_leave_out_noise_is_said(is_class):
    own = type("Own", (DPOptimizer,), {"scale_grad": leave_out_noise})
    training = Training(engine=engine_with(own)() if is_class else None)
    optimizer = training.optimizer
    if not is_class:
        optimizer.scale_grad = lambda: leave_out_noise(optimizer)
    with pytest.warns(UserWarning, match="has a method scale_grad of its own"):
        training.train(1)
    (link,) = (c for c in training.engine.ledger.custody.links if c.name == "noise")
    assert link.state == "unchecked" and "method scale_grad" in link.sentence


@pytest.mark.filterwarnings("error:The library assumes, without a check")
@pytest.mark.parametrize("name", ["step", "pre_step", "scale_grad"])
def test_a_method_that_calls_the_original_changes_nothing(name):
    plain = Training().train(2).engine.ledger
    training = Training()
    original = getattr(training.optimizer, name)
    setattr(training.optimizer, name, lambda *arguments: original(*arguments))
    ledger = training.train(2).engine.ledger
    np.testing.assert_array_equal(ledger.grad_norms, plain.grad_norms)


def test_a_loop_that_steps_by_hand_after_pre_step():
    plain = Training().train(2).engine.ledger
    training = Training()
    optimizer = training.optimizer

    def step():
        if optimizer.pre_step():
            optimizer.original_optimizer.step()

    optimizer.step = step
    ledger = training.train(2).engine.ledger
    np.testing.assert_array_equal(ledger.grad_norms, plain.grad_norms)
    assert ledger.mechanism.num_steps == plain.mechanism.num_steps == 8


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
def test_a_method_that_was_put_into_opacus_class(monkeypatch):
    def clip_and_accumulate(self):
        for p in self.params:
            p.summed_grad = self._get_flat_grad_sample(p).sum(0)

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", clip_and_accumulate)
    require_refused(Training().train(1), "DPOptimizer has a method clip_and_accumulate")


# ----------------------------------------------------------------------- ghost clipping
class OwnCoefficients(GradSampleModuleFastGradientClipping):
    def get_clipping_coef(self):
        return self.max_grad_norm / (self.get_norm_sample() + 0.01)


class OwnCriterion(DPLossFastGradientClipping):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options)


class OwnSum(DPOptimizerFastGradientClipping):
    def accumulate(self):
        super().accumulate()


class GhostModel:
    def _prepare_model(self, module, *, max_grad_norm, loss_reduction="mean", **_):
        return OwnCoefficients(
            module, max_grad_norm=max_grad_norm, loss_reduction=loss_reduction
        )


class GhostCriterion:
    def _prepare_criterion(
        self, *, module, optimizer, criterion, loss_reduction="mean", **_
    ):
        return OwnCriterion(module, optimizer, criterion, loss_reduction)


class PlainCriterion:
    """Opacus's criterion, made by the client."""

    def _prepare_criterion(
        self, *, module, optimizer, criterion, loss_reduction="mean", **_
    ):
        return DPLossFastGradientClipping(module, optimizer, criterion, loss_reduction)


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (GhostModel, "OwnCoefficients has a method get_clipping_coef"),
        (GhostCriterion, "OwnCriterion has a method __call__"),
        (engine_with(OwnSum, object), "OwnSum has a method accumulate"),
    ],
)
def test_own_rules_of_ghost_clipping(override, reason):
    engine = type("Engine", (override, PrivacyEngine), {})()
    require_refused(Training(engine=engine, grad_sample_mode="ghost").train(1), reason)


def test_a_criterion_of_opacus_that_the_client_made():
    kind = type("Engine", (PlainCriterion, PrivacyEngine), {})
    engine = kind(accountant="rdp", recorder=Recorder(every=1))
    training = Training(engine=engine, grad_sample_mode="ghost").train(1)
    plain = Training(grad_sample_mode="ghost").train(1)
    np.testing.assert_array_equal(
        training.engine.ledger.grad_norms, plain.engine.ledger.grad_norms
    )


# ------------------------------------------------------------------------------ budgets
@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("how", ["derived", "ours first", "ours last", "mixin"])
def test_budgets_are_kept(override, how):
    spent = []
    for cls in (derived(override)[how], PrivacyEngine):
        budget = RenyiFilter(2.0, order=2)
        engine = cls(renyi_filter=budget, accountant="rdp")
        training = Training(engine=engine).train(3)
        spent.append(budget.spent)
        assert 0 < budget.spent.max() <= 2.0
        assert (training.engine.ledger.grad_norms == 0).any()  # some were left out
    np.testing.assert_array_equal(*spent)


@pytest.mark.parametrize("optimizer_class", OWN_RULES)
def test_budgets_that_cannot_be_kept_are_refused(optimizer_class):
    engine = engine_with(optimizer_class)(renyi_filter=RenyiFilter(1.0, order=2))
    with pytest.raises(ValueError, match=r"cannot keep budgets.*of its own"):
        Training(engine=engine)


def test_budgets_of_a_run_that_cannot_be_recorded():
    engine = FromElsewhere(renyi_filter=RenyiFilter(1.0, order=2))
    with pytest.raises(ValueError, match=r"cannot keep budgets.*nothing is recorded"):
        Training(engine=engine)


def test_arguments_that_an_override_changes_are_seen():
    class Engine(PrivacyEngine):
        def make_private(self, *, noise_multiplier, **options):
            return super().make_private(noise_multiplier=1.0, **options)

        def _prepare_optimizer(self, *, noise_multiplier, **options):
            return super()._prepare_optimizer(noise_multiplier=0.0, **options)

    with pytest.raises(ValueError, match="noise_multiplier"):
        Training(engine=Engine(renyi_filter=RenyiFilter(1.0, order=2)))
