"""Write the page of results, docs/results.md, from stored results.

    python -m benchmarks.reproduce.page

Reads the numbers in benchmarks/results/reproduce/cpu/*.json. They are judged and drawn
again, so that verdicts, tables and pictures belong to the present code; nothing is
trained. Pictures are copied to docs/results. Figures that were run with the earlier
design only are described, without a verdict.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common.command_line import parser_of
from benchmarks.reproduce.earlier import crossings_and_ends, described
from benchmarks.reproduce.figures import FIGURES, Figure
from benchmarks.reproduce.judging import __main__ as judges
from benchmarks.reproduce.judging.order import FEWEST_SETS
from benchmarks.reproduce.judging.verdicts import Verdict, sentences
from benchmarks.reproduce.publication import Content, publish, verdict_on

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "reproduce" / "cpu"
AGAIN = RESULTS.parent / "again"  # from an empty store
EARLIER = RESULTS.parent / "earlier"  # with five forget sets; described only
_HEAD = """# Results

For each figure: the paper's claim, a verdict, and what we found. {counts}

| figure | claim | verdict |
|---|---|---|
{verdicts}
To make this page again:

```bash
python -m benchmarks.reproduce all --scale cpu --data-root DIR \\
    --data svhn FILE.npz --out benchmarks/results/reproduce/cpu
python -m benchmarks.reproduce.judging
python -m benchmarks.reproduce.page
```

All numbers, with seeds, settings and environment, are in
[`benchmarks/results/reproduce`](../benchmarks/results/reproduce).

## How to read the results

**Verdicts.** A claim is *borne out* or *not borne out* if a test says so for every
part of the claim and every measure; how often the tests err is shown below. It is
*undecided* if the test was made and both answers remain possible. It is *not testable
yet* if the numbers cannot answer it; the reason is given. A claim about numbers that
follow from constants is *computed*: nothing in it is random, so it is not judged. A
claim of which no test has any power is *described, not judged*, whatever is run. A
claim with many parts is not borne out only if one part would be so after Holm's
correction for their number, since one of many true parts fails by chance.

**The unit is the forget set.** All trainings (seeds) that unlearn a set share its
examples and its oracles, the models retrained without it. More seeds do not make a
result hold for other sets. Trainings are therefore averaged first, and the test
permutes the sets: how often would a random order of the sets look as clear? At least
{fewest} sets are needed. Correlations over examples (fig2, fig9, ranks, literal) are
tested over classes and trainings instead. They are measured within each class, so
scores that only tell classes apart do not correlate.

**Alike** (fig1-right, fig4, fig5) means that every set lies within a fixed margin: five
points of accuracy and a factor of 1.25 in a bound between any two sets, and 1.5 times
the barrier between a set's own oracles. A one-sided 97.5 % limit over trainings must
lie within the margin, so noise leaves the claim undecided instead of confirming it. The
claim is about the sets that were measured, in trainings like those that were run. The
baseline of fig1-right needs ten pairs of oracles, five oracles for each set: at scales
with three, this claim cannot be borne out.

**What was fixed beforehand, and what was not.** The statistics and thresholds of the
judges were chosen after the first curves on Fashion-MNIST had been seen, and before any
run with 20 forget sets. They were changed on 30 November 2026, after a statistician
from outside had fooled several of them with simulated data, and still before any such
run. After a second attack by simulated data they were changed once more on the same
day. The simulated gaps were made about as large as the measured ones, for which the
first runs of fig1-middle, fig5 and fig6, too fast to be judged, had been looked at. The
verdicts on the present runs were not known when the change was written. But fig1-middle
and fig5 had been judged when it was adopted, and it changed their verdicts: by UA, hard
sets were *not slower*, and MIA approached the oracle's; both are now *undecided*. What
was changed is listed below. Limits of correlations (fig2, ranks, literal) were chosen
when similar correlations over all examples were known, and the margins of *alike* after
five sets had been seen. So the claims about forget sets are tested on new runs; those
about correlations were not.

