"""Stored results are found again: keys do not change when descriptions grow."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common.facts import facts_of, later
from benchmarks.common.own import source_digest
from benchmarks.common.training import PrivateRecipe, Recipe
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.pool import stages
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.store import path_of
from benchmarks.reproduce.units import Oracle, Training, Unlearning, oracle_seed
from benchmarks.reproduce.workspace import Workspace

CPU = SCALES["cpu"].sgd
HARDEST = sets_of(CPU)[-1]


def key(kind, facts):
    return path_of(Path(), kind, facts, "").name


@pytest.mark.parametrize(
    ("unit", "known"),
    [
        (Training(SCALES["smoke"].sgld[0], 0), "a6b1f9707290724a95e05208"),
        (Training(SCALES["cpu"].sgld[0], 0), "2af7fc50aa19e476a2a07fd8"),
        (Training(SCALES["cpu"].private[0], 1), "6fe59f65a38d53a5c2f8710e"),
        (Oracle(CPU, HARDEST, 2), "aac2382c9679142823a9795d"),
        (Unlearning(CPU, HARDEST, "fine-tune", 3), "3f5cbc122677da587a848d40"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_results_of_known_experiments_keep_their_keys(unit, known):
    assert key(type(unit).__name__.lower(), unit.facts()) == known


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"unlearn_epochs": 3, "num_trials": 9, "num_oracles": 7}, True),
        ({"num_probe": 10}, False),
        ({"num_test": 10}, False),
        ({"recipe": replace(CPU.recipe, model="mlp")}, False),
    ],
    ids=str,
)
def test_an_oracle_depends_on_training_and_evaluation_alone(change, same):
    other = Oracle(replace(CPU, **change), HARDEST, 2)
    assert (other.facts() == Oracle(CPU, HARDEST, 2).facts()) is same


def test_models_and_scores_keep_their_keys():
    facts = CPU.training_facts() | {"seed": 0, "num_checkpoints": 35}
    assert key("models", facts) == "46f3c5262a3889d5388c0b26"
    assert key("scores", CPU.ranking_facts()) == "24a8c765d82dd5475f5a3e1b"


def test_every_job_of_a_scale_has_a_key_of_its_own():
    units = [u for figure in FIGURES.values() for u in figure.units(SCALES["smoke"])]
    jobs = [job for stage in stages(units) for job in stage]
    keys = {(type(job), key("", job.facts())) for job in jobs}
    assert len(keys) == len(jobs)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"channels_last": True}])
def test_another_precision_or_layout_is_another_result(change):
    other = replace(CPU, recipe=replace(CPU.recipe, **change))
    for facts in ("facts", "training_facts", "ranking_facts"):
        assert key("", getattr(other, facts)()) != key("", getattr(CPU, facts)())


@dataclass(frozen=True)
class Inner:
    size: int
    extra: float = later(0.5)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    several: tuple = ()
    name: str = "x"


def test_later_fields_are_said_only_where_they_differ_at_every_depth():
    plain, other = Inner(1), Inner(1, 0.25)
    assert facts_of(Outer(plain, (other, plain))) == {
        "inner": {"size": 1},
        "several": ({"size": 1, "extra": 0.25}, {"size": 1}),
        "name": "x",
    }


def test_a_private_recipe_says_its_own_facts():
    facts = PrivateRecipe("mlp", 1, 8, 0.1, noise_multiplier=2.0).key()
    assert facts["noise_multiplier"] == 2.0 and "precision" not in facts


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must .*got int8"):
        Recipe("mlp", 1, 8, 0.1, precision="int8")


def test_the_content_of_a_data_set_is_part_of_every_key(tmp_path):
    rng, found = np.random.default_rng(0), []
    for name in ("one", "other"):
        file = tmp_path / f"{name}.npz"
        images = rng.random((40, 1, 4, 4), dtype=np.float32)
        labels = np.arange(40) % 2
        np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
        workspace = Workspace(tmp_path, arrays=(("mine", file),))
        mine = replace(CPU, dataset="mine")
        found.append(Training(mine, 0).facts_in(workspace))
        assert workspace.images(mine).num_classes == 2
    assert found[0] != found[1] and found[0]["dataset"] == found[1]["dataset"]


def test_the_file_of_an_own_model_is_part_of_the_key():
    assert len(source_digest("benchmarks.common.models:mlp")) == 24
    assert source_digest("mlp") == ""


def test_no_two_sets_share_the_seeds_of_their_oracles():
    sets = [np.arange(20), np.arange(1, 21), np.arange(19)]
    seeds = {oracle_seed(one, number) for one in sets for number in range(5)}
    assert len(seeds) == 15
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert oracle_seed(sets[0], 1) == oracle_seed(sets[0][::-1], 1)
