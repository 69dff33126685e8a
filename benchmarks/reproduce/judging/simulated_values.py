"""Simulated values of forget sets and examples, for all judges but those of an order.

Values come as ``(seeds, sets)``. A set has its own part, which all seeds share, as they
share its examples and oracles; a training has its own part, which all sets share.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.contrasts import (
    groups_differ,
    larger,
    shrinks,
)
from benchmarks.reproduce.judging.equivalence import alike, at_most
from benchmarks.reproduce.judging.examples import (
    Correlations,
    above,
    ahead,
    within_classes,
)
from benchmarks.reproduce.judging.scenario import Rng, Scenario
from benchmarks.reproduce.judging.verdicts import Verdict

Floats = NDArray[np.float64]
SEEDS, SETS = 5, 20
_MARGIN = 0.05


def _crossed(
    rng: Rng, sets: int, middle: float = 0.0, *, of_sets: float, of_trainings: float
) -> Floats:
    """Draw values with parts of sets, of trainings, and of each run."""
    return np.asarray(
        middle
        + of_sets * rng.normal(size=sets)
        + of_trainings * rng.normal(size=(SEEDS, 1))
        + 0.02 * rng.normal(size=(SEEDS, sets))
    )


def _gap_closed(
    rng: Rng, sets: int, share: float, *, of_sets: float, of_trainings: float = 0.0
) -> Verdict:
    """Draw gaps before and after; the mean relative change of the sets is ``share``."""
    before = 0.4 + 0.02 * rng.normal(size=(SEEDS, sets))
    change = _crossed(rng, sets, share, of_sets=of_sets, of_trainings=of_trainings)
    after = np.where(
        change < 0, 0.4 / (1 + np.clip(change, -0.9, 0)), 0.4 * (1 - change)
    )
    return larger(before, np.clip(after, 0, 1), "closer by")


def _rare_and_far(rng: Rng, sets: int, often: float, share: float) -> Verdict:
    """Draw gaps that close by a share, but for some sets that leave the oracles."""
    before = 0.3 + 0.01 * rng.normal(size=(SEEDS, sets))
    after = before * (1 - share) + 0.005 * rng.normal(size=(SEEDS, sets))
    bad = rng.random(sets) < often
    before[:, bad], after[:, bad] = 0.01, 1.0
    return larger(before, np.clip(after, 0, 1), "closer by")


def _groups(
    rng: Rng,
    more: float,
    sizes: tuple[int, int] = (4, 4),
    *,
    wider: float = 1.0,
    of_trainings: float = 0.0,
) -> Verdict:
    """Draw two groups; the first may vary more between sets, or with the training."""
    first = _crossed(
        rng, sizes[0], more, of_sets=0.2 * wider, of_trainings=of_trainings
    )
    second = _crossed(rng, sizes[1], of_sets=0.2, of_trainings=0.0)
    return groups_differ(first, second, "larger by")


def _separations(
    rng: Rng, small: float, large: float, of_trainings: float = 0.0
) -> Verdict:
    """Draw gaps that rise with difficulty; a training may change both slopes."""
    hardness = np.linspace(-0.5, 0.5, SETS)
    pair = [
        one * hardness
        + _crossed(rng, SETS, 0.4, of_sets=0.08, of_trainings=0.0)
        + of_trainings * rng.normal(size=(SEEDS, 1)) * hardness
        for one in (small, large)
    ]
    return shrinks(*pair, "gap before unlearning")


def _rare_failure(rng: Rng) -> Verdict:
    """Draw accuracies; one run in six on the hardest set fails by 40 points."""
    values = 0.9 + 0.004 * rng.normal(size=(SEEDS, SETS))
    values[:, -1] -= 0.4 * (rng.random(SEEDS) < 1 / 6)
    return alike(values, _MARGIN, "accuracy")


def _groups_with_far_sets(rng: Rng, often: float) -> Verdict:
    """Draw two groups of one mean; some sets of the first are far below it."""
    below = rng.random(4) < often
    far = np.where(below, -0.1 * (1 - often) / often, 0.1)
    first, second = (_crossed(rng, 4, of_sets=0.02, of_trainings=0.0) for _ in range(2))
    return groups_differ(first + far, second, "larger by")


def _accuracies(
    rng: Rng, *, one: float = 0.0, half: float = 0.0, of_sets: float, noise: float
) -> Verdict:
    """Draw accuracies; one set, or the harder half, may be lower than the others."""
    level = 0.8 + of_sets * rng.normal(size=SETS)
    level[-1] -= one
    level[SETS // 2 :] -= half
    return alike(level + noise * rng.normal(size=(SEEDS, SETS)), _MARGIN, "accuracy")


def _barriers(rng: Rng, ratio: float, worst: float, oracle: float = 0.007) -> Verdict:
    """Draw barriers that are multiples of those between five oracles of ten sets."""
    left, right = np.triu_indices(5, 1)
    level = 0.1 + 0.01 * rng.normal(size=(10, 1))
    own = oracle * rng.normal(size=(10, 5))
    times = np.full(10, ratio)
    times[-1] = worst
    after = times * level[:, 0] + 0.01 * rng.normal(size=(SEEDS, 10))
    return at_most(after, level + own[:, left] + own[:, right], 1.5, "barrier")


def _only_oracles(rng: Rng) -> Verdict:
    """Draw barriers of which one is at the margin; little noise but the oracles'."""
    left, right = np.triu_indices(5, 1)
    own = 0.01 * rng.normal(size=(10, 5))
    after = 0.1 * np.append(np.full(9, 0.5), 1.5) + 0.001 * rng.normal(size=(SEEDS, 10))
    return at_most(after, 0.1 + own[:, left] + own[:, right], 1.5, "barrier")