**Two claims** replace "takes longer". A harder set is *farther* if its gap before
unlearning is larger: the signed distance of a metric from the mean oracle. It is
*slower* if a larger share of this gap remained, on average over the run. Both are
tested over sets and trainings, and mean that the correlation with the privacy loss is
above 0. *Slower* is judged on sets whose gap exceeds five points, chosen by one
training and one oracle and measured with the others, in runs of at least eight epochs
that closed at least a fifth of the gap. Every training and every oracle chooses in
turn: a verdict stands if two thirds of these choices give it, and their number is
shown. The movement of the same metric on retained images is subtracted from the gap,
since a loss of accuracy on all images is no unlearning; if it exceeds five points on
average, nothing is judged. Forgotten images may not share this movement, so the verdict
must be the same without the subtraction. By UA it must also be the same if forgotten
images end with as many more errors than the oracles make as test images do. No set may
overshoot its oracles by more than five points, and no run may cost more than five
points of test accuracy. Both claims need at least five trainings and three oracles for
each set. A trend over the sets of one data set may come from a few classes that differ;
it is claimed for this data set only. Figure 8 compares the smallest with the largest
size of the forget sets, and no other. Figure 3 compares four sets with four others,
which is too few to refute one of its many parts. The first epoch within five points,
the paper's number, is stored too. It says little: a run can cross the five points and
move on.

**Intervals**, in brackets, are two-sided 95 % intervals and show how large an effect
is. Verdicts follow from p-values, which are one-sided, of the named side, and compared
with 2.5 %. They need not agree with the interval where the text names another one: the
test of *larger on average* bets on each set and knows no distribution, its interval is
Student's; the test of two groups also permutes the sets, its interval is Welch's.

**Measures.** UA: unlearning accuracy, the share of the forget set that is classified
wrongly. MIA: the share of the forget set that a membership attack calls not trained on.
RA and TA: accuracy on retained and on test images.

**Scale** of the figures that have a picture. {scale}

## How often the judges err

The judges were simulated with known truth; the tables say how often (*studies*). An
error rate of 5 % in 200 studies has a standard error of 1.5 points. Without the effect
(*claim is false*) judges may say *borne out* in at most 5 % of the cases. With the
effect, *not borne out* is an error. The tables cover the simulated cases only.

These cases are known to fool judges, or are not judged; the second table has rates:

- **Groups of sets and separations** (fig3, fig8, methods): sets that are rare and far
  below the others are often not drawn, so that a mean of 0 looks positive. With one
  such set in ten or in twenty, more than 40 % of the simulated studies confirm a
  difference that does not exist, and still 10 % if 40 % of the sets are far below.
- **Rare trainings** (all judges): what happens in one training of six is often not
  among five. Accuracies are called alike although one set fails in some runs. If
  trainings are of two kinds, 5 % of the studies with five trainings find an order that
  is not there on average, and 2 % of those with ten. An order is not judged with fewer
  than five.
- **Classes** (all judges of an order): over other classes the trend may be absent.
- **Rare classes** (fig2, fig9, ranks, literal): if one class in ten is far below the
  limit of a correlation, ten classes often contain none, and a third of the simulated
  studies find the mean above the limit. The claim is about the classes of this data
  set.
- **Neighbours in the ranking** (all tests over sets): if sets next to each other
  resemble each other, there are fewer independent sets than the test counts. With a
  correlation of 0.8 between neighbours, a quarter of the simulated studies find an
  order that is not there. With sets of three kinds, 11 % find a mean difference.
- **Trainings that rank** (all claims about forget sets): the examples are ranked by the
  ledgers of the same trainings that are then unlearned. The claims are about trainings
  whose ledgers rank the sets. In other trainings the same sets may show no order.
- **Damage that depends on difficulty** (*slower*): only the mean movement of retained
  images is subtracted. If a method hurts hard images more than others, it looks faster
  on hard sets.
- **As many points on all sets** (*slower*): they are a large share of a small gap. If
  all sets overshoot by up to 4.5 points for some epochs, the easy ones look faster, and
  6 % of the simulated studies find hard sets slower. If all stop some points short of
  the oracles, easy sets look slower. Where such an offset is not seen on retained or
  test images, nothing corrects it.
- **Budgets from the loss** (predicted) are described and not judged. The mean gain is
  so small beside its spread over sets that no test of 20 sets has any power.

{judges}
## What changed since the last version

Earlier versions of this page tested the order of five strata with the seed as the unit.
Three of the five start at the oracles, so the order of the other two could not change
the verdict: the claims about times were borne out whatever happened. These claims are
measured again with 20 forget sets, one figure after the other, and are *not testable
yet* until then. The table counts, for all methods of the earlier run, the runs that
came within five points of the oracles at some epoch. Many of them ended outside, or
lost more than five points of test accuracy.

{crossings}

Two more errors were found. The search of settings made 8 trials, all of them random:
every method with one setting tried the same eight rates, none above 0.061. And it ran
on a random forget set, on which there was hardly anything to forget. It now has 5
random trials of 25, rates from 0.001 to 1, and a set of hard examples of its own;
settings that cost test accuracy are ruled out, and the result says if the search could
not distinguish the settings.

