"""A result of unlearning is saved and read back, whole or not at all."""

import json
import stat

import pytest
import safetensors.torch
import torch
from torch.utils.data import TensorDataset

from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.report import write_report
from opacus_pi.unlearning import (
    DeletionRequests,
    Unlearner,
    load_result,
    save_result,
)

SIZE = 20


@pytest.fixture
def result(tmp_path):
    torch.manual_seed(0)
    data_set = TensorDataset(torch.randn(SIZE, 4), torch.arange(SIZE) % 2)
    requests = DeletionRequests(tmp_path / "deletions.db", SIZE)
    requests.submit("a", indices=[3, 7])
    model = torch.nn.Linear(4, 2)
    unlearner = Unlearner(model, criterion=torch.nn.CrossEntropyLoss())
    (found,) = requests.process(
        *(unlearner, data_set),
        num_epochs=1,
        evaluation_of=lambda rows: lambda model: {"forget_loss": float(len(rows))},
    )
    return found


def test_a_result_of_requests_is_reported_later(result, tmp_path):
    place = tmp_path / "kept" / "a"
    save_result(place, result)
    loaded = load_result(str(place))
    assert loaded.trace == result.trace and loaded.guarantee == result.guarantee
    assert loaded.record["requests"] == ["a"] and loaded.record["not_checked"] == []
    assert result.record.items() <= loaded.record.items()
    assert "[3, 7]" not in repr(loaded)
    weights = safetensors.torch.load_file(place / "weights.safetensors")
    for name, value in result.model.state_dict().items():
        assert torch.equal(weights[name], value)
    for path in place.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    mechanism = NoisySGD(30, 0.1, 2.0, 1.0)
    ledger = GradNormLedger(mechanism, [30], [torch.rand(SIZE).tolist()])
    facts = write_report(tmp_path / "r.html", ledger=ledger, result=loaded)
    assert facts["unlearning"]["forget_set"]["size"] == 2


def test_results_are_never_overwritten_and_edits_are_found(result, tmp_path):
    save_result(tmp_path / "a", result)
    with pytest.raises(FileExistsError, match="exists already"):
        save_result(tmp_path / "a", result)
    with pytest.raises(ValueError, match="delta must be in"):
        save_result(tmp_path / "b", result, delta=0)
    assert not (tmp_path / "b").exists()
    trace = tmp_path / "a" / "trace.json"
    kept = trace.read_bytes()
    type(result.trace)([0, 1], {"forget_loss": [2.0, 0.0]}).save(trace)
    with pytest.raises(ValueError, match=r"trace.json is not the file that record"):
        load_result(tmp_path / "a")
    trace.write_bytes(kept)
    record = tmp_path / "a" / "record.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "forget_indices": [4]}))
    with pytest.raises(ValueError, match=r"record.json .*checksum"):
        load_result(tmp_path / "a")
    record.unlink()  # as after a process that was killed while it saved
    with pytest.raises(FileNotFoundError):
        load_result(tmp_path / "a")
