"""A ledger names the weights it describes, and vouches for no others."""

import copy
import gc
from dataclasses import replace

import numpy as np
import opacus
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import GradNormLedger, PrivacyEngine, Unlearner
from opacus_pi.accounting import NoisySGD
from opacus_pi.models.weights_name import weights_name
from opacus_pi.recording import weights
from opacus_pi.recording.weights import LastWeights


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator)
    return TensorDataset(x, torch.arange(24) % 3)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.GroupNorm(1, 5), nn.Linear(5, 3))


def prepared(mode="hooks", make_optimizer=torch.optim.SGD, **options):
    engine, module = PrivacyEngine(), net()
    model, optimizer, loader, *rest = engine.make_private(
        module=module,
        optimizer=make_optimizer(module.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
        **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
        **options,
    )
    if rest:  # ghost: the criterion comes before the loader
        (criterion, loader), rest = (loader, rest[0]), []
    else:
        criterion = nn.CrossEntropyLoss()
    return engine, model, optimizer, loader, criterion


def train(run, num_steps=4):
    _, model, optimizer, loader, criterion = run
    model.train()
    for _, (x, y) in zip(range(num_steps), loader, strict=False):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def matching(model, ledger=None):
    """The assumption that the ledger is of the model's weights, as a plan tells it."""
    unlearner = Unlearner(model, criterion=nn.CrossEntropyLoss(), ledger=ledger)
    found = [a for a in unlearner.plan([3]).guarantee.assumptions if "last" in str(a)]
    assert len(found) == 1
    return found[0].met, found[0].evidence


def is_vouched_for(model, ledger=None):
    return matching(model, ledger) == (True, "their SHA-256 is the one in the ledger")


@pytest.fixture
def run():
    made = prepared()
    train(made)
    return made


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
@pytest.mark.parametrize(
    "make_optimizer",
    [torch.optim.SGD, lambda p, lr: torch.optim.Adam(p, lr, foreach=True)],
)
def test_an_engine_vouches_for_what_it_trained(mode, make_optimizer):
    run = prepared(mode, make_optimizer)
    train(run)
    engine, model, *_ = run
    assert is_vouched_for(engine)
    assert is_vouched_for(model, engine.ledger)  # wrapped, with Opacus's hooks
    train(run, 1)
    assert is_vouched_for(engine)


def test_before_the_first_update_no_weights_are_named():
    recorder = prepared()[0].recorder
    recorder.name_weights()
    assert recorder.state_dict()["weights"] == ""


def test_the_name_goes_where_the_ledger_goes(run, tmp_path):
    engine, model, *_ = run
    ledger, path = engine.ledger, tmp_path / "ledger.safetensors"
    ledger.save(path)
    parts = list(GradNormLedger.load_chunks(path, 10))
    for found in (GradNormLedger.load(path), ledger.subset([3, 4]), *parts):
        assert found.weights == ledger.weights == weights_name(model)
    assert ledger.with_noise_std(3.0).weights == ledger.weights
    other = replace(ledger, weights=f"sha256:{'0' * 64}")
    assert is_vouched_for(model, [other, ledger])  # runs: the model is one's
    assert not is_vouched_for(model, [other, other])


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
def test_an_uncounted_write_after_the_optimizer_is_gone(mode):
    engine, model, optimizer, loader, criterion = prepared(mode)
    train((engine, model, optimizer, loader, criterion))
    del optimizer, loader, criterion
    gc.collect()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)  # as an average of weights is copied in
    assert engine.ledger.weights == "changed"
    assert matching(engine)[0] is False


def test_an_optimizer_that_is_gone_is_no_change():
    engine, model, optimizer, loader, criterion = prepared()
    train((engine, model, optimizer, loader, criterion))
    del optimizer, loader, criterion
    gc.collect()
    assert is_vouched_for(engine)


def test_an_uncounted_write_after_the_model_was_unwrapped():
    engine, model, optimizer, loader, criterion = prepared()
    train((engine, model, optimizer, loader, criterion))
    plain = model.to_standard_module()
    del model, optimizer, loader, criterion
    gc.collect()
    for parameter in plain.parameters():
        parameter.data.mul_(0.9)
    assert matching(plain, engine.ledger)[0] is False


