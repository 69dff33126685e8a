"""Evaluation on the command line is the library's, oracles beside it."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import Subset, TensorDataset

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.sets import require_unseen
from opacus_pi.evaluation import OracleCache, evaluate
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, LOG, MODEL

EVALUATE = ("evaluate", *MODEL, *DATA, "--forget", "3,17,40")


def test_metrics_are_the_librarys(answer, project):
    found = answer(*EVALUATE)
    import cli_project

    model = cli_project.build()
    model.load_state_dict(safetensors.torch.load_file(project / "model.safetensors"))
    train = cli_project.train_set()
    expected = evaluate(
        model,
        torch.nn.CrossEntropyLoss(),
        forget=Subset(train, [3, 17, 40]),
        retain=Subset(train, [i for i in range(120) if i not in (3, 17, 40)]),
        test=cli_project.test_set,
    )
    for name in ("unlearning_accuracy", "test_accuracy", "forget_loss"):
        assert found["metrics"][name] == expected[name]
    assert set(found["metrics"]) == set(expected)
    assert found["oracle"] is None and found["barriers"] is None
    assert (found["num_forget"], found["num_retain"], found["num_test"]) == (3, 80, 80)


@pytest.mark.parametrize(
    ("oracles", "message"),
    [
        (("wrapped.pt",), "wrapped.pt holds the same weights as --weights model.safe"),
        (("retrained.pt", "retrained.pt"), "retrained.pt holds the same weights as re"),
    ],
)
def test_no_model_is_judged_beside_itself(run, oracles, message):
    code, out, err = run(*EVALUATE, "--oracle", *oracles)
    assert (code, out) == (2, "") and f"--oracle: {message}" in err


def test_the_training_set_is_no_test_set(run, tmp_path):
    words = ("--forget", "3", "--data", "cli_project:train_set", "--test")
    out = (*LOG, tmp_path / "record", "--out", tmp_path / "run")
    for command in (("evaluate",), ("unlearn", *out)):
        code, _, err = run(*command, *MODEL, *words, "cli_project:train_set")
        assert code == 2 and "--test: this is the training set of --data" in err
    assert list(tmp_path.iterdir()) == []


def test_a_test_set_may_have_the_labels_of_the_training_set():
    labels = torch.arange(4)
    one, other = (TensorDataset(torch.full((4, 2), x), labels) for x in (1.0, 2.0))
    require_unseen(one, other)
    require_unseen([(1, 2)], [(1, 2)])  # nothing names them
    with pytest.raises(BadInput, match="test examples must be unseen"):
        require_unseen(one, TensorDataset(*one.tensors))


@pytest.mark.parametrize(
    "places", [range(300), range(299, -1, -1), range(100, 160), [5] * 20, [3]]
)
def test_training_examples_are_no_test_set(places):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 4, generator=generator)
    train = TensorDataset(x, torch.zeros(300))
    copies = [(row, 1) for row in x[list(places)].clone()]
    with pytest.raises(BadInput, match=r"--test: about 100 %|this is the training"):
        require_unseen(train, copies)


def test_a_part_of_training_in_a_test_set_is_said():
    generator = torch.Generator().manual_seed(0)
    x, fresh = torch.rand(2, 300, 4, generator=generator)
    train = TensorDataset(x, torch.zeros(300))
    require_unseen(train, TensorDataset(fresh, torch.zeros(300)))
    mixed = TensorDataset(torch.cat([fresh[:90], x[5:15]]), torch.zeros(100))
    with pytest.warns(UserWarning, match="about 10 % .*10 of the 100"):
        require_unseen(train, mixed)


def test_inputs_that_are_equal_by_chance_are_no_evidence():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (400, 5), generator=generator)
    require_unseen(
        TensorDataset(bits[:300], torch.zeros(300)),
        TensorDataset(bits[300:], torch.zeros(100)),
    )


def test_copies_in_a_large_training_set_are_found():
    x = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    train = TensorDataset(x, torch.zeros(40_000))
    with pytest.raises(BadInput, match="--test: about"):
        require_unseen(train, TensorDataset(x.flip(0)[:5000], torch.zeros(5000)))


def test_matching_undoes_a_permutation(answer):
    oracle = ("--oracle", "permuted.pt")
    plain = answer(*EVALUATE, *oracle)["barriers"]
    matched = answer(*EVALUATE, *oracle, "--match")["barriers"]
    assert plain["to_oracles"][0] > 0.01 and plain["matched"] is False
    assert matched["to_oracles"][0] < 1e-6 and matched["matched"] is True


def test_text_and_file(run, tmp_path):
    path = tmp_path / "evaluation.json"
    code, out, err = run(*EVALUATE, "--oracle", "retrained.pt", "--out", path)
    assert (code, err) == (0, "") and "retrained (1)" in out and "Loss barriers" in out
    found = json.loads(path.read_text())
    assert found["barriers"]["to_oracles"][0] >= 0
    assert np.isfinite(found["oracle"]["forget_loss"]).all()
    assert "can only be judged beside those of retrained models" in run(*EVALUATE)[1]


def test_errors(run):
    code, _, err = run(*EVALUATE, "--oracle", "nothing.pt")
    assert code == 2 and "--weights" not in err
    assert "--oracle: no such file: nothing.pt" in err
    code, _, err = run(*EVALUATE, "--criterion", "cli_project:number")
    assert code == 2 and "--criterion: cli_project:number is of type int" in err


def oracle_without(directory, forget):
    import cli_project

    model = cli_project.build()
    for tensor in model.state_dict().values():
        tensor.mul_(1 + len(forget) / 100)  # trained elsewhere
    cache, about = OracleCache(directory), {"key": {}, "forget_indices": forget}
    about |= {"data_set": cli_project.train_set()}
    cache.train(
        lambda retain, seed: model,
        **about,
        seeds=[1],
        model_factory=cli_project.build,
    )
    return cache.path(**about, seed=1)


def test_oracles_of_other_people_are_refused(run, tmp_path):
    other = oracle_without(tmp_path, [5, 6])
    code, out, err = run(*EVALUATE, "--oracle", other)
    assert (code, out) == (2, "")
    assert "was retrained without other examples than this forget set" in err


def test_an_oracle_without_the_examples_of_all_requests_is_named(run, tmp_path):
    log = tmp_path / "deletions.db"
    DeletionRequests(log, 120).submit("other", indices=[5, 6])
    every = oracle_without(tmp_path, [3, 5, 6, 17, 40])
    code, _, err = run(*EVALUATE, "--log", log, "--oracle", every)
    assert code == 2 and "without 2 other examples, too: those of the other" in err
    assert "all requests (5) with --forget" in err


def test_oracles_add_up_and_those_without_facts_are_named(run, answer, tmp_path):
    own = oracle_without(tmp_path, [40, 3, 17])
    both = ("--oracle", own, "--oracle", "retrained.pt")
    found = answer(*EVALUATE, *both)
    assert len(found["oracle"]["forget_loss"]) == 2
    assert found["oracles_not_checked"] == ["retrained.pt"]
    assert "Not checked: whether these models" in run(*EVALUATE, *both)[1]
    assert "Not checked" not in run(*EVALUATE, "--oracle", own)[1]


def test_a_forgotten_set_after_the_data_of_another_were_erased(run, answer, tmp_path):
    log, common = tmp_path / "deletions.db", (*MODEL, "--epochs", "1", *LOG)
    for ids in ("3,4", "7"):
        answer("unlearn", *common, log, *DATA, "--forget", ids, "--out", tmp_path / ids)
    weights = ("--model", "cli_project:build", "--weights", f"{log}.safetensors")
    whole = answer("evaluate", *weights, *DATA, "--forget", "7", "--log", log)
    assert whole["num_retain"] == 80
    left = [word.replace("train_set", "with_blanks") for word in DATA]
    found = answer("evaluate", *weights, *left, "--forget", "7", "--log", log)
    assert found["metrics"] == whole["metrics"]
    words = ("evaluate", *weights, *left, "--log", log, "--forget")
    code, _, err = run(*words, "3,4")
    assert code == 2 and "--forget: all of these examples may have been erased" in err
    code, _, err = run("evaluate", *weights, *DATA, "--forget", "7", "--log", "no.db")
    assert code == 2 and "--log: no such file" in err
