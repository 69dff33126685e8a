"""Truncated, flipped, foreign, of another version or data set: refused, everywhere."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi.accounting import GradNormLedger, NoisySGD, fingerprint
from opacus_pi.recording import AccountingError, gram_ledger
from opacus_pi.recording.weights import save_weights
from opacus_pi.unlearning.requests import DeletionRequests
from tests.fuzz import originals
from tests.fuzz.campaign import CLEAR
from tests.fuzz.mutations import edited_log
from tests.fuzz.targets import Refused, targets
from tests.private_training import Training

pytestmark = [
    pytest.mark.filterwarnings("ignore:This run has no ledger"),
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]
TARGETS = targets()
FORMATS = list(TARGETS)


def refused(target, path, content):
    path.write_bytes(content)
    try:
        answer = target.read(path)
    except Refused:
        return True
    except ValueError as error:
        return CLEAR.match(str(error)) is not None
    return "prefix" if target.equal(answer) else False


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_anywhere(tmp_path, name):
    target = TARGETS[name]
    content = target.original
    step = max(1, len(content) // 23)
    for end in [*range(0, len(content), step), len(content) - 1]:
        (tmp_path / str(end)).mkdir(exist_ok=True)
        path = tmp_path / str(end) / target.name
        found = refused(target, path, content[:end])
        whole_lines = name == "json lines"  # a prefix of such a log is a log
        assert found is True or (whole_lines and found == "prefix"), end


@pytest.mark.parametrize("name", FORMATS)
def test_of_another_version(tmp_path, name):
    """The version of every format is looked at before anything else."""
    target = TARGETS[name]
    if name in ("json lines", "filter"):
        pytest.skip("each line, or charge, is checked by itself")
    if name == "deletions":
        content = edited_log(target.original, "PRAGMA user_version = 9")
    elif name.startswith("checkpoint"):
        state = torch.load(io.BytesIO(target.original), weights_only=True)
        content = originals.as_file({**state, "version": 9})
    else:
        content = target.original
        for version in (b"1", b"2", b"3"):
            stored = b'"version":"' + version + b'"'
            content = content.replace(stored, b'"version":"9"')
        content = content.replace(b'"version": 1', b'"version": 9')
    assert content != target.original
    path = tmp_path / target.name
    path.write_bytes(content)
    with pytest.raises((ValueError, Refused), match="version|release|again"):
        target.read(path)


# ------------------------------------------------------------------ other data sets


def test_a_ledger_of_another_data_set():
    run = originals.ledger()
    with pytest.raises(ValueError, match="must be the ledger's data set, digits"):
        run.require_data_set("other")


def weights_and_run(directory, data_set):
    """Weights of one row, and the ledger of a run on the toy data."""
    save_weights(directory, 20, originals.net().state_dict(), data_set)
    mechanism = NoisySGD(20, 0.5, noise_std=1.0, max_grad_norm=1.0)
    own = fingerprint(originals.DATA)
    return GradNormLedger(mechanism, [20], np.ones((1, 6)), data_set=own)


def grams(directory, run):
    model, criterion = originals.net(), nn.CrossEntropyLoss()
    return gram_ledger(directory, model, criterion, originals.DATA, [1, 2], run)


def test_weights_of_another_data_set_or_moment(tmp_path):
    run = weights_and_run(tmp_path, "another")
    with pytest.raises(
        ValueError, match="from a run on another data set .another, not"
    ):
        grams(tmp_path, run)
    run = weights_and_run(tmp_path, fingerprint(originals.DATA))
    assert grams(tmp_path, run).grams.shape == (1, 2, 2)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "weights-00000010.safetensors")
    shorter = GradNormLedger(run.mechanism, [10], run.grad_norms, data_set=run.data_set)
    with pytest.raises(
        ValueError, match="has the weights after 20 updates, but its name"
    ):
        grams(tmp_path, shorter)


def test_what_is_beside_the_weights_is_not_taken_for_them(tmp_path):
    run = weights_and_run(tmp_path, fingerprint(originals.DATA))
    (tmp_path / "weights-best.safetensors").write_text("mine")
    (tmp_path / ".weights-00000020.safetensors.17.tmp").write_text("half")
    assert grams(tmp_path, run).grams.shape == (1, 2, 2)


def test_a_deletion_log_of_another_data_set(tmp_path):
    originals.deletions(tmp_path / "deletions")
    with pytest.raises(ValueError, match="log belongs to another training set"):
        _ = DeletionRequests(tmp_path / "deletions", 3).pending


# ------------------------------------------------------------------ checkpoints


def checkpoint_with(change):
    """A checkpoint whose record was changed without its checksum."""
    training, file = Training(batch_size=12).train(1), io.BytesIO()
    training.engine.save_checkpoint(
        path=file, module=training.model, optimizer=training.optimizer
    )
    file.seek(0)
    content = torch.load(file, weights_only=False)
    change(content["opacus_pi"])
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def smaller(record):
    record["rows.grad_norms"][0, 0] = 0.125


def test_a_damaged_checkpoint_trains_on_without_a_ledger():
    again = Training(batch_size=12)
    file = checkpoint_with(smaller)
    again.engine.load_checkpoint(
        path=file, module=again.model, optimizer=again.optimizer
    )
    again.train(1)
    assert again.engine.get_epsilon(1e-3) > 0  # Opacus's part is Opacus's
    with pytest.raises(AccountingError, match="checksum.*edited or damaged"):
        _ = again.engine.ledger


def test_an_observed_record_has_no_measures_of_sweeps():
    state = Training(batch_size=12).train(1).engine.recorder.state_dict()
    again = Training(batch_size=12).engine.recorder
    state["rows.errors"] = state["rows.grad_norms"].clone()
    with pytest.raises(
        ValueError, match="rows.grad_norms.*measurements that this release"
    ):
        again.load_state_dict(state)


@pytest.mark.parametrize("change", [smaller, lambda record: record.clear()])
def test_a_damaged_checkpoint_is_not_resumed_exactly(change):
    again = Training(batch_size=12)
    file = checkpoint_with(change)
    with pytest.raises(ValueError, match="edited or damaged|no random states"):
        again.engine.load_checkpoint(
            path=file,
            module=again.model,
            optimizer=again.optimizer,
            restore_rng=True,
        )