def _unlike_oracles(rng: Rng, kind: str, ratio: float, worst: float) -> Verdict:
    """Draw barriers of ten sets whose oracles are skewed, or sometimes good or bad.

    The mean barrier between the oracles of every set is 0.1.
    """
    left, right = np.triu_indices(5, 1)
    shape = 10, 5
    own = {
        "skewed": lambda: np.exp(0.8 * rng.normal(size=shape) - 0.32),
        "rare good": lambda: (rng.random(shape) > 0.12) / 0.88,
        "rare bad": lambda: np.where(rng.random(shape) < 0.1, 4.0, 1.0) / 1.3,
    }[kind]()
    pairs = 0.05 * (own[:, left] + own[:, right])
    times = np.append(np.full(9, ratio), worst)
    after = 0.1 * times + 0.004 * rng.normal(size=(SEEDS, 10))
    noise = 0.002 * rng.normal(size=pairs.shape)
    return at_most(after, np.maximum(pairs + noise, 0), 1.5, "barrier")


def _two_kinds_of_classes(rng: Rng, high: float, low: float, low_ones: int) -> Verdict:
    """Draw correlations of ten classes, some of which are low."""
    middle = np.where(np.arange(10) < low_ones, low, high)
    of_classes = np.tanh(np.arctanh(middle) + 0.1 * rng.normal(size=10))
    trainings = np.tanh(np.arctanh(0.97) + 0.02 * rng.normal(size=SEEDS))
    return above(Correlations(trainings, of_classes), 0.9)


