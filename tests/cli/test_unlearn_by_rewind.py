"""Rewinds from the command line: planned, exact, by policy, as requests of a log."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader

from opacus_pi import GradNormLedger, PrivacyEngine, Recorder, Unlearner
from opacus_pi.accounting import DeletionPolicy
from opacus_pi.recording import Checkpoints
from opacus_pi.unlearning import exported_entries
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, LOG

POLICY = DeletionPolicy(1000.0, 1e-5)


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """A directory with weights, ledger and states of one training."""
    import cli_project

    folder = tmp_path_factory.mktemp("rewinds")
    torch.manual_seed(0)
    model = cli_project.build()
    states = Checkpoints(folder / "states", every=1, deletion_policy=POLICY)
    engine = PrivacyEngine(recorder=Recorder(checkpoints=states))
    prepared, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        data_loader=DataLoader(cli_project.train_set(), batch_size=20),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(prepared(x), y).backward()
        optimizer.step()
    states.flush()
    engine.ledger.save(folder / "ledger.safetensors")
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder, states.record.first_updates()


def words(folder, *more):
    return (
        *("unlearn", "--model", "cli_project:build", *DATA),
        *("--weights", folder / "model.safetensors"),
        *("--checkpoints", folder / "states", *more),
    )


def test_an_exact_rewind(answer, trained, tmp_path):
    folder, first = trained
    example = int(first.argmin())
    ledger = ("--ledger", folder / "ledger.safetensors")
    found = answer(
        *words(folder, *ledger, "--forget", example, "--out", tmp_path / "run")
    )
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["method"] == "exact rewind" and record["start"] == 0
    assert found["num_steps"] == record["num_steps"] == 6
    assert found["epsilon"] == 0 and found["guarantee"]["kind"] == "certified if"
    before, after = (
        safetensors.torch.load_file(path / name)
        for path, name in (
            (folder, "model.safetensors"),
            (tmp_path / "run", "weights.safetensors"),
        )
    )
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_metrics_of_a_rewind_are_of_all_examples_that_were_forgotten(
    answer, trained, tmp_path
):
    folder, first = trained
    later, example = map(int, first.argsort()[[-40, 0]])
    log, out = tmp_path / "deletions.db", tmp_path / "run"
    DeletionRequests(log, 120).submit("before", indices=[later])
    made = answer(
        *words(folder, "--ledger", folder / "ledger.safetensors"),
        *("--forget", example, "--log", log, "--out", out),
    )
    found = answer(
        *("evaluate", "--model", "cli_project:build", *DATA),
        *("--weights", out / "weights.safetensors", "--forget", f"{example},{later}"),
    )
    assert made["after"] == pytest.approx(found["metrics"])


def test_requests_by_policy(answer, trained, tmp_path):
    folder, first = trained
    ledger = ("--ledger", folder / "ledger.safetensors")
    log = tmp_path / "deletions.db"
    for name, example in zip("ab", first.argsort()[:2].tolist(), strict=True):
        found = answer(
            *words(folder, *ledger, "--policy", "--log", log, "--forget", example),
            *("--request-id", name, "--out", tmp_path / name),
        )
        assert found["num_steps"] == 0 and found["epsilon"] <= POLICY.epsilon
    requests = DeletionRequests(log, 120)
    assert requests.pending == []
    runs = [e.payload["run"] for e in requests.log.entries() if e.kind == "done"]
    assert [run["method"] for run in runs] == ["filtered rewind"] * 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "needs the ledger"),
        (("--method", "finetune"), "no unlearning method"),
        (("--ledger", "ledger.safetensors", "--checkpoints", "none"), "--checkpoints"),
        (("--ledger", "ledger.safetensors"), "of the ledger's run"),
    ],
)
def test_what_cannot_be_rewound_leaves_nothing(run, trained, tmp_path, more, message):
    folder, _ = trained
    log = ("--log", tmp_path / "deletions.db")
    code, text, err = run(
        *words(folder, "--forget", "3", "--out", tmp_path / "run", *more, *log)
    )
    assert (code, text) == (2, "") and message in err
    assert not [*tmp_path.iterdir()]


def test_a_policy_without_states_is_refused(run, trained, tmp_path):
    folder, _ = trained
    head = words(folder)[:-2]
    code, _, err = run(*head, "--policy", "--forget", "3", "--out", tmp_path / "run")
    assert code == 2 and "--checkpoints DIR" in err


def planned(folder, *more):
    states = ("--checkpoints", folder / "states")
    return ("plan", folder / "ledger.safetensors", *states, *more)


ARCHITECTURE = ("--model", "cli_project:build")


@pytest.mark.parametrize("by_policy", [False, True])
def test_a_planned_rewind_is_the_one_that_is_run(
    answer, run, trained, tmp_path, by_policy
):
    folder, first = trained
    example, policy = int(first.argmin()), ("--policy",) * by_policy
    words_of_plan = (*planned(folder, *ARCHITECTURE, *policy), "--forget", example)
    found = answer(*words_of_plan)["rewind"]
    out = tmp_path / "run"
    ledger = ("--ledger", folder / "ledger.safetensors")
    made = answer(*words(folder, *ledger, *policy), "--forget", example, "--out", out)
    record = json.loads((out / "record.json").read_text())
    assert found["method"] == record["method"] and found["start"] == record["start"]
    assert found["num_updates"] == made["num_steps"] and found["epsilon"] <= 1000
    assert found["policy"] == record["policy"]
    assert found["guarantee"]["kind"] == made["guarantee"]["kind"] == "certified if"
    assert found["cost"] == (0 if by_policy else 1)
    _, text, _ = run(*words_of_plan)
    assert text.index("By a rewind: ") < text.index("By unlearning steps instead")
    assert "depends on the unlearning method. Name it (--method finetune" in text


def test_a_plan_without_states_has_no_rewind(answer, trained):
    folder, _ = trained
    found = answer("plan", folder / "ledger.safetensors", "--forget", "3")
    assert found["rewind"] is None


def test_what_cannot_be_planned_is_refused(run, trained, tmp_path):
    folder, _ = trained
    everything = ",".join(map(str, range(120)))
    other = tmp_path / "empty"
    other.mkdir()
    for arguments, message in (
        ((*planned(folder), "--forget", "3"), "--checkpoints: the guarantee .*--model"),
        (
            (*planned(folder, *ARCHITECTURE), "--forget", everything),
            "at least one example",
        ),
        (("plan", folder / "ledger.safetensors", "--policy", "--forget", "3"), "Add"),
        (
            (*planned(folder, *ARCHITECTURE)[:3], other, *ARCHITECTURE, "--forget", 3),
            "--checkpoints: .*Pass the directory of a run",
        ),
        (
            ("plan", "ledger.safetensors", *planned(folder, *ARCHITECTURE)[2:])
            + ("--forget", "3"),
            "of the ledger's run",
        ),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert re.search(message, err), err


def test_a_request_by_policy_does_not_weaken_an_exact_one(answer, trained, tmp_path):
    folder, first = trained
    a, b = first.argsort()[:2].tolist()
    log, ledger = tmp_path / "d.db", ("--ledger", folder / "ledger.safetensors")
    head = (*words(folder, *ledger), "--log", log)
    answer(*head, "--forget", a, "--out", tmp_path / "a")
    states = planned(folder, *ARCHITECTURE, "--policy", "--log", log)
    plan = answer(*states, "--forget", b)["rewind"]
    made = answer(*head, "--policy", "--forget", b, "--out", tmp_path / "b")
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    assert record["start"] == plan["start"] < first[a]
    assert "stay exactly forgotten" in json.dumps(made["guarantee"])


def test_other_weights_are_not_kept_and_nothing_is_entered(
    run, answer, trained, tmp_path
):
    folder, first = trained
    example, log = int(first.argmin()), ("--log", tmp_path / "d.db")
    head = [*words(folder, "--ledger", folder / "ledger.safetensors")]
    head[head.index(folder / "model.safetensors")] = "retrained.pt"
    for place in (("--out", tmp_path / "a"), (*log, "--out", tmp_path / "a")):
        code, out, err = run(*head, "--policy", "--forget", example, *place)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "--weights: retrained.pt does not hold what" in err
        assert str(folder / "states") in err
    assert not [*tmp_path.iterdir()]
    # An exact rewind starts from a saved state, whatever the weights are.
    more = ("--forget", example, *log, "--out", tmp_path / "a", "--json")
    code, out, err = run(*head, *more)
    assert code == 0 and err.count("\n") == 1
    assert "The weights of this model are not those that the recorded" in err
    found = json.loads(out)
    assert found["epsilon"] == 0 and found["num_steps"] == 6
    # Metrics of weights that were not used would describe no model of this training.
    assert found["before"] == {} and found["after"].keys() >= {"test_accuracy"}
    code, out, _ = run(*head, "--forget", example, "--out", tmp_path / "b")
    assert code == 0 and "before" not in out.split("certified")[0].split("\n\n")[1]
    more = ("--ledger", folder / "ledger.safetensors", "--out", tmp_path / "r.html")
    code, _, err = run("report", tmp_path / "b", *more)
    assert code == 0
    facts = json.loads((tmp_path / "r.json").read_text())
    assert {m["before"] for m in facts["unlearning"]["metrics"]} == {None}


def test_fine_tuned_weights_of_the_log_are_not_kept(run, answer, trained, tmp_path):
    folder, first = trained
    a, b = first.argsort()[:2].tolist()
    log, ledger = ("--log", tmp_path / "d.db"), folder / "ledger.safetensors"
    head = (*words(folder, "--ledger", ledger), *log)
    model = ("--model", "cli_project:build", "--weights", folder / "model.safetensors")
    fine_tuned = ("unlearn", *model, *DATA, *LOG, log[1], "--epochs", 1, "--forget", a)
    answer(*fine_tuned, "--out", tmp_path / "a")
    before = (tmp_path / "d.db").read_bytes()
    code, _, err = run(*head, "--policy", "--forget", b, "--out", tmp_path / "b")
    assert code == 2 and "--log: the weights beside" in err
    assert "Leave out --policy: an exact rewind starts from a saved state" in err
    assert (tmp_path / "d.db").read_bytes() == before


@pytest.fixture(scope="module")
def sequence(trained, tmp_path_factory):
    """A log whose requests were carried out by a rewind, two fine-tunings, a rewind."""
    import cli_project

    folder, first = trained
    path = tmp_path_factory.mktemp("sequence") / "deletions.db"
    model = cli_project.build()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for name, example in zip("abcd", first.argsort()[:4].tolist(), strict=True):
        model.load_state_dict(weights)
        unlearner = Unlearner(
            model,
            criterion=torch.nn.CrossEntropyLoss(),
            ledger=GradNormLedger.load(folder / "ledger.safetensors"),
        )
        requests = DeletionRequests(path, 120)
        requests.submit(name, indices=[example])
        exact = {"checkpoints": folder / "states"}
        options = exact if name in "ad" else {"num_epochs": 1}
        requests.process(unlearner, cli_project.train_set(), **options)
        if name in "cd":
            shutil.copytree(path.parent, path.parent.with_name(f"after_{name}"))
    return {name: path.parent.with_name(f"after_{name}") / path.name for name in "cd"}


def test_the_list_says_what_followed_a_rewind(run, answer, sequence):
    log = sequence["c"]
    code, out, _ = run("log", "list", log, "--request-id", "a")
    assert code == 0 and "Run of entry 2: exact rewind, 6 updates. " in out
    assert "ε = 0 at δ" in out and "ε ≤ 0 " not in out
    last = (
        "Run of entry 8, after 1 other since: FineTune(), 2 updates, on weights of "
        "earlier runs (exact rewind, FineTune()). Guarantee: empirical; no ε is "
        "claimed. But the examples of this request stay exactly forgotten"
    )
    assert last in out
    for name in "bc":
        code, out, _ = run("log", "list", log, "--request-id", name)
        assert "no ε is claimed" in out and "stay exactly forgotten" not in out
    found = answer("log", "list", sequence["d"], "--request-id", "a")["guarantees"]
    assert [one["entry"] for one in found] == [2, 11]
    assert [one["epsilon"] for one in found] == [0, 0]


def test_the_plan_says_what_the_weights_went_through(answer, trained, sequence):
    folder, first = trained
    words = ("plan", folder / "ledger.safetensors", *ARCHITECTURE)
    for name, runs, exact in (
        ("c", [["exact rewind", 1], ["FineTune()", 2]], 1),
        ("d", [["exact rewind", 1]], 4),
    ):
        log = ("--log", sequence[name])
        found = answer(*words, *log, "--forget", int(first.argsort()[9]))
        assert (found["earlier_runs"], found["num_forgotten_exactly"]) == (runs, exact)


def test_an_auditor_may_see_the_last_run(run, answer, sequence, tmp_path):
    """It carried out another request, whose examples stay withheld."""
    out = ("--out", tmp_path / "x.json")
    words = ("log", "export", sequence["d"], "--disclose", "a")
    assert answer(*words, *out)["disclosed"] == [0, 2]
    assert answer(*words, "--last-run", *out)["disclosed"] == [0, 2, 11]
    shown = exported_entries(tmp_path / "x.json")[11].payload
    assert shown["run"]["method"] == "exact rewind" and shown["epsilon"] == 0
    assert "indices" not in json.dumps(shown)
    empty = DeletionRequests(tmp_path / "empty.db", 120).log.path
    code, _, err = run("log", "export", empty, "--last-run", *out)
    assert code == 2 and err.startswith("opacus-pi log export: --last-run: no request")


def test_a_plan_is_refused_where_the_rewind_would_be(run, trained, sequence):
    folder, first = trained
    example = ("--forget", int(first.argmin()))
    for model in ("cli_project:build_wider",):
        for more in ((), ("--policy",)):
            code, out, err = run(*planned(folder, "--model", model, *more), *example)
            assert (code, out) == (2, "") and "are not those of the saved state" in err
    other = ("--forget", int(first.argsort()[9]))
    by_policy = (*planned(folder, *ARCHITECTURE, "--policy"), *other)
    assert run(*by_policy)[0] == 0
    fine_tuned = DeletionRequests(folder / "tuned.db", 120)
    fine_tuned.submit("x", indices=[int(first.argsort()[8])])
    import cli_project

    model = cli_project.build()
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    unlearner = Unlearner(model, criterion=torch.nn.CrossEntropyLoss())
    fine_tuned.process(unlearner, cli_project.train_set(), num_epochs=1)
    code, out, err = run(*by_policy, "--log", folder / "tuned.db")
    assert (code, out) == (2, "") and "Leave out --policy: an exact rewind" in err
