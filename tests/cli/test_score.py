"""Scores on the command line are the library's."""

import csv
import json
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch

from opacus_pi.accounting import NoisySGD, epsilons, privacy_losses, worst_case_loss
from opacus_pi.cli.output import write_csv
from opacus_pi.difficulty.forget_sets import ranking
from tests.cli.conftest import owners_file
from tests.private_training import Training

LEDGER = "ledger.safetensors"


def test_numbers_are_the_librarys(answer, ledger):
    found = answer("score", LEDGER, "--order", 4, "--delta", 1e-4, "--top", 3)
    losses = privacy_losses(ledger, 4.0)
    each = found["per_example"]
    assert each["ids"] == list(range(120))
    np.testing.assert_array_equal(each["losses"], losses)
    np.testing.assert_array_equal(each["epsilons"], epsilons(ledger, 1e-4))
    assert found["worst_case_loss"] == worst_case_loss(ledger.mechanism, 4.0)
    assert found["worst_case_epsilon"] >= max(each["epsilons"])
    hardest = [row["id"] for row in found["hardest"]]
    assert len(hardest) == 3 and set(losses[hardest]) == set(np.sort(losses)[-3:])
    assert found["quantiles"]["loss"][0] == losses.min()
    assert found["quantiles"]["loss"][-1] == losses.max()
    assert [s["name"] for s in found["strata"]] == ["first", "q1", "q2", "q3", "last"]
    assert found["ranking_only"] is False and "Sensitive" in found["sensitive"]


def test_json_in_a_file_is_for_the_owner_only(run, tmp_path):
    path = tmp_path / "scores.json"
    code, out, err = run("score", LEDGER, "--out", path)
    assert (code, err) == (0, "")
    assert json.loads(path.read_text())["format"] == "opacus_pi.cli.score.v1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert out.startswith("Sensitive") and "Worst case (bound for any example)" in out


def test_a_spreadsheet_has_a_line_for_each_example(run, ledger, tmp_path):
    path = tmp_path / "scores.csv"
    assert run("score", LEDGER, "--csv", path)[0] == 0
    header, *lines = csv.reader(path.read_text().splitlines())
    assert header == ["example", "loss", "epsilon", "limit"]
    ids, losses, found, _ = np.array(lines, dtype=float).T
    assert ids.tolist() == list(range(120))
    np.testing.assert_array_equal(losses, privacy_losses(ledger, 8.0))
    np.testing.assert_array_equal(found, epsilons(ledger, 1e-5))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run("score", LEDGER, "--sigma", 3, "--csv", path)[0] == 0
    assert path.read_text().startswith("example,loss\n")


def test_a_spreadsheet_has_the_upper_limits_of_the_answer(
    run, answer, ledger, tmp_path
):
    path = tmp_path / "scores.csv"
    found = answer("score", LEDGER, "--top", 120, "--csv", path)
    limits = {row["id"]: row["limit"] for row in found["hardest"]}
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert {int(line["example"]): float(line["limit"]) for line in lines} == limits
    assert any(float(line["limit"]) > float(line["epsilon"]) for line in lines)
    for name, other in (
        ("swept", [replace(ledger, source="swept")]),  # needs no limits
        ("two", [ledger, replace(ledger, grad_norms=ledger.grad_norms / 2)]),
    ):
        files = [tmp_path / f"{name}{i}.safetensors" for i, _ in enumerate(other)]
        for file, one in zip(files, other, strict=True):
            one.save(file)
        assert run("score", *files, "--csv", path)[0] == 0
        assert path.read_text().startswith("example,loss,epsilon\n")


def test_an_example_without_a_limit_has_an_empty_cell(tmp_path):
    columns = {"example": np.arange(2), "limit": np.array([np.nan, 0.5])}
    write_csv(str(tmp_path / "a.csv"), columns)
    assert (tmp_path / "a.csv").read_text() == "example,limit\n0,\n1,0.5\n"


def test_an_assumed_noise_gives_a_ranking_and_no_epsilon(run, answer, ledger):
    found = answer("score", LEDGER, "--sigma", 3)
    assert found["ranking_only"] is True
    assert found["per_example"]["epsilons"] is None
    assert found["worst_case_epsilon"] == found["worst_case_loss"] == "inf"
    np.testing.assert_array_equal(
        found["per_example"]["losses"], privacy_losses(ledger.with_noise_std(3), 8.0)
    )
    assert "guarantee nothing" in run("score", LEDGER, "--sigma", 3)[1]


