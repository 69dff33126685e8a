"""Unlearning from the command line: the library's run, whole files or none."""

import errno
import json
import stat
import sys
from functools import partial

import pytest
import safetensors.torch
import torch

from opacus_pi import Guarantee, Langevin, Unlearner
from opacus_pi.cli import unlearn
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.unlearning.deletion_log import verify
from opacus_pi.unlearning.log_lock import locked
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, LOG, MODEL

FILES = {
    "weights.safetensors",
    "record.json",
    "trace.json",
    "guarantee.json",
    "guarantee_to_show.json",
}
SHORT = ("--epochs", "2", "--learning-rate", "0.05")
NOISY = ("--method", "langevin", "--set", "noise_std=0.02")
UNLEARN = ("unlearn", *MODEL, *DATA, *SHORT, "--forget")


def test_weights_are_the_librarys(run, project, tmp_path, ledger):
    out = tmp_path / "run"
    words = ("3", *NOISY, "--seed", "4", "--ledger", "ledger.safetensors", "--out", out)
    code, text, err = run(*UNLEARN, *words)
    assert (code, err) == (0, "") and "Certified if the declarations" in text
    import cli_project

    model = cli_project.build()
    model.load_state_dict(safetensors.torch.load_file(project / "model.safetensors"))
    unlearner = Unlearner(
        model,
        criterion=torch.nn.CrossEntropyLoss(),
        method=Langevin(0.02),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        ledger=ledger,
        generator=torch.Generator().manual_seed(4),
    )
    result = unlearner.unlearn(cli_project.train_set(), [3], num_epochs=2)
    found = safetensors.torch.load_file(out / "weights.safetensors")
    for name, value in result.model.state_dict().items():
        assert torch.equal(found[name], value)
    guarantee = Guarantee.from_json((out / "guarantee.json").read_text())
    assert guarantee == result.guarantee and guarantee.kind == "certified if"


def test_noise_is_new_in_every_run_without_a_seed(answer, tmp_path):
    weights = []
    for name, more in (
        ("a", ()),
        ("b", ()),
        ("c", ("--seed", "4")),
        ("d", ("--seed", 4)),
    ):
        answer(*UNLEARN, "3", *NOISY, *more, "--out", tmp_path / name)
        found = safetensors.torch.load_file(tmp_path / name / "weights.safetensors")
        weights.append(torch.cat([w.flatten() for w in found.values()]))
    one, other, seeded, repeated = weights
    assert torch.equal(seeded, repeated)
    assert not any(torch.equal(one, w) for w in (other, seeded))


def test_what_is_left(answer, tmp_path):
    out = tmp_path / "run"
    found = answer(*UNLEARN, "3,17", "--out", out)
    assert {path.name for path in out.iterdir()} == FILES
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    trace = UnlearningTrace.load(out / "trace.json")
    assert trace.times == [0, 1, 2] and "membership_inference" in trace.metrics
    assert found["after"]["forget_loss"] == trace["forget_loss"][-1]
    record = json.loads((out / "record.json").read_text())
    assert record["forget_indices"] == [3, 17] and record["num_epochs"] == 2
    assert found["guarantee"]["kind"] == "empirical" and found["carried_out"] is True


