"""Copies and pickles of what ``make_private`` returns, and of the engine."""

import copy
import gc
import pickle
import subprocess
import sys

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import default_collate as collate

from opacus_pi._torch_compat import load_hooks
from opacus_pi.attribution.samples import StoredSamples
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import Net, Training, data

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}
MODES = ("hooks", "ghost", "fast", "functorch", "ew")


@pytest.fixture(params=sorted(WAYS))
def copied(request):
    return WAYS[request.param]


def parts(training):
    """What can be copied: torch copies no optimizer of Opacus."""
    return {
        "engine": training.engine,
        "model": training.model,
        "net": training.net,
        "loader": training.loader,
        "together": [training.engine, training.model, training.loader],
    }


# ------------------------------------------------------------------- as Opacus's copies
@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch", "ew"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_whatever_opacus_copies_is_copied(mode, epochs, copied):
    ours = parts(Training(grad_sample_mode=mode).train(epochs))
    plain = Training(engine=opacus.PrivacyEngine(), grad_sample_mode=mode).train(epochs)
    for name, theirs in parts(plain).items():
        try:
            expected = type(copied(theirs))
        except (AttributeError, TypeError, pickle.PicklingError):
            continue  # neither does Opacus's
        made = type(copied(ours[name]))
        assert made.__name__ == expected.__name__
        assert "_pi_swaps" not in vars(made)


@pytest.mark.parametrize("mode", MODES)
def test_a_copied_model_trains_as_a_copy_of_opacus_does(mode):
    weights = []
    engines = [PrivacyEngine(), opacus.PrivacyEngine()]
    for engine in engines[: 1 if mode == "fast" else 2]:
        training = Training(engine=engine, grad_sample_mode=mode).train(1)
        again = Training(
            engine=type(engine)(),
            module=copy.deepcopy(training.model).to_standard_module(),
            loader=copy.deepcopy(training.loader),
            grad_sample_mode=mode,
        ).train(1)
        again.model.to_standard_module()
        weights.append([p.detach().clone() for p in again.net.parameters()])
        if engine is engines[0]:
            assert again.engine.attribution["unattributed"] == 0
            assert again.engine.ledger.mechanism.num_steps == 4
    for ours, theirs in zip(weights[0], weights[-1], strict=True):
        assert torch.equal(ours, theirs)


# ----------------------------------------------------------------- the engine's numbers
@pytest.mark.parametrize("mode", MODES)
def test_a_copied_engine_has_what_was_recorded_until_then(mode, copied):
    training = Training(grad_sample_mode=mode, recorder=Recorder(every=0.5)).train(2)
    made = copied(training.engine)
    for _ in range(2):
        np.testing.assert_array_equal(
            made.ledger.grad_norms, training.engine.ledger.grad_norms
        )
        assert made.ledger.weights == training.engine.ledger.weights != ""
        assert made.attribution == training.engine.attribution
        assert made.get_epsilon(1e-3) == training.engine.get_epsilon(1e-3)
        np.testing.assert_array_equal(
            made.epsilons(1e-3), training.engine.epsilons(1e-3)
        )
        made = copied(made)
    before = made.ledger.mechanism.num_steps
    training.train(1)  # the original goes on, and the copy does not notice
    assert training.engine.ledger.mechanism.num_steps == before + 4
    assert made.ledger.mechanism.num_steps == before
    with pytest.raises(AccountingError, match="the engine is a copy"):
        _ = made.module


def test_a_copy_that_trains_on_leaves_the_original_alone(copied):
    training = Training(recorder=Recorder(every=0.5)).train(1)
    engine, model = copied([training.engine, training.model])
    net = model.to_standard_module()
    resumed = Training(engine=engine, module=net, data_set=data()).train(1)
    training.train(1)
    for each in (resumed.engine, training.engine):
        assert each.ledger.mechanism.num_steps == 8
        assert len(each.epsilons(1e-3)) == 24
        assert each.attribution["unattributed"] == 0
    first = training.engine.ledger.grad_norms
    np.testing.assert_array_equal(resumed.engine.ledger.grad_norms[:2], first[:2])


def test_a_copy_knows_the_chain_of_custody(copied):
    training = Training().train(1)
    custody = copied(training.engine).ledger.custody
    assert custody == training.engine.ledger.custody is not None
    assert custody.num_samples > 0


def test_a_loader_that_cannot_be_pickled_does_not_matter(copied):
    whole = data()
    loader = DataLoader(whole, batch_size=6, collate_fn=lambda rows: collate(rows))
    training = Training(data_set=whole, loader=loader).train(1)
    copied(Training(engine=opacus.PrivacyEngine(), loader=loader).engine)
    made = copied(training.engine)
    assert made.ledger.mechanism.num_steps == 4
    with pytest.raises(AccountingError, match="the engine is a copy"):
        made.audit(nn.CrossEntropyLoss())


def test_a_copy_refuses_what_the_original_refuses(copied):
    training = Training().train(1)
    training.recorder.refuse("This was found out.")
    with pytest.raises(AccountingError, match="This was found out"):
        copied(training.engine).epsilons(1e-3)


