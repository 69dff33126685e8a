"""Does the privacy loss predict what a strong attacker sees after unlearning?

Claim (beyond the paper): after fine-tuning, attacks with many models still recognise
the forgotten examples of high privacy loss, and not those of low loss. The attacks are
U-LiRA (balanced accuracy on each example; 0.5: nothing is seen) and KLOM (a divergence,
in nats), between models that unlearned the set and models retrained without it.

Data: the scale's main experiment. One forget set spans the ranking by the loss within
each class. A control set of retained examples has the neighbours in this ranking, so
both have the same classes and ranks; neither has an example of the search. Seeds: the
mean loss over the seeds' ledgers ranks the examples; the attacked models are trained
with other seeds, which rank nothing. Settings: ``shadows`` models on each side, each
unlearned with the settings that the search found on its own set.

Primary statistics, for each attack on the models after unlearning. They were fixed
before any run of this figure. (a) On forgotten examples, Spearman's ρ of mean loss and
attack, within classes, is above 0.3: the limit and the judge of figure 9. (b) Hard
examples might tell fine-tuned from retrained models whether they are forgotten or not.
So on the hardest quarter of each class, the attack sees more of forgotten examples than
of the control set. The sets of this test are these quarters, one of each kind for each
class. It compares groups and does not use that they are pairs: classes that are hard
are so for both, which makes the test conservative. The paired test of
``judging.contrasts`` bets on relative differences and needs more than half of the value
in each of ten classes, which KLOM, far above 0 without any difference, cannot reach. In
both tests the errors over trainings are those of the jackknife, which leaves out a
fifth of the models, and in (a) one of the trainings that rank, at a time.

Described beside it: means by quarter of the loss, before and after unlearning;
the correlation on the control set; KLOM between the two halves of the retrained models
(half as many, so it is larger than KLOM of all models without any difference); and the
largest lower limit of ε that U-LiRA proves, at 95 % for all examples together.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from numpy.typing import NDArray
from scipy import stats

from benchmarks.common.report import markdown
from benchmarks.reproduce.attack_units import AttackedExamples, Shadow, ShadowOracle
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import attacked_and_control
from benchmarks.reproduce.judging.contrasts import FEWEST_TRAININGS, groups_differ
from benchmarks.reproduce.judging.examples import (
    FEWEST_EXAMPLES,
    Correlations,
    above,
    artanh,
    within_classes,
)
from benchmarks.reproduce.judging.jackknife import group_left, pseudo_values
from benchmarks.reproduce.judging.verdicts import (
    NOT_TESTABLE,
    Verdict,
    combined,
    text_of,
    with_remark,
)
from benchmarks.reproduce.outcomes import rounded_to_json
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation.intervals import mean_interval
from opacus_pi.evaluation.shadow_models import klom, u_lira
from opacus_pi.plotting.style import GREY, draw_means, styles

METHOD = "fine-tune"
CORRELATED = 0.3  # Spearman's rho above this counts as confirming the claim
QUARTERS = 4
_MOST_CLASSES = 10  # compared in (b); the test lists all divisions of twice as many
_BINS = 8  # of the ranks, in the picture
_AXES = {"U-LiRA": "balanced accuracy of U-LiRA", "KLOM": "KLOM (nats)"}
WHEN = ("before", "after")
KINDS = ("forgotten", "retained")
Floats = NDArray[np.float64]


def _seen_by_u_lira(unlearned: Floats, oracles: Floats) -> Floats:
    return u_lira(unlearned, oracles).accuracies


ATTACKS = {"U-LiRA": _seen_by_u_lira, "KLOM": klom}


def _jobs(scale: Scale) -> tuple[AttackedExamples, list[Shadow], list[ShadowOracle]]:
    sets, numbers = attacked_and_control(scale.attacked), range(scale.shadows)
    return (
        AttackedExamples(scale.sgd, *sets),
        [Shadow(scale.sgd, *sets, METHOD, number) for number in numbers],
        [ShadowOracle(scale.sgd, *sets, number) for number in numbers],
    )


def _units(scale: Scale) -> list[Unit]:
    if not scale.attacked:
        return []
    examples, shadows, oracles = _jobs(scale)
    return [examples, *shadows, *oracles]


def _result(scale: Scale, workspace: Workspace) -> Result:
    if not scale.attacked:
        return {"attacks": {}}
    examples, shadows, oracles = _jobs(scale)
    found = [one.run(workspace) for one in shadows]
    return {"method": METHOD} | measured(
        examples.run(workspace),
        np.array([one["trained"] for one in found]),
        np.array([one["unlearned"] for one in found]),
        np.array([one.run(workspace) for one in oracles]),
    )


def measured(
    examples: dict[str, Any], trained: Floats, unlearned: Floats, oracles: Floats
) -> Result:
    """Return what the attacks see of each example, and all that the judges need.

    Args:
        examples: The result of ``AttackedExamples``.
        trained: Margins of the models before unlearning, ``(models, examples)``.
        unlearned: Margins after unlearning.
        oracles: Margins of the retrained models.
    """
    groups = len(examples["losses"])
    number = examples["forgotten"]
    parts = {"forgotten": slice(0, number), "retained": slice(number, None)}
    attacks: dict[str, Any] = {}
    for name, attack in ATTACKS.items():
        attacks[name] = {
            "before": rounded_to_json(attack(trained, oracles)),
            "after": rounded_to_json(attack(unlearned, oracles)),
            "after, without a group": _without_groups(
                attack, unlearned, oracles, groups
            ),
        }
    half = rounded_to_json(klom(oracles[::2], oracles[1::2]))
    attacks["KLOM"]["halves of the retrained"] = half
    return {
        "num_models": len(oracles),
        "examples": examples["examples"],
        "class": examples["class"],
        "forgotten": [i < number for i in range(len(half))],
        "losses": [rounded_to_json(np.array(one), 6) for one in examples["losses"]],
        "attacks": attacks,
        "epsilon": {
            when: {kind: _epsilon(margins, oracles, one) for kind, one in parts.items()}
            for when, margins in zip(WHEN, (trained, unlearned), strict=True)
        },
    }


def _without_groups(
    attack: Any, unlearned: Floats, oracles: Floats, groups: int
) -> list[list[float]]:
    """Return what an attack sees without each group of models, ``[group][example]``.

    There are as many groups as trainings that rank; with fewer than three there is no
    verdict, and nothing is computed.
    """
    if groups < FEWEST_TRAININGS:
        return []
    left = [group_left(len(oracles), group, groups) for group in range(groups)]
    return [rounded_to_json(attack(unlearned[one], oracles[one])) for one in left]


def _epsilon(margins: Floats, oracles: Floats, part: slice) -> float:
    """Return the largest lower limit, valid for all examples of a part together."""
    confidence = 1 - 0.05 / margins[:, part].shape[1]
    found = u_lira(margins[:, part], oracles[:, part])
    limits = [one.low for one in found.epsilons(confidence=confidence)]
    return float(f"{max(limits):.4g}")


def _of_kind(result: Result, kind: str) -> NDArray[np.bool_]:
    """Return which examples were forgotten, or retained."""
    return np.array(result["forgotten"]) == (kind == "forgotten")


def _correlations(result: Result, attack: str, kind: str) -> Correlations:
    """Return the correlation of loss and attack after unlearning, on one kind."""
    chosen = _of_kind(result, kind)
    losses = np.array(result["losses"])[:, chosen]
    seen = np.array(result["attacks"][attack]["after"])[chosen]
    left = np.array(result["attacks"][attack]["after, without a group"])
    labels = np.array(result["class"])[chosen]
    if not left.size:
        return Correlations(np.array([]), np.array([]))
    others = [np.delete(losses, k, 0).mean(0) for k in range(len(losses))]
    full = _artanh(losses.mean(0), seen)
    without = [_artanh(*one) for one in zip(others, left[:, chosen], strict=True)]
    return Correlations(
        np.tanh(pseudo_values(full, without)),
        within_classes(losses.mean(0), seen, labels),
    )


def _artanh(losses: Floats, seen: Floats) -> float:
    """Return the artanh of Spearman's correlation; NaN if one does not vary."""
    if not (np.ptp(losses) and np.ptp(seen)):
        return float("nan")
    return float(artanh(stats.spearmanr(losses, seen)[0]))


