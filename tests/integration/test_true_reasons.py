"""Each refusal, and each row of an audit, names the cause that is true."""

import copy
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError, Checkpoints, Recorder
from opacus_pi.recording.state_file import read_state, write_state

NUM, BATCH = 24, 6
CRITERION = nn.CrossEntropyLoss()
GLOBAL = torch.Generator()

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def data():
    x = torch.randn(NUM, 6, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, torch.arange(NUM) % 3)


class Run:
    def __init__(self, net, engine=PrivacyEngine, loader=None):
        self.net, self.engine = net, engine()
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=loader or DataLoader(data(), BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )

    def epoch(self, before_step=None):
        for x, y in self.loader:
            self.optimizer.zero_grad()
            CRITERION(self.model(x), y).backward()
            if before_step is not None:
                before_step()
            self.optimizer.step()
        return self

    def link(self, name):
        links = self.engine.ledger.custody.links
        return next(link for link in links if link.name == name)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


# -------------------------------------------------------------------- freezing a layer
def test_a_layer_may_be_frozen_between_two_epochs():
    run = Run(two_layers()).epoch()
    run.net[0].requires_grad_(False)
    run.epoch()
    assert "p.grad_sample" not in run.link("loss").sentence
    assert run.link("norm").state == run.link("noise").state == "checked"


def test_a_layer_frozen_before_the_step_is_updated_without_noise():
    run = Run(two_layers())
    weight = run.net[0].weight
    before = weight.detach().clone()
    run.epoch(before_step=lambda: run.net[0].requires_grad_(False))
    assert not torch.equal(before, weight)  # by a gradient that was not clipped
    with pytest.raises(AccountingError, match="frozen .* while it had a gradient"):
        _ = run.engine.ledger


def test_changed_gradients_are_still_found():
    run = Run(two_layers())
    run.epoch(before_step=lambda: run.net[0].weight.grad_sample.mul_(2))
    assert "p.grad_sample" in run.link("loss").sentence


# ----------------------------------------------------------------------- own generators
class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.generator = torch.Generator().manual_seed(4)
        self.rng = np.random.default_rng(4)
        self.draw = draw

    def forward(self, x):
        return self.layer(x) + 0.1 * self.draw(self, len(x))


