"""The fast mode trains as hooks mode does, and as single examples say."""

import copy
import pickle

import numpy as np
import opacus
import pytest
import torch
from opacus.optimizers import DPOptimizer
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.accounting import RenyiFilter
from opacus_pi.fast import FastGradSampleModule
from opacus_pi.privacy_engine import PrivacyEngine
from tests.fast_models import CLASSES, MODELS, MORE, mlp
from tests.private_training import Training, one_at_a_time

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*rows are unattributed",
    "ignore:Optimal order is the largest alpha",
    "ignore:This run has no ledger",
    "ignore:PrivacyEngine detected new dataset",
    "ignore:Secure RNG turned off",
)
SLOW = "are used in a way that has no formula"


def training(mode, name="cnn", *, kind=torch.float32, num=24, **options):
    """A training of one of the models; those made alike draw alike."""
    build, inputs = {**MODELS, **MORE}[name]
    torch.manual_seed(7)
    module, x = build().to(kind), inputs(num)
    x = x.to(kind) if x.is_floating_point() else x
    data_set = TensorDataset(x, torch.randint(0, CLASSES, (num,)))
    options = {"batch_size": 6, "max_grad_norm": 0.5, "lr": 0.05, **options}
    return Training(
        module=module,
        data_set=data_set,
        grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(1),
        **options,
    )


def assert_alike(ours, theirs, start, rtol=1e-5):
    """The updates of every weight agree."""
    for a, b, w in zip(
        ours.net.parameters(), theirs.net.parameters(), start, strict=True
    ):
        assert (a - b).norm() <= rtol * (b - w).norm() + 1e-12


