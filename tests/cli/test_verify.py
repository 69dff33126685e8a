"""Complete files are verified, edited ones are not; the exit code says so."""

import hashlib
import json
import os
import shutil
import tracemalloc
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import GramLedger, Guarantee, NoisySGD, PrivacyEngine
from opacus_pi.cli.errors import NOTHING_TO_CHECK
from opacus_pi.evaluation import OracleCache, UnlearningTrace
from opacus_pi.files.checksummed_state import with_checksum
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS, FileKind
from opacus_pi.files.weights_file import write_weights
from opacus_pi.integration.checkpoints import CHECKPOINT_KEY
from opacus_pi.recording.state_file import write_state
from opacus_pi.recording.weights import save_weights
from opacus_pi.unlearning.deletion_log import DeletionLog
from opacus_pi.unlearning.log_export import export_log
from tests.cli.conftest import DATA, MODEL
from tests.fuzz.mutations import edited_log
from tests.unlearning.test_deletion_log import leave_unfinished_write
from tests.unlearning.test_json_lines_log import OLD as OLD_LOG
from tests.unlearning.test_json_lines_log import chained


def oracle(path, project):
    cache = OracleCache(path.parent / "oracles")
    options = {"key": {}, "data_set": list(range(4)), "forget_indices": [1]}
    model = torch.nn.Linear(2, 2)
    cache.train(
        lambda retain, seed: model,
        seeds=[0],
        model_factory=lambda: torch.nn.Linear(2, 2),
        **options,
    )
    shutil.copy(cache.path(seed=0, **options), path)


def trace(path, project):
    UnlearningTrace([0, 1], {"forget_loss": [0.1, 0.2]}).save(path)


def ledger(path, project):
    shutil.copy(project / "ledger.safetensors", path)


def record(path, project):
    DeletionLog(path).append("request", {"indices": [1]}, name="a")


def recorded_weights(path, project):
    written = save_weights(
        path.parent / "weights", 3, torch.nn.Linear(2, 2).state_dict()
    )
    shutil.copy(written, path)


def unlearned_weights(path, project):
    state = torch.nn.Linear(2, 2).state_dict()
    write_weights(path, UNLEARNED_WEIGHTS, state, {"honoured": "[]"})


def gram_ledger(path, project):
    grams = np.stack([np.eye(2), 2 * np.eye(2)])
    mechanism = NoisySGD(10, sample_rate=0.5, noise_std=1.0)
    GramLedger(mechanism, [5, 10], grams).save(path)


def checkpoint(path, project):
    """What an engine saves; its record is made once and kept."""
    kept = project / "checkpoint.pt"
    if not kept.exists():
        model, engine = torch.nn.Linear(2, 2), PrivacyEngine()
        data = TensorDataset(torch.randn(8, 2), torch.randint(2, (8,)))
        private, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        engine.save_checkpoint(path=kept, module=private, optimizer=optimizer)
    shutil.copy(kept, path)