DRAWS = {
    "of the model": lambda m, n: torch.randn(n, 3, generator=m.generator),
    "a global variable": lambda m, n: torch.empty(n, 3).normal_(generator=GLOBAL),
    "of NumPy": lambda m, n: torch.from_numpy(m.rng.standard_normal((n, 3))).float(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_models_with_a_generator_of_their_own(name):
    weights = []
    for engine in (opacus.PrivacyEngine, PrivacyEngine):
        GLOBAL.manual_seed(7)
        torch.manual_seed(0)
        run = Run(Noisy(DRAWS[name]), engine).epoch()
        weights.append(run.net.layer.weight.detach())
    assert torch.equal(*weights)
    assert run.link("model").state == "checked"


def test_the_number_of_examples_is_still_found():
    run = Run(Noisy(lambda m, n: torch.full((n, 3), float(n)))).epoch()
    with pytest.raises(AccountingError, match="depend on the number of examples"):
        _ = run.engine.ledger


# ------------------------------------------------------------------------------- audits
class Stretched(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.layer, self.factor, self.calls = nn.Linear(6, 3), factor, 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.factor(self)


FACTORS = {
    "random": lambda m: 1 + 0.2 * random.random(),
    "numpy": lambda m: 1 + 0.2 * np.random.rand(),
    "warm-up": lambda m: min(1.0, 0.1 * m.calls),
    "later": lambda m: 1.0 if m.calls < 5 else 2.0,
}


@pytest.mark.parametrize("name", FACTORS)
def test_an_audit_says_that_a_model_changes_between_calls(name):
    audit = Run(Stretched(FACTORS[name])).engine.audit(CRITERION)
    for row in ("norms", "order"):
        assert audit[row].passed is None
        assert audit[row].sentence.startswith("The model returns other values")


def test_an_audit_says_that_a_criterion_changes_between_calls():
    generator = torch.Generator().manual_seed(2)
    before = generator.get_state()

    def noisy(outputs, targets):
        noise = torch.randn(outputs.shape, generator=generator)
        return CRITERION(outputs + 0.05 * noise, targets)

    audit = Run(nn.Linear(6, 3)).engine.audit(noisy)
    for row in ("norms", "order", "loss"):
        assert audit[row].sentence.startswith("The criterion returns other values")
    assert torch.equal(before, generator.get_state())


def test_an_audit_of_a_loader_without_batching():
    samples = BatchSampler(RandomSampler(data()), BATCH, drop_last=False)
    run = Run(two_layers(), loader=DataLoader(data(), batch_size=None, sampler=samples))
    assert run.engine.audit(CRITERION).passed


# -------------------------------------------------------------------------------- files
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_saved_state(tmp_path):
    path = tmp_path / "state-00000000.pt"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a pipe"):
        read_state(path)


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state-00000000.pt"
    write_state(path, {"weights": torch.arange(64)})
    content = torch.load(path)
    content["state"]["weights"][3] = 7
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"in {path} does not match its checksum"):
        read_state(path)


def test_names_that_no_state_has_are_passed_over(tmp_path):
    states = Checkpoints(tmp_path)
    for stray in ("state-1.pt", "state-\u0660\u0661.pt", "state-x.pt"):
        (tmp_path / stray).write_bytes(b"")
    assert not states.steps


def test_a_file_in_place_of_the_directory_of_states(tmp_path):
    (tmp_path / "states").write_text("notes")
    recorder = Recorder(checkpoints=Checkpoints(tmp_path / "states"))
    run = Run(two_layers(), lambda: PrivacyEngine(recorder=recorder))
    with pytest.raises(ValueError, match="checkpoints must be a directory"):
        run.epoch()
    assert (tmp_path / "states").read_text() == "notes"


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    other = Run(two_layers(), opacus.PrivacyEngine).epoch()
    other.engine.save_checkpoint(
        path=path, module=other.model, optimizer=other.optimizer
    )
    run = Run(two_layers())
    before = {k: v.clone() for k, v in run.net.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be resumed exactly"):
        run.engine.load_checkpoint(
            path=path, module=run.model, optimizer=run.optimizer, restore_rng=True
        )
    for name, value in run.net.state_dict().items():
        assert torch.equal(before[name], value)
    assert not run.engine.accountant.history
    assert run.epoch().engine.ledger.mechanism.num_steps == NUM // BATCH


# ---------------------------------------------------------------- of a run as a whole
def poisson_run(net, engine):
    return engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def update(model, optimizer, x, y):
    optimizer.zero_grad()
    CRITERION(model(x), y).backward()
    optimizer.step()


def epoch(model, optimizer, loader):
    for batch in loader:
        update(model, optimizer, *batch)


def test_more_poisson_batches_in_a_pass_are_counted():
    engine = PrivacyEngine()
    parts = poisson_run(two_layers(), engine)
    epoch(*parts)
    parts[-1].batch_sampler.steps = 7
    epoch(*parts)
    assert engine.ledger.mechanism.num_steps == 4 + 7
    assert engine.accountant.history == [(1.0, 0.25, 11)]
    parts[-1].batch_sampler.sample_rate = 0.5
    epoch(*parts)
    with pytest.raises(AccountingError, match="changed after make_"):
        _ = engine.ledger


def test_a_second_engine_on_the_model_is_named():
    first, second, net = PrivacyEngine(), PrivacyEngine(), two_layers()
    parts = poisson_run(net, first)
    others = poisson_run(parts[0], second)
    epoch(*others)
    epoch(*parts)
    with pytest.raises(AccountingError, match="prepared again by a later make_private"):
        _ = first.ledger


def test_another_release_of_the_accountant_is_named():
    engine = PrivacyEngine()
    epoch(*poisson_run(two_layers(), engine))
    engine.accountant.step(noise_multiplier=2.0, sample_rate=0.1)
    with pytest.raises(AccountingError, match="was charged for something else"):
        _ = engine.ledger


def sorting(items):
    return torch.utils.data.default_collate(sorted(items, key=lambda one: -one[0][0]))


def test_a_collate_fn_that_is_replaced_later_is_followed():
    ledgers = []
    for is_late in (False, True):
        torch.manual_seed(1)
        net, engine = two_layers(), PrivacyEngine(recorder=Recorder(every=1))
        model, optimizer, loader = engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(
                data(), BATCH, shuffle=True, collate_fn=None if is_late else sorting
            ),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        if is_late:
            loader.collate_fn = sorting
        torch.manual_seed(2)
        for _ in range(2):
            epoch(model, optimizer, loader)
        ledgers.append(engine.ledger)
    first, second = ledgers
    assert np.array_equal(first.grad_norms, second.grad_norms, equal_nan=True)
    assert not second.custody.broken


def test_trainings_in_two_threads_say_nothing_of_each_other():
    def run(seed):
        net = two_layers()
        engine = PrivacyEngine()
        parts = engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(data(), BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(seed),
        )
        return engine, parts

    runs = [run(seed) for seed in range(2)]

    def train(parts):
        for _ in range(8):
            epoch(*parts)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [parts for _, parts in runs]))
    for engine, _ in runs:
        names = {link.name for link in engine.ledger.custody.unchecked}
        assert names <= {"loss"}


# ---------------------------------------------------------- several runs of one engine
def prepared_again(run, net):
    """Prepare a model with the engine of a run, and train it for an epoch."""
    return Run(net, engine=lambda: run.engine).epoch()


SAME, OTHER, CHARGED = (
    "4 were made before this model was prepared again",
    "4 were of another model that this engine prepared",
    "1 were counted by the accountant, but not recorded",
)


def another_model(run):
    return prepared_again(run, two_layers())


def the_same_model(run):
    run.model.remove_hooks()
    return prepared_again(run, run.net)


def the_same_after_another(run):
    prepared_again(run, two_layers())
    run.model.remove_hooks()
    return prepared_again(run, run.net)


def another_release(run):
    run.engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    return run


def all_of_them(run):
    return another_release(the_same_after_another(run))


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (another_model, {OTHER}),
        (the_same_model, {SAME}),
        (the_same_after_another, {SAME, OTHER}),
        (another_release, {CHARGED}),
        (all_of_them, {SAME, OTHER, CHARGED}),
    ],
)
def test_updates_that_a_ledger_lacks_are_named(loop, said):
    run = loop(Run(two_layers()).epoch())
    with pytest.raises(AccountingError, match="The ledger holds 4 updates") as caught:
        _ = run.engine.ledger
    text = str(caught.value)
    assert {found for found in (SAME, OTHER, CHARGED) if found in text} == said
    assert ("keep what the first call" in text) == (SAME in said)
    assert ("Use one engine for each model" in text) == (OTHER in said)
    assert ("counts the updates of both" in text) == (OTHER in said)
    assert ("an accountant of their own" in text) == (CHARGED in said)


def test_two_models_that_are_prepared_before_either_is_trained_have_a_ledger():
    run = Run(two_layers())
    assert prepared_again(run, two_layers()).engine.ledger.mechanism.num_steps == 4


def test_a_copy_of_an_engine_names_the_updates_too():
    run = another_model(Run(two_layers()).epoch())
    with pytest.raises(AccountingError, match=OTHER):
        _ = copy.deepcopy(run.engine).ledger