An outside statistician then attacked the judges, and these were changed before any
figure was measured by them. *Slower* took a loss of accuracy of all images for
unlearning (up to 100 % of studies without the effect borne out); the movement of
retained images is now subtracted. An order was tested against 0 on one side and against
0.5 on the other, so that a weak true order was not borne out in up to 48 %; now both
sides test 0. The training and the oracle that choose the sets were the first ones, and
other ones gave another verdict in 55 to 74 % of studies near five points; now two
thirds of all choices must agree. Separations of speeds were compared on different sets
at two sizes, and are now on the same positions. "The hardest sets are slowest" compared
with the mean of the others, and is now called so. Many parts, and pairs of noises, are
corrected for their number. A few almost perfect correlations outweighed others, and
classes of two or three examples counted; now means must pass with and without artanh,
and a class needs 30 examples. A barrier is called too high only if it also exceeds the
multiple of the mean baseline of all sets. Oracles of different sets no longer share
their seeds.

The first runs with these judges showed a third error of the search. Its limits held
after the run only, and of the good settings it chose the fastest. At that rate
fine-tuning raised the error on retained images by nine points in its first epoch and
closed more than half of the gap at once, and L1-sparse did so still more; the model was
repaired in later epochs. Speeds could not be judged (fig1-middle, fig5, fig6). The
limits now hold at every evaluation, for retained images as well. The runs were made
again, with 10 epochs instead of 15, and the figure rates with the rates 0.05, 0.07 and
0.09 instead of 0.03, 0.06, 0.12 and 0.24: at 0.03 nothing was unlearned, and 0.12
damaged the model first. These choices were made by the share of the gap that was
closed, the movement of retained images and overshooting; the order of the speeds had
not been looked at.

The second attack fooled *slower* again. If the metric of retained images moved by three
points and forgotten images did not follow, 78 % of the studies of equal speed were
borne out. Or a weak true difference was not borne out, in 61 %. If forgotten and test
images ended two points worse than with the oracles, 9 % were borne out. A verdict on
speeds must now be the same by each account of what forgotten images share; none of
these studies is fooled any more, and the power falls from 74 to 69 % in the simulated
case that is most like the measured sets. Where the metric of all retained images falls
by three points, even sets that are 2.7 times slower are no longer found (before: 90 %):
the numbers cannot tell this from a movement that forgotten images do not share. Early
in the runs of fig1-middle, retained images moved by one to two points (UA). With this
subtracted the rank correlation of slowness with difficulty is -0.89, without it -0.44.
The best proxy must lead with and without artanh. Before, one that led only in classes
near 1 was called best in all studies. The 97.5 % limit of a barrier took the mean of
pairs of five oracles for more exact than it is. With rare oracles without a barrier it
erred in 19 % of the studies, and now in 1 %. Its power falls from 78 to 58 % in one
simulated case. Five further cases were added to the list of those that fool judges.

Before the statistician, other judges were mended. The test of correlations took the
examples for independent, although those of one class resemble each other. It now needs
their classes, and the results of fig2, fig9, ranks and literal were stored without
them. So these four claims became *not testable yet* for one version of this page, until
they were measured again. Means over sets were confirmed where rare sets could have
turned them around. Accuracies were called alike although one set differed, and noise
alone could confirm that a bound does not rise.

"""
_AGAIN = """## Repeated from scratch

The same commands with an empty store (`--store EMPTY --out
benchmarks/results/reproduce/again`). All models were trained again.