def _small_classes(rng: Rng, sizes: tuple[int, ...], rho: float) -> Correlations:
    """Draw the scores of examples of classes of these sizes."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    latent = 2 * np.sin(np.pi * rho / 6)
    x, noise = rng.normal(size=(2, len(labels)))
    y = latent * x + np.sqrt(1 - latent**2) * noise
    trainings = np.tanh(np.arctanh(rho) + 0.02 * rng.normal(size=SEEDS))
    return Correlations(trainings, within_classes(x, y, labels))


def _least_pair(rng: Rng, z: float) -> Verdict:
    """Draw ten pairs of noises that agree equally well, and judge the lowest."""
    of_classes = np.tanh(z + 0.3 * rng.normal(size=(10, 10)))
    least = of_classes[:, of_classes.mean(0).argmin()]
    trainings = np.tanh(z + 0.01 * rng.normal(size=SEEDS))
    return above(Correlations(trainings, least), 0.9, among=10)


def _correlated(
    rng: Rng,
    rho: float,
    *,
    of_classes: float = 0.2,
    of_trainings: float = 0.02,
    copies: int = 1,
    shift: float = 3.0,
) -> Correlations:
    """Draw two scores of 1,000 examples of 10 classes.

    Args:
        rng: Source of the draws.
        rho: Spearman's correlation within a class of medium artanh.
        of_classes: Standard deviation between classes, of the artanh.
        of_trainings: Standard deviation between trainings, of the artanh.
        copies: Examples that share one image.
        shift: Standard deviation of the means of the classes, in both scores alike.
    """
    labels = np.repeat(np.arange(10), 100)
    z = np.arctanh(rho) + of_classes * rng.normal(size=10)
    latent = 2 * np.sin(np.pi * np.tanh(z) / 6)[labels]
    x, noise = np.repeat(rng.normal(size=(2, 1_000 // copies)), copies, axis=1)
    y = latent * x + np.sqrt(1 - latent**2) * noise
    mean = shift * rng.normal(size=10)[labels]
    seen = np.arctanh(np.corrcoef(x + mean, y + mean)[0, 1])
    trainings = np.tanh(seen + of_trainings * rng.normal(size=SEEDS))
    return Correlations(trainings, within_classes(x, y, labels))


def _two_proxies(rng: Rng, more: float, of_trainings: float = 0.005) -> Verdict:
    """Draw the correlations of two proxies, one of which may be better."""
    of_classes = 0.02 * rng.normal(size=10)
    first, second = (
        Correlations(
            0.9 + m + of_trainings * rng.normal(size=SEEDS),
            0.9 + m + of_classes + 0.02 * rng.normal(size=10),
        )
        for m in (more, 0.0)
    )
    return ahead(first, second)


def _incomplete(rng: Rng) -> Verdict:
    """Compare two groups that clearly differ, one value of which is missing."""
    first = _crossed(rng, 4, 1.0, of_sets=0.1, of_trainings=0.0)
    first[0, 0] = np.nan
    return groups_differ(first, _crossed(rng, 4, of_sets=0.1, of_trainings=0.0), "by")


def _turned_around(rng: Rng) -> Verdict:
    """Draw a proxy that leads near 1, where it matters little, but not on average."""
    of_classes = np.where(np.arange(10) < 9, 3.2, 0.4) + 0.1 * rng.normal(size=10)
    lead = np.where(np.arange(10) < 9, 0.5, -0.5) + 0.05 * rng.normal(size=10)
    first, second = (
        Correlations(0.95 + 0.005 * rng.normal(size=SEEDS), np.tanh(one))
        for one in (of_classes, of_classes - lead)
    )
    return ahead(first, second)


def _rare_class(rng: Rng) -> Verdict:
    """Draw ten of many classes; one in ten is at 0.3, the mean of all below 0.9."""
    middle = np.where(rng.random(10) < 0.1, 0.3, 0.95)
    of_classes = np.tanh(np.arctanh(middle) + 0.05 * rng.normal(size=10))
    trainings = np.tanh(np.arctanh(0.95) + 0.02 * rng.normal(size=SEEDS))
    return above(Correlations(trainings, of_classes), 0.9)


def _clusters(rng: Rng) -> Verdict:
    """Draw changes of gaps that six or seven sets have in common; 0 on average."""
    change = rng.choice([-0.5, 0.5], 3)[np.arange(SETS) * 3 // SETS]
    before = np.where(change < 0, 0.4 * (1 + change), 0.4)
    after = np.where(change > 0, 0.4 * (1 - change), 0.4)
    noise = 0.005 * rng.normal(size=(2, SEEDS, SETS))
    return larger(before + noise[0], after + noise[1], "closer by")


_LARGER = "one value above another on average (1 right, 5)"
_GROUPS = "one group of sets above another (3, methods, attack)"
_SHRINKS = "separation shrinks (8)"
_ALIKE = "every set alike, margin five points (4, 5)"
_AT_MOST = "every set at most 1.5 times its baseline (1 right)"
_ABOVE = "correlation within classes above a limit (2, 9, ranks, literal, attack)"
_AHEAD = "best proxy (2)"

SCENARIOS = (
    [
        Scenario(judge, name, effect, draw)
        for judge, effect, studies in (
            (
                _LARGER,
                False,
                {
                    "equal on average, 20 sets": lambda r: _gap_closed(
                        r, 20, 0.0, of_sets=0.2
                    ),
                    "what agrees is the training": lambda r: _gap_closed(
                        r, 20, 0.0, of_sets=0.02, of_trainings=0.5
                    ),
                    "1 of 20 sets far below, mean below 0": lambda r: _rare_and_far(
                        r, 20, 0.05, 0.05
                    ),
                    "1 of 5 sets far below, mean below 0": lambda r: _rare_and_far(
                        r, 20, 0.2, 0.24
                    ),
                    "the same, 10 sets": lambda r: _rare_and_far(r, 10, 0.2, 0.24),
                    "4 of 10 sets far below, 8 sets": lambda r: _rare_and_far(
                        r, 8, 0.4, 0.65
                    ),
                },
            ),
            (
                _LARGER,
                True,
                {
                    "by a quarter, 20 sets": lambda r: _gap_closed(
                        r, 20, 0.25, of_sets=0.15
                    ),
                    "by two fifths, 20 sets": lambda r: _gap_closed(
                        r, 20, 0.4, of_sets=0.15
                    ),
                    "by a half, 10 sets": lambda r: _gap_closed(
                        r, 10, 0.5, of_sets=0.15
                    ),
                    "by seven tenths, 10 sets": lambda r: _gap_closed(
                        r, 10, 0.7, of_sets=0.15
                    ),
                },
            ),
            (
                _GROUPS,
                False,
                {
                    "no difference, 4 and 4": lambda r: _groups(r, 0.0),
                    "the first varies 3 times more, 4 and 4": lambda r: _groups(
                        r, 0.0, wider=3.0
                    ),
                    "the first varies 3 times more, 4 and 12": lambda r: _groups(
                        r, 0.0, (4, 12), wider=3.0
                    ),
                    "what differs is the training": lambda r: _groups(
                        r, 0.0, wider=0.1, of_trainings=0.5
                    ),
                    "a value is NaN": _incomplete,
                },
            ),
            (
                _GROUPS,
                True,
                {
                    "two standard deviations of sets, 4 and 4": lambda r: _groups(
                        r, 0.4
                    ),
                    "three standard deviations of sets, 4 and 4": lambda r: _groups(
                        r, 0.6
                    ),
                    "two standard deviations of sets, 4 and 12": lambda r: _groups(
                        r, 0.4, (4, 12)
                    ),
                },
            ),
            (
                _SHRINKS,
                False,
                {
                    "equal separation": lambda r: _separations(r, 0.4, 0.4),
                    "equal on average, trainings differ": lambda r: _separations(
                        r, 0.4, 0.4, of_trainings=0.5
                    ),
                },
            ),
            (
                _SHRINKS,
                True,
                {
                    "a fifth of the separation": lambda r: _separations(r, 0.6, 0.12),
                    "half of the separation": lambda r: _separations(r, 0.6, 0.3),
                },
            ),
            (
                _ALIKE,
                False,
                {
                    "one set at the margin": lambda r: _accuracies(
                        r, one=_MARGIN, of_sets=0.0, noise=0.003
                    ),
                    "one set at the margin, much noise": lambda r: _accuracies(
                        r, one=_MARGIN, of_sets=0.0, noise=0.1
                    ),
                    "the harder half at the margin": lambda r: _accuracies(
                        r, half=_MARGIN, of_sets=0.0, noise=0.01
                    ),
                    "noise alone hides any difference": lambda r: _accuracies(
                        r, half=_MARGIN, of_sets=0.02, noise=0.3
                    ),
                },
            ),
            (
                _ALIKE,
                True,
                {
                    "equal, half a point of noise": lambda r: _accuracies(
                        r, of_sets=0.0, noise=0.005
                    ),
                    "sets vary by half a point, one point of noise": lambda r: (
                        _accuracies(r, of_sets=0.005, noise=0.01)
                    ),
                    "sets vary by one point, half a point of noise": lambda r: (
                        _accuracies(r, of_sets=0.01, noise=0.005)
                    ),
                },
            ),
            (
                _AT_MOST,
                False,
                {
                    "one set at the margin": lambda r: _barriers(r, 1.0, 1.5),
                    "one set at the margin, only oracles vary": _only_oracles,
                    "all sets at the margin": lambda r: _barriers(r, 1.5, 1.5),
                    "noise alone hides any difference": lambda r: _barriers(
                        r, 1.5, 1.5, oracle=0.07
                    ),
                },
            ),
            (
                _AT_MOST,
                True,
                {
                    "as between oracles": lambda r: _barriers(r, 1.0, 1.0),
                    "as between oracles, these vary less": lambda r: _barriers(
                        r, 1.0, 1.0, oracle=0.002
                    ),
                    "1.35 times, oracles skewed": lambda r: _unlike_oracles(
                        r, "skewed", 1.35, 1.35
                    ),
                    "1.4 times, one oracle in ten is bad": lambda r: _unlike_oracles(
                        r, "rare bad", 1.4, 1.4
                    ),
                },
            ),
            (
                _ABOVE,
                False,
                {
                    "at the limit of 0.9": lambda r: above(_correlated(r, 0.9), 0.9),
                    "at the limit of 0.5, classes differ": lambda r: above(
                        _correlated(r, 0.5, of_classes=0.4), 0.5
                    ),
                    "none within classes, classes agree": lambda r: above(
                        _correlated(r, 0.0, shift=10.0), 0.3
                    ),
                    "at the limit of 0.3, 20 copies of each": lambda r: above(
                        _correlated(r, 0.3, copies=20), 0.3
                    ),
                    "at the limit of 0.5, trainings differ": lambda r: above(
                        _correlated(r, 0.5, of_classes=0.0, of_trainings=0.3), 0.5
                    ),
                    "3 of 10 classes at 0.6, others at 0.9999": lambda r: (
                        _two_kinds_of_classes(r, 0.9999, 0.6, 3)
                    ),
                    "4 of 10 classes at 0.7, others at 0.999": lambda r: (
                        _two_kinds_of_classes(r, 0.999, 0.7, 4)
                    ),
                    "5 of 7 classes have 3 examples": lambda r: above(
                        _small_classes(r, (600, 385, 3, 3, 3, 3, 3), 0.88), 0.9
                    ),
                    "6 of 10 classes have 2 or 3 examples": lambda r: above(
                        _small_classes(r, (400, 250, 200, 135, 3, 3, 3, 2, 2, 2), 0.88),
                        0.9,
                    ),
                },
            ),
            (
                _ABOVE,
                True,
                {
                    "0.95 against the limit of 0.9": lambda r: above(
                        _correlated(r, 0.95), 0.9
                    ),
                    "0.7 against the limit of 0.5": lambda r: above(
                        _correlated(r, 0.7), 0.5
                    ),
                    "0.5 against the limit of 0.3": lambda r: above(
                        _correlated(r, 0.5), 0.3
                    ),
                    "the lowest of ten pairs, each at 0.905": lambda r: _least_pair(
                        r, np.arctanh(0.905) + 0.02
                    ),
                },
            ),
            (
                _AHEAD,
                False,
                {
                    "equally good": lambda r: _two_proxies(r, 0.0),
                    "equally good, trainings differ": lambda r: _two_proxies(
                        r, 0.0, 0.05
                    ),
                    "worse on average, better in 9 of 10 classes near 1": (
                        _turned_around
                    ),
                },
            ),
            (_AHEAD, True, {"better by 0.04": lambda r: _two_proxies(r, 0.04)}),
        )
        for name, draw in studies.items()
    ]
    + [
        Scenario(
            _GROUPS,
            f"{often:.0%} of the sets far below, means equal",
            False,
            lambda r, often=often: _groups_with_far_sets(r, often),
            fools=True,
        )
        for often in (0.1, 0.3)
    ]
    + [
        Scenario(
            _LARGER,
            "equal on average, sets of three kinds",
            False,
            _clusters,
            fools=True,
        ),
        Scenario(
            _ABOVE, "one class in ten far below the limit", False, _rare_class, True
        ),
        Scenario(_ALIKE, "one run in six fails on one set", False, _rare_failure, True),
        Scenario(
            _AT_MOST,
            "one set beyond, one oracle in eight has no barrier",
            False,
            lambda r: _unlike_oracles(r, "rare good", 0.5, 1.53),
        ),
    ]
)
