"""Search the settings of an unlearning method: of the good ones, the fastest.

Needs optuna (``pip install "optuna>=4"``). The search is made once, on a forget
set that is not used otherwise; the settings found then serve every forget set. This set
must have something to forget: if the model already behaves like the retrained models on
it, all settings look alike, and the search returns one of them by chance. Then
``informative`` is false, and a warning says so:

    def run(settings):
        unlearner = Unlearner(
            model, criterion=criterion, method=L1Sparse(settings["strength"]),
            optimizer=lambda params: torch.optim.SGD(params, settings["learning_rate"]),
        )
        return unlearner.unlearn(train_set, held_out_set, evaluate=evaluate).trace

    ranges = {"learning_rate": (1e-3, 1.0), "strength": (1e-6, 1e-3)}
    found = search_settings(run, ranges, oracle)
    found.best.settings, found.informative

To search anew for each forget set would make the times incomparable: a set could look
easy because its search was lucky.

A large learning rate can reach the retrained models at once because it destroys what
the model knows, of retained images, too, and learns most of it again later. This is no
unlearning. So the limits on utility and on overshooting hold at every evaluation of a
run, not only after it.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.evaluation.trace import (
    UnlearningTrace,
    mean_of_oracle,
    time_to_unlearn,
)

__all__ = ["SearchResult", "Trial", "fastest_good", "gap_to_oracle", "search_settings"]

Settings = dict[str, float]
_DIVERGED = 1e3  # the gap that the optimizer gets for a run that diverged
_STARTUP = 5  # random trials before the estimator chooses
_LEAST_CLOSED = 0.01  # a smaller change of the gap is a few labels of the forget set
_VIOLATED = 1.0  # added to the gap of a trial that broke a limit, so that it ranks last


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Args:
        settings: Values by name.
        gap: Distance from the retrained models after the run, at least 0; NaN or
            ``inf`` where the run diverged.
        time: Time to unlearn, in the trace's unit; ``inf``: never.
        lost: How far the utility, or another metric held, was below that of the
            retrained models, at the worst evaluation of the run; 0: not at all.
        beyond: How far the run went beyond the retrained models, at the furthest
            evaluation; 0: not at all.
    """

    settings: Settings
    gap: float
    time: float
    lost: float = 0.0
    beyond: float = 0.0

    def keeps(self, margin: float) -> bool:
        """Whether the run never lost more than the margin, or went further beyond."""
        return max(self.lost, self.beyond) <= margin


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        best: The trial to use.
        trials: All trials, in order.
        initial_gap: The gap before unlearning.
        noise: Standard error of the gap: how far the mean of the retrained models may
            be off. 0 for one retrained model, whose error is unknown.
    """

    best: Trial
    trials: tuple[Trial, ...]
    initial_gap: float
    noise: float

    @property
    def informative(self) -> bool:
        """Whether the best trial closed more of the gap than noise explains."""
        return self.initial_gap - self.best.gap > max(2 * self.noise, _LEAST_CLOSED)


def search_settings(
    run: Callable[[Settings], UnlearningTrace],
    ranges: Mapping[str, tuple[float, float]],
    oracle: Mapping[str, ArrayLike],
    *,
    privacy: str = "unlearning_accuracy",
    utility: str = "test_accuracy",
    held: Sequence[str] = (),
    num_trials: int = 30,
    margin: float = 0.05,
    seed: int = 0,
) -> SearchResult:
    """Search settings on a logarithmic scale, by a tree-structured Parzen estimator.

    The search minimises the gap: the mean over the two metrics of
    abs(after the run - mean of the retrained models). Settings rank last if, at any
    evaluation after the start, they took the utility or a metric of ``held`` more than
    ``margin`` below the retrained models, or went more than the margin beyond the
    retrained models in ``privacy``. Among the other trials whose gap is within the
    margin of the smallest, the one that unlearned fastest is chosen. The first five
    trials are random.

    Args:
        run: Unlearns a forget set with some settings and returns its trace. The set
            must have something to forget, and should not be used otherwise.
        ranges: Lowest and highest value of each setting, above 0.
        oracle: Values of both metrics of retrained models, as ``time_to_unlearn`` takes
            them; at least two models, or the noise of the gap is unknown.
        privacy: The metric that measures forgetting; its time to unlearn counts.
        utility: The metric that measures how well the model still performs; higher is
            better.
        held: Further metrics, higher is better, that a run must not lower either; for
            example ``["retain_accuracy"]``.
        num_trials: How many settings to try; with 10 or fewer, half of them or more
            are random.
        margin: Largest excess gap, loss of utility and distance beyond the retrained
            models, in the metrics' own units (0.05: five points).
        seed: Seed of the search.

    Returns:
        The choice, all trials, and whether the search could distinguish the settings.

    Raises:
        ImportError: If optuna is not installed.
        ValueError: If a range is empty or not above 0, a metric is missing, or every
            run diverged.

    Warns:
        UserWarning: If no trial closed more of the gap than noise explains.

    Source: paper, Appendix D, "Hyperparameter tuning"; Akiba et al. 2019
    (arXiv:1907.10902).
    """
    in_range(1, math.inf, num_trials=num_trials, remedy="Run at least one trial.")
    for name, (low, high) in ranges.items():
        expect(
            0 < low < high < math.inf,
            f"ranges[{name!r}]",
            (low, high),
            "must be (low, high) with 0 < low < high, both finite",
            "Pass two numbers above 0: settings are drawn on a logarithmic scale.",
        )
    study = _study(seed)
    trials, before = [], math.nan
    for _ in tqdm(range(num_trials), desc="searching", disable=None):
        asked = study.ask()
        settings = {k: asked.suggest_float(k, *r, log=True) for k, r in ranges.items()}
        trace = run(settings)
        trial = _judged(settings, trace, oracle, (privacy, utility), held)
        before = _gap_at(0, trace, oracle, (privacy, utility))
        trials.append(trial)
        study.tell(asked, _objective(trial, margin))
    best = fastest_good(trials, margin)
    noise = _noise(oracle, (privacy, utility))
    found = SearchResult(best, tuple(trials), before, noise)
    if not found.informative:
        warnings.warn(_uninformative(found), UserWarning, stacklevel=2)
    return found


def _study(seed: int) -> Any:
    """Return a study that minimises and has few random trials at the start."""
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler(n_startup_trials=_STARTUP, seed=seed)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _judged(
    settings: Settings,
    trace: UnlearningTrace,
    oracle: Mapping[str, ArrayLike],
    metrics: tuple[str, str],
    held: Sequence[str],
) -> Trial:
    """Return a run as a trial; what is not a number counts as lost altogether."""
    privacy, utility = metrics
    gap = gap_to_oracle(trace, oracle, metrics)
    time = time_to_unlearn(trace, oracle, metric=privacy)
    lost = [mean_of_oracle(oracle, name) - trace[name] for name in (utility, *held)]
    past = trace[privacy] - mean_of_oracle(oracle, privacy)
    beyond = -np.sign(past[0]) * past
    return Trial(settings, gap, time, _worst(np.stack(lost)), _worst(beyond))


def _worst(excess: NDArray[np.float64]) -> float:
    """Return the largest value after the start, at least 0; 1 if one is not finite."""
    during = excess[..., 1:]
    return float(during.max(initial=0.0)) if np.isfinite(during).all() else 1.0


def _objective(trial: Trial, margin: float) -> float:
    """Return what the estimator minimises: the gap, with penalties."""
    if not math.isfinite(trial.gap):
        return _DIVERGED
    return trial.gap + (0.0 if trial.keeps(margin) else _VIOLATED)


def _noise(oracle: Mapping[str, ArrayLike], metrics: Sequence[str]) -> float:
    """Return the standard error of the gap that comes from the retrained models."""
    values = [np.atleast_1d(np.asarray(oracle[name], float)) for name in metrics]
    errors = [v.std(ddof=1) / math.sqrt(v.size) if v.size > 1 else 0.0 for v in values]
    return float(np.linalg.norm(errors) / len(metrics))


def _uninformative(found: SearchResult) -> str:
    return (
        "The search could not distinguish the settings: the gap to the retrained "
        f"models was {found.initial_gap:.4f} before unlearning and "
        f"{found.best.gap:.4f} after the best of {len(found.trials)} trials, with a "
        f"standard error of {found.noise:.4f}. The settings returned are arbitrary. "
        "Search on a forget set that the model has memorised, run more epochs, or "
        "widen the ranges."
    )


def gap_to_oracle(
    trace: UnlearningTrace, oracle: Mapping[str, ArrayLike], metrics: Sequence[str]
) -> float:
    """Return the mean over metrics of abs(last evaluation - mean of retrained models).

    Args:
        trace: The run.
        oracle: Values of the metrics of retrained models.
        metrics: Names.

    Raises:
        ValueError: If a metric was not evaluated on one of them.
    """
    for name in metrics:
        expect(
            name in oracle,
            "oracle",
            sorted(oracle),
            f"must contain {name!r}",
            "Evaluate this metric on the retrained models, too.",
        )
    return _gap_at(-1, trace, oracle, metrics)


def _gap_at(
    when: int,
    trace: UnlearningTrace,
    oracle: Mapping[str, ArrayLike],
    metrics: Sequence[str],
) -> float:
    """Return the mean over metrics of the distance at one evaluation."""
    return float(
        np.mean([abs(trace[m][when] - np.mean(np.asarray(oracle[m]))) for m in metrics])
    )


def fastest_good(trials: Sequence[Trial], margin: float = 0.05) -> Trial:
    """Return the fastest of the trials within the margin of the smallest gap.

    Trials that lost more utility than the margin, or went further beyond the retrained
    models, are left out, unless all did.

    Args:
        trials: At least one with a finite gap.
        margin: Largest excess gap, loss of utility and distance beyond, at least 0.

    Returns:
        The trial; of equally fast ones that of the smallest gap.

    Raises:
        ValueError: If no gap is finite or the margin is negative.
    """
    in_range(0, math.inf, margin=margin, remedy="Try 0.05, as in the paper.")
    finite = [trial for trial in trials if math.isfinite(trial.gap)]
    expect(
        len(finite) > 0,
        "trials",
        f"{len(trials)} trial(s)",
        "must contain at least one that did not diverge",
        "Lower the ranges, first that of the learning rate.",
    )
    kept = [trial for trial in finite if trial.keeps(margin)] or finite
    least = min(trial.gap for trial in kept)
    good = [trial for trial in kept if trial.gap <= least + margin]
    return min(good, key=lambda trial: (trial.time, trial.gap))


def _optuna() -> ModuleType:
    """Import optuna, an optional dependency, and silence its log.

    Raises:
        ImportError: If it is not installed; the message says how to
            install it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "The search of settings needs optuna, which is not installed. Run: pip "
            "install 'optuna>=4'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
