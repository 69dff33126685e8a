import io
import os
import stat

import numpy as np
import opacus
import pytest
import torch

from opacus_pi.integration.checkpoints import CHECKPOINT_KEY
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import Training

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger", "ignore:PrivacyEngine detected new dataset"
)


def save(training, **options):
    file = io.BytesIO()
    training.engine.save_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer, **options
    )
    file.seek(0)
    return file


def load(training, file):
    return training.engine.load_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer
    )


def vanilla():
    return Training(engine=opacus.PrivacyEngine(accountant="rdp"))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(mode):
    def first():
        return Training(grad_sample_mode=mode, shuffle=False, poisson_sampling=False)

    torch.manual_seed(0)
    whole = first().train(1)
    file, state = save(whole), torch.get_rng_state()
    whole.train(2)
    resumed = first()
    load(resumed, file)
    torch.set_rng_state(state)
    resumed.train(2)
    one, other = whole.engine.ledger, resumed.engine.ledger
    np.testing.assert_array_equal(one.grad_norms, other.grad_norms)
    np.testing.assert_array_equal(one.steps, other.steps)
    assert one.mechanism == other.mechanism and one.data_set == other.data_set
    np.testing.assert_array_equal(
        whole.engine.privacy_losses(3), resumed.engine.privacy_losses(3)
    )


def test_loading_before_the_run_is_prepared():
    first = Training().train(1)
    file, second = save(first), Training()
    engine = type(first.engine)(accountant="rdp")
    engine.load_checkpoint(path=file, module=second.model, optimizer=second.optimizer)
    resumed = Training(engine=engine).train(1)
    assert resumed.engine.ledger.mechanism.num_steps == 8
    assert resumed.engine.privacy_losses(2).shape == (24,)


def test_our_checkpoint_in_opacus():
    ours, theirs = Training().train(1), vanilla()
    checkpoint = load(theirs, save(ours, checkpoint_dict={"mine": 1}))
    assert checkpoint["mine"] == 1
    assert theirs.engine.accountant.history == ours.engine.accountant.history
    for a, b in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_our_key_holds_tensors_numbers_and_strings_only():
    file = save(Training().train(1))
    record = torch.load(file, weights_only=False)[CHECKPOINT_KEY]
    kinds = {type(value) for value in record.values()}
    assert kinds <= {torch.Tensor, int, float, str}


def test_opacus_checkpoint_in_ours_is_loaded_and_not_taken_for_the_whole():
    theirs, ours = vanilla().train(1), Training()
    checkpoint = load(ours, save(theirs))
    assert CHECKPOINT_KEY not in checkpoint
    ours.train(1)
    assert ours.engine.ledger.mechanism.num_steps == 4
    assert ours.engine.get_epsilon(1e-3) > 0
    with pytest.raises(AccountingError, match="accountant has counted 8"):
        ours.engine.privacy_losses(2)


def test_the_key_is_not_left_in_what_loading_returns():
    training = Training().train(1)
    assert CHECKPOINT_KEY not in load(training, save(training))


@pytest.mark.parametrize("prepared", [True, False])
def test_a_recorded_run_of_another_version(prepared):
    first = Training().train(1)
    content = torch.load(save(first), weights_only=False)
    content[CHECKPOINT_KEY]["version"] = 99
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    second = Training()
    engine = second.engine if prepared else type(first.engine)(accountant="rdp")
    engine.load_checkpoint(path=file, module=second.model, optimizer=second.optimizer)
    training = second if prepared else Training(engine=engine)
    training.train(1)  # goes on as with Opacus
    with pytest.raises(AccountingError, match="99.*release of opacus_pi"):
        _ = training.engine.ledger


@pytest.mark.parametrize("prepared", [True, False])
def test_a_recorded_run_of_another_data_set(prepared):
    first = Training().train(1)
    file, second = save(first), Training(batch_size=12)  # another sample rate
    engine = second.engine if prepared else type(first.engine)(accountant="rdp")
    engine.load_checkpoint(path=file, module=second.model, optimizer=second.optimizer)
    training = second if prepared else Training(engine=engine, batch_size=12)
    training.train(1)
    with pytest.raises(AccountingError, match="sample_rate"):
        _ = training.engine.ledger


def test_a_recorded_run_of_another_mode():
    file = save(Training().train(1))
    swept = Training(recorder=Recorder("swept", criterion=torch.nn.CrossEntropyLoss()))
    load(swept, file)
    swept.train(1)
    with pytest.raises(AccountingError, match="mode"):
        _ = swept.engine.ledger


def test_saving_before_anything_is_prepared():
    engine = Training().engine
    fresh = type(engine)(accountant="rdp")
    file = io.BytesIO()
    fresh.save_checkpoint(path=file, module=torch.nn.Linear(2, 1))
    file.seek(0)
    assert CHECKPOINT_KEY not in torch.load(file, weights_only=False)


@pytest.mark.parametrize("before", [None, 0o666])
def test_a_checkpoint_is_the_owners_alone(tmp_path, before):
    training, path = Training().train(1), tmp_path / "checkpoint.pt"
    if before is not None:
        path.touch()
        path.chmod(before)
    umask = os.umask(0)
    try:
        training.engine.save_checkpoint(path=path, module=training.model)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