def both(name="cnn", epochs=1, **options):
    """The trainings in fast and in hooks mode, after some epochs."""
    pair = [training(mode, name, **options) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        one.train(epochs)
    return *pair, start


def clipped_sum(model, x, y, max_grad_norm):
    """The clipped gradients of single examples, added up."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for one, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for sum_, g in zip(total, grads, strict=True):
            sum_ += g * min(1.0, max_grad_norm / (norm + 1e-6))
    return total


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
@pytest.mark.parametrize("name", {**MODELS, **MORE})
def test_clipped_sums_are_those_of_single_examples(name):
    build, _ = {**MODELS, **MORE}[name]
    one = training("fast", name, kind=torch.float64, num=8, poisson_sampling=False)
    plain = build().double()
    plain.load_state_dict(one.net.state_dict())
    for p, q in zip(plain.parameters(), one.net.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    x, y = one.data_set.tensors
    one.criterion(one.model(x), y).backward()
    assert all(p.grad is None for p in one.optimizer.params) or name in MORE
    one.optimizer.clip_and_accumulate()
    truth = clipped_sum(plain, x, y, 0.5)
    for p, sum_ in zip(one.optimizer.params, truth, strict=True):
        torch.testing.assert_close(p.summed_grad, sum_, rtol=1e-9, atol=1e-12)
    norms = one_at_a_time(plain, x, y)
    assert min(norms) < 0.5 < max(norms) or min(norms) > 0.5
    found = one.optimizer.per_sample_gradient_norms
    np.testing.assert_allclose(found, norms, rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_ledger_are_those_of_hooks(name):
    ours, theirs, start = both(name)
    assert_alike(ours, theirs, start)
    assert ours.engine.get_epsilon(1e-5) == theirs.engine.get_epsilon(1e-5)
    indices, norms = zip(*ours.recorder.observed, strict=True)
    others = dict(theirs.recorder.observed)
    assert len(indices) == len(theirs.recorder.observed) > 10
    first = dict(zip(indices, norms, strict=True))
    np.testing.assert_allclose(
        [first[i] for i in others], list(others.values()), rtol=2e-5
    )
    counts = ours.engine.attribution
    assert counts["by_storage"] == len(indices) == sum(counts.values())
    assert ours.engine.ledger.mechanism.num_steps == len(ours.loader)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_reduction": "sum", "lr": 0.05},
        {"poisson_sampling": False},
        {"wrap_model": False},
        {"batch_size": 1, "name": "mlp"},  # many empty batches
    ],
    ids=str,
)
def test_the_engines_options(options):
    ours, theirs, start = both(epochs=2, **options)
    assert_alike(ours, theirs, start)
    if options.get("batch_size") == 1:
        entered = len(ours.recorder.observed)
        assert entered < ours.engine.ledger.mechanism.num_steps * 2


def test_physical_batches():
    pair = [training(mode, batch_size=12) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        for _ in one.memory_managed(5):
            one.train(2)
    assert_alike(*pair, start)
    assert len(pair[0].recorder.updates) == 4
    assert pair[0].recorder.updates == pair[1].recorder.updates


def accumulate(one, joined=False):
    """Two backward passes, or one of two losses, before each step."""
    batches = list(one.loader)
    for (x, y), (v, w) in zip(batches[::2], batches[1::2], strict=True):
        one.optimizer.zero_grad()
        if joined:
            loss = one.criterion(one.model(x), y) + one.criterion(one.model(v), w)
            loss.backward()
        else:
            one.criterion(one.model(x), y).backward()
            one.criterion(one.model(v), w).backward()
        one.optimizer.step()


@pytest.mark.parametrize("joined", [False, True])
def test_several_passes_before_a_step(joined):
    pair = [training(mode, poisson_sampling=False) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        accumulate(one, joined)
    assert_alike(*pair, start)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: ExponentialNoise(optimizer, gamma=0.7),
        lambda optimizer: ExponentialGradClip(optimizer, gamma=0.7),
    ],
)
def test_schedules(schedule):
    pair = [training(mode) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        scheduler = schedule(one.optimizer)
        for x, y in one.loader:
            one.batch(x, y)
            scheduler.step()
    assert_alike(*pair, start)
    stds = [[u["noise_std"] for u in one.recorder.updates] for one in pair]
    assert stds[0] == stds[1] and len(set(stds[0])) == 4


def test_with_epsilon_and_checkpoints_of_the_other_mode(tmp_path):
    made = []
    for mode in ("fast", "hooks"):
        torch.manual_seed(0)
        net, engine = mlp(), PrivacyEngine(accountant="rdp")
        data_set = TensorDataset(torch.randn(24, 12), torch.randint(0, 3, (24,)))
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=net,
            optimizer=torch.optim.Adam(net.parameters()),
            data_loader=DataLoader(data_set, batch_size=6),
            target_epsilon=4.0,
            target_delta=1e-3,
            epochs=2,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        made.append((engine, model, optimizer))
    for (engine, model, optimizer), (other, loaded, optimizer_2) in (made, made[::-1]):
        path = tmp_path / "checkpoint"
        engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
        other.load_checkpoint(path=path, module=loaded, optimizer=optimizer_2)
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
        assert engine.accountant.history == other.accountant.history


def test_dropout_and_evaluation_mode():
    torch.manual_seed(0)
    net = nn.Sequential(mlp(), nn.Dropout(0.5))
    one = training("fast", "mlp")
    one = Training(module=net, data_set=one.data_set, grad_sample_mode="fast")
    start = [p.detach().clone() for p in net.parameters()]
    one.model.eval()
    one.model(one.data_set.tensors[0]).sum().backward()  # of nobody's training
    assert not one.model.book.batches
    one.model.train()
    stale = one.model(one.data_set.tensors[0][:3])  # without a backward pass
    one.train(1)
    assert stale.shape == (3, CLASSES)
    for p, before in zip(net.parameters(), start, strict=True):
        assert not torch.equal(p, before)


def test_half_precision_activations():
    one = training("fast", "mlp")
    x, y = one.data_set.tensors
    norms = torch.tensor(one_at_a_time(copy.deepcopy(one.net), x, y))
    with torch.autocast("cpu", torch.bfloat16):
        loss = one.criterion(one.model(x), y)
    loss.backward()
    one.optimizer.clip_and_accumulate()
    found = one.optimizer.per_sample_gradient_norms
    torch.testing.assert_close(found, norms.double(), rtol=0.1, atol=0)
    assert {p.summed_grad.dtype for p in one.optimizer.params} == {torch.float32}


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "options, match",
    [
        ({"clipping": "per_layer"}, "clipping='per_layer' to be \"flat\""),
        ({"clipping": "adaptive"}, "clipping='adaptive' to be \"flat\""),
        ({"batch_first": False}, "batch_first=False to be true"),
        ({"module": nn.DataParallel(mlp())}, "DataParallel to be trained in one"),
    ],
    ids=str,
)
def test_refused_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        Training(grad_sample_mode="fast", **options)


def test_refused_with_a_filter():
    engine = PrivacyEngine(renyi_filter=RenyiFilter(1.0))
    with pytest.raises(ValueError, match="'fast' to keep per-example gradients"):
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
    with pytest.raises(ValueError, match=r"spare\.weight has no gradient"):
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
        return self.dropout(x).flatten(1) @ self.weight


@pytest.mark.filterwarnings(f"ignore:.*{SLOW}")
def test_parameters_that_cannot_be_told_apart_are_named():
    one = Training(module=MixesUp(), grad_sample_mode="fast")
    with pytest.raises(ValueError, match="gradients by weight cannot be told apart"):
        one.train(1)


def test_the_slow_way_is_announced():
    with pytest.warns(UserWarning, match=f"words.weight.*{SLOW}"):
        training("fast", "functional").train(1)


def test_per_example_gradients_are_not_to_be_had():
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
    with pytest.raises(ValueError, match="Pass the vanilla module"):
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
    one = training("fast", "bare-parameters")
    x, y = one.data_set.tensors
    for error in (RuntimeError, KeyboardInterrupt):
        handle = one.net.mix.register_forward_pre_hook(_raise(error))
        with pytest.raises(error):
            one.model(x)
        handle.remove()
        one.optimizer.zero_grad()
        one.batch(x, y)
        assert all(p.requires_grad for p in one.net.parameters())


def _raise(error):
    def hook(*_):
        raise error

    return hook