def _places(result: Result) -> Floats:
    """Return the rank of each example's mean loss among its class and kind, in (0, 1).

    It is the middle of the example's part of the range: 1/2 for the median.
    """
    losses = np.array(result["losses"]).mean(0)
    labels, places = np.array(result["class"]), np.empty(len(losses))
    for kind in KINDS:
        for label in np.unique(labels):
            own = _of_kind(result, kind) & (labels == label)
            places[own] = (stats.rankdata(losses[own], "ordinal") - 0.5) / own.sum()
    return places


def _classes(result: Result, fewest: int) -> NDArray[np.int64]:
    """Return the classes with at least so many examples of each kind."""
    labels = np.array(result["class"])[_of_kind(result, "forgotten")]
    names, counts = np.unique(labels, return_counts=True)
    return np.asarray(names[counts >= fewest])


def _of_parts(
    result: Result, values: Floats, kind: str, parts: int, classes: NDArray[np.int64]
) -> Floats:
    """Return means of values over parts of the ranks, ``(..., classes, parts)``.

    Args:
        result: The result of this figure.
        values: ``(..., examples)``.
        kind: ``"forgotten"`` or ``"retained"``.
        parts: How many parts of equal size.
        classes: Classes with at least as many examples.
    """
    labels, chosen = np.array(result["class"]), _of_kind(result, kind)
    part = (_places(result) * parts).astype(int)
    return np.stack(
        [
            np.stack(
                [
                    values[..., chosen & (labels == label) & (part == k)].mean(-1)
                    for k in range(parts)
                ],
                -1,
            )
            for label in classes
        ],
        -2,
    )


