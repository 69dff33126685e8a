"""Loops that break or strain the links draw, weights, norm and noise."""

import gc
import itertools
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder, Unlearner
from opacus_pi.accounting import fingerprint
from opacus_pi.integration import runs
from opacus_pi.integration.checkpoints import ledger_in_checkpoint
from opacus_pi.ledger.custody import Custody

NUM, BATCH = 48, 6


class Run:
    def __init__(self, mode="hooks", poisson=True, recorder=None, accountant="rdp"):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(NUM, 4), torch.arange(NUM) % 3)
        self.data = data.tensors
        self.plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.engine = PrivacyEngine(accountant=accountant, recorder=recorder)
        prepared = self.engine.make_private(
            module=self.plain,
            optimizer=torch.optim.SGD(self.plain.parameters(), lr=0.05),
            data_loader=DataLoader(data, batch_size=BATCH, shuffle=True),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
            grad_sample_mode=mode,
            criterion=self.criterion,
        )
        self.model, self.optimizer, self.loader = prepared[0], prepared[1], prepared[-1]
        if mode == "ghost":
            self.criterion = prepared[2]

    def step(self, x, y):
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    @property
    def custody(self) -> Custody:
        return self.engine.ledger.custody

    def unchecked(self):
        return {link.name for link in self.custody.unchecked}