| figure | verdict | verdict when repeated | numbers |
|---|---|---|---|
"""


def main() -> None:
    """Write the page and copy the pictures."""
    parser = parser_of("benchmarks.reproduce.page", __doc__)
    parser.parse_args()
    matplotlib.use("Agg")
    pictures = DOCS / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, content in stored(RESULTS).items():
        if content:
            facts = content["result"], content["scale"], content["environment"]
            publish(FIGURES[name], *facts, RESULTS)
            shutil.copy(RESULTS / f"{name}.png", pictures)
    (DOCS / "results.md").write_text(whole_page(), encoding="utf-8")


def whole_page() -> str:
    """Return the text of docs/results.md."""
    found = stored(RESULTS)
    return page_of(found, RESULTS, EARLIER) + "\n" + again_of(found, stored(AGAIN))


def stored(folder: Path) -> dict[str, Content | None]:
    """Return the stored figures, judged anew; None for those that have not been run."""
    found: dict[str, Content | None] = dict.fromkeys(FIGURES)
    for name, figure in FIGURES.items():
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            verdict = verdict_on(figure, content["result"], content["scale"])
            found[name] = content | {"claim": figure.claim} | verdict.to_json()
    return found


def page_of(
    found: dict[str, Content | None], results: Path, earlier: Path = EARLIER
) -> str:
    """Return the text of the page.

    Args:
        found: The published content of each figure, or None if it has not been run.
        results: The folder with the figures' tables.
        earlier: The folder of earlier results, which can be described only.
    """
    before = {name: described(earlier, name) for name in found}
    known = [content for content in found.values() if content]
    verdicts = {
        name: _verdict(content, before[name]) for name, content in found.items()
    }
    lines = (
        f"| {name} | {FIGURES[name].claim} | {_cell(verdict, found[name])} |\n"
        for name, verdict in verdicts.items()
    )
    simulated = judges.stored()
    head = _HEAD.format(
        counts=_counts(list(verdicts.values())),
        verdicts="".join(lines),
        fewest=FEWEST_SETS,
        scale=_scale(known[0]["scale"]) if known else "Nothing has been run.",
        judges=judges.table(simulated),
        crossings=crossings_and_ends(earlier),
    )
    sections = [
        _section(FIGURES[name], content, results / f"{name}.md")
        if content
        else _section_of_earlier(FIGURES[name], one)
        for name, content in found.items()
        if (one := before[name]) or content
    ]
    return head + "\n".join(sections)


def _verdict(content: Content | None, before: Verdict | None) -> str:
    """Return the verdict on a figure as text."""
    if content:
        return str(content["verdict"])
    return before.verdict if before else "not run yet"


def _cell(verdict: str, content: Content | None) -> str:
    """Return the verdict on a figure and those of its parts that differ from it."""
    parts = Verdict.from_json(content).parts if content else {}
    others = [
        f"{name}: {one.verdict}"
        for name, one in parts.items()
        if one.verdict not in ("", verdict)
    ]
    return "; ".join([f"**{verdict}**", *others])


def _counts(verdicts: list[str]) -> str:
    """Return how many claims have each verdict, in one sentence."""
    kinds = [kind for kind in dict.fromkeys(verdicts)]
    parts = [f"{verdicts.count(kind)} {kind}" for kind in sorted(kinds)]
    return f"Of {len(verdicts)} claims: {', '.join(parts)}."


def _section_of_earlier(figure: Figure, before: Verdict) -> str:
    """Return the section of a figure that was run with the earlier design only."""
    return "\n".join(
        [
            f"## {figure.name}\n",
            f"**Claim.** {figure.claim}\n",
            f"**Verdict.** {sentences(before.verdict, before.reason)}\n",
            "**What the earlier run shows.**\n",
            "\n".join(before.lines()) + "\n",
        ]
    )


def again_of(found: dict[str, Content | None], again: dict[str, Content | None]) -> str:
    """Return a table of a second run from scratch beside the first."""
    lines = [_AGAIN]
    for name, second in again.items():
        first = found[name]
        if first and second:
            same = first["result"] == second["result"]
            because = Verdict.from_json(second).because
            numbers = "the same to the last digit" if same else because
            lines.append(
                f"| {name} | {first['verdict']} | {second['verdict']} | {numbers} |\n"
            )
    return "".join(lines)


def _section(figure: Figure, content: Content, table: Path) -> str:
    """Return the section of one figure."""
    verdict = Verdict.from_json(content)
    parts = [
        f"## {figure.name}\n",
        f"**Claim.** {figure.claim}\n",
        f"**Verdict.** {sentences(verdict.verdict)}\n",
        f"**Found.** {sentences(verdict.reason)}".rstrip() + "\n",
    ]
    if verdict.parts:
        parts.append("\n".join(verdict.lines()) + "\n")
    parts.append(f"![{figure.name}](results/{figure.name}.png)\n")
    if table.exists():
        parts.append(table.read_text(encoding="utf-8"))
    return "\n".join(parts)


def _scale(scale: dict[str, Any]) -> str:
    """Describe the main experiment."""
    main = scale["sgd"]
    recipe = main["recipe"]
    return (
        f"{main['num_train']:,} training and {main['num_test']:,} test images of "
        f"{main['dataset']}, model {recipe['model']}, {recipe['num_epochs']} epochs of "
        f"SGD, learning rate {recipe['learning_rate']}, momentum {recipe['momentum']}, "
        f"Poisson batches of {recipe['batch_size']} in expectation; "
        f"{main['num_seeds']} trainings."
    )


if __name__ == "__main__":
    main()
