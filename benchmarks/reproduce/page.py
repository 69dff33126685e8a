"""Write ``docs/results.md`` from published figures.

    python -m benchmarks.reproduce.page

Reads ``benchmarks/results/reproduce/cpu/*.json`` and copies the pictures beside the
page. A figure that has not been run at this scale is listed as such.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.reproduce.figures import FIGURES, Figure

ROOT = Path(__file__).parents[2]
_HEAD = """# Results

Figure by figure: the paper's claim, what was found here, and the verdict. Made by
`python -m benchmarks.reproduce all --scale cpu --data-root DIR --data svhn FILE.npz
--out benchmarks/results/reproduce/cpu` and `python -m benchmarks.reproduce.page`; the
numbers stand in `benchmarks/results/reproduce/cpu`, with seeds, settings and
environment. Nothing is left out because it disagrees.

**Scale.** {scale}

Intervals are Student's, 95 %, over trainings (seeds). Forget sets are ranked by the
mean privacy loss over all seeds' ledgers and are the same for every seed; the oracles
of a set are shared by the seeds, and a method's settings are found once. So intervals
hold for these sets, oracles and settings: other draws of them are not in the intervals.
In pictures of times and barriers bars are the same intervals and faint points single
seeds; bands, and the bars of figure 4, are one standard deviation.

"Epochs to unlearn" is the first epoch within five points of the mean oracle, 0 if the
model was there before: where three sets of five are, they tie, and the rank correlation
mostly tells the sets with something to forget from those without. *Never* counts as
longer than any time. A claim is *borne out* where every part of it is, by every
measure; two different things are called *not testable*: an interval that holds 0, and
times that all tie.

Whether a hard set arrives at all hangs on the learning rate. The search serves random
sets, has few trials and looks no higher than 0.1, near which it found most rates;
*rates* has higher ones, at which hard sets arrive, at a cost in test accuracy.

| figure | claim | verdict |
|---|---|---|
"""
_AGAIN = """## From scratch, once more

The same commands with an empty store (`--store EMPTY --out
benchmarks/results/reproduce/again`): everything was trained again.

| figure | verdict | verdict again | numbers |
|---|---|---|---|
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=_results())
    parser.add_argument("--again", type=Path, default=_results().parent / "again")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    found = {name: _read(args.results / f"{name}.json") for name in FIGURES}
    pictures = args.docs / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        if content is not None:
            shutil.copy(args.results / f"{name}.png", pictures)
    again = {name: _read(args.again / f"{name}.json") for name in FIGURES}
    page = page_of(found, args.results) + "\n" + again_of(found, again)
    (args.docs / "results.md").write_text(page, encoding="utf-8")


def page_of(found: dict[str, dict[str, Any] | None], results: Path) -> str:
    """The page's text.

    Args:
        found: The published content of each figure, or None.
        results: Where tables lie.
    """
    known = [content for content in found.values() if content]
    scale = _scale(known[0]["scale"]) if known else "nothing has been run."
    lines = [_HEAD.format(scale=scale)]
    for name, content in found.items():
        verdict = content["verdict"] if content else "not run yet at this scale"
        lines.append(f"| {name} | {FIGURES[name].claim} | **{verdict}** |\n")
    sections = [
        _section(FIGURES[name], content, results / f"{name}.md")
        for name, content in found.items()
        if content
    ]
    return "".join(lines) + "\n" + "\n".join(sections)


def again_of(
    found: dict[str, dict[str, Any] | None], again: dict[str, dict[str, Any] | None]
) -> str:
    """What a second run from scratch said, beside the first."""
    lines = [_AGAIN]
    for name, second in again.items():
        first = found[name]
        if first and second:
            same = first["result"] == second["result"]
            numbers = "the same to the last digit" if same else second["because"]
            lines.append(
                f"| {name} | {first['verdict']} | {second['verdict']} | {numbers} |\n"
            )
    return "".join(lines)


def _section(figure: Figure, content: dict[str, Any], table: Path) -> str:
    """One figure."""
    parts = [
        f"## {figure.name}\n",
        f"**Claim.** {figure.claim}\n",
        f"**Verdict.** {content['verdict'].capitalize()}.\n",
        f"**Found.** {content['because']}.\n",
        f"![{figure.name}](results/{figure.name}.png)\n",
    ]
    if table.exists():
        parts.append(table.read_text(encoding="utf-8"))
    return "\n".join(parts)


def _scale(scale: dict[str, Any]) -> str:
    """The main experiment in words."""
    main = scale["sgd"]
    recipe = main["recipe"]
    return (
        f"{main['num_train']:,} training and {main['num_test']:,} test images of "
        f"{main['dataset']}, model {recipe['model']}, {recipe['num_epochs']} epochs of "
        f"SGD, learning rate {recipe['learning_rate']}, momentum {recipe['momentum']}, "
        f"Poisson batches of {recipe['batch_size']} in expectation; "
        f"{main['num_seeds']} trainings, {main['num_oracles']} oracles for each forget "
        f"set, sets of {main['stratum_size']}, at most {main['unlearn_epochs']} epochs "
        f"of unlearning; settings of each method by {main['num_trials']} trials of "
        "Bayesian search on a random set."
    )


def _results() -> Path:
    return ROOT / "benchmarks" / "results" / "reproduce" / "cpu"


def _read(path: Path) -> dict[str, Any] | None:
    """A published figure, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
