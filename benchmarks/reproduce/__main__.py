r"""Reproduce the paper's figures.

    python -m benchmarks.reproduce all --scale smoke        # digits, minutes
    python -m benchmarks.reproduce fig1 --scale cpu --data-root DIR
    python -m benchmarks.reproduce fig1 --scale gpu --device cuda --data cifar10 FILE
    python -m benchmarks.reproduce all --scale full --device cuda --data-root DIR
    python -m benchmarks.reproduce fig1-middle --scale cpu --dataset mine \
        --data mine FILE.npz --model my_project:build --seeds 3 --without-gus
    python -m benchmarks.reproduce methods --dataset my_project:data_sets \
        --model my_project:build --method my_project:Ascent
    python -m benchmarks.reproduce all --scale cpu-cifar10 --data-root DIR \
        --minutes 110 --journal benchmarks/results/reproduce/cpu-cifar10.jsonl

What happens: the figures named on the command line list the jobs (units) that they need
at the chosen scale; jobs without a stored result are run in parallel; then every figure
is computed from the stored results, judged, and written as JSON and PNG.

Scales:
    smoke  embedded digits, tiny sizes; shows that the code runs, not what the paper
           claims
    cpu    10,000 images, a small CNN, 5 seeds; a day on 2 cores
    cpu-cifar10
           20,000 images of CIFAR-10, ResNet-18 of width 16, 5 seeds, 20 forget sets;
           --plan shows the core-hours
    gpu    figure 1 in less than an hour on one GPU: ResNet-18, 20,000 images, 20
           epochs, 4 seeds, bfloat16 and channels_last
    full   the paper's sizes, on GPUs, in bfloat16 and channels_last

The results of finished jobs are stored. If a command is interrupted, give it again: it
continues where it stopped. A figure whose jobs are all stored is drawn in seconds. With
--minutes no job is started after that time, and figures that lack jobs are listed.
--journal names one file of all finished results, without models. It is read first and
written at the end, so that a study can move to another machine. --plan shows what is
left to do.

Own parts are named MODULE:NAME and imported, from the current directory first.
--dataset: a tuple of a training and a test set, whose items are an image and its label,
or a function that returns it. --model: a function (image_shape, num_classes) that
returns the model. --method: an opacus_pi.unlearning.Method, or a class or function
without arguments that returns one; the figure 'methods' shows it beside the others, at
the learning rate that the search finds.

With --device cuda, several processes share each GPU. The scales gpu and full have not
been run on a GPU yet; their times are estimates.
"""

import argparse
import contextlib
import math
import os
import zipfile
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path

import joblib
import matplotlib
import numpy as np

from benchmarks.common.command_line import parser_of
from benchmarks.common.data import NAMES, load
from benchmarks.common.facts import facts_of
from benchmarks.common.models import MODELS
from benchmarks.common.own import DATA_SETS, METHOD, MODEL, is_own, own
from benchmarks.common.report import environment
from benchmarks.common.set_ranges import set_apart
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures import FIGURES, Figure
from benchmarks.reproduce.journal import record, restore
from benchmarks.reproduce.methods import candidate
from benchmarks.reproduce.pool import JOBS_PER_GPU, default_jobs, run_all, stages
from benchmarks.reproduce.progress import plan
from benchmarks.reproduce.publication import publish, text_of
from benchmarks.reproduce.scales import SCALES, Scale, adapted
from benchmarks.reproduce.units import Search, Unit
from benchmarks.reproduce.workspace import Workspace

_COUNTS = {
    "seeds": "trainings of each experiment",
    "oracles": "retrained models of each forget set",
    "epochs": "epochs of training",
}


def chosen(names: list[str]) -> list[Figure]:
    """Return the figures named; ``fig1`` names all its parts, ``all`` everything.

    Raises:
        SystemExit: No figure has this name.
    """
    found = []
    for name in names:
        matching = [
            figure
            for key, figure in FIGURES.items()
            if name in ("all", key) or key.startswith(f"{name}-")
        ]
        if not matching:
            raise SystemExit(
                f"FIGURE must be 'all' or one of {', '.join(FIGURES)}; got {name}."
            )
        found += [figure for figure in matching if figure not in found]
    return found