def test_another_layer_with_as_many_writes_is_a_change(run):
    engine, model, *_ = run
    other = copy.deepcopy(model._module[2])
    mine = [p._version for p in model._module[2].parameters()]
    with torch.no_grad():
        for parameter, count in zip(other.parameters(), mine, strict=True):
            for _ in range(count - parameter._version):
                parameter.mul_(0.9)
    assert [p._version for p in other.parameters()] == mine
    model._module[2] = other
    assert engine.ledger.weights == "changed"


def test_an_uncounted_write_to_a_buffer():
    run = batch_norm_run()
    train(run)
    run[1][1].running_mean.data.add_(1)
    assert run[0].ledger.weights == "changed"


def test_an_uncounted_write_without_a_snapshot_of_others():
    model = net()
    last = LastWeights(model)  # as for distributed training
    last.updated()
    model[0].weight.data.add_(1)
    assert last.name() == "changed"


@pytest.mark.filterwarnings("ignore:Weights were changed between two updates")
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_weight_changed_after_the_last_update(run, tensor):
    engine, model, *_ = run
    with torch.no_grad():
        getattr(model._module[0], tensor).add_(1e-6)
    assert engine.ledger.weights == "changed"
    met, evidence = matching(engine)
    assert (
        not met
        and evidence == "the weights were written to after the last recorded update"
    )
    train(run, 1)
    assert is_vouched_for(engine)


def test_a_weight_changed_after_it_was_named(run):
    engine, model, *_ = run
    ledger = engine.ledger
    module = copy.deepcopy(engine.module)
    with torch.no_grad():
        model._module[2].bias[1] += 1e-6
    assert engine.ledger.weights == ledger.weights  # still those of the update
    for found in (matching(engine), matching(model, ledger)):
        assert found[0] is False and found[1].startswith(
            "the SHA-256 of the weights is not the one"
        )
    assert is_vouched_for(module, ledger)


def test_a_model_that_was_unlearned_is_another(run):
    engine, *_ = run
    unlearner = Unlearner(engine, criterion=nn.CrossEntropyLoss())
    first = unlearner.unlearn(data(), [3], num_epochs=1, batch_size=8)
    second = unlearner.unlearn(data(), [4], num_epochs=1, batch_size=8)
    met = [
        [a.met for a in result.guarantee.assumptions if "last weights" in str(a)]
        for result in (first, second)
    ]
    assert met == [[True], [True]]  # only runs of the unlearner changed it
    unlearner = Unlearner(unlearner.model, criterion=nn.CrossEntropyLoss())
    met, evidence = matching(unlearner.model, engine.ledger)
    assert not met and evidence.startswith("the SHA-256 of the weights is not the one")


def test_a_ledger_without_a_name_is_checked_against_no_weights(run, tmp_path):
    engine, model, *_ = run
    old = replace(engine.ledger, weights=None)
    old.save(tmp_path / "old.safetensors")
    old = GradNormLedger.load(tmp_path / "old.safetensors")
    assert matching(model, old) == (True, "the ledger has no SHA-256 of the weights")
    (found,) = (
        a
        for a in Unlearner(model, criterion=nn.CrossEntropyLoss(), ledger=old)
        .plan([3])
        .guarantee.assumptions
        if "last weights" in a.statement
    )
    assert found.is_declared


@pytest.mark.parametrize("name", ["", "sha256:", "sha256:" + "0" * 63 + "G", 3, "md5"])
def test_a_malformed_name_is_refused(name):
    mechanism = NoisySGD(1, sample_rate=0.5, noise_std=1.0)
    with pytest.raises(ValueError, match="^weights must"):
        GradNormLedger(mechanism, [1], np.ones((1, 2)), weights=name)


# ------------------------------------------------------------------ checkpoints


def resumed(path, seed=1):
    """A new engine that goes on from a checkpoint, with other weights before."""
    engine, model, optimizer, *rest = prepared()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    return engine, model, optimizer, *rest


def test_checkpoints_keep_the_name(run, tmp_path):
    engine, model, optimizer, *_ = run
    path = tmp_path / "run.pt"
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    again = resumed(path)
    assert is_vouched_for(again[0])  # without an update of its own
    with torch.no_grad():
        again[1]._module[0].weight.mul_(1.01)
    assert matching(again[0])[1].startswith("the SHA-256 of the weights is not the one")
    train(again, 1)
    assert is_vouched_for(again[0])


