"""No writer of the package replaces a file of another kind, however it is named."""

import os
import secrets
import sqlite3

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opacus_pi import PrivacyEngine
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import write_weights
from opacus_pi.recording.state_file import write_state
from opacus_pi.report import write_report
from opacus_pi.unlearning import DeletionLog, export_log, verify_export
from opacus_pi.unlearning.deletion_log import verify


def ledger():
    mechanism = NoisySGD(num_steps=10, sample_rate=0.1, noise_std=1.0)
    return GradNormLedger(mechanism, [10], np.ones((1, 5), np.float32))


def new_log(path):
    log = DeletionLog(path)
    log.append("request", {"indices": [3]}, name="2026-001")
    return log


def trace():
    return UnlearningTrace(unit="epochs")


def checkpoint(path):
    engine, model = PrivacyEngine(), nn.Linear(2, 2)
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.zeros(4, 2)), batch_size=2
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)


def export(path):
    export_log(new_log(path.parent / f"{secrets.token_hex(4)}.db"), path)


WRITERS = {
    "ledger": lambda path: ledger().save(path),
    "trace": lambda path: trace().save(path),
    "weights": lambda path: write_weights(
        path, UNLEARNED_WEIGHTS, nn.Linear(2, 2).state_dict(), {}
    ),
    "state": lambda path: write_state(path, {"num_steps": 1}),
    "checkpoint": checkpoint,
    "export": export,
}
OTHERS = {
    "log": new_log,
    "database": lambda path: sqlite3.connect(path).execute("CREATE TABLE t (a)"),
    "key": lambda path: path.write_text(secrets.token_hex(32) + "\n"),
    "log of lines": lambda path: path.write_text('{"body": {}, "hash": "0"}\n'),
    "program": lambda path: path.write_text("import torch\n"),
    "arrays": lambda path: np.save(open(path, "wb"), np.arange(9)),
    "model": lambda path: save_file({"a": torch.ones(2)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_of_another_kind_stays_as_it_is(tmp_path, writer):
    makers = {**OTHERS, **WRITERS}
    for name, make in makers.items():
        path = tmp_path / f"{name}.file"
        make(path)
        before = path.read_bytes()
        is_text_by_text = writer in ("trace", "export") and name == "program"
        if name == writer or is_text_by_text:
            WRITERS[writer](path)  # of its own kind, or a text by a text
            continue
        with pytest.raises(ValueError, match="path must be new or hold .*another name"):
            WRITERS[writer](path)
        assert path.read_bytes() == before, name
    left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert not left


def test_an_export_never_replaces_its_own_log(tmp_path):
    log = new_log(tmp_path / "deletions.db")
    os.symlink(log.path, tmp_path / "link.json")
    os.link(log.path, tmp_path / "hard.json")
    inside = tmp_path / "folder"
    inside.mkdir()
    places = [log.path, tmp_path / "link.json", tmp_path / "hard.json"]
    places.append(inside / ".." / "deletions.db")
    for place in places:
        with pytest.raises(ValueError, match="got a deletion log"):
            export_log(log, place)
    assert verify(log.path, log.head).num_entries == 1
    export_log(log, tmp_path / "export.json")
    export_log(log, tmp_path / "export.json")  # replaces an export
    assert verify_export(tmp_path / "export.json").num_entries == 1


def test_a_report_checks_both_of_its_files_before_it_writes_one(tmp_path):
    trace().save(tmp_path / "run.json")
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match="got the trace of an unlearning run"):
        write_report(tmp_path / "run.html", ledger=ledger())
    assert (tmp_path / "run.json").read_bytes() == before
    assert not (tmp_path / "run.html").exists()


def test_empty_files_and_texts_are_replaced(tmp_path):
    path = tmp_path / "a"
    path.touch()
    ledger().save(path)
    text = tmp_path / "b"
    text.write_text("é" * 40_000)  # a character is cut where reading stops
    replace_file(text, b"new")
    assert text.read_bytes() == b"new"


def test_a_checkpoint_replaces_saved_weights_as_in_opacus(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    checkpoint(path)
    assert "privacy_accountant_state_dict" in torch.load(path, weights_only=True)
