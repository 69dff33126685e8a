import copy
import io
import os
import stat

import numpy as np
import opacus
import pytest
import torch

from opacus_pi.accounting import GradNormLedger
from opacus_pi.integration.checkpoints import CHECKPOINT_KEY, ledger_in_checkpoint
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError, Recorder
from tests.files.test_torch_file import touching
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


@pytest.mark.parametrize("is_changed", [False, True])
def test_going_back_to_a_checkpoint_brings_back_the_weights_of_the_run(is_changed):
    training = Training(shuffle=False, poisson_sampling=False)
    training.train(1)
    if is_changed:  # and saved with the change
        with torch.no_grad():
            next(training.net.parameters()).mul_(0.9)
    file = save(training)
    training.train(1)
    load(training, file)
    training.train(1)
    unchecked = training.engine.ledger.custody.unchecked
    (weights,) = (link.sentence for link in unchecked if link.name == "weights")
    assert "4 updates are not counted" in weights  # those after the checkpoint
    assert ("Weights were changed between" in weights) == is_changed


def test_loading_before_the_run_is_prepared():
    first = Training().train(1)
    file, second = save(first), Training()
    engine = type(first.engine)(accountant="rdp")
    engine.load_checkpoint(path=file, module=second.model, optimizer=second.optimizer)
    resumed = Training(engine=engine, seed=1).train(1)
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
    said = "None of the 4 updates .* was recorded: a checkpoint of plain Opacus was"
    for reading in (ours.engine.epsilons, ours.engine.epsilon_limits):
        with pytest.raises(AccountingError, match=said):
            reading(1e-3)
    ours.train(1)
    assert ours.engine.recorder.num_steps == 4
    assert ours.engine.get_epsilon(1e-3) > 0
    with pytest.raises(AccountingError, match="4 were counted by the accountant"):
        ours.engine.privacy_losses(2)
    with pytest.raises(AccountingError, match="4 were counted by the accountant"):
        _ = ours.engine.ledger


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


# ---------------------------------------------------------------- code in a checkpoint


class Settings:
    """An object of the user's own in a checkpoint."""

    rate = 0.5


@pytest.mark.parametrize("options", [{}, {"torch_load_kwargs": {"weights_only": True}}])
def test_no_code_of_a_checkpoint_is_run(tmp_path, options):
    training, made = Training().train(1), tmp_path / "made"
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    file = io.BytesIO()
    torch.save({"module_state_dict": touching(made)}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="mkdir. Nothing was loaded"):
        training.engine.load_checkpoint(path=file, module=training.model, **options)
    assert not made.exists()
    after = training.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("writer", [Training, vanilla], ids=["ours", "opacus"])
