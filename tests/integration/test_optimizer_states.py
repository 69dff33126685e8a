"""A checkpoint goes back to the optimizer's state and to the counts, or says so."""

import warnings

import pytest
import torch

from opacus_pi import AccountingError
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