def _hardest(result: Result, attack: str, kind: str) -> Floats:
    """Return pseudo-values of the mean over hardest quarters, ``(groups, classes)``.

    Of classes that are large enough, the first ten.
    """
    classes = _classes(result, FEWEST_EXAMPLES)[:_MOST_CLASSES]
    full, left = (
        _of_parts(result, np.array(values), kind, QUARTERS, classes)[..., -1]
        for name, values in result["attacks"][attack].items()
        if name in ("after", "after, without a group")
    )
    return pseudo_values(full, left)


def _judge(result: Result) -> Verdict:
    if not result["attacks"]:
        return Verdict(NOT_TESTABLE, "no example is attacked at this scale")
    trainings = len(result["losses"])
    if trainings < FEWEST_TRAININGS:
        few = f"{trainings} trainings rank; at least {FEWEST_TRAININGS} are needed"
        return Verdict(NOT_TESTABLE, few)
    found: dict[str, Verdict] = {}
    for name in result["attacks"]:
        forgotten = _correlations(result, name, "forgotten")
        found[f"{name}, rises with the loss"] = above(forgotten, CORRELATED, 2)
        found[f"{name}, more on forgotten than on retained"] = _contrast(result, name)
    reason = f"{result['num_models']} models on each side"
    verdict = combined(found, reason)
    for name, text in _remarks(result).items():
        verdict = with_remark(verdict, name, text)
    return verdict


def _contrast(result: Result, attack: str) -> Verdict:
    """Decide whether an attack sees more on the hardest forgotten examples."""
    if not len(_classes(result, FEWEST_EXAMPLES)):
        few = f"no class has {FEWEST_EXAMPLES} examples of each kind"
        return Verdict(NOT_TESTABLE, few)
    both = [_hardest(result, attack, kind) for kind in KINDS]
    return groups_differ(
        *both, "difference of the means on the hardest quarter of each class"
    )


def _remarks(result: Result) -> dict[str, str]:
    """Return what is described beside the judged parts."""
    rho = []
    for name in result["attacks"]:
        of_classes = _correlations(result, name, "retained").of_classes
        if np.isfinite(of_classes).all() and of_classes.size:
            rho.append(f"{name} {of_classes.mean():.2f}")
    epsilon = (
        f"{when} unlearning {found['forgotten']:.2f} on forgotten and "
        f"{found['retained']:.2f} on retained examples"
        for when, found in result["epsilon"].items()
    )
    return {
        "correlation with the loss on retained examples": ", ".join(rho) or "none",
        "largest lower limit of ε that U-LiRA proves": "; ".join(epsilon),
    }


