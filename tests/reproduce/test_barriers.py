"""Barriers of the figures: modulo permutation, against oracles fairly shared out."""

from dataclasses import replace
from functools import partial
from math import comb

import numpy as np
import pytest
import torch

from benchmarks.common.models import MODELS, build_model
from benchmarks.common.resnet import resnet18
from benchmarks.common.training import Recipe
from benchmarks.reproduce.barrier_units import (
    SETS,
    BarrierAfter,
    BarrierBaseline,
    barriers,
    oracles_of_seed,
)
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.figures.loss_barriers import FEWEST_PAIRS
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.judging.verdicts import NOT_TESTABLE
from benchmarks.reproduce.pool import run_all
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.units import Unlearning
from benchmarks.reproduce.unlearning_runs import evaluator, unlearn
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import apply_permutation, permutation_spec

TINY = Experiment(
    "digits",
    120,
    60,
    Recipe("mlp", 3, 32, 0.1),
    num_seeds=2,
    num_oracles=2,
    set_size=10,
    num_sets=8,
    num_checkpoints=3,
    unlearn_epochs=2,
    num_trials=2,
    num_probe=50,
)
SET = ForgetSet("range", 10, 7, 8)


@pytest.mark.parametrize("name", ["mlp", "narrow-batch-norm"])
def test_a_model_with_its_units_in_another_order_has_no_barrier(
    tmp_path, monkeypatch, name
):
    narrow = partial(resnet18, norm="batch", width=4)
    monkeypatch.setitem(MODELS, "narrow-batch-norm", narrow)
    experiment = replace(TINY, recipe=replace(TINY.recipe, model=name), num_probe=6)
    workspace, shape = Workspace(tmp_path), (1, 8, 8)
    torch.manual_seed(0)
    model = build_model(name, shape).eval()
    spec = permutation_spec(model, torch.rand(2, *shape))
    other = build_model(name, shape).eval()
    order = spec.random(np.random.default_rng(0))
    other.load_state_dict(apply_permutation(spec, order, model.state_dict()))
    found = barriers(workspace, experiment, model, other)
    assert set(found) == set(SETS)
    assert max(found.values()) == pytest.approx(0, abs=1e-5)


def test_no_two_seeds_share_an_oracle_unless_all_do():
    enough = replace(TINY, num_seeds=2, num_oracles=3)
    met = [oracles_of_seed(enough, SET, seed) for seed in range(2)]
    assert [[one.number for one in row] for row in met] == [[0], [1]]
    few = replace(TINY, num_seeds=4, num_oracles=3)
    met = [oracles_of_seed(few, SET, seed) for seed in range(4)]
    assert [[one.number for one in row] for row in met] == [[0, 1, 2]] * 4


@pytest.mark.parametrize("scale", SCALES)
def test_every_baseline_has_enough_pairs_of_oracles(scale):
    units = FIGURES["fig1-right"].units(SCALES[scale])
    found = [unit for unit in units if isinstance(unit, BarrierBaseline)]
    assert len(found) == SCALES[scale].sgd.num_sets
    assert all(comb(len(one.needs()), 2) >= FEWEST_PAIRS for one in found)


def test_a_run_that_is_not_judged_ends_at_the_same_model(tmp_path):
    workspace = Workspace(tmp_path)
    unit = Unlearning(TINY, SET, "fine-tune", 1)
    run_all([unit, BarrierAfter(TINY, SET, "fine-tune", 1)], workspace)
    trace = unit.run(workspace)
    where = (workspace, TINY, SET, "fine-tune", trace["settings"], 1)
    model, empty = unlearn(*where, evaluated=False)
    assert not empty.times
    found = evaluator(workspace, TINY, SET)(model)
    assert found == {name: values[-1] for name, values in trace["trace"].items()}


def test_where_no_line_has_a_barrier_nothing_is_told():
    none = {"training images": [[0.0] * 3] * 3}
    found = FIGURES["fig1-right"].judge(
        {"before": none, "after": none, "baseline": none}
    )
    assert found.verdict == NOT_TESTABLE and "no barrier between" in found.because
