"""Costs counted beforehand against what is then done."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.facts import facts_of
from benchmarks.group_bound import Settings
from benchmarks.models import MODELS
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.barrier_units import (
    BarrierAfter,
    BarrierBaseline,
    BarrierBefore,
)
from benchmarks.reproduce.barriers import barriers
from benchmarks.reproduce.bound_units import GroupBounds
from benchmarks.reproduce.cost import Gpu, evaluation_seconds, update_seconds
from benchmarks.reproduce.estimate import Estimate, estimate, every_job, table
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.poison_units import Poisoned
from benchmarks.reproduce.pool import run_all
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.units import Oracle, Training
from benchmarks.reproduce.unlearning_units import Search, Unlearning
from benchmarks.reproduce.work import Work
from benchmarks.resnet import resnet18
from benchmarks.training import PrivateRecipe, Recipe

SMOKE = SCALES["smoke"]
TINY = replace(
    SMOKE.sgd,
    num_train=100,
    num_test=40,
    recipe=Recipe("mlp", 3, 20, 0.1),
    stratum_size=10,
    unlearn_epochs=2,
    num_checkpoints=3,
    num_probe=30,
)
SMALL = replace(SMOKE, sgd=TINY, sgld=(TINY.with_noise(0.1),))
SET = ForgetSet("random", 10)
GPU = Gpu()


@pytest.fixture
def rows_seen():
    """Examples that pass through models, by whether the model was training."""
    seen = Counter()

    def note(module, inputs, output):
        if isinstance(module, nn.Flatten):
            seen[module.training] += len(inputs[0])

    handle = nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    "unit",
    [
        Unlearning(TINY, SET, "fine-tune", 0),
        Search(TINY, "fine-tune"),
        BarrierBefore(TINY, SET, 1),
        BarrierAfter(TINY, SET, "fine-tune", 1),
        BarrierBaseline(TINY, SET),
    ],
    ids=lambda unit: type(unit).__name__,
)
def test_a_unit_passes_as_many_examples_as_it_says(tmp_path, rows_seen, unit):
    lab = Lab(tmp_path)
    run_all(unit.needs(), lab)
    fresh = lab.fresh_model(TINY)
    barriers(lab, TINY, fresh, fresh)  # symmetries are traced once in a process
    rows_seen.clear()
    unit.run(lab)
    work = unit.work()
    assert rows_seen[True] == work.unlearned
    assert rows_seen[False] == work.evaluated


@pytest.mark.parametrize(
    "unit",
    [
        Training(TINY, 0),
        Oracle(TINY, SET, 0),
        Poisoned(TINY, SET, "fine-tune", 0, 0.5),
        GroupBounds(Settings(0, 8.0, 0.1, 2, 3, 5), TINY.with_noise(0.1)),
    ],
    ids=lambda unit: type(unit).__name__,
)
def test_trainings_draw_as_many_examples_in_expectation(tmp_path, rows_seen, unit):
    lab = Lab(tmp_path)
    run_all(unit.needs(), lab)
    rows_seen.clear()
    unit.run(lab)
    work = unit.work()
    fine_tuned = 2 * 90 if isinstance(unit, Poisoned) else 0
    assert rows_seen[True] - fine_tuned == pytest.approx(work.trained, abs=60)
    assert work.trained == 3 * (90 if isinstance(unit, Oracle) else 100)
    assert rows_seen[False] >= work.swept + work.evaluated


def test_dp_sgd_is_not_swept():
    private = replace(TINY, recipe=PrivateRecipe("mlp", 3, 20, 0.1))
    assert Training(private, 0).work().swept == Oracle(private, SET, 0).work().swept
    assert Training(private, 0).work().swept == 0


def test_sizes_and_shapes_are_those_of_the_data(tmp_path):
    for experiment in (TINY, replace(TINY, num_train=0, num_test=0)):
        images = Lab(tmp_path).images(experiment)
        assert experiment.sizes == (len(images.train), len(images.test))
        assert experiment.image_shape == images.image_shape


def test_jobs_are_counted_as_they_are_then_run(tmp_path):
    units = [u for n in ("middle", "right") for u in FIGURES[f"fig1-{n}"].units(SMALL)]
    run_all(units, Lab(tmp_path))
    done = Counter(path.parent.name for path in tmp_path.glob("*/*.json"))
    assert done == Counter(type(job).__name__.lower() for job in every_job(units))
    found = estimate(units, GPU)
    assert found.trainings == done["training"] + done["poisoned"]
    assert found.oracles == done["oracle"] == len(list(tmp_path.glob("oracles/*")))
    kinds = ("unlearning", "poisoned", "barrierafter")
    assert found.runs == sum(done[kind] for kind in kinds) + 2  # trials


def test_totals_of_a_figure_by_hand():
    found = estimate(FIGURES["fig5"].units(SMALL), GPU)
    assert isinstance(found, Estimate)
    assert (found.trainings, found.oracles, found.runs) == (2, 12, 12)
    assert found.trained == pytest.approx(2 * 3 + 12 * 3 * 0.9)
    assert found.unlearned == pytest.approx(12 * 2 * 0.9)
    assert found.sweeps == pytest.approx(2 * 3 + 12 * 0.9)
    assert 0 < found.kernels <= found.alone


def test_the_table_counts_shared_jobs_once():
    figures = [FIGURES["fig5"], FIGURES["fig1-right"]]
    lines = table(figures, SMALL, GPU).splitlines()
    fig5, fig1, together = (line.split(" | ")[1:6] for line in lines[2:5])
    assert fig1 == fig5  # barriers train nothing
    assert together == ["2", "12", "22", *fig5[3:4], "40"]  # but need runs of their own
    assert "Not measured" in lines[-1]


def test_the_command_line_estimates_and_runs_nothing(tmp_path, capsys):
    main(["fig5", "--estimate", "--store", str(tmp_path / "store")])
    assert "| fig5 | 2 |" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_operations_of_a_linear_network_by_hand():
    """Two hidden layers of 128 on 64 inputs: forward 2, backward 4 per weight."""
    per_example = 64 * 128 + 128 * 128 + 128 * 10
    peak = GPU.share_of_peak * dict(GPU.peak)["float32"]
    free = replace(GPU, bandwidth=float("inf"), launch=0.0, loading=0.0)
    forward = evaluation_seconds("mlp", (1, 8, 8), free).kernels
    update = update_seconds("mlp", (1, 8, 8), free, 32, "float32").kernels
    assert forward == pytest.approx(2 * per_example / peak)
    first = 2 * 64 * 128 / peak  # no gradient is taken by the images
    assert update == pytest.approx(3 * forward - first)


def test_bfloat16_computes_faster_and_waits_longer_for_the_processor():
    seconds = {
        precision: update_seconds("strided-cnn", (1, 28, 28), GPU, 128, precision)
        for precision in ("float32", "bfloat16")
    }
    assert seconds["bfloat16"].processor > seconds["float32"].processor
    free = replace(GPU, bandwidth=float("inf"))
    compute = [
        update_seconds("strided-cnn", (1, 28, 28), free, 128, precision).kernels
        for precision in ("float32", "bfloat16")
    ]
    assert compute[0] / compute[1] == pytest.approx(989 / 494)


def test_work_adds_up():
    assert Work(1, 2, 3, 4) * 2 + Work(swept=1) == Work(2, 4, 7, 8)


def _tiny(experiment):
    """An experiment with all that costs time made small, and nothing else changed."""
    recipe = replace(experiment.recipe, num_epochs=2, batch_size=20, milestones=(1,))
    small = facts_of(TINY) | {"recipe": recipe, "num_seeds": 1, "num_oracles": 1}
    return replace(experiment, **small | {"stratum_size": 4, "num_train": 40})


def test_the_gpu_scale_runs_on_what_there_is(tmp_path, monkeypatch):
    scale = SCALES["gpu"]
    narrow = partial(resnet18, norm="batch", width=8)
    monkeypatch.setitem(MODELS, scale.sgd.recipe.model, narrow)
    assert scale.sgd.recipe.precision == "bfloat16" and scale.sgd.recipe.channels_last
    tiny, lab = replace(scale, sgd=_tiny(scale.sgd)), Lab(tmp_path)
    run_all(FIGURES["fig1-right"].units(tiny), lab)
    assert FIGURES["fig1-right"].result(tiny, lab)["baseline"]
    weights = lab.trained(tiny.sgd, 0)[0].conv.weight
    assert weights.is_contiguous(memory_format=torch.channels_last)


def test_half_an_hour_is_enough_for_figure_1_at_scale_gpu():
    units = [
        u for n in FIGURES if n[:4] == "fig1" for u in FIGURES[n].units(SCALES["gpu"])
    ]
    assert estimate(units, GPU).alone < 0.35  # of an hour: the rates are assumed