def test_wrapped_weights_are_the_same_weights(run, tmp_path):
    words = ("--forget", "3", *SHORT, "--data", "cli_project:train_set", "--out")
    for weights in ("model.safetensors", "wrapped.pt"):
        model = ("--model", "cli_project:one_model", "--weights", weights)
        assert (
            run("unlearn", *model, *words, tmp_path / weights[:5], "--seed", 0)[0] == 0
        )
    a, b = (
        safetensors.torch.load_file(tmp_path / name / "weights.safetensors")
        for name in ("model", "wrapp")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_requests_are_recorded_and_go_on_from_each_other(run, answer, tmp_path):
    log = tmp_path / "deletions.db"
    first = answer(*UNLEARN, "3", *LOG, log, "--out", tmp_path / "a")
    assert verify(log).head == first["head"]
    second = answer(
        *UNLEARN, "5", *LOG, log, "--request-id", "x", "--out", tmp_path / "b"
    )
    assert second["request_id"] == "x" and verify(log).head == second["head"]
    facts = json.loads((tmp_path / "b" / "record.json").read_text())
    assert facts["forgotten_before"] == [3] and facts["forget_indices"] == [5]
    kept = safetensors.torch.load_file(second["weights"])
    new = safetensors.torch.load_file(tmp_path / "b" / "weights.safetensors")
    assert all(torch.equal(kept[name], new[name]) for name in new)
    again = answer(*UNLEARN, "3", *LOG, log, "--out", tmp_path / "c")
    assert again["carried_out"] is False
    facts = json.loads((tmp_path / "c" / "record.json").read_text())
    assert facts["requests"] == [first["request_id"], "x"]
    assert again["head"] == second["head"]
    words = (*UNLEARN, "6", *LOG, log, "--request-id", "x", "--out")
    code, _, err = run(*words, tmp_path / "d")
    assert code == 2 and "--request-id 'x' was submitted before" in err


def test_written_weights_can_be_checked(run, answer, tmp_path):
    answer(*UNLEARN, "3", "--out", tmp_path / "run")
    path = tmp_path / "run" / "weights.safetensors"
    code, out, _ = run("verify", path)
    assert code == 0 and out.startswith("verified: opacus_pi.UnlearnedWeights\n")
    model = ("--model", "cli_project:build", "--weights", path)
    assert run("evaluate", *model, *DATA, "--forget", "3")[0] == 0
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    code, out, _ = run("verify", path)
    assert code == 1 and "match its checksum" in out


def test_what_was_pending_is_carried_out_and_said(run, answer, tmp_path):
    log = tmp_path / "deletions.db"
    DeletionRequests(log, 120).submit("before", indices=[5, 6])
    words = (*UNLEARN, "3", *LOG, log, "--out", tmp_path / "a")
    code, out, err = run(*words, "--request-id", "new")
    assert (code, err) == (0, "")
    assert out.startswith("Forgot 3 examples by FineTune")
    assert "Request before was still pending in the log: its examples were" in out
    assert "is a new log" not in out
    facts = json.loads((tmp_path / "a" / "record.json").read_text())
    assert facts["forget_indices"] == [3, 5, 6] and facts["forgotten_before"] == []
    left = safetensors.torch.load_file(tmp_path / "a" / "weights.safetensors")
    honouring = safetensors.torch.load_file(f"{log}.safetensors")
    assert all(torch.equal(left[name], value) for name, value in honouring.items())
    DeletionRequests(log, 120).submit("later", indices=[7])
    again = answer(
        *(*UNLEARN, "3", *LOG, log, "--request-id", "new"),
        *(*NOISY, "--out", tmp_path / "b"),
    )
    assert again["carried_out"] is False
    facts = json.loads((tmp_path / "b" / "record.json").read_text())
    assert facts["requests"] == ["new", "later"]
    (also,) = again["also_carried_out"]
    assert also["request_ids"] == ["later"] and also["num_forget"] == 1
    assert also["method"].startswith("Langevin") and also["num_steps"] > 0


@pytest.mark.parametrize("method", [(), NOISY])
def test_metrics_are_of_all_examples_that_were_forgotten(
    answer, tmp_path, project, method
):
    """As ``evaluate`` measures them on the examples that the run forgot."""
    log, out = tmp_path / "deletions.db", tmp_path / "a"
    DeletionRequests(log, 120).submit("before", indices=[5, 6, 8])
    unlearned = answer(*UNLEARN, "3,9", *method, *LOG, log, "--out", out)
    model = ("evaluate", "--model", "cli_project:build", *DATA, "--forget", "3,5,6,8,9")
    places = {"before": project / "model.safetensors"}
    places["after"] = out / "weights.safetensors"
    trace = UnlearningTrace.load(out / "trace.json").metrics
    for when, place in places.items():
        found = answer(*model, "--weights", place)["metrics"]
        assert unlearned[when] == pytest.approx(found)
        moment = 0 if when == "before" else -1
        assert {name: values[moment] for name, values in trace.items()} == (
            unlearned[when]
        )


def leftovers(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_interrupted_nothing_is_left(run, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Unlearner, "unlearn", interrupted)
    code, out, err = run(*UNLEARN, "3", "--out", tmp_path / "run")
    assert (code, out, err) == (130, "", "opacus-pi unlearn: interrupted\n")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("120",), "--forget must be in [0, 120), got 120"),
        (("3", "--device", "nowhere"), "--device: nowhere cannot be used here"),
        (("3", "--learning-rate", "-1"), "--learning-rate, --momentum: Invalid"),
        (("3", "--method", "langevin"), "--set: langevin needs noise_std"),
        (("3", "--method", "magic"), "argument --method: invalid choice"),
        (("3", "--request-id", "x"), "--request-id: there is no log"),
        (("3", "--ledger", "none.safetensors"), "--ledger none.safetensors: no such"),
        (("3", *LOG, "cli_project.py"), "path must be a deletion log, got"),
        (("3", *LOG, "ledger.safetensors"), "path must be a deletion log, got"),
        (("3", "--weights", "retrained.py"), "--weights: retrained.py is not"),
        (("3", "--weights", "ledger.safetensors"), "is a ledger of gradient norms"),
        (("3", "--model", "cli_project:build_wider"), "does not fit the model"),
        (
            ("3", "--data", "cli_project:other_set", "--ledger", "ledger.safetensors"),
            "--data must be the ledger's data set, TensorDataset:120",
        ),
    ],
)
def test_errors_leave_nothing(run, tmp_path, words, message):
    code, out, err = run(*UNLEARN, *words, "--out", tmp_path / "run")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert leftovers(tmp_path) == []