def _table(result: Result) -> str:
    """Return means before and after unlearning, by quarter of the loss and kind."""
    if not result["attacks"]:
        return "No example is attacked at this scale.\n"
    classes = _classes(result, QUARTERS)
    if not len(classes):
        return f"No class has {QUARTERS} examples of each kind.\n"

    def means(values: list[float], kind: str) -> Floats:
        return _of_parts(result, np.array(values), kind, QUARTERS, classes)

    head = ["quarter of the loss within its class", "examples", "mean loss"]
    rows = [head + [f"{name} before → after" for name in result["attacks"]]]
    losses = np.mean(result["losses"], axis=0).tolist()
    for place, name in enumerate(("easiest", "second", "third", "hardest")):
        for kind in KINDS:
            row = [name, kind, f"{means(losses, kind)[:, place].mean():.2g}"]
            for found in result["attacks"].values():
                both = [means(found[when], kind)[:, place] for when in WHEN]
                row.append(" → ".join(text_of(mean_interval(v), 2) for v in both))
            rows.append(row)
    half = np.mean(result["attacks"]["KLOM"]["halves of the retrained"])
    below = (
        "Means over the classes, with 95 % intervals over them. KLOM between two "
        f"halves of the retrained models, on all examples: {half:.2f}; with all models "
        "and no difference it would be smaller."
    )
    return f"{markdown(rows)}\n\n{below}\n"


def _draw(result: Result) -> Picture:
    """Draw what each attack sees against the rank of the loss.

    Points are means over the classes of the examples in an eighth of the ranks, or in a
    larger part if the classes are small. The dotted line of U-LiRA is guessing. KLOM of
    halves of the retrained models is not drawn: with half as many models it is larger.
    """
    number = max(1, len(result["attacks"]))
    picture, axes = plt.subplots(
        1, number, figsize=(4.8 * number, 3.8), squeeze=False, layout="constrained"
    )
    for ax, (name, found) in zip(axes[0], result["attacks"].items(), strict=False):
        _draw_attack(ax, result, found)
        if name == "U-LiRA":
            ax.axhline(0.5, color=GREY, lw=1, ls=(0, (1, 2)), zorder=0)
        ax.set(xlabel="rank of the privacy loss within the class", ylabel=_AXES[name])
        ax.set_xlim(0, 1)
    if result["attacks"]:
        axes[0, 0].legend(frameon=False, fontsize="small")
    return picture


def _draw_attack(ax: Axes, result: Result, found: dict[str, Any]) -> None:
    """Draw forgotten and retained examples, before and after unlearning."""
    _, counts = np.unique(result["class"], return_counts=True)
    parts = min(_BINS, int(counts.max()) // 2)
    classes = _classes(result, parts)
    middles = (np.arange(parts) + 0.5) / parts
    for kind, style in zip(KINDS, styles(), strict=False):
        for when, look in zip(WHEN, ({"ls": "--", "mfc": "white"}, {}), strict=True):
            heights = _of_parts(result, np.array(found[when]), kind, parts, classes)
            label = f"{kind}, {when} unlearning"
            draw_means(ax, middles, heights, label, style | look)


FIGURES = [
    Figure(
        "attack",
        "Beyond the paper: after unlearning, U-LiRA and KLOM see more of a forgotten "
        "example the higher its privacy loss, and more than of equally hard retained "
        "examples.",
        _units,
        _result,
        _judge,
        _draw,
        _table,
        note="One forget set and one control set of retained images, both along the "
        "whole range of the loss within each class. U-LiRA is the balanced accuracy on "
        "each image (0.5: nothing is seen), KLOM a divergence in nats. They compare "
        "models after fine-tuning with models retrained without the forget set. KLOM "
        "of so few models is far above 0 without any difference, so that only its "
        "differences mean something. The *sets* of the second test are the hardest "
        "quarters of the classes. Fine-tuning changes models in other ways too, so an "
        "attack can see more than 0.5 on retained images.",
    )
]
