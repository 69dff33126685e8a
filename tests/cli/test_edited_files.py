"""An error about an edited file names the file, also among several."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from opacus_pi import GradNormLedger
from opacus_pi.integration.checkpoints import CHECKPOINT_KEY
from opacus_pi.ledger.custody import Custody, Link
from opacus_pi.unlearning import list_requests
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, LOG, MODEL
from tests.private_training import Training

LEDGER = "ledger.safetensors"
UNLEARN = ("unlearn", *MODEL, *DATA[:2], "--epochs", "1")


def edited(path, old, new):
    """Replace some bytes of a file by as many others."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def refused(run, *words):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.count("\n") == 1
    return err


def test_the_ledger_of_another_training_among_several(run, ledger, tmp_path):
    second, third = tmp_path / "second.safetensors", tmp_path / "third.safetensors"
    other = replace(ledger, grad_norms=ledger.grad_norms / 2)
    other.save(second)
    replace(ledger, data_set="another").save(third)
    for command in (("score",), ("plan", "--forget", "3")):
        err = refused(run, command[0], LEDGER, second, third, *command[1:])
        assert f"data_set, but {third} differs from {LEDGER}" in err
    place = ("--out", tmp_path / "run", "--log", tmp_path / "log.db")
    words = (*UNLEARN, "--forget", "3", *place, "--ledger", LEDGER)
    assert f"--ledger {third}: --data must be the" in refused(run, *words, third)
    louder = replace(ledger.mechanism, noise_std=2 * ledger.mechanism.noise_std)
    replace(other, mechanism=louder).save(third)
    err = refused(run, *words, third)
    assert f"mechanism, but {third} differs from {LEDGER}" in err
    assert {p.name for p in tmp_path.iterdir()} == {second.name, third.name}


def test_the_ledger_with_a_broken_link_among_several(run, ledger, tmp_path):
    broken = tmp_path / "broken.safetensors"
    chain = Custody((Link("draw", "broken", "A batch was used twice."),))
    norms = ledger.grad_norms / 2
    replace(ledger, grad_norms=norms, custody=chain).save(broken)
    for command in (("score",), ("plan", "--forget", "3")):
        err = refused(run, command[0], LEDGER, broken, *command[1:])
        assert f"LEDGER {broken}: " in err and "A batch was used twice" in err


def test_an_edited_guarantee(run, tmp_path):
    out = tmp_path / "run"
    assert run(*UNLEARN, "--forget", "3", "--out", out)[0] == 0
    path = out / "guarantee.json"
    edited(path, b'"met": true', b'"met": 1   ')
    code, text, _ = run("verify", path)
    assert code == 1 and "guarantee.json: " in text
    words = ("report", out, "--ledger", LEDGER, "--out", tmp_path / "page.html")
    assert "guarantee.json: " in refused(run, *words)


def test_an_edited_checkpoint(run, tmp_path):
    training, path = Training().train(2), tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(path=path, module=training.model)
    content = torch.load(path, weights_only=False)
    state = content[CHECKPOINT_KEY]
    content[CHECKPOINT_KEY] = {**state, "checksum": "0" * 64}
    torch.save(content, path)
    code, text, _ = run("verify", path)
    assert code == 1 and "checkpoint.pt does not match its checksum" in text
    assert str(path) in refused(run, "score", LEDGER, path)


def test_an_empty_file_of_ids(run, tmp_path):
    (tmp_path / "ids.txt").write_text("\n")
    err = refused(run, "plan", LEDGER, "--forget", tmp_path / "ids.txt")
    assert "ids.txt does not hold whole numbers" in err


@pytest.fixture
def edited_index(tmp_path):
    """A log in whose index of names one name was edited; its entries are whole."""
    log = tmp_path / "deletions.db"
    DeletionRequests(log, 120).submit("name-of-a-request", indices=[3])
    content = bytearray(log.read_bytes())
    places = [i for i in range(len(content)) if content[i:].startswith(b"name-of-a-")]
    assert len(places) == 2  # the entry and the index
    for place in places:
        changed = content.copy()
        changed[place] ^= 1
        log.write_bytes(changed)
        try:
            list_requests(log)
        except ValueError:
            continue
        return log
    raise AssertionError("no index was found")


def test_a_log_with_an_edited_index_gets_no_entry(run, edited_index, tmp_path):
    before = edited_index.read_bytes()
    name = ("--request-id", "name-of-a-request")
    place = (*LOG, edited_index, "--out", tmp_path / "run")
    err = refused(run, *UNLEARN, "--forget", "3", *name, *place)
    assert "--log: " in err and "deletions.db" in err and "It is damaged" in err
    for action, more in (
        ("submit", ("--forget", "3", *name)),
        ("list", ()),
        ("export", ("--out", tmp_path / "x.json")),
        ("redact", name),
    ):
        err = refused(run, "log", action, edited_index, *more)
        assert "LOG: " in err and "deletions.db" in err and "It is damaged" in err
    assert edited_index.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"deletions.db"}


FILES = ["weights.safetensors", "record.json", "trace.json", "guarantee.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["empty", "half", "one byte", "a text"])
def test_the_files_of_a_run(run, finished, tmp_path, name, how):
    if not finished.exists():
        assert run(*UNLEARN, "--forget", "3", "--out", finished)[0] == 0
    folder = shutil.copytree(finished, tmp_path / "run")
    content = bytearray((folder / name).read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    damaged = {"empty": b"", "half": content[:middle], "a text": b"hello\n"}
    (folder / name).write_bytes(damaged.get(how, content))
    words = ("report", folder, "--ledger", LEDGER, "--out", tmp_path / "page.html")
    assert name in refused(run, *words)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("how", ["empty", "half", "one byte", "a text"])
def test_one_of_two_ledgers(run, project, tmp_path, how):
    content = bytearray((project / LEDGER).read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    damaged = {"empty": b"", "half": content[:middle], "a text": b"hello\n"}
    path = tmp_path / "second.safetensors"
    path.write_bytes(damaged.get(how, content))
    assert str(path) in refused(run, "score", LEDGER, path)
    with pytest.raises(ValueError, match=r"second\.safetensors"):
        GradNormLedger.load(path)
    owners = tmp_path / "owners.json"
    owners.write_text(json.dumps({"p03": [3]})[:-3])
    assert str(owners) in refused(run, "score", LEDGER, "--owners", owners)
