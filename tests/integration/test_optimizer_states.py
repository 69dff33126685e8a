"""A checkpoint goes back to the optimizer's state and to the counts, or says so."""

import warnings

import pytest
import torch

from opacus_pi import AccountingError
from opacus_pi.accounting import GradNormLedger
from tests.private_training import NUM_EXAMPLES, Training


def weights_link(engine):
    (link,) = [k for k in engine.ledger.custody.links if k.name == "weights"]
    return link


def trained(momentum=0.9):
    training = Training()
    training.optimizer.param_groups[0]["momentum"] = momentum
    return training.train(1)


def saved(training, path, **parts):
    training.engine.save_checkpoint(path=path, module=training.model, **parts)
    return path


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_rollback_without_the_optimizer_is_said(tmp_path, with_optimizer):
    training = trained()
    parts = {"optimizer": training.optimizer} if with_optimizer else {}
    path = saved(training, tmp_path / "state.pt", **parts)
    training.train(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        training.engine.load_checkpoint(path=path, module=training.model, **parts)
    said = [w for w in seen if "without the optimizer" in str(w.message)]
    assert bool(said) == (not with_optimizer)
    link = weights_link(training.engine)
    assert ("without the optimizer" in link.sentence) == (not with_optimizer)


def test_an_optimizer_without_a_state_needs_none(tmp_path):
    training = trained(momentum=0)
    path = saved(training, tmp_path / "state.pt")
    training.engine.load_checkpoint(path=path, module=training.model)
    assert "without the optimizer" not in weights_link(training.engine).sentence


def test_a_new_process_may_leave_the_optimizer_out(tmp_path):
    path = saved(trained(), tmp_path / "state.pt")
    resumed = Training()
    resumed.engine.load_checkpoint(path=path, module=resumed.model)
    assert "without the optimizer" not in weights_link(resumed.engine).sentence


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_an_edited_state_is_refused(tmp_path, factor):
    training = trained()
    path = saved(training, tmp_path / "state.pt", optimizer=training.optimizer)
    content = torch.load(path, weights_only=False)
    for values in content["optimizer_state_dict"]["state"].values():
        values["momentum_buffer"] *= factor
    torch.save(content, path)
    resumed = Training()
    parts = {"module": resumed.model, "optimizer": resumed.optimizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.engine.load_checkpoint(path=path, **parts)
    if factor == 1:
        assert resumed.engine.ledger.mechanism.num_steps
        return
    with pytest.raises(AccountingError, match="optimizer's state in the checkpoint"):
        _ = resumed.engine.ledger


@pytest.mark.filterwarnings("ignore:.*ample")
@pytest.mark.parametrize("num_before", [0, 1])
def test_samples_of_updates_that_were_undone_are_not_counted(tmp_path, num_before):
    """Neither those with a known example nor the others."""
    training = Training(poisson_sampling=False).train(num_before)
    parts = {"module": training.model, "optimizer": training.optimizer}
    path = tmp_path / "state.pt"
    training.engine.save_checkpoint(path=path, **parts)
    training.train(1)
    x, y = training.data_set[:4]
    training.batch(x.exp(), y)  # of no batch
    with pytest.raises(AccountingError, match=f"of {24 * num_before + 28} samples"):
        _ = training.engine.ledger
    for _ in range(2):
        training.engine.load_checkpoint(path=path, **parts)
    for num_since in (1, 2):
        training.train(1)
        custody = training.engine.ledger.custody
        assert custody.num_samples == NUM_EXAMPLES * (num_before + num_since)
        assert custody.num_unattributed == 0 and not custody.cause


# ------------------------------------------------------- updates that a rollback undoes
def go_on(training, path):
    return training.train(1)


def go_back(training, path):
    return load(training, path)


def load(training, path):
    parts = {"module": training.model, "optimizer": training.optimizer}
    training.engine.load_checkpoint(path=path, **parts)
    return training


def in_a_new_process(training, path):
    resumed = load(Training(), path)
    torch.manual_seed(5)  # other noise than in the first process
    return resumed


UNDONE = {
    "loaded for good": ([go_on, go_back], 1),
    "training goes on": ([go_on, go_back, go_on], 1),
    "twice": ([go_on, go_back, go_on, go_on, go_back, go_on], 3),
    "a new process after an update": ([go_on, in_a_new_process, go_on], 0),
    "the current update": ([go_back, go_on], 0),
    "a new process": ([in_a_new_process, go_on], 0),
}


@pytest.mark.parametrize("name", UNDONE)
def test_updates_that_a_checkpoint_undoes_are_said_once(tmp_path, name):
    moves, num_epochs = UNDONE[name]
    training = trained(momentum=0)
    per_epoch = training.engine.ledger.mechanism.num_steps
    path = saved(training, tmp_path / "state.pt", optimizer=training.optimizer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for move in moves:
            training = move(training, path)
        ledger = training.engine.ledger
    said = [w for w in seen if "are not counted" in str(w.message)]
    num = per_epoch * num_epochs
    text = f": {num} updates are not counted."
    link = weights_link(training.engine)
    assert (text in link.sentence) == ("not counted" in link.sentence) == bool(num)
    assert not num or link.state == "unchecked"
    assert len(said) == sum(move is go_back for move in moves) * bool(num)
    made = ledger.mechanism.num_steps + num
    assert not num or f"all {made} updates" in link.sentence


def test_updates_that_were_undone_stay_in_files(tmp_path):
    training = trained(momentum=0)
    path = saved(training, tmp_path / "state.pt", optimizer=training.optimizer)
    training.train(1)
    load(training, path).train(1)
    sentence = weights_link(training.engine).sentence
    training.engine.ledger.save(tmp_path / "ledger")
    (link,) = (
        link
        for link in GradNormLedger.load(tmp_path / "ledger").custody.unchecked
        if link.name == "weights"
    )
    assert link.sentence == sentence
    saved(training, path, optimizer=training.optimizer)
    resumed = load(Training(), path)
    assert weights_link(resumed.engine).sentence == sentence


def test_a_later_checkpoint_brings_its_updates_back(tmp_path):
    training = trained(momentum=0)
    early, late = tmp_path / "early.pt", tmp_path / "late.pt"
    saved(training, early, optimizer=training.optimizer)
    saved(training.train(1), late, optimizer=training.optimizer)
    for path in (early, late):
        load(training, path)
    training.train(1)
    assert weights_link(training.engine).state == "checked"