def quietly(loop, run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(run)


def once_each(run):
    for batch in run.loader:
        run.step(*batch)


def restarted(run):
    for _ in range(10):
        run.step(*next(iter(run.loader)))


def left_early(run):
    for _ in range(5):
        for batch in itertools.islice(run.loader, 3):
            run.step(*batch)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
@pytest.mark.parametrize("loop", [once_each, restarted, left_early])
def test_fresh_draws_are_fine(loop, mode):
    run = Run(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Full backward hook")
        loop(run)
        found = run.unchecked()
    assert found <= {"model", "loss"}


def inner_loop(run):
    for batch in run.loader:
        for _ in range(2):
            run.step(*batch)


def cycled(run):
    for batch in itertools.islice(itertools.cycle(run.loader), 20):
        run.step(*batch)


def kept_in_a_list(run):
    for batch in list(run.loader) * 2:
        run.step(*batch)


def a_copy_later(run):
    kept = None
    for x, y in run.loader:
        run.step(x, y)
        if kept is not None:
            run.step(*kept)
        kept = (x.clone(), y.clone())


def in_parts(run):
    for x, y in run.loader:
        for part in zip(x.split(2), y.split(2), strict=True):
            run.step(*part)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
@pytest.mark.parametrize(
    "loop", [inner_loop, cycled, kept_in_a_list, a_copy_later, in_parts]
)
def test_a_draw_that_serves_two_updates_is_refused(loop, mode):
    run = Run(mode)
    quietly(loop, run)
    for read in (
        lambda: run.engine.ledger,
        lambda: run.engine.epsilons(1e-5),
        lambda: run.engine.privacy_losses(8),
    ):
        with pytest.raises(AccountingError, match="used for more than one update"):
            read()
    with pytest.warns(UserWarning, match="taken as a bound for this training. A batch"):
        assert run.engine.get_epsilon(1e-5) > 0


def test_batches_of_another_loader_are_refused():
    run = Run()
    quietly(lambda run: [run.step(*run.data) for _ in range(5)], run)
    with pytest.raises(AccountingError, match="240 of 240 samples are unattributed"):
        run.engine.epsilons(1e-5)


def test_a_recorder_can_be_told_how_to_charge():
    run = Run(recorder=Recorder(unattributed="worst_case"))

    def loop(run):
        run.step(*next(iter(run.loader)))
        run.step(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))

    quietly(loop, run)
    norms = run.engine.ledger.grad_norms
    assert not torch.from_numpy(norms).isnan().any()
    assert (norms == 1.0).sum() >= NUM - 20  # those that were not observed: C


def clamped(run):
    for parameter in run.plain.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def averaged(run):
    for parameter in run.plain.parameters():
        parameter.data = parameter.data * 0.9


def by_numpy(run):
    for parameter in run.plain.parameters():
        parameter.data.numpy()[...] *= 0.5


@pytest.mark.parametrize("write", [clamped, averaged, by_numpy])
def test_writes_to_weights_are_said(write):
    run = Run()
    batches = iter(run.loader)
    run.step(*next(batches))
    write(run)
    with pytest.warns(UserWarning, match="Weights were changed between two updates"):
        run.step(*next(batches))
    assert "weights" in run.unchecked()


@pytest.mark.parametrize("write", [clamped, averaged, by_numpy])
def test_weights_that_were_changed_after_the_last_update_are_not_named(write):
    run = Run()
    run.step(*next(iter(run.loader)))
    assert run.engine.ledger.weights.startswith("sha256:")
    run.step(*next(iter(run.loader)))
    write(run)
    assert run.engine.ledger.weights == "changed"


def frozen(run):
    for parameter in run.plain[0].parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_ghost_clipping_after_requires_grad_changed(frozen_first):
    torch.manual_seed(0)
    run = Run.__new__(Run)
    run.plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    if frozen_first:
        frozen(run)
    data = TensorDataset(torch.randn(NUM, 4), torch.arange(NUM) % 3)
    run.engine = PrivacyEngine(accountant="rdp")
    run.model, run.optimizer, run.criterion, run.loader = run.engine.make_private(
        module=run.plain,
        optimizer=torch.optim.SGD(run.plain.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=0.05,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        criterion=nn.CrossEntropyLoss(),
    )
    quietly(once_each, run)
    assert run.unchecked() <= {"model", "loss"}  # so far nothing was changed
    for parameter in run.plain[0].parameters():
        parameter.requires_grad_(frozen_first)
    quietly(once_each, run)
    with pytest.raises(AccountingError, match="requires_grad was changed"):
        run.engine.ledger  # noqa: B018


def test_a_step_hook_of_the_user_replaces_the_accountants():
    run = Run()
    run.optimizer.attach_step_hook(lambda _: None)
    quietly(once_each, run)
    with pytest.warns(UserWarning, match="has counted fewer updates than were made"):
        run.engine.get_epsilon(1e-5)
    assert run.engine.epsilons(1e-5).max() > 0


def by_parts(run):
    for x, y in run.loader:
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.clip_and_accumulate()
        run.optimizer.add_noise()
        run.optimizer.scale_grad()
        run.optimizer.original_optimizer.step()


def test_updates_that_the_loop_makes_of_the_parts_of_a_step():
    run = Run(accountant="prv")
    quietly(by_parts, run)
    num_updates = run.engine.ledger.mechanism.num_steps
    assert num_updates > 0
    assert run.engine.epsilons(1e-5).max() > 0
    with (
        pytest.warns(UserWarning, match="counted fewer updates than were made"),
        pytest.raises(AccountingError, match=f"none of {num_updates} updates"),
    ):
        run.engine.get_epsilon(1e-5)


def test_the_group_accountant_refuses_too():
    run = Run(accountant="group")
    engine = run.engine
    quietly(once_each, run)
    engine.accountant.group_size = 2
    assert engine.accountant.divergence(4.0) > 0
    quietly(inner_loop, run)
    with pytest.raises(AccountingError, match="used for more than one update"):
        engine.accountant.divergence(4.0)
    with pytest.raises(AccountingError, match="used for more than one update"):
        engine.get_epsilon(1e-5)
    engine.accountant.group_size = 1
    with pytest.warns(UserWarning, match="cannot be taken as a bound for this"):
        assert engine.get_epsilon(1e-5) > 0


def ghost_with(change):
    """A loop that computes the criterion's input from the model's outputs."""

    def loop(run):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            run.criterion(change(run.model(x)), y).backward()
            run.optimizer.step()

    return loop


@pytest.mark.parametrize(
    "change, is_said, is_refused",
    [
        (lambda z: z, False, False),
        (lambda z: z.view(len(z), -1), False, False),
        (lambda z: z + z.flip(0), True, True),
        (lambda z: z + z.flip(0).detach(), True, False),
        (lambda z: z.flip(0), True, True),
        (lambda z: z - z.mean(0), True, True),
    ],
)
def test_what_ghost_clipping_s_criterion_is_given(change, is_said, is_refused):
    run = Run("ghost")
    quietly(ghost_with(change), run)
    if is_refused:  # gradients of several examples are mixed
        with pytest.raises(AccountingError, match="a loop that mixes the model's out"):
            run.engine.ledger  # noqa: B018
    else:
        assert ("loss" in run.unchecked()) == is_said


def hardest(run):
    for x, y in run.loader:
        with torch.no_grad():
            losses = nn.functional.cross_entropy(run.model(x), y, reduction="none")
        chosen = losses.topk(2).indices
        run.step(x[chosen], y[chosen])


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_examples_that_the_loop_chooses_from_a_batch(mode):
    run = Run(mode, poisson=False)
    quietly(hardest, run)
    assert "draw" in run.unchecked()
    (draw,) = [link for link in run.custody.links if link.name == "draw"]
    assert "only a part of some delivered batches" in draw.sentence


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_all_parts_of_a_batch_may_be_used_one_after_another(mode):
    run = Run(mode, poisson=False)
    quietly(in_parts, run)
    assert "draw" not in run.unchecked()


def without_noise(run):
    def write(optimizer):
        for parameter in optimizer.params:
            parameter.grad.copy_(parameter.summed_grad.view_as(parameter) / BATCH)

    run.optimizer.attach_step_hook(write)
    once_each(run)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_gradients_that_are_changed_after_the_noise(mode):
    run = Run(mode)
    with pytest.warns(UserWarning, match="changed after noise was added"):
        without_noise(run)
    assert "noise" in run.unchecked()


def permuted_between_epochs(run):
    once_each(run)
    for tensor in run.data:
        tensor.copy_(tensor.flip(0))
    once_each(run)


def test_a_data_set_that_is_permuted_in_training_is_refused():
    run = Run()
    quietly(permuted_between_epochs, run)
    with pytest.raises(AccountingError, match="what it had returned for another index"):
        _ = run.custody


def changed_between_epochs(run):
    once_each(run)
    for tensor in run.data:
        if tensor.is_floating_point():
            tensor.add_(0.25)
    once_each(run)


def test_a_data_set_that_is_changed_in_training_is_said():
    run = Run()
    once_each(run)
    assert "identity" not in run.unchecked()
    quietly(changed_between_epochs, run)
    with pytest.warns(UserWarning, match="What the data set stores has changed"):
        assert "identity" in run.unchecked()


def test_a_data_set_that_was_changed_is_said_after_its_loader_is_gone():
    run = Run()
    quietly(changed_between_epochs, run)
    run.loader = run.data = None
    gc.collect()
    with pytest.warns(UserWarning, match="What the data set stores has changed"):
        assert "identity" in run.unchecked()


def run_with_updates_from_elsewhere():
    """A run whose accountant has counted 8 updates that its recorder has not seen."""
    before = Run()
    quietly(once_each, before)
    after = Run()
    # as a checkpoint that plain Opacus has saved: with a history, without a record
    after.engine.accountant.load_state_dict(before.engine.accountant.state_dict())
    quietly(once_each, after)
    return after


@pytest.mark.parametrize(
    "read",
    [
        lambda run, path: run.engine.ledger,
        lambda run, path: run.engine.recorder.ledger,
        lambda run, path: run.engine.epsilons(1e-5),
        lambda run, path: run.engine.privacy_losses(order=2),
        lambda run, path: run.engine.epsilon_limits(1e-5),
        lambda run, path: run.engine.accountant_bound(),
        lambda run, path: Unlearner(run.engine, criterion=nn.CrossEntropyLoss()),
        lambda run, path: ledger_in(run, path),
    ],
)
def test_a_ledger_that_lacks_updates_of_the_accountant_is_refused(read, tmp_path):
    run = run_with_updates_from_elsewhere()
    with pytest.raises(AccountingError, match=r"8 updates|ledger holds 8"):
        read(run, tmp_path / "checkpoint.pt")


def ledger_in(run, path):
    run.engine.save_checkpoint(path=path, module=run.model, optimizer=run.optimizer)
    return ledger_in_checkpoint(path)


def test_get_epsilon_counts_the_updates_that_the_ledger_lacks():
    run = run_with_updates_from_elsewhere()
    with warnings.catch_warnings():
        # Opacus's number covers all of them.
        warnings.filterwarnings("error", message="get_epsilon returns")
        both = run.engine.get_epsilon(1e-5)
    first = Run()
    quietly(once_each, first)
    assert both > first.engine.get_epsilon(1e-5)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
def test_the_notes_of_errors_name_the_cause():
    with pytest.raises(Exception, match="training mode") as caught:
        PrivacyEngine().make_private(
            module=(plain := nn.Linear(4, 3)).eval(),
            optimizer=torch.optim.SGD(plain.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert caught.value.__notes__ == ["Call module.train() before make_private."]
    run = Run("ghost")
    with pytest.raises(RuntimeError) as caught:
        for _ in range(6):
            once_each(run)
            frozen(run)
    (note,) = caught.value.__notes__
    assert "were frozen" in note and "earlier batch" in note


def test_get_epsilon_does_not_read_the_data_set(monkeypatch):
    run, reads = Run(), []
    quietly(once_each, run)

    def counted(data_set):
        reads.append(data_set)
        return fingerprint(data_set)

    monkeypatch.setattr(runs, "fingerprint", counted)
    run.engine.get_epsilon(1e-5)
    assert not reads
    assert run.engine.ledger.custody.unchecked and reads
