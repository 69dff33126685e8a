"""What the figures of a scale cost before anything is run, in GPU hours.

Counted: the jobs of each figure, each once, and the examples that pass through models
in them; the operations of a step (``cost``). Assumed: the rates of the GPU.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from benchmarks.reproduce.cost import (
    PRIVATE,
    Gpu,
    Seconds,
    evaluation_seconds,
    sweep_seconds,
    update_seconds,
)
from benchmarks.reproduce.figures import Figure
from benchmarks.reproduce.pool import stages
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.unlearning_units import Search
from benchmarks.reproduce.work import Work

# Each runs a method once.
_RUNS = ("Unlearning", "Poisoned", "BarrierAfter", "FineTuned")
_HEADER = (
    "figure",
    "trainings",
    "oracles",
    "unlearning runs",
    "epochs trained",
    "epochs unlearned",
    "sweeps",
    "GPU hours, one job at a time",
    "GPU hours, kernels alone",
)


@dataclass(frozen=True)
class Estimate:
    """What some jobs and all they need come to.

    Attributes:
        trainings: Models trained on everything, on clean or on noisy inputs.
        oracles: Models retrained.
        runs: Unlearning runs, trials of the searches among them.
        trained: Passes over a data set, in training.
        unlearned: The same, in unlearning.
        sweeps: The same, for gradient norms.
        alone: Hours of one job after the other.
        kernels: Hours in which the GPU computes: jobs at the same time take no less.
    """

    trainings: int
    oracles: int
    runs: int
    trained: float
    unlearned: float
    sweeps: float
    alone: float
    kernels: float


def every_job(units: Iterable[Unit]) -> list[Unit]:
    """Units and all they need, each once."""
    return [unit for stage in stages(units) for unit in stage]


def estimate(units: Iterable[Unit], gpu: Gpu) -> Estimate:
    """The cost of units and of all they need, as if nothing were stored."""
    jobs = every_job(units)
    kinds = Counter(type(job).__name__ for job in jobs)
    trials = sum(
        job.experiment.num_trials
        for job in jobs
        if isinstance(job, Search) and job.work() != Work()
    )
    working = [job for job in jobs if job.work() != Work()]
    passes = [_passes(job) for job in working]
    seconds = [_seconds(job, gpu) for job in working]
    return Estimate(
        trainings=sum(job.work().trained > 0 for job in working) - kinds["Oracle"],
        oracles=kinds["Oracle"],
        runs=sum(kinds[name] for name in _RUNS) + trials,
        trained=sum(one[0] for one in passes),
        unlearned=sum(one[1] for one in passes),
        sweeps=sum(one[2] for one in passes),
        alone=sum(one[0] for one in seconds) / 3600,
        kernels=sum(one[1] for one in seconds) / 3600,
    )


def table(figures: list[Figure], scale: Scale, gpu: Gpu) -> str:
    """Markdown: a line for each figure alone, and one for all together."""
    rows = {figure.name: figure.units(scale) for figure in figures}
    together = [unit for units in rows.values() for unit in units]
    lines = ["| " + " | ".join(_HEADER) + " |", "|---" + "|---:" * 8 + "|"]
    for name, units in {**rows, "together, shared jobs once": together}.items():
        found = asdict(estimate(units, gpu))
        hours = [_hours(found.pop(key)) for key in ("alone", "kernels")]
        cells = [name, *(f"{value:,.0f}" for value in found.values()), *hours]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + assumptions(gpu)


def _hours(value: float) -> str:
    """Two digits at least."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def assumptions(gpu: Gpu) -> str:
    """What the hours rest on, in words."""
    peaks = dict(gpu.peak)
    return (
        f"Not measured: one {gpu.name} by its data sheet (dense bfloat16 "
        f"{peaks['bfloat16'] / 1e12:.0f} TFLOP/s, TF32 {peaks['float32'] / 1e12:.0f}, "
        f"{gpu.bandwidth / 1e12:.1f} TB/s), of which convolutions are assumed to reach "
        f"{gpu.share_of_peak:.0%} and elementwise kernels {gpu.share_of_bandwidth:.0%};"
        f" an operation of eager PyTorch is assumed to take the processor "
        f"{1e6 * gpu.launch:.0f} µs, and an example of a batch takes it "
        f"{1e6 * gpu.loading:.0f} µs (measured). Jobs, examples and operations of a "
        "step are counted from the code; every method is counted as fine-tuning, "
        "figure 4 without its Gram matrices. Several jobs at once on the GPU bring the "
        "hours from the first figure towards the second, never below it.\n"
    )


def _passes(job: Unit) -> tuple[float, float, float]:
    """Passes over the data set: trained, unlearned, swept."""
    work, size = job.work(), job.experiment.sizes[0]
    return work.trained / size, work.unlearned / size, work.swept / size


def _seconds(job: Unit, gpu: Gpu) -> tuple[float, float]:
    """Of a job alone on the GPU, and of its kernels."""
    work, experiment = job.work(), job.experiment
    recipe, dearer = experiment.recipe, PRIVATE if experiment.is_private else 1.0
    where = recipe.model, experiment.image_shape, gpu
    update = update_seconds(*where, recipe.batch_size, recipe.precision)
    parts: list[tuple[float, Seconds]] = [
        (dearer * work.trained + work.unlearned, update),
        (work.swept, sweep_seconds(*where)),
        (work.evaluated, evaluation_seconds(*where)),
    ]
    alone = sum(count * one.alone for count, one in parts)
    return alone, sum(count * one.kernels for count, one in parts)