def test_a_full_disk_after_the_run_loses_nothing(run, answer, tmp_path, monkeypatch):
    words = (*UNLEARN, "3", *LOG, tmp_path / "d.db", "--request-id", "x")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(unlearn, "save_result", full)
        code, out, err = run(*words, "--out", tmp_path / "a")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "The request was carried out, and nothing is lost" in err
    assert "with another --out" in err and not (tmp_path / "a").exists()
    found = answer(*words, "--out", tmp_path / "b")
    assert found["done_before"] == ["x"]
    shown = json.loads((tmp_path / "b" / "guarantee_to_show.json").read_text())
    assert shown["requests"] == ["x"] and (tmp_path / "b" / "record.json").exists()


def test_a_second_command_at_once_enters_nothing(run, answer, tmp_path):
    log = tmp_path / "d.db"
    answer("log", "submit", log, *DATA[:2], "--forget", "3")
    head = verify(log).head
    with locked(log):
        words = ("5", *LOG, log, "--out", tmp_path / "a")
        code, out, err = run(*UNLEARN, *words)
    assert (code, out) == (1, "") and "another process is carrying out requests" in err
    assert "repeat this. Nothing was entered." in err and "--traceback" not in err
    assert verify(log).head == head


def test_the_metrics_say_on_what_they_are(run, answer, tmp_path):
    words = (*UNLEARN, "3,5")
    out = run(*words, "--out", tmp_path / "a")[1]
    found = answer(*words, "--out", tmp_path / "b")
    number = found["num_retain_evaluated"]
    assert 0 < number <= 118
    assert f"Metrics of the retain set are of {number} examples, drawn at r" in out
    assert "with random augmentation, if these have any" in out


def test_results_are_never_overwritten(run, tmp_path):
    (tmp_path / "precious").write_text("")
    code, _, err = run(*UNLEARN, "3", "--out", tmp_path)
    assert code == 2 and "--out:" in err and "never overwritten" in err
    assert leftovers(tmp_path) == ["precious"]