def test_objects_of_the_users_own_are_loaded_when_allowed(tmp_path, writer):
    first, path = writer().train(1), tmp_path / "checkpoint.pt"
    own = {"settings": Settings(), "best": np.float32(0.25)}
    first.engine.save_checkpoint(path=path, module=first.model, checkpoint_dict=own)
    second = Training()
    arguments = {"path": path, "module": second.model}
    with pytest.raises(ValueError, match=r"Settings.*weights_only.*add_safe_globals"):
        second.engine.load_checkpoint(**arguments)
    as_opacus = {"torch_load_kwargs": {"weights_only": False}}
    found = second.engine.load_checkpoint(**arguments, **as_opacus)
    assert found["settings"].rate == 0.5 and found["best"] == np.float32(0.25)
    with torch.serialization.safe_globals([Settings]):
        again = Training()
        found = again.engine.load_checkpoint(path=path, module=again.model)
    assert found["settings"].rate == 0.5
    for one, other in zip(
        first.model.state_dict().values(),
        again.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_options_of_torch_load_are_the_users(tmp_path):
    training, path = Training().train(1), tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(path=path, module=training.model)
    seen = []

    def place(storage, location):
        seen.append(location)
        return storage

    training.engine.load_checkpoint(
        path=path,
        module=training.model,
        torch_load_kwargs={"map_location": place, "mmap": True},
    )
    assert set(seen) == {"cpu"}


@pytest.mark.parametrize("unattributed", ["refuse", "worst_case"])
def test_a_ledger_is_read_from_a_checkpoint_without_an_engine(tmp_path, unattributed):
    recorder = Recorder(unattributed=unattributed)
    engine = PrivacyEngine(accountant="rdp", recorder=recorder)
    training, path = Training(engine=engine).train(2), tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(path=path, module=training.model)
    one, other = training.engine.ledger, ledger_in_checkpoint(path)
    np.testing.assert_array_equal(one.grad_norms, other.grad_norms)
    assert one.mechanism == other.mechanism and one.data_set == other.data_set
    assert one.custody == other.custody
    assert one.custody.allows_unattributed == (unattributed == "worst_case")


def test_a_ledger_of_a_part_of_the_training_is_not_read_from_a_checkpoint(tmp_path):
    training, path = Training().train(1), tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(path=path, module=training.model)
    content = torch.load(path, weights_only=True)
    noise, rate, count = content["privacy_accountant_state_dict"]["history"][0]
    content["privacy_accountant_state_dict"]["history"] = [(noise, rate, count + 1)]
    torch.save(content, path)
    with pytest.raises(AccountingError, match="does not cover the whole training"):
        ledger_in_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.ones(1)}, "with a recorded run"),
        (3, "with a recorded run"),
        ({CHECKPOINT_KEY: 5}, "with a recorded run"),
        ({CHECKPOINT_KEY: {"version": 1}}, "checksum"),
    ],
)
def test_other_archives_have_no_ledger(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        ledger_in_checkpoint(tmp_path / "other.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4damaged")
    with pytest.raises(ValueError, match="damaged"):
        ledger_in_checkpoint(tmp_path / "damaged.pt")


# -------------------------------------------------- files that no engine has saved so
def without(name):
    return lambda content: {k: v for k, v in content.items() if k != name}


def having(name, value):
    return lambda content: {**content, name: value}


def having_history(history):
    state = {"history": history, "mechanism": "rdp"}
    return having("privacy_accountant_state_dict", state)


NO_CHECKPOINTS = {
    "list": (lambda content: [1, 2], "got a list in"),
    "tensor": (lambda content: torch.zeros(3), "got a Tensor in"),
    "numbered": (lambda content: {1: 2}, "with the complete entries module_state"),
    "weights": (lambda content: content["module_state_dict"], "Load weights alone by"),
    "no_accountant": (without("privacy_accountant_state_dict"), "privacy_accountant"),
    "weights_list": (having("module_state_dict", [1]), "entries module_state"),
    "optimizer_list": (having("optimizer_state_dict", [1]), "optimizer_state_dict"),
    "optimizer_keys": (having("optimizer_state_dict", {"a": 1}), "optimizer_state"),
    "history_text": (having_history("abc"), "entries privacy_accountant"),
    "history_nan": (having_history([(float("nan"), 0.2, 8)]), "privacy_accountant"),
    "history_negative": (having_history([(1.0, 0.2, -8)]), "privacy_accountant"),
    "other_optimizer": (
        having("optimizer_state_dict", {"state": {}, "param_groups": []}),
        "different number of parameter groups",
    ),
    "other_model": (having("module_state_dict", {}), "which has no weights"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The content of a checkpoint after two epochs."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    run = Training().train(2)
    run.engine.save_checkpoint(path=path, module=run.model, optimizer=run.optimizer)
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_of_another_file_nothing_is_loaded(tmp_path, saved, name, safe):
    edit, match = NO_CHECKPOINTS[name]
    if not safe and name.startswith("history"):
        return  # Opacus takes any history
    path = tmp_path / "other.pt"
    torch.save(edit(saved), path)
    run = Training(seed=1)
    before = {n: value.clone() for n, value in run.model.state_dict().items()}
    errors = (ValueError, RuntimeError) if safe else (Exception,)
    with pytest.raises(errors, match=match if safe else None):
        run.engine.load_checkpoint(
            path=path,
            module=run.model,
            optimizer=run.optimizer,
            torch_load_kwargs=None if safe else {"weights_only": False},
        )
    after = run.model.state_dict()
    assert all(torch.equal(value, after[n]) for n, value in before.items())
    assert not run.engine.accountant.history and not run.optimizer.state
    assert run.train(1).engine.ledger.mechanism.num_steps == 4


def test_a_damaged_record_names_the_file(tmp_path, saved):
    path = tmp_path / "damaged.pt"
    content = copy.deepcopy(saved)
    content[CHECKPOINT_KEY]["checksum"] = "0" * 64
    torch.save(content, path)
    run = Training(seed=1)
    where = f"saved state in {path} does not match its checksum"
    with pytest.raises(ValueError, match=where):
        run.engine.load_checkpoint(
            path=path, module=run.model, optimizer=run.optimizer, restore_rng=True
        )


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize(
    "history", [[], [(1.0, 0.25, 3)], [(1.0, 0.25, 30)], [(9.0, 0.25, 8)]]
)
def test_a_history_that_was_changed_is_named_as_the_cause(tmp_path, saved, history):
    path = tmp_path / "edited.pt"
    torch.save(having_history(history)(saved), path)
    run = Training(seed=1)
    run.engine.load_checkpoint(path=path, module=run.model, optimizer=run.optimizer)
    with pytest.raises(AccountingError, match="history in the checkpoint .* edited"):
        _ = run.engine.ledger
    with pytest.warns(UserWarning, match="is not the one that was saved together"):
        run.engine.get_epsilon(1e-3)


def test_a_checkpoint_is_recognised_where_a_ledger_is_expected(tmp_path):
    training, path = Training().train(1), tmp_path / "privacy_engine.pt"
    training.engine.save_checkpoint(path=path, module=torch.nn.Identity())
    with pytest.raises(ValueError, match="file of torch.save.*ledger_in_checkpoint"):
        GradNormLedger.load(path)
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="truncated, or another kind of file"):
        GradNormLedger.load(tmp_path / "other")
    fresh = Training()
    with pytest.raises(ValueError, match="module must be torch.nn.Identity.. for"):
        fresh.engine.load_checkpoint(path=path, module=fresh.model)
    fresh.engine.load_checkpoint(path=path, module=torch.nn.Identity())
    assert fresh.engine.ledger.mechanism == training.engine.ledger.mechanism
