"""What is whole is verified; what was edited is not; the exit code says so."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from opacus_pi.evaluation import OracleCache, UnlearningTrace
from opacus_pi.unlearning.deletion_record import DeletionRecord


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
    DeletionRecord(path).append("request", {"id": "a", "indices": [1]})


KINDS = {
    "opacus_pi.Oracle": oracle,
    "opacus_pi.UnlearningTrace": trace,
    "opacus_pi.GradNormLedger": ledger,
    "deletion record": record,
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
    if kind.endswith(("Oracle", "Ledger")):
        place = len(content) - 3
    path.write_bytes(
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    )
    code, out, err = run("verify", path)
    assert code == 1 and err == "" and out.startswith("NOT VERIFIED: ")
    path.write_bytes(content[: len(content) // 2])
    code, out, err = run("verify", path, "--json")
    assert code == 1 and json.loads(out)["verified"] is False


def test_the_head_of_a_record(run, tmp_path):
    path = tmp_path / "deletions.jsonl"
    kept = DeletionRecord(path).append("request", {"id": "a", "indices": [1]})["hash"]
    assert run("verify", path, kept)[0] == 0
    DeletionRecord(path).append("request", {"id": "b", "indices": [2]})
    code, out, _ = run("verify", path, kept)
    assert code == 1 and "head" in out
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[1])
    assert run("verify", path)[0] == 1


def test_what_is_none_of_ours(run, tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    code, out, _ = run("verify", tmp_path / "w.safetensors")
    assert code == 1 and "no checksum of ours" in out
    (tmp_path / "empty").write_bytes(b"")
    code, out, _ = run("verify", tmp_path / "empty")
    assert code == 1 and "empty" in out
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    assert run("verify", tmp_path / "noise")[0] == 1


def test_bad_arguments(run, tmp_path):
    code, _, err = run("verify", tmp_path / "nothing")
    assert code == 2 and "FILE: no such file" in err
    code, _, err = run("verify", tmp_path)
    assert code == 2 and "FILE: " in err
    code, _, err = run("verify", "ledger.safetensors", "abc")
    assert code == 2 and "HEAD: only a deletion record has one" in err
    trace(tmp_path / "trace.json", None)
    code, _, err = run("verify", tmp_path / "trace.json", "abc")
    assert code == 2 and "HEAD: only a deletion record has one" in err
