"""Write the page of results, docs/results.md, from stored results.

    python -m benchmarks.reproduce.page

Reads the numbers in benchmarks/results/reproduce/cpu/*.json. They are judged and drawn
again, so that verdicts, tables and pictures belong to the present code; nothing is
trained. Pictures are copied to docs/results. Figures that have not been run at this
scale are listed as not run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common.command_line import parser_of
from benchmarks.reproduce.figures import FIGURES, Figure
from benchmarks.reproduce.figures.verdicts import Verdict, sentences
from benchmarks.reproduce.publication import Content, publish, verdict_on

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "reproduce" / "cpu"
AGAIN = RESULTS.parent / "again"  # from an empty store
_HEAD = """# Results

For each figure: the paper's claim, what we found, and a verdict. Results that disagree
with the paper are reported like all others.

To make this page again:

```bash
python -m benchmarks.reproduce all --scale cpu --data-root DIR \\
    --data svhn FILE.npz --out benchmarks/results/reproduce/cpu
python -m benchmarks.reproduce.page
```

All numbers, with seeds, settings and environment, are in
[`benchmarks/results/reproduce/cpu`](../benchmarks/results/reproduce/cpu).

| figure | claim | verdict |
|---|---|---|
{verdicts}
## How to read the results

**Scale.** {scale}

**Verdicts.** A claim is *borne out* if every part of it holds, by every measure. It is
*not testable* if an interval contains 0, or if all times are equal. Median epochs are
listed from the easiest to the hardest set; tables call these sets *first*, *q1*, *q2*,
*q3* and *last*. *n* is the number of seeds.

**Intervals**, in brackets or after ±, are 95 % Student intervals over trainings
(seeds). Forget sets are ranked
by the mean privacy loss over the ledgers of all seeds, and all seeds use the same sets.
The seeds also share the oracles of a set, and the settings of a method, which are
searched once. The intervals therefore hold for these sets, oracles and settings. They
do not include the variation between other choices of them. In figures of times and
barriers, bars show these intervals and faint points show single seeds. Bands, and the
bars of figure 4, show one standard deviation.

**Measures.** UA: unlearning accuracy, the share of the forget set that is classified
wrongly. MIA: the share of the forget set that a membership attack calls not trained on.
RA and TA: accuracy on retained and on test images. GUS: Gaussian unlearning score. All
are compared with the oracles, the models retrained without the set.

**Epochs to unlearn** is the first epoch at which the model is within five points of the
mean oracle; it is 0 if the model starts there. If three of five sets start there, they
tie. The rank correlation then mostly separates the sets with something to forget from
the others. *Never* counts as longer than any time.

**The learning rate** decides whether a hard set reaches the oracles at all. The search
uses random sets, has few trials, and tries no rate above 0.1; most of the rates it
found are near 0.1. Figure *rates* uses higher rates. Hard sets then reach the oracles,
but test accuracy falls.

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
    return page_of(found, RESULTS) + "\n" + again_of(found, stored(AGAIN))


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


def page_of(found: dict[str, Content | None], results: Path) -> str:
    """Return the text of the page.

    Args:
        found: The published content of each figure, or None if it has not been run.
        results: The folder with the figures' tables.
    """
    known = [content for content in found.values() if content]
    scale = _scale(known[0]["scale"]) if known else "nothing has been run."
    verdicts = []
    for name, content in found.items():
        verdict = content["verdict"] if content else "not run yet at this scale"
        verdicts.append(f"| {name} | {FIGURES[name].claim} | **{verdict}** |\n")
    sections = [
        _section(FIGURES[name], content, results / f"{name}.md")
        for name, content in found.items()
        if content
    ]
    return _HEAD.format(scale=scale, verdicts="".join(verdicts)) + "\n".join(sections)


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
        f"{main['num_seeds']} trainings; {main['num_oracles']} oracles for each forget "
        f"set; forget sets of {main['stratum_size']} images; at most "
        f"{main['unlearn_epochs']} epochs of unlearning. The settings of each method "
        f"were found by {main['num_trials']} trials of Bayesian search on a random set."
    )


if __name__ == "__main__":
    main()