def require_used(names: list[str], units: list[Unit], scale: str) -> None:
    """Refuse data sets that no job reads, which would silently be replaced by others.

    Raises:
        SystemExit: A name is not that of a data set of the chosen figures.
    """
    experiments = [getattr(unit, "experiment", None) for unit in units]
    used = sorted({one.dataset for one in experiments if one is not None})
    for name in names:
        if name not in used:
            raise SystemExit(
                f"--data {name}: at scale {scale} the chosen figures read "
                f"{', '.join(used) or 'no data set'}, and would ignore this file. Name "
                "one of these data sets, or choose another scale."
            )


def require_readable(files: list[list[str]]) -> None:
    """Refuse files of ``--data`` that are not there, or hold no data set.

    Raises:
        SystemExit: With the name, the file and the reason.
    """
    for name, file in files:
        try:
            load(name, arrays=Path(file))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise SystemExit(
                f"--data {name} {file}: this file cannot be used. {error}"
            ) from None


def require_images(
    workspace: Workspace, experiment: Experiment, units: list[Unit]
) -> None:
    """Refuse a main data set without images and labels, or with too few of them.

    How many images are needed is known where a job forgets a set.

    Raises:
        SystemExit: With the name and the reason.
    """
    try:
        number = len(workspace.images(experiment).train)
        if any(hasattr(unit, "forget_set") for unit in units):
            set_apart(np.arange(number), experiment.set_size, experiment.num_sets)
    except ValueError as error:
        raise SystemExit(
            f"--dataset {experiment.dataset}: this data set cannot be used. {error}"
        ) from None


def require_studied(names: list[str], figures: list[Figure]) -> None:
    """Refuse own methods if no chosen figure compares methods.

    Raises:
        SystemExit: The figure of the methods was not chosen.
    """
    if names and FIGURES["methods"] not in figures:
        raise SystemExit(
            f"--method {names[0]}: only the figure 'methods' compares methods, and it "
            "was not chosen. Add it to the figures."
        )


def require_optuna(units: list[Unit], workspace: Workspace) -> None:
    """Refuse to start without optuna if a search of settings is still to be made.

    A search comes after trainings that take hours, and would fail only then.

    Raises:
        SystemExit: With the remedy.
    """
    needed = any(
        isinstance(unit, Search)
        and candidate(unit.method).ranges
        and unit.seconds(workspace) is None
        for stage in stages(units)
        for unit in stage
    )
    if not needed:
        return
    try:
        import_module("optuna")
    except ImportError as error:
        raise SystemExit(
            "The chosen figures need a search of settings, which needs optuna, but it "
            f'cannot be imported ({error}). Run: pip install -e ".[benchmarks]"'
        ) from None


def cluster(address: str | None) -> AbstractContextManager:
    """Return a context in which jobs run on this machine or on a Dask cluster.

    Args:
        address: Address of the scheduler, or None for this machine. The workers need
            this code, and must see the store and the data under the same paths.
    """
    if address is None:
        return contextlib.nullcontext()
    from distributed import Client

    Client(address)
    return joblib.parallel_config(backend="dask", wait_for_workers_timeout=60)


