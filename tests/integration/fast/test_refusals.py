"""What the fast mode refuses, and what it leaves whole."""

import copy
import pickle
from functools import partial

import opacus
import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from opacus_pi.accounting import RenyiFilter
from opacus_pi.gradients.clipping import TrainingTaps
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.fast import FastGradSampleModule
from tests.integration.fast.models import CLASSES, mlp
from tests.integration.fast.training import SLOW, training
from tests.integration.test_explanations import LENGTH, Tagger
from tests.private_training import Training

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*samples are unattributed",
    "ignore:Optimal order is the largest alpha",
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:Secure RNG turned off",
)


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    "options, match",
    [
        ({"clipping": "per_layer"}, "clipping must be \"flat\", got 'per_layer'"),
        ({"clipping": "adaptive"}, "clipping must be \"flat\", got 'adaptive'"),
        ({"batch_first": False}, "batch_first must be True, got False"),
        (
            {"module": nn.DataParallel(mlp())},
            "must be trained in one process .*, got DataParallel",
        ),
    ],
    ids=str,
)
def test_refused_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        Training(grad_sample_mode="fast", **options)


def test_refused_with_a_filter():
    engine = PrivacyEngine(renyi_filter=RenyiFilter(1.0))
    with pytest.raises(ValueError, match="'fast' keeps no per-example gradients"):
        Training(engine=engine, grad_sample_mode="fast")


def test_batch_norm_is_refused_as_by_opacus():
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4))
    errors = []
    for mode in ("hooks", "fast"):
        with pytest.raises(opacus.validators.errors.UnsupportedModuleError) as caught:
            Training(module=copy.deepcopy(module), grad_sample_mode=mode)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_what_hooks_refuse_too():
    one = training("fast", poisson_sampling=True)
    x, y = one.data_set.tensors
    with pytest.raises(ValueError, match="No backward pass"):
        one.optimizer.step()
    one.criterion(one.model(x), y).backward()
    one.optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        one.optimizer.step()
    one.optimizer.zero_grad()
    one.criterion(one.model(x), y).backward()
    with pytest.raises(ValueError, match="Poisson sampling is not compatible"):
        one.criterion(one.model(x), y).backward()
    one.optimizer.zero_grad()
    one.batch(x, y)
    one.optimizer.zero_grad()
    loss = one.criterion(one.model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_an_unused_parameter_is_named():
    module = nn.Sequential(mlp())
    module.spare = nn.Linear(2, 2)
    module.forward = lambda x: module[0](x)
    one = Training(module=module, grad_sample_mode="fast")
    with pytest.raises(ValueError, match=r"no gradient for parameter spare\.weight"):
        one.train(1)


def test_inputs_that_were_overwritten():
    one = training("fast", "mlp")
    x, y = one.data_set.tensors
    buffer = x.clone()
    one.criterion(one.model(buffer), y).backward()
    buffer.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        one.optimizer.step()


class MixesUp(nn.Module):
    """A parameter outside of layers, in a model that is random."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, CLASSES))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return torch.tensordot(self.dropout(x).flatten(1), self.weight, 1)


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
def test_parameters_without_per_example_gradients_are_named():
    one = Training(module=MixesUp(), grad_sample_mode="fast")
    with pytest.raises(
        ValueError, match="per-example gradients of weight cannot be computed"
    ) as error:
        one.train(1)
    assert "(vmap: called random operation while in" in str(error.value)
    assert "used outside of layers into a layer of its own" in str(error.value)


def _loss_within(model, ids):
    return nn.functional.cross_entropy(model(ids), ids[:, 0] % 2)


def _asks_for_a_value(model, ids):
    return model(ids) if bool((ids >= 0).all()) else None


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize(
    "forward, why",
    [
        (
            _loss_within,
            r"output of shape \(\), which does not have one row for each of the 4",
        ),
        (lambda model, ids: nn.functional.dropout(model(ids)), "random operation"),
        (_asks_for_a_value, "data-dependent control flow"),
    ],
)
def test_one_row_for_the_whole_batch_is_refused_with_remedies(forward, why):
    model = Tagger()
    model.forward = partial(forward, copy.deepcopy(model))
    model.words, model.position, model.out = model.forward.args[0].children()
    taps, ids = TrainingTaps(), torch.arange(4 * LENGTH).view(4, LENGTH) % 10
    taps.attach(model)
    model(ids).sum().backward()
    with pytest.raises(ValueError, match=f"of position.weight cannot.*{why}") as error:
        taps.caches[0].gradients(model.parameters(), model)
    assert "position_ids=" in str(error.value)
    assert "requires_grad_(False)" in str(error.value)
    assert "hooks" not in str(error.value)


def test_forming_gradients_through_the_whole_model_warns():
    with pytest.warns(UserWarning, match=f"{SLOW}.*words.weight"):
        training("fast", "functional").train(1)


def test_reading_per_example_gradients_raises():
    one = training("fast")
    assert len(one.optimizer.grad_samples) == len(one.optimizer.params)
    with pytest.raises(AttributeError, match="forms no per-example gradients"):
        one.optimizer.grad_samples[0]


# ------------------------------------------------------------------- what stays whole
def test_types_and_preparing_again():
    one = training("fast")
    assert type(one.model) is FastGradSampleModule
    assert isinstance(one.optimizer, DPOptimizer)
    again = Training(module=one.model, data_set=one.data_set, grad_sample_mode="fast")
    assert again.model is one.model
    again.train(1)
    with pytest.raises(ValueError, match="Pass the plain module"):
        Training(module=one.model, grad_sample_mode="fast", loss_reduction="sum")
    with pytest.raises(ValueError, match="Trying to add hooks twice"):
        Training(module=one.net, grad_sample_mode="fast")


def test_copies_are_plain_and_removal_leaves_nothing():
    one = training("fast", "cnn").train(1)
    x = one.data_set.tensors[0]
    one.model.eval()
    for copied in (copy.deepcopy(one.net), pickle.loads(pickle.dumps(one.net))):
        assert torch.equal(copied(x), one.net(x))
        copied.train()(x).sum().backward()
        assert all(p.grad is not None for p in copied.parameters())
    net = one.model.to_standard_module()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(hasattr(p, "grad_sample") for p in net.parameters())
    net.train()
    net.zero_grad(set_to_none=True)
    net(x).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in net.parameters())


def test_an_interrupted_forward_pass_leaves_weights_trainable():
    one = training("fast", "outside-of-layers")
    x, y = one.data_set.tensors
    for error in (RuntimeError, KeyboardInterrupt):
        handle = one.net.mix.register_forward_pre_hook(_raise(error))
        with pytest.raises(error):
            one.model(x)
        handle.remove()
        one.optimizer.zero_grad()
        assert all(p.summed_grad is None for p in one.net.parameters())
        one.batch(x, y)
        assert all(p.requires_grad for p in one.net.parameters())


def _raise(error):
    def hook(*_):
        raise error

    return hook