def test_a_checkpoint_of_an_earlier_release_names_nothing(run, tmp_path, monkeypatch):
    engine, model, optimizer, *_ = run
    state = engine.recorder.state_dict()
    del state["weights"]
    monkeypatch.setattr(engine.recorder, "state_dict", lambda: state)
    path = tmp_path / "run.pt"
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    again = resumed(path)
    assert matching(again[0]) == (True, "the ledger has no SHA-256 of the weights")


@pytest.mark.parametrize("name", ["sha256:xyz", 7, None])
def test_a_checkpoint_with_a_bad_name_is_refused(run, name):
    state = run[0].recorder.state_dict() | {"weights": name}
    with pytest.raises(ValueError, match="weights"):
        run[0].recorder.load_state_dict(state)


# ------------------------------------------------------------------ without clipping


def batch_norm_run():
    engine, module = PrivacyEngine(), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    module, optimizer, loader = engine.make_monitored(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=6),
        noise_std=0.5,
        criterion=nn.CrossEntropyLoss(),
        poisson_sampling=False,
    )
    return engine, module, optimizer, loader, cross_entropy


def test_monitored_training_vouches_for_buffers_too():
    run = batch_norm_run()
    engine, module, *_ = run
    train(run)
    assert is_vouched_for(module, engine.ledger)
    train(run, 1)
    module.eval()(data()[:8][0])  # reads the running statistics
    assert is_vouched_for(engine)
    train(run, 1)
    module.train()(data()[:8][0])  # writes them
    assert engine.ledger.weights == "changed"


# ------------------------------------------------------------------ the name itself


def test_every_bit_counts():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names = {weights_name(module)}
    for name, tensor in module.state_dict().items():
        other = copy.deepcopy(module)
        flat = other.state_dict()[name].view(-1).view(torch.uint8)
        flat[0] ^= 1
        names.add(weights_name(other))
        assert tensor is not None
    names |= {weights_name(copy.deepcopy(module).double())}
    assert len(names) == len(module.state_dict()) + 2
    assert weights_name(copy.deepcopy(module)) == weights_name(module)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group(
        "gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_wrappers_do_not_count(process_group):
    module = net()
    name = weights_name(module)
    for wrapped in (
        opacus.GradSampleModule(copy.deepcopy(module)),
        nn.DataParallel(module),
        nn.parallel.DistributedDataParallel(module),
        opacus.GradSampleModule(
            nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        ),
        torch.compile(module),
    ):
        assert weights_name(wrapped) == name
    module[0] = torch.compile(module[0])
    assert weights_name(module) == name
    assert is_vouched_for(copy.deepcopy(net()), ledger_of(name))


def ledger_of(name):
    mechanism = NoisySGD(1, sample_rate=0.5, noise_std=1.0, max_grad_norm=1.0)
    return GradNormLedger(mechanism, [1], np.ones((1, 24)), weights=name)


def test_frozen_weights_and_names_count():
    module, frozen = net(), net()
    frozen[0].requires_grad_(False)
    assert weights_name(frozen) == weights_name(module)
    with torch.no_grad():
        frozen[0].weight[0, 0] += 1
    assert weights_name(frozen) != weights_name(module)
    assert weights_name(nn.Sequential(module)) != weights_name(module)


def test_weights_are_hashed_when_they_are_asked_for(monkeypatch, tmp_path):
    calls, run = [], prepared()

    def counted(model):
        calls.append(model)
        return weights_name(model)

    monkeypatch.setattr(weights, "weights_name", counted)
    train(run)
    engine = run[0]
    engine.privacy_losses(order=8), engine.epsilons(delta=1e-3)
    assert not calls
    assert engine.ledger.weights == engine.ledger.weights is not None
    assert len(calls) == 1


def test_a_model_that_is_gone_has_no_name():
    model = net()
    last = LastWeights(model)
    last.updated()
    assert last.name() == weights_name(model)
    del model
    assert last.name() is None


def test_another_type_of_numbers_is_a_change():
    model = net()
    last = LastWeights(model)
    last.updated()
    model.half()
    assert last.name() == "changed"