@pytest.mark.parametrize("accountant", ["per_instance", "group", "gdp", "prv"])
def test_accountants_are_copied_with_their_engine(accountant, copied):
    training = Training(accountant=accountant, recorder=Recorder()).train(1)
    made = copied(training.engine)
    assert made.get_epsilon(1e-3) == training.engine.get_epsilon(1e-3) > 0
    if accountant == "per_instance":
        np.testing.assert_array_equal(
            made.accountant.epsilons(1e-3), training.engine.epsilons(1e-3)
        )
        training.train(1)
        assert made.accountant.ledger.mechanism.num_steps == 4


def test_budgets_are_copied(copied):
    from opacus_pi.accounting import RenyiFilter

    engine = PrivacyEngine(renyi_filter=RenyiFilter(1e3, order=4))
    training = Training(engine=engine).train(1)
    made = copied(training.engine).renyi_filter
    before = made.spent.copy()
    training.train(1)
    np.testing.assert_array_equal(made.spent, before)
    assert (engine.renyi_filter.spent > before).any()


def test_a_monitored_engine_is_copied(copied):
    net, engine = Net(), PrivacyEngine()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss(reduction="none")
    net, optimizer, loader = engine.make_monitored(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(data(), batch_size=6),
        noise_std=0.1,
        criterion=loss,
    )
    for x, y in loader:
        optimizer.zero_grad()
        loss(net(x), y).mean().backward()
        optimizer.step()
    made, other_net, other_loader = copied([engine, net, loader])
    np.testing.assert_array_equal(made.ledger.grad_norms, engine.ledger.grad_norms)
    with pytest.raises(AccountingError, match="no epsilon holds"):
        made.get_epsilon(1e-3)
    assert type(other_loader) is opacus.data_loader.DPDataLoader
    before = made.ledger.mechanism.num_steps
    for x, _ in other_loader:
        other_net(x).sum().backward()
    assert made.ledger.mechanism.num_steps == before


def test_a_recorder_without_a_model_writes_no_swept_row():
    recorder = Recorder("swept", criterion=nn.CrossEntropyLoss(reduction="none"))
    training = Training(recorder=recorder).train(1)
    made = copy.deepcopy(training.recorder)
    assert made.ledger.num_rows == 1
    with pytest.warns(UserWarning, match="no model to sweep"):
        for _ in range(4):
            made.step(noise_std=1.0, max_grad_norm=1.0)


# ------------------------------------------------------------------------------- memory
def test_copies_after_every_batch_leave_the_memory_intact():
    training = Training()
    for _ in range(3):
        for x, y in training.loader:
            training.batch(x, y)
            assert copy.deepcopy(training.engine).attribution["by_storage"] > 0
            gc.collect()
    assert training.engine.attribution["unattributed"] == 0


def test_references_to_memory_are_not_copied():
    stored = StoredSamples(torch.ones(3, 2), 0)
    for way in WAYS.values():
        with pytest.raises(TypeError, match="memory of this process"):
            way(stored)


def test_another_process_reads_a_pickled_engine(tmp_path):
    training = Training(recorder=Recorder()).train(1)
    path = tmp_path / "engine.pickle"
    path.write_bytes(pickle.dumps(training.engine))
    program = (
        "import pickle, sys; engine = pickle.load(open(sys.argv[1], 'rb'));"
        "print(engine.ledger.mechanism.num_steps, float(engine.epsilons(1e-3).sum()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(shown[0]) == 4
    assert float(shown[1]) == training.engine.epsilons(1e-3).sum()


# --------------------------------------------------------------------------- optimizers
@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_optimizers_say_that_they_cannot_be_copied(mode, copied):
    training = Training(grad_sample_mode=mode).train(1)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copied(training.optimizer)
    if mode == "ghost":  # the criterion has the optimizer
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            copied(training.criterion)
    training.train(1)
    # Opacus's class would have no working step now
    assert Training(grad_sample_mode=mode).train(1).engine.ledger.num_rows == 1


# -------------------------------------------------------------------------------- hooks
def hooks_of(module):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    counted = [len(getattr(m, name)) for m in module.modules() for name in tables]
    return [*counted, len(load_hooks(module))]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast", "ew", "no_op"])
def test_hooks_do_not_accumulate(mode):
    net, counts = Net(), []
    for round_number in range(4):
        training = Training(module=net, grad_sample_mode=mode)
        counts.append(hooks_of(net))
        del training
        gc.collect()
        if round_number == 2:
            net = copy.deepcopy(net)
        removed = getattr(net, "autograd_grad_sample_hooks", [])
        while removed:
            removed.pop().remove()
        vars(net).pop("autograd_grad_sample_hooks", None)
        if mode in ("hooks", "ghost", "fast"):
            assert sum(hooks_of(net)) == 0
    assert counts == counts[:1] * 4


def test_models_that_are_prepared_again_have_one_hook_of_each_kind():
    model = Training().model
    counts = []
    for _ in range(3):
        model = Training(module=copy.deepcopy(model)).model  # as Opacus, as it is
        counts.append(hooks_of(model._module))
    assert counts == counts[:1] * 3
    assert sum(hooks_of(model.to_standard_module())) == 0
