"""Stored results are found again: keys do not change when descriptions grow."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.common.facts import facts_of, later
from benchmarks.common.training import PrivateRecipe, Recipe
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.pool import stages
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.store import path_of
from benchmarks.reproduce.units import Oracle, Training, Unlearning

CPU = SCALES["cpu"].sgd
HARDEST = ForgetSet("last", 200)


def key(kind, facts):
    return path_of(Path(), kind, facts, "").name


@pytest.mark.parametrize(
    ("unit", "known"),
    [
        (Training(SCALES["smoke"].sgld[0], 0), "4ede7aa58c4e15e82e78c1d4"),
        (Training(SCALES["cpu"].sgld[0], 0), "6ccf2b5f3a9410756208cdc7"),
        (Training(SCALES["cpu"].private[0], 1), "5551fe58a3c95c8fa69d945e"),
        (Oracle(CPU, HARDEST, 2), "ca979238928f842c6cf5b121"),
        (Unlearning(CPU, HARDEST, "fine-tune", 3), "60bca81f8fb932a5442316d0"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_results_of_known_experiments_keep_their_keys(unit, known):
    assert key(type(unit).__name__.lower(), unit.facts()) == known


def test_models_and_scores_keep_their_keys():
    facts = CPU.training_facts() | {"seed": 0, "num_checkpoints": 35}
    assert key("models", facts) == "01badc63b7450ec5c29e71be"
    assert key("scores", CPU.ranking_facts()) == "dbee193236cd923b025d8535"


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