def test_pickles_are_not_run(run, project, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "run_by_pickle"), "w"))

    torch.save({"0.weight": Bomb()}, tmp_path / "bomb.pt")
    words = ("--weights", tmp_path / "bomb.pt", "--out", tmp_path / "run")
    code, _, err = run(*UNLEARN, "3", *words)
    assert code == 2 and "is not a readable file of tensors" in err
    assert leftovers(tmp_path) == ["bomb.pt"]


def test_a_log_of_another_model_gets_no_request(run, tmp_path):
    log = (*LOG, tmp_path / "log.db", "--epochs", 1)
    words = ("unlearn", *MODEL[:2], *DATA[:2], *log)
    one = ("--weights", "model.safetensors", "--forget", "3", "--out", tmp_path / "a")
    assert run(*words, *one)[0] == 0
    before = (tmp_path / "log.db").read_bytes()
    other = ("--weights", "retrained.pt", "--forget", "5", "--out", tmp_path / "b")
    code, _, err = run(*words, *other)
    assert code == 2 and "the log is of another model" in err
    assert (tmp_path / "log.db").read_bytes() == before


def test_a_test_set_that_does_not_fit_the_model_gets_no_request(run, tmp_path):
    (tmp_path / "wrong_set.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "wrong = TensorDataset(torch.rand(50, 9), torch.arange(50) % 10)\n",
        encoding="utf-8",
    )
    log = (*LOG, tmp_path / "log.db", "--epochs", 1, "--out", tmp_path / "a")
    words = ("unlearn", *MODEL, *DATA[:2], *log, "--forget", "3")
    sys.path.append(str(tmp_path))
    try:
        code, _, err = run(*words, "--test", "wrong_set:wrong")
    finally:
        sys.path.remove(str(tmp_path))
    assert code == 2 and "--test" in err and "shapes" in err
    assert not (tmp_path / "log.db").exists()


@pytest.mark.parametrize("data", ["without_erased", "with_blanks"])
def test_requests_after_the_data_of_others_were_erased(run, answer, tmp_path, data):
    log, ledger = tmp_path / "deletions.db", ("--ledger", "ledger.safetensors")
    answer(*UNLEARN, "3,4", "--log", log, *ledger, "--out", tmp_path / "a")
    words = [*UNLEARN]
    words[words.index("cli_project:train_set")] = f"cli_project:{data}"
    code, out, err = run(*words, "7", "--log", log, *ledger, "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    assert out.startswith("2 forgotten examples may have been erased from the data set")
    assert (
        "except for 2 examples that were forgotten before and may have been erased"
        in out
    )
    facts = json.loads((tmp_path / "b" / "record.json").read_text())
    assert facts["forgotten_before"] == [3, 4] and facts["forget_indices"] == [7]
    again = answer(*words, "3,8", *LOG, log, "--out", tmp_path / "c")
    assert again["num_erased"] == 2 and again["carried_out"] is True
    head = verify(log).head
    words[words.index(f"cli_project:{data}")] = "cli_project:other_set"
    code, _, err = run(*words, "9", *LOG, log, "--out", tmp_path / "d")
    assert code == 2 and "--data: The data set has 120 examples" in err
    assert "without exactly the examples that were forgotten" in err
    assert verify(log).head == head and not (tmp_path / "d").exists()


def test_a_request_for_erased_examples_costs_nothing(answer, tmp_path):
    log = tmp_path / "deletions.db"
    answer(*UNLEARN, "3,4", *LOG, log, "--out", tmp_path / "a")
    words = [w.replace("train_set", "without_erased") for w in UNLEARN]
    name = ("--request-id", "again")
    found = answer(*words, "4", *LOG, log, *name, "--out", tmp_path / "b")
    assert found["carried_out"] is False and found["forgotten_before"] == ["again"]