def test_without_noise_the_remedy_is_sigma(run, ledger, tmp_path):
    facts = ledger.mechanism
    silent = NoisySGD(facts.num_steps, facts.sample_rate, 0.0)
    replace(ledger, mechanism=silent).save(tmp_path / "sgd.safetensors")
    code, out, err = run("score", tmp_path / "sgd.safetensors")
    assert code == 2 and out == "" and "added no noise" in err and "--sigma 1" in err
    assert run("score", tmp_path / "sgd.safetensors", "--sigma", 1)[0] == 0


def test_several_runs_are_averaged(answer, ledger, tmp_path):
    second = replace(ledger, grad_norms=ledger.grad_norms[:, ::-1] / 2)
    second.save(tmp_path / "second.safetensors")
    found = answer("score", LEDGER, tmp_path / "second.safetensors")
    expected = privacy_losses([ledger, second], 8.0)
    np.testing.assert_array_equal(found["per_example"]["losses"], expected)
    assert found["training"]["num_runs"] == 2


def test_a_run_is_averaged_once(run, ledger, tmp_path):
    ledger.save(tmp_path / "copy.safetensors")
    code, out, err = run("score", LEDGER, tmp_path / "copy.safetensors")
    assert code == 2 and out == ""
    assert f"copy.safetensors has the same norms as {LEDGER}" in err


def test_a_tolerance_rounds_up(answer):
    exact, rounded = (
        np.array(answer("score", LEDGER, *words)["per_example"]["losses"])
        for words in ((), ("--tolerance", "0.01"))
    )
    assert (rounded >= exact).all() and (rounded <= 1.01 * exact).all()
    assert (rounded != exact).any()


def test_runs_of_different_trainings_are_refused(run, ledger, tmp_path):
    replace(ledger, data_set="another").save(tmp_path / "other.safetensors")
    code, _, err = run("score", LEDGER, tmp_path / "other.safetensors")
    assert code == 2 and "the same data_set" in err


def test_ids_are_positions_in_the_data_set(answer, ledger, tmp_path):
    ledger.subset([50, 7, 99]).save(tmp_path / "part.safetensors")
    found = answer("score", tmp_path / "part.safetensors")
    assert found["per_example"]["ids"] == [50, 7, 99]
    assert {row["id"] for row in found["hardest"]} == {50, 7, 99}


def test_ties_are_said(run, answer, ledger, tmp_path):
    norms = np.full_like(ledger.grad_norms, 0.5)
    norms[:, :37] = 100.0  # clipped
    replace(ledger, grad_norms=norms).save(tmp_path / "tied.safetensors")
    found = answer("score", tmp_path / "tied.safetensors", "--top", 5)
    assert (found["num_at_top"], found["num_at_bound"]) == (37, 37)
    hardest = [row["id"] for row in found["hardest"]]
    assert hardest == ranking(found["per_example"]["losses"])[::-1][:5].tolist()
    assert set(hardest) < set(range(37)) and hardest != [0, 1, 2, 3, 4]
    out = run("score", tmp_path / "tied.safetensors")[1]
    assert (
        "37 examples share the largest loss, which equals the worst case: the " in out
    )
    words = ("score", tmp_path / "tied.safetensors", "--sigma", 1)
    assert "37 examples share the largest loss: the loss cannot" in run(*words)[1]
    clipped = "37 of them had gradients at or above the clip norm at every update"
    assert clipped in out and clipped in run(*words)[1] and "was cut" not in out
    ledger.subset([0]).save(tmp_path / "single.safetensors")
    assert "share" not in run("score", tmp_path / "single.safetensors")[1]


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_ledgers(answer, ledger, tmp_path, size):
    ledger.subset(range(size)).save(tmp_path / "tiny.safetensors")
    found = answer("score", tmp_path / "tiny.safetensors")
    assert found["num_examples"] == size and len(found["strata"]) == 5 * (size > 1)


def test_a_checkpoint_is_as_good_as_its_ledger(answer, run, tmp_path):
    training, path = Training().train(2), tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(path=path, module=training.model)
    training.engine.ledger.save(tmp_path / "ledger")
    from_ledger = answer("score", tmp_path / "ledger")
    assert answer("score", path) == from_ledger
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.pt")
    code, _, err = run("score", tmp_path / "weights.pt")
    assert code == 2 and "must be a checkpoint with a recorded run" in err


