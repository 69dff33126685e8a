"""Search the settings of an unlearning method: of the good ones, the fastest.

Needs optuna (``pip install "opacus-pi[search]"``). The search is made once, on a random
forget set; the settings found then serve every forget set:

    def run(settings):
        unlearner = Unlearner(
            model, criterion=criterion, method=L1Sparse(settings["strength"]),
            optimizer=lambda params: torch.optim.SGD(params, settings["learning_rate"]),
        ) return unlearner.unlearn(train_set, random_set, evaluate=evaluate).trace

    ranges = {"learning_rate": (1e-4, 1e-1), "strength": (1e-6, 1e-3)} best =
    search_settings(run, ranges, oracle).best.settings

To search anew for each forget set would make the times incomparable: a set could look
easy because its search was lucky.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from tqdm import tqdm

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.evaluation.trace import UnlearningTrace, time_to_unlearn

__all__ = ["SearchResult", "Trial", "fastest_good", "gap_to_oracle", "search_settings"]

Settings = dict[str, float]
_DIVERGED = 1e3  # the gap that the optimizer gets for a run that diverged


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Args:
        settings: Values by name.
        gap: Distance from the retrained models after the run, at least 0; NaN or
            ``inf`` where the run diverged.
        time: Time to unlearn, in the trace's unit; ``inf``: never.
    """

    settings: Settings
    gap: float
    time: float


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        best: The trial to use.
        trials: All trials, in order.
    """

    best: Trial
    trials: tuple[Trial, ...]


def search_settings(
    run: Callable[[Settings], UnlearningTrace],
    ranges: Mapping[str, tuple[float, float]],
    oracle: Mapping[str, ArrayLike],
    *,
    privacy: str = "unlearning_accuracy",
    utility: str = "test_accuracy",
    num_trials: int = 30,
    margin: float = 0.05,
    seed: int = 0,
) -> SearchResult:
    """Search settings on a logarithmic scale, by a tree-structured Parzen estimator.

    The search minimises the gap: the mean over the two metrics of
    abs(after the run - mean of the retrained models). Among the trials whose gap is
    within the margin of the smallest, the one that unlearned fastest is chosen.

    Args:
        run: Unlearns a random forget set with some settings and returns its trace.
        ranges: Lowest and highest value of each setting, above 0.
        oracle: Values of both metrics of retrained models, as ``time_to_unlearn`` takes
            them.
        privacy: The metric that measures forgetting; its time to unlearn counts.
        utility: The metric that measures how well the model still performs.
        num_trials: How many settings to try.
        margin: Largest excess gap, in the metrics' own units (0.05: five points).
        seed: Seed of the search.

    Returns:
        The choice and all trials.

    Raises:
        ImportError: If optuna is not installed.
        ValueError: If a range is empty or not above 0, a metric is missing, or every
            run diverged.

    Source: paper, Appendix D, "Hyperparameter tuning"; Akiba et al. 2019
    (arXiv:1907.10902).
    """
    optuna = _optuna()
    in_range(1, math.inf, num_trials=num_trials, remedy="Run at least one trial.")
    for name, (low, high) in ranges.items():
        expect(
            0 < low < high < math.inf,
            f"ranges[{name!r}]",
            (low, high),
            "must be (low, high) with 0 < low < high, both finite",
            "Settings are drawn on a logarithmic scale.",
        )
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    trials = []
    for _ in tqdm(range(num_trials), desc="searching", disable=None):
        asked = study.ask()
        settings = {k: asked.suggest_float(k, *r, log=True) for k, r in ranges.items()}
        trace = run(settings)
        gap = gap_to_oracle(trace, oracle, (privacy, utility))
        time = time_to_unlearn(trace, oracle, metric=privacy)
        trials.append(Trial(settings, gap, time))
        study.tell(asked, gap if math.isfinite(gap) else _DIVERGED)
    return SearchResult(fastest_good(trials, margin), tuple(trials))


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
    return float(
        np.mean([abs(trace[m][-1] - np.mean(np.asarray(oracle[m]))) for m in metrics])
    )


def fastest_good(trials: Sequence[Trial], margin: float = 0.05) -> Trial:
    """Return the fastest of the trials within the margin of the smallest gap.

    Args:
        trials: At least one with a finite gap.
        margin: Largest excess gap, at least 0.

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
    least = min(trial.gap for trial in finite)
    good = [trial for trial in finite if trial.gap <= least + margin]
    return min(good, key=lambda trial: (trial.time, trial.gap))


def _optuna() -> ModuleType:
    """Import optuna, an optional dependency, and silence its log.

    Raises:
        ImportError: If it is not installed; the message names the extra that installs
            it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "The search of settings needs optuna: pip install 'opacus-pi[search]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
