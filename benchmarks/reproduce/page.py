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
follow from constants is *computed*: nothing in it is random, so it is not judged.

**The unit is the forget set.** All trainings (seeds) that unlearn a set share its
examples and its oracles, the models retrained without it. More seeds do not make a
result hold for other sets. Trainings are therefore averaged first, and the test
permutes the sets: how often would a random order of the sets look as clear? At least
{fewest} sets are needed. Correlations over examples (fig2, fig9, ranks, literal) are
tested over classes and trainings instead. They are measured within each class, so
scores that only tell classes apart do not correlate.

**Alike** (fig1-right, fig4, fig5) means that every set lies within a fixed margin: five
points of accuracy and a factor of 1.25 in a bound between any two sets, and 1.5 times
the barrier between a set's own oracles. The 95 % interval over trainings must lie
within the margin, so noise leaves the claim undecided instead of confirming it. The
claim is about the sets that were measured, not about other ones.

**What was fixed beforehand, and what was not.** The statistics and thresholds of the
judges were chosen after the first curves on Fashion-MNIST had been seen, and before any
run with 20 forget sets. Limits of correlations (fig2, ranks, literal) were chosen when
similar correlations over all examples were known, and the margins of *alike* after five
sets had been seen. So the claims about forget sets will be tested on new runs; those
about correlations were not.

**Two claims** replace "takes longer". A harder set is *farther* if its gap before
unlearning is larger: the signed distance of a metric from the mean oracle. It is
*slower* if a larger share of this gap remained, on average over the run. Both are
tested over sets and trainings. *Slower* is judged on sets whose gap exceeds five
points, chosen by one training and one oracle and measured with the others, in runs of
at least eight epochs that closed at least a fifth of the gap. No set may overshoot its
oracles by more than five points, and no run may cost more than five points of test
accuracy. Both claims need at least three oracles for each set. The first epoch within
five points, the paper's number, is stored too. It says little: a run can cross the five
points and move on.

**Intervals**, in brackets, are 95 % intervals.

**Measures.** UA: unlearning accuracy, the share of the forget set that is classified
wrongly. MIA: the share of the forget set that a membership attack calls not trained on.
RA and TA: accuracy on retained and on test images.

**Scale** of the figures that have a picture. {scale}

## How often the judges err

The judges in this table were simulated {draws:,} times with known truth. Without the
effect (*claim is false*) they may say *borne out* in at most 5 % of the cases. With the
effect, *not borne out* is an error. The table covers the simulated cases only.

These cases are known to fool judges other than *farther* and *slower*, or are not
judged:

- **Groups of sets and separations** (fig3, fig8, methods): sets that are rare and far
  below the others are often not drawn, so that a mean of 0 looks positive. With one
  such set in ten or in twenty, more than 40 % of the simulated studies confirm a
  difference that does not exist.
- **Budgets from the loss** (predicted) are described and not judged. The mean gain is
  so small beside its spread over sets that no test of 20 sets has any power.

{judges}
## What changed since the last version

Earlier versions of this page tested the order of five strata with the seed as the unit.
Three of the five start at the oracles, so the order of the other two could not change
the verdict: the claims about times were borne out whatever happened. These claims are
now *not testable yet*, until they have been measured with 20 forget sets. The table
counts, for all methods of the earlier run, the runs that came within five points of the
oracles at some epoch. Many of them ended outside, or lost more than five points of test
accuracy.

{crossings}

Two more errors were found. The search of settings made 8 trials, all of them random:
every method with one setting tried the same eight rates, none above 0.061. And it ran
on a random forget set, on which there was hardly anything to forget. It now has 5
random trials of 25, rates from 0.001 to 1, and a set of hard examples of its own;
settings that cost test accuracy are ruled out, and the result says if the search could
not distinguish the settings.

Other judges were mended. The test of correlations took the examples for independent,
although those of one class resemble each other. It now needs their classes, and the
results of fig2, fig9, ranks and literal were stored without them. So these four claims
were *borne out* on the last version of this page, and are *not testable yet*. Means
over sets were confirmed where rare sets could have turned them around. Accuracies were
called alike although one set differed, and noise alone could confirm that a bound does
not rise.

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
        f"| {name} | {FIGURES[name].claim} | **{verdict}** |\n"
        for name, verdict in verdicts.items()
    )
    simulated = judges.stored()
    head = _HEAD.format(
        counts=_counts(list(verdicts.values())),
        verdicts="".join(lines),
        fewest=FEWEST_SETS,
        scale=_scale(known[0]["scale"]) if known else "Nothing has been run.",
        draws=simulated["draws"],
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