KINDS = {
    "opacus_pi.GramLedger": gram_ledger,
    "opacus_pi.RecordedWeights": recorded_weights,
    "opacus_pi.UnlearnedWeights": unlearned_weights,
    "ledger in a checkpoint": checkpoint,
    "opacus_pi.Oracle": oracle,
    "opacus_pi.UnlearningTrace": trace,
    "opacus_pi.GradNormLedger": ledger,
    "deletion log": record,
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_damaged(run, answer, project, tmp_path, kind):
    path = tmp_path / "file"
    KINDS[kind](path, project)
    found = answer("verify", path)
    assert found["verified"] is True and found["kind"] == kind
    assert f"verified: {kind}" in run("verify", path)[1]
    content = path.read_bytes()
    digits = [i for i, byte in enumerate(content) if byte in b"123456789"]
    place = digits[-1] if kind != "opacus_pi.UnlearningTrace" else digits[3]
    if kind.endswith(("Oracle", "Ledger", "Weights")):
        place = len(content) - 3
    if kind == "ledger in a checkpoint":
        place = content.index(b"opacus_pi") + 300
    path.write_bytes(
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    )
    code, out, err = run("verify", path)
    assert code == 1 and err == "" and out.startswith("NOT VERIFIED: ")
    path.write_bytes(content[: len(content) // 2])
    code, out, err = run("verify", path, "--json")
    assert code == 1 and json.loads(out)["verified"] is False


def test_a_saved_state_is_recognised(run, answer_of, tmp_path):
    state = {"num_steps": 3, "model": {"weight": torch.ones(40)}}
    path = tmp_path / "state-00000003.pt"
    write_state(path, state)
    code, found = answer_of(path)
    assert (code, found["kind"]) == (0, "saved state of a training")
    whole = path.read_bytes()
    ones = torch.ones(40).numpy().tobytes()
    for damaged in (whole.replace(ones, ones[:-4] + bytes(4)), whole[:-30]):
        assert damaged != whole
        path.write_bytes(damaged)
        code, found = answer_of(path)
        assert (code, found["kind"]) == (1, "saved state of a training")


def test_the_head_of_a_record(run, tmp_path):
    path = tmp_path / "deletions.db"
    kept = DeletionLog(path).append("request", {"indices": [1]}, name="a").hash
    assert run("verify", path, kept)[0] == 0
    DeletionLog(path).append("request", {"indices": [2]}, name="b")
    code, out, _ = run("verify", path, kept)
    assert code == 0 and "1 entry was added since HEAD" in out
    code, out, _ = run("verify", path, "f" * 64)
    assert code == 1 and "hash of one of the 2 entries" in out
    DeletionLog(path).redact(0)
    code, out, _ = run("verify", path, kept)
    assert code == 0 and out.endswith("since HEAD; 1 entry is redacted (number 0)\n")
    assert json.loads(run("verify", path, "--json")[1])["redacted"] == [0]
    path.write_bytes(
        edited_log(path.read_bytes(), "DELETE FROM entries WHERE number=0")
    )
    assert run("verify", path)[0] == 1


@pytest.mark.parametrize("kind", ["log", "export", "lines"])
def test_a_pasted_head_is_recognised_and_half_of_one_is_not(run, tmp_path, kind):
    path = tmp_path / kind
    if kind == "lines":
        path.write_bytes(OLD_LOG.read_bytes())
        head = json.loads(path.read_bytes().splitlines()[-1])["hash"]
    else:
        log = DeletionLog(tmp_path / "log")
        head = log.append("request", {"indices": [1]}, name="a").hash
        if kind == "export":
            export_log(log, path)
    for pasted in (head, head.upper(), f"  {head}\n", f"\t{head.title()} "):
        code, out, err = run("verify", path, pasted)
        assert (code, err) == (0, "") and "HEAD is the hash of the last entry" in out
    for wrong in (
        head[:-1],
        head + "0",
        "0x" + head[2:],
        "",
        f"{head[:8]}...{head[-4:]}",
    ):
        code, out, err = run("verify", path, wrong)
        assert code == 2 and not out and len(err.splitlines()) == 1
        assert f"HEAD: {wrong!r} is not a hash of 64 digits" in err
        assert "Copy the whole hash" in err


def test_a_log_of_json_lines(run, tmp_path):
    path = tmp_path / "deletions.jsonl"
    path.write_bytes(OLD_LOG.read_bytes())
    kept = json.loads(path.read_bytes().splitlines()[3])["hash"]
    code, out, _ = run("verify", path, kept)
    assert code == 0 and out.startswith("verified: deletion log of JSON lines, head ")
    assert "; 3 entries were added since HEAD" in out
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run("verify", path)
    assert code == 1 and "unlearning.import_log(old, new) imports the complete" in out


def test_a_log_of_json_lines_with_a_long_first_line(run, tmp_path):
    path = tmp_path / "deletions.jsonl"
    path.write_text(chained([("request", {"id": "a", "indices": [*range(200_000)]})]))
    code, out, _ = run("verify", path)
    assert code == 0 and "verified: deletion log of JSON lines" in out


FOREIGN = {
    "weights or other arrays (safetensors)": safetensors.torch.save(
        {"w": torch.zeros(1)}, {"format": "pt"}
    ),
    "an empty file": b"",
    "a page": b"<!doctype html><p>No report.",
    "a text": b"one\ntwo\n",
    "JSON": b'{"format": "theirs"}',
    "data of an unknown kind": bytes(range(256)),
    "an archive, or weights without a recorded run": b"PK\x03\x04 and more",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_programs_are_not_checked(run, answer_of, tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(FOREIGN[kind])
    code, found = answer_of(path)
    assert code == NOTHING_TO_CHECK and found["verified"] is None
    assert (found["kind"], found["reason"]) == (kind, "it is not an opacus_pi file")
    code, out, err = run("verify", path)
    assert (code, err) == (3, "") and out.startswith(f"NOT CHECKED: {path} is {kind}: ")


@pytest.fixture
def answer_of(run):
    """The exit code and the JSON about a file."""

    def go(path):
        code, out, err = run("verify", path, "--json")
        assert err == ""
        return code, json.loads(out)

    return go


def test_weights_of_torch_are_not_checked(answer_of):
    code, found = answer_of("wrapped.pt")
    assert code == 3 and found["kind"].startswith("an archive, or weights")


def test_our_files_without_a_checksum(run, answer_of, project, tmp_path):
    words = ("report", "--ledger", "ledger.safetensors", "--out", tmp_path / "r.html")
    assert run(*words)[0] == 0
    assert (
        run(
            "plan", "ledger.safetensors", "--forget", "3", "--out", tmp_path / "p.json"
        )[0]
        == 0
    )
    (tmp_path / "record.json").write_text('{"method": "x", "forget_indices": [1]}')
    for name, kind in {
        "r.html": "a report's page",
        "r.json": "the JSON of a report",
        "p.json": "an answer of opacus-pi",
        "record.json": "the record of an unlearning run",
    }.items():
        code, found = answer_of(tmp_path / name)
        assert (code, found["kind"]) == (NOTHING_TO_CHECK, kind)
        assert "no checksum" in found["reason"]


def test_a_guarantee_has_a_checksum(answer_of, tmp_path):
    path = tmp_path / "guarantee.json"
    whole = Guarantee("plain words", ()).to_json()
    path.write_text(whole)
    assert answer_of(path)[0] == 0 and answer_of(path)[1]["kind"] == "a guarantee"
    path.write_text(whole.replace("plain words", "other words"))
    code, found = answer_of(path)
    assert code == 1 and "The text was edited" in found["reason"]
    old = {**json.loads(whole), "format": "opacus_pi.Guarantee.v1"}
    path.write_text(json.dumps(old))
    code, found = answer_of(path)
    assert code == 3 and "no checksum" in found["reason"]


def test_a_trace_that_is_too_large_is_not_called_damaged(answer_of, tmp_path):
    path = tmp_path / "trace.json"
    UnlearningTrace([0.0], {"a": [1.0]}).save(path)
    os.truncate(path, (1 << 28) + 1)  # sparse: it takes no space on the disk
    code, found = answer_of(path)
    assert code == 3 and found["verified"] is None
    assert "a text or JSON is read up to 268435456 bytes" in found["reason"]


def test_a_lock_is_no_record_but_an_emptied_record_is_noticed(run, tmp_path):
    lock = tmp_path / "deletions.db.lock"
    lock.touch()
    assert run("verify", lock)[0] == 3
    kept = DeletionLog(tmp_path / "a").append("request", {}, name="a").hash
    code, out, _ = run("verify", lock, kept)
    assert code == 1 and "must be a deletion log, got" in out


def test_a_kind_of_a_newer_release(run, tmp_path):
    path = tmp_path / "new.safetensors"
    write_weights(path, FileKind("opacus_pi.Later", "a later kind"), {}, {})
    code, out, _ = run("verify", path)
    assert code == 1 and "a newer release wrote it" in out


def test_nothing_in_a_file_is_run(run, tmp_path, capsys):
    class Loud:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"opacus_pi": Loud()}, tmp_path / "loud.pt")
    code, out, _ = run("verify", tmp_path / "loud.pt")
    assert code == 3 and "ran" not in out.split() and "builtins.print" in out


@pytest.mark.parametrize("length", [9, 20, 60])
def test_a_file_that_ends_in_its_header_is_damaged(run, project, tmp_path, length):
    path = tmp_path / "ledger.safetensors"
    path.write_bytes((project / "ledger.safetensors").read_bytes()[:length])
    code, out, _ = run("verify", path)
    assert code == 1 and "is damaged: its header should have" in out
    assert f"the whole file has {length}." in out


def test_an_unfinished_write_names_the_command_that_takes_it_back(run, tmp_path):
    path = tmp_path / "deletions.db"
    record(path, None)
    leave_unfinished_write(path)
    code, out, _ = run("verify", path)
    assert code == 1 and "removes the unfinished part" in out


def test_bad_arguments(run, tmp_path):
    code, _, err = run("verify", tmp_path / "nothing")
    assert code == 2 and "FILE: no such file" in err
    code, _, err = run("verify", tmp_path)
    assert code == 2 and "is a directory. Name one file in it" in err
    code, _, err = run("verify", "ledger.safetensors", 64 * "a")
    assert code == 2 and "HEAD: only a deletion log has a head, but" in err
    trace(tmp_path / "trace.json", None)
    code, _, err = run("verify", tmp_path / "trace.json", 64 * "a")
    assert code == 2 and "HEAD: only a deletion log has a head" in err


# ------------------------------------------------------------------ bounded input


def test_a_pipe_is_not_waited_for(answer_of, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        code, found = answer_of(path)
        assert code == 3 and "save its content to a file" in found["reason"]


def test_a_small_archive_that_grows_is_not_unpacked(answer_of, tmp_path):
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28))
    tracemalloc.start()
    code, found = answer_of(tmp_path / "b.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 3 and peak < 1 << 25


def test_large_files_of_no_kind_are_not_read(answer_of, tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    assert answer_of(tmp_path / "sparse")[0] == 3
    with open(tmp_path / "old.jsonl", "wb") as file:
        file.write(b'{"body":')
        file.truncate(1 << 40)
    code, found = answer_of(tmp_path / "old.jsonl")
    assert code == 3 and "a text or JSON is read up to" in found["reason"]


def test_a_state_that_seems_larger_than_it_is(answer_of, tmp_path):
    """A tensor that repeats one number, and a text without end, are no state."""
    endless = "x"
    for _ in range(200):
        endless = [endless, endless]
    for value in (torch.zeros(1).expand(1 << 40), endless):
        state = {"version": 1, "a": value, "checksum": "0" * 64}
        torch.save({CHECKPOINT_KEY: state}, tmp_path / "state.pt")
        assert answer_of(tmp_path / "state.pt")[0] == 1


def test_a_good_checkpoint_with_the_users_own_objects_is_not_called_damaged(
    answer_of, tmp_path
):
    state = with_checksum({"version": 1})
    content = {CHECKPOINT_KEY: state, "mine": Fraction(1, 2)}
    torch.save(content, tmp_path / "own.pt")
    code, found = answer_of(tmp_path / "own.pt")
    assert code == 3 and found["kind"] == "ledger in a checkpoint"
    assert "fractions.Fraction" in found["reason"]


def test_the_hashes_of_weights_are_those_that_a_statement_names(answer, run, tmp_path):
    out = tmp_path / "run"
    words = ("--forget", "3", "--epochs", "1", "--ledger", "ledger.safetensors")
    answer("unlearn", *MODEL, *DATA[:2], *words, "--out", out)
    shown = answer("verify", out / "guarantee_to_show.json")["statement"]
    path = out / "weights.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "state.pt")
    named = json.loads((out / "guarantee_to_show.json").read_text())
    for file, code in ((path, 0), (tmp_path / "plain.safetensors", 3)):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found, text, _ = run("verify", file)
        assert found == code and f"\nSHA-256 of the file: {digest}\n" in text
        assert f"\nSHA-256 of its weights: {named['weights']}\n" in text
    code, text, _ = run("verify", tmp_path / "state.pt", "--json")
    assert code == 3 and json.loads(text)["weights"] == named["weights"]
    facts = answer("verify", path)
    assert named["weights_file"] == facts["weights_file"] and facts["weights"] in shown
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "SHA-256 of" not in run("verify", path)[1]
    assert "SHA-256 of" not in run("verify", "ledger.safetensors")[1]