def test_equal_losses_are_ordered_by_epsilon_and_equal_lines_are_one(
    run, answer, ledger, tmp_path
):
    norms = np.full_like(ledger.grad_norms, 0.5)
    norms[:, :9] = 100.0  # clipped in every update
    norms[:, 4:9] = 0.93 * ledger.mechanism.max_grad_norm
    replace(ledger, grad_norms=norms, source="swept").save(tmp_path / "l.safetensors")
    words = ("score", tmp_path / "l.safetensors", "--order", 8, "--top", 9)
    found = answer(*words)
    assert found["num_at_top"] == 9  # larger estimates were cut to the worst case
    assert {row["id"] for row in found["hardest"][:4]} == {0, 1, 2, 3}
    own = [row["epsilon"] for row in found["hardest"]]
    assert own == sorted(own, reverse=True) and own[3] > own[4] * 1.001
    ids = [row["id"] for row in found["hardest"]]
    out = run(*words)[1]
    assert "here they are ordered by ε; ids of equal ε are in one line" in out
    assert "4 of them had gradients at or above the clip norm" in out
    tied = found["tied"]
    assert (tied["num_clipped"], tied["num_cut"]) == (4, 5)
    elsewhere = answer(*words[:2], "--order", tied["other_order"])
    assert elsewhere["num_at_bound"] == tied["num_at_other"] == 4
    assert "For 5 of them the estimate was above the worst case and was cut" in out
    assert f"at order {tied['other_order']:g}, 4 examples have the worst case" in out
    for part in (ids[:4], ids[4:]):
        assert f"\n{', '.join(map(str, part))} " in out


def test_persons_are_ranked_with_a_bound_for_as_many_examples(
    run, answer, ledger, tmp_path
):
    owners = {"p03": [3, 17], "p04": [5], "none": []}
    path = owners_file(tmp_path / "owners.json", owners)
    found = answer("score", LEDGER, "--owners", path)
    losses = privacy_losses(ledger, 8.0)
    of = {row["person"]: row for row in found["persons"]}
    assert list(of) == sorted(of, key=lambda name: -losses[owners[name]].max())
    assert of["p03"]["loss"] == losses[[3, 17]].max() and of["p03"]["num_examples"] == 2
    assert of["p04"]["group_epsilon"] == found["composed_worst_case"]
    assert of["p03"]["group_epsilon"] > found["worst_case_epsilon"]
    assert (found["num_without_owner"], found["num_without_examples"]) == (117, 1)
    code, out, err = run("score", LEDGER, "--owners", path, "--top", 1)
    assert (code, err) == (0, "") and "Hardest persons\n" in out
    assert "Examples without an owner: 117." in out and list(of)[0] in out
    assert list(of)[1] not in out and "bound on ε" in out
    out = run("score", LEDGER, "--sigma", 3, "--owners", path)[1]
    assert "Hardest persons" in out and "may be promised" not in out
    owners_file(path, {"p03": [3, 120]})
    code, out, err = run("score", LEDGER, "--owners", path)
    assert code == 2 and out == "" and "--owners must list examples of the" in err
    assert "persons" not in answer("score", LEDGER)


def test_persons_are_named_beside_the_examples(run, answer, ledger, tmp_path):
    first, second = (row["id"] for row in answer("score", LEDGER)["hardest"][:2])
    owners = {"ada": [first, second], "ben": [first]}
    path = owners_file(tmp_path / "owners.json", owners)
    file = tmp_path / "scores.csv"
    words = ("--owners", path, "--top", 3, "--csv", file)
    rows = answer("score", LEDGER, *words)["hardest"]
    assert [row["persons"] for row in rows] == [["ada", "ben"], ["ada"], []]
    out = run("score", LEDGER, *words)[1]
    assert f"{first} (ada, ben)" in out and f"{second} (ada)" in out
    with file.open(newline="") as lines:
        named = {int(r["example"]): r["persons"] for r in csv.DictReader(lines)}
    assert (named[first], named[second]) == ("ada; ben", "ada")
    assert set(named.values()) == {"ada; ben", "ada", ""}
    assert all("persons" not in row for row in answer("score", LEDGER)["hardest"])
    run("score", LEDGER, "--csv", file)
    assert "persons" not in file.read_text().splitlines()[0]


def test_tied_persons_and_large_bounds_are_said(run, ledger, tmp_path):
    norms = np.full_like(ledger.grad_norms, 0.5)
    norms[:, :37] = 100.0  # clipped
    tied = tmp_path / "tied.safetensors"
    replace(ledger, grad_norms=norms).save(tied)
    persons = {"a": [*range(30)], "b": [31], "c": [50]}
    path = owners_file(tmp_path / "owners.json", persons)
    out = run("score", tied, "--owners", path)[1]
    assert "2 of 3 persons share the largest loss" in out
    assert "A bound above 10 is too large to be of practical use." in out
    owners_file(path, {"a": [1], "c": [50]})
    out = run("score", tied, "--owners", path)[1]
    assert "persons share" not in out
