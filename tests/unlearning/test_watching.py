"""Callbacks watch a run, a plateau ends it, and a broken run continues exactly."""

import copy
import random
import stat

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from opacus_pi.unlearning import (
    SCRUB,
    SSD,
    Callback,
    FineTune,
    L1Sparse,
    Langevin,
    LogMetrics,
    RandomLabels,
    SalUn,
    StopAtPlateau,
)
from tests.unlearning.unlearners import data, state_bytes, unlearner


class Broken(Exception):
    """What ends a run in the middle."""


class Augmented(Dataset):
    """Examples that differ at every look, by all three global generators."""

    def __init__(self):
        self.examples = data()

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        x, y = self.examples[index]
        return x + 0.1 * torch.randn(5) * random.random() * np.random.rand(), y


def net():
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def breaking(breaks_at):
    """An evaluation that draws random numbers, and breaks the run after some epochs."""
    epochs = iter(range(100))

    def evaluate(model):
        if next(epochs) == breaks_at:
            raise Broken
        total = sum(float(p.detach().sum()) for p in model.parameters())
        return {"total": total, "draw": random.random()}

    return evaluate


def started(method, seed_of_run):
    seed(seed_of_run)
    return unlearner(
        net(),
        seed_of_run,
        method=method,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    )


def run(method, seed_of_run, breaks_at, batch_size, **options):
    mine, evaluate = started(method, seed_of_run), breaking(breaks_at)
    return mine.unlearn(Augmented(), [3, 17], 5, evaluate, batch_size, **options)


METHODS = [
    FineTune(),
    Langevin(0.05),
    Langevin(0.05, max_grad_norm=1.0, projection_radius=2.0),
    L1Sparse(0.01),
    RandomLabels(),
    SalUn(),
    SCRUB(),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("breaks_at", "batch_size"), [(2, 7), (4, 8), (1, 28)])
def test_a_broken_run_ends_as_an_unbroken_one(tmp_path, method, breaks_at, batch_size):
    whole = run(method, 1, None, batch_size)
    path = tmp_path / "run.pt"
    with pytest.raises(Broken):
        run(method, 1, breaks_at, batch_size, checkpoint=path)
    saved = breaks_at > 1  # nothing is saved before the first pass has ended
    assert path.exists() is saved
    resumed = run(method, 2 if saved else 1, None, batch_size, checkpoint=path)
    assert state_bytes(resumed.model) == state_bytes(whole.model)
    assert resumed.trace.metrics == whole.trace.metrics
    assert resumed.guarantee == whole.guarantee
    changing = dict.fromkeys(("seconds", "started", "finished"))
    assert {**whole.record, **changing} == {**resumed.record, **changing}
    assert resumed.record["seconds"] > 0
    assert not path.exists()


def test_saving_changes_nothing(tmp_path):
    plain = run(Langevin(0.05), 1, None, 8)
    draw = torch.rand(1)
    saving = run(Langevin(0.05), 1, None, 8, checkpoint=tmp_path / "run.pt")
    assert state_bytes(plain.model) == state_bytes(saving.model)
    assert torch.rand(1) == draw


def test_a_run_that_was_stopped_early_leaves_no_file(tmp_path):
    path, stop = tmp_path / "run.pt", StopAtPlateau("draw", 1, min_change=10)
    result = run(FineTune(), 1, None, 8, stop=stop, checkpoint=path)
    assert len(result.trace) == 2 and not path.exists()


def test_a_method_of_a_single_pass_needs_no_file(tmp_path):
    method, path = SSD(1.0, 0.5), tmp_path / "run.pt"
    saving = run(method, 1, None, 8, checkpoint=path)
    assert state_bytes(saving.model) == state_bytes(run(method, 1, None, 8).model)


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(Broken):
        run(FineTune(), 1, 2, 8, checkpoint=path)
    return path


def test_only_the_owner_can_read_the_file(broken):
    assert stat.S_IMODE(broken.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, "batch_size=4, got a run with batch_size=8"),
        ({"method": L1Sparse(0.1)}, "must be of a run with method="),
        ({"stop": StopAtPlateau("draw")}, "must be of a run with stop="),
    ],
)
def test_a_file_of_another_run_is_refused(broken, change, words):
    method = change.pop("method", FineTune())
    options = {"batch_size": 8, **change}
    with pytest.raises(ValueError, match=words):
        run(method, 1, None, checkpoint=broken, **options)
    assert broken.exists()