def _parser() -> argparse.ArgumentParser:
    """Return the parser: first what is studied, then how it is run."""
    parser = parser_of("benchmarks.reproduce", __doc__)
    parser.add_argument(
        "figures", nargs="+", metavar="FIGURE", help="all, or: " + ", ".join(FIGURES)
    )
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument(
        "--dataset", metavar="NAME", help="another main data set, also MODULE:NAME"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="another main model, also MODULE:FUNCTION"
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="add an own method to the figure 'methods'; may be repeated",
    )
    for name, what in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument(
        "--without-gus", action="store_true", help="leave out the Gaussian score"
    )
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data")
    parser.add_argument(
        "--data",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "NPZ"),
        help="read a data set from an .npz file, e.g. --data svhn svhn.npz",
    )
    _add_run_options(parser)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that change no result."""
    parser.add_argument(
        "--jobs",
        type=int,
        help=f"processes; default: one per core, with cuda {JOBS_PER_GPU} per GPU",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda (all GPUs in turn), cuda:1, ..."
    )
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="run on this Dask scheduler's cluster"
    )
    parser.add_argument("--store", type=Path, default=Path("runs/reproduce/store"))
    parser.add_argument("--out", type=Path, help="default: runs/reproduce/SCALE")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no job after this time"
    )
    parser.add_argument("--journal", type=Path, help="file of all finished results")
    parser.add_argument("--plan", action="store_true", help="show what is left to do")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run the missing jobs, and publish the figures."""
    args = _parser().parse_args(argv)
    matplotlib.use("Agg")
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread in each process
    arrays = tuple((name, Path(file)) for name, file in args.data)
    scale = _scale(args)
    figures = chosen(args.figures)
    workspace = Workspace(args.store, args.data_root, arrays, args.device)
    units = [unit for figure in figures for unit in figure.units(scale)]
    require_used([name for name, _ in arrays], units, args.scale)
    require_readable(args.data)
    require_studied(args.method, figures)
    if args.dataset:
        require_images(workspace, scale.sgd, units)
    if args.journal:
        restore(args.journal, args.store)
    if args.plan:
        print(plan(units, workspace))
        return
    if not args.dask:  # a cluster's workers have packages of their own
        require_optuna(units, workspace)
    with cluster(args.dask):
        finished = run_all(
            units, workspace, args.jobs or default_jobs(args.device), args.minutes
        )
    if args.journal:
        record(args.store, args.journal)
    out = args.out or Path("runs/reproduce") / args.scale
    for figure in figures:
        _publish(figure, scale, workspace, out)
    if not finished:
        print(plan(units, workspace))


def _scale(args: argparse.Namespace) -> Scale:
    """Return the scale with the options of the command line.

    Raises:
        SystemExit: An own data set or model cannot be found.
    """
    _require_found(args)
    counts = {name: getattr(args, name) for name in _COUNTS}
    return adapted(
        SCALES[args.scale],
        dataset=args.dataset,
        model=args.model,
        methods=tuple(args.method),
        without_gus=args.without_gus,
        **counts,
    )


def _require_found(args: argparse.Namespace) -> None:
    """Refuse data sets, models and methods that no job could import or build.

    Raises:
        SystemExit: With the argument, the reason and the remedy.
    """
    given = [name for name, _ in args.data]
    data_set, model = args.dataset or NAMES[0], args.model or next(iter(MODELS))
    if not is_own(data_set) and data_set not in (*NAMES, *given):
        raise SystemExit(
            f"--dataset {data_set} is none of {', '.join(NAMES)}, and no file was "
            f"given for it. Add --data {data_set} FILE.npz, or name a tuple of two "
            "data sets of your code as MODULE:NAME."
        )
    if not is_own(model) and model not in MODELS:
        raise SystemExit(
            f"--model must be one of {', '.join(MODELS)} or MODULE:FUNCTION; got "
            f"{model}."
        )
    named = [("--dataset", data_set, DATA_SETS), ("--model", model, MODEL)]
    own_parts = [one for one in named if is_own(one[1]) and one[1] not in given]
    try:
        for flag, name, kind in own_parts + [
            ("--method", name, METHOD) for name in args.method
        ]:
            own(flag, name, kind)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _publish(figure: Figure, scale: Scale, workspace: Workspace, out: Path) -> None:
    """Publish a figure whose jobs are all finished; name one that lacks some."""
    jobs = figure.units(scale)
    missing = sum(unit.seconds(workspace) is None for unit in jobs)
    if missing:
        print(f"{figure.name}: {missing} of {len(jobs)} jobs are not finished")
        return
    result = figure.result(scale, workspace)
    content = publish(figure, result, facts_of(scale), environment(), out)
    print(text_of(content))
    if figure.table:
        print(figure.table(result))
    kinds = ("json", "png", "md") if figure.table else ("json", "png")
    print("written: " + ", ".join(str(out / f"{figure.name}.{one}") for one in kinds))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. Give the same command again to continue from here."
        ) from None