def test_a_file_of_another_model_is_refused_and_nothing_has_begun(broken):
    other = unlearner(net(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    with torch.no_grad():
        other.model[0].weight.zero_()
    history = copy.copy(other.history)
    with pytest.raises(ValueError, match="began with other weights"):
        other.unlearn(Augmented(), [3, 17], 5, breaking(None), 8, checkpoint=broken)
    assert other.history == history and len(other.forgotten) == 0


@pytest.mark.parametrize("entry", ["begun", "random", "model", "optimizer", "trace"])
def test_a_file_that_cannot_be_restored_changes_nothing(broken, entry):
    content = torch.load(broken, weights_only=True)
    if entry in content:
        content[entry] = {}
    elif entry == "model":  # its first tensors fit, and torch loads them
        content["updates"]["model"]["3.bias"] = torch.zeros(9)
    else:
        content["updates"]["optimizer"]["param_groups"] = []
    torch.save(content, broken)
    one, examples = started(FineTune(), 1), Augmented()
    before, weights = dict(vars(one)), state_bytes(one.model)
    drawn = one._generator.get_state()
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        one.unlearn(examples, [3, 17], 5, breaking(None), 8, checkpoint=broken)
    assert vars(one) == before and state_bytes(one.model) == weights
    assert torch.equal(one._generator.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert np.array_equal(np.random.get_state()[1], expected[2])


def raising(*args, **options):
    """Any function of the user's that fails, here after it has drawn a number."""
    torch.rand(1)
    raise Broken


FAILURES = {
    "evaluate": {"evaluate": raising},
    "callback": {"callbacks": [type("Bad", (Callback,), {"on_start": raising})()]},
    "method": {"method": type("Bad", (FineTune,), {"prepare": raising})()},
    "loss": {"method": type("Bad", (FineTune,), {"loss": raising})()},
    "after the step": {"method": type("Bad", (FineTune,), {"project_": raising})()},
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_run_that_fails_before_its_first_update_leaves_nothing(where):
    options = dict(FAILURES[where])
    one, whole = started(FineTune(), 1), started(FineTune(), 1)
    method = options.pop("method", one.method)
    seed(1)
    before, weights = dict(vars(one)), state_bytes(one.model)
    one.method, given = method, one.method
    with pytest.raises(Broken):
        one.unlearn(Augmented(), [4], 2, batch_size=8, **options)
    one.method = given
    assert vars(one) == before and state_bytes(one.model) == weights
    found = one.unlearn(Augmented(), [3, 17], 2, batch_size=8)
    seed(1)
    expected = whole.unlearn(Augmented(), [3, 17], 2, batch_size=8)
    assert found.record["forgotten_before"] == []
    assert found.guarantee == expected.guarantee
    assert state_bytes(found.model) == state_bytes(expected.model)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(net().state_dict(), path)
    with pytest.raises(ValueError, match="must be a file of the format"):
        run(FineTune(), 1, None, 8, checkpoint=path)


# ------------------------------------------------------------------ callbacks


class Heard(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, unlearner, metrics):
        self.calls.append(("start", len(unlearner.trace), dict(metrics)))

    def on_epoch_end(self, unlearner, epoch, metrics):
        self.calls.append((epoch, len(unlearner.trace), dict(metrics)))

    def on_end(self, unlearner):
        self.calls.append("end")


def values(*numbers):
    given = iter(numbers)
    return lambda model: {"loss": next(given)}


def test_callbacks_are_told_about_every_evaluation():
    heard = Heard()
    unlearner().unlearn(data(), [3], 2, values(3.0, 2.0, 1.0), callbacks=[heard])
    told = [("start", 1, {"loss": 3.0}), (1, 2, {"loss": 2.0}), (2, 3, {"loss": 1.0})]
    assert heard.calls == [*told, "end"]


def test_callbacks_are_called_without_an_evaluation():
    heard = Heard()
    unlearner().unlearn(data(), [3], 1, callbacks=[heard])
    assert heard.calls == [("start", 0, {}), (1, 0, {}), "end"]


def test_the_start_is_told_once(tmp_path):
    path, heard = tmp_path / "run.pt", Heard()
    with pytest.raises(Broken):
        run(FineTune(), 1, 2, 8, checkpoint=path, callbacks=[heard])
    run(FineTune(), 1, None, 8, checkpoint=path, callbacks=[heard])
    names = [call if call == "end" else call[0] for call in heard.calls]
    assert names == ["start", 1, 2, 3, 4, 5, "end"]


def test_a_function_is_no_callback():
    with pytest.raises(ValueError, match="subclasses of Callback"):
        unlearner().unlearn(data(), [3], 1, callbacks=[print])


def test_a_logger_of_lightning_writes_every_evaluation(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path)
    log = [LogMetrics(logger)]
    unlearner().unlearn(data(), [3], 2, values(3.0, 2.0, 1.0), callbacks=log)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split()
    assert lines == ["loss,step", "3.0,0", "2.0,1", "1.0,2"]


class Board:
    """The methods of a SummaryWriter that a logger needs."""

    def __init__(self):
        self.lines = []

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.lines.append((tag, scalar_value, global_step))

    def flush(self):
        self.lines.append("flushed")


class WandbRun:
    """The method of a run of Weights & Biases."""

    def __init__(self):
        self.lines = []

    def log(self, data, step=None):
        self.lines.extend((name, value, step) for name, value in data.items())


@pytest.mark.parametrize("kind", [Board, WandbRun])
def test_other_loggers_are_called_by_their_own_methods(kind):
    logger, expected = kind(), [("loss", 3.0, 0), ("loss", 2.0, 1)]
    log = [LogMetrics(logger)]
    unlearner().unlearn(data(), [3], 1, values(3.0, 2.0), callbacks=log)
    assert logger.lines == expected + ["flushed"] * (kind is Board)


def test_without_metrics_nothing_is_logged():
    logger = WandbRun()
    unlearner().unlearn(data(), [3], 1, callbacks=[LogMetrics(logger)])
    assert logger.lines == []


def test_what_cannot_log_is_refused():
    with pytest.raises(ValueError, match="log_metrics, add_scalar, log"):
        LogMetrics(object())


# ------------------------------------------------------------------ plateau


def stopped_after(numbers, **options):
    stop = StopAtPlateau("loss", **options)
    evaluate = values(*numbers, *range(100, 110))
    return len(unlearner().unlearn(data(), [3], 8, evaluate, stop=stop).trace) - 1


@pytest.mark.parametrize(
    ("numbers", "options", "epochs"),
    [
        ([5, 4, 3, 3, 3, 3], {}, 5),
        ([5, 4, 3, 3.009, 2.999, 3], {}, 5),
        ([5, 4, 3, 3, 3, 3.02], {}, 8),  # it still changes
        ([5, 4, 4], {"patience": 1}, 2),
        ([5, 4, 3], {"patience": 2, "min_change": 2}, 2),
        ([1, 1, 1, 1], {"patience": 3}, 3),
    ],
)
def test_a_run_ends_at_a_plateau(numbers, options, epochs):
    assert stopped_after(numbers, **options) == epochs


def test_a_plateau_makes_the_guarantee_empirical_and_is_recorded():
    stop = StopAtPlateau("loss", 2, 0.5)
    result = unlearner().unlearn(data(), [3], 1, values(1, 2), stop=stop)
    assert result.record["stop"] == {"metric": "loss", "patience": 2, "min_change": 0.5}
    reasons = [a.evidence for a in result.guarantee.unmet]
    ended = "a rule could end it at an evaluation of 'loss', which may look at the "
    assert ended + "forget set" in reasons


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_change": -1}])
def test_a_plateau_has_a_length_and_a_height(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        StopAtPlateau("loss", **wrong)


# ------------------------------------------------------------------ progress


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (True, True)])
def test_the_bar_is_shown_if_asked_for(capsys, progress, shown):
    unlearner().unlearn(data(), [3], 2, batch_size=10, progress=progress)
    assert ("6/6" in capsys.readouterr().err) is shown
