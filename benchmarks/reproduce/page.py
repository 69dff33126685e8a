"""Write the pages of results and judges, docs/results.md and judges.md.

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
from benchmarks.common.report import markdown
from benchmarks.reproduce.earlier import described
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.judges_page import judges_page
from benchmarks.reproduce.judging.verdicts import Verdict, sentences
from benchmarks.reproduce.publication import Content, publish, verdict_on
from benchmarks.reproduce.replication import counted, replication_of
from benchmarks.reproduce.sections import (
    head,
    section,
    section_of_earlier,
    summary,
    table_of_claims,
)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "reproduce" / "cpu"
AGAIN = RESULTS.parent / "again"  # from an empty store
REPLICATION = RESULTS.parent / "replication"  # on another data set
EARLIER = RESULTS.parent / "earlier"  # with five forget sets; described only
NOT_RUN = "not run yet"
_TEXT = """# Results

This page tests claims of *the paper*, Sepahvand et al., *Leveraging Per-Instance
Privacy for Machine Unlearning* (ICML 2025), and claims beyond it. They are about the
*privacy loss* of a training image, a number computed from the norms of its gradients.
If noise was added in training, it limits how much that image can have influenced the
model. The paper says that it predicts how difficult the image is to unlearn.

{summary}

[A replication](#the-replication) on other data was planned before it was run. {counted}

The table shows one effect of each kind for each claim. Where several parts of a claim
measure the same kind, it is the one least favourable to the claim. An interval that
excludes 0 is not a verdict: see [how to read this page](#how-to-read-this-page).

{claims}

## How to read this page

**The privacy loss** is computed from the *ledger* of a training, in which the gradient
norms of each image were recorded. Models called *SGD* were trained without noise. Their
loss is the one that noise of standard deviation 0.01 on the mean gradient would have
given, so it ranks images but guarantees nothing. *SGLD* is SGD with noise of standard
deviation σ on the mean gradient. Its loss is a guarantee, but that of hard images,
often above 1,000,000, is far too large to be a useful one.

**What is measured.** A *forget set* is a set of training images that a model shall
forget. Its *difficulty* is the mean privacy loss of its images. An *oracle* is a model
trained again without the set. Models are compared with the oracles by these measures:
**UA** (unlearning accuracy) is the share of the forget set that is classified wrongly,
**MIA** is the share that a membership-inference attack takes for images that the model
was not trained on, **RA** and **TA** are the accuracies on retained and on test images.
The *gap* is the distance of a measure from the mean oracle, positive while something is
left to forget. *Points* are percentage points: a gap of 0.05 is five points.

**Farther and slower.** A set can take longer to unlearn for two reasons. It is
*farther* if its gap before unlearning is larger. It is *slower* if a larger share of
this gap remained, on average over the run. Both are measured by Spearman's rank
correlation with difficulty, and claimed to be above 0. A correlation below 0 for
*slower* means that less of the gap of harder sets remained, so that they were faster in
these runs. Whether that holds for other sets is what the verdict says.

**Other names.** *Proxies* are scores of difficulty that need no privacy accounting:
the gradient norm of an image, averaged over training (*mean norm*), in its middle (*mid
norm*) or at its end (*end norm*); *C-Proxy*, from the model's confidence in the label;
and *EL2N*, from the length of its error. A *loss barrier* is the rise of the loss on
the line between two models. *GUS* is the paper's Gaussian unlearning score. *U-LiRA*
and *KLOM* compare many unlearned models with many oracles.

**The unit is the set.** All trainings (seeds) that unlearn a set share its images and
its oracles, so more trainings do not make a result hold for other sets. Trainings are
averaged, and the test asks how often a random order of the sets would look as clear.
Correlations over images (fig2, fig9, ranks, literal, attack) are measured within each
class, with the class as the unit. Figures that unlearn the same sets of the same
trainings share their gaps before unlearning (fig1-middle, fig5, fig6, rates, and fig8
for its larger sets), so they do not confirm each other.

**Verdicts.** A claim is *borne out* if a test says so for all its parts, and *not borne
out* if one part contradicts it more clearly than chance would among so many parts.
Otherwise it is *not testable yet* if the numbers cannot answer one part, for which the
reason is given, and *undecided* if both answers remain possible. Each test is made for
an error of 2.5 % on each side. In [simulations](judges.md#how-often-the-judges-err)
some err in up to 4 % of the cases, and in the cases known to fool them far more often.
A claim that follows from constants is *computed*, because nothing in it is random. A
claim of which no test has any power is *described, not judged*.

**Tables.** *Effect* is the estimate with its two-sided 95 % interval. Where values are
claimed to be alike, it is their largest difference, with a limit that holds with 97.5 %
(*at most*) and the largest difference that counts as alike (*allowed*). Verdicts follow
from the *one-sided p*, which names its side, and not from the interval; both
[need not agree](judges.md#how-each-judge-works). Where an effect is tested over sets
and over trainings, both p must be at most 0.025. Where there is no p, the limit (*at
most*) is compared with the largest allowed difference. *Number* says how many sets (or
classes) and trainings were tested.

**Slower in detail.** Speeds are judged on the sets with a gap of more than five points.
One training and one oracle select these sets, and the others measure them, so 4 of 5
trainings are counted; each takes its turn, and two thirds of these choices must give
the verdict. Unlearning also changes the measure on retained images. Whether forgotten
images share this movement is not known, so a verdict on speeds must be the same if they
do and if they do not. If it is not, the part is undecided, although its p may be small.
A table shows the effect of one choice under the first assumption: of the choices that
give the verdict, the one whose effect is the median. Below it stand the correlations of
all choices if forgotten images share the movement (*shared*), if they do not (*not
shared*), and by UA if they end with as many errors more than the oracles make as test
images do (*as test images*). Their signs can differ.

**Runs and pictures.** Where a picture has three rows, its points are sets, averaged
over the trainings. Those with a mean gap of more than five points (dotted line) are
filled, and only they have a share that remained. Nothing is subtracted for retained
images there, so the shares need not show the order that the test has found. The table
below such a picture describes the runs on the filled sets, also without subtraction.
*Closed* is the share of their mean gap that was closed at the end, *remaining on
average* the share that remained over the run. *Came within five points* counts runs
that did so at any time, *accuracy kept* those that lost at most five points of test
accuracy, and *overshot* those that ended more than five points beyond the oracles.

## What was fixed beforehand, and what was not

- The statistics and thresholds of the judges were chosen after the first curves on
  Fashion-MNIST had been seen, and before any run with 20 forget sets.
- They were changed on 30 November 2026, after a statistician from outside had fooled
  several of them with simulated data, and still before any such run.
- They were changed once more on the same day, after a second attack by simulated data.
  The simulated gaps were made about as large as the measured ones, for which the first
  runs of fig1-middle, fig5 and fig6, too fast to be judged, had been looked at. The
  verdicts on the present runs were not known when the change was written.
- But fig1-middle and fig5 had been judged when this change was adopted. It changed two
  verdicts: by UA, hard sets were *not slower*, and MIA approached the oracle's. Both
  are now *undecided*.
- The rates and the number of epochs of these runs were chosen after the first runs on
  the same sets, by how much of the gap they closed and how far they moved retained
  images. Those runs had also shown that *farther* is borne out in fig1-middle.
- The statistics of attack were chosen before any of its models was trained.
- Rates 0.06 and 0.08 (rates) and σ = 0.01 (fig1-left) replaced outer values at which
  speeds could not be judged. What those showed was known
  ([numbers](judges.md#rates-and-noise-1-december-2026)).
- Limits of correlations (fig2, fig9, ranks, literal) were chosen when similar
  correlations over all images were known, and the margins of *alike* after five sets
  had been seen.

So no rule for *slower* was fixed by the runs that it is tested on, except those of
fig1-middle and fig5, which fig8 repeats. *Farther* was known for its sets, and the
correlations over images were known, before the last rules were fixed.

## What changed since the last version

On 1 December 2026 prose and lists became tables, which changed no verdict. Then attack
was run for the first time, predicted with 20 sets, rates and fig1-left with
[other values](judges.md#rates-and-noise-1-december-2026), and the
[replication](#the-replication) was made. These changes came before:

The first version tested the order of five forget sets, of which three start at the
oracles. Its claims about times were borne out whatever happened. They are measured
again with 20 sets, one figure after the other. Figures whose turn has not come are *not
testable yet*, and their earlier run is described. Two attacks by simulated data showed
that the judges could be fooled, so the judges are stricter now. The search of settings
was mended three times, because it tried too few rates, had nothing to forget, or chose
rates that damage the model first. [The whole history](judges.md#what-changed-and-why)
has the reasons and numbers, and
[this list](judges.md#what-is-known-to-fool-the-judges) says what still fools the
judges.

## The figures

{figures}
{replication}{again}## Commands, scale and environment

```bash
python -m benchmarks.reproduce all --scale cpu --data-root DIR \\
    --data svhn FILE.npz --out benchmarks/results/reproduce/cpu
python -m benchmarks.reproduce.judging
python -m benchmarks.reproduce.page
```

The last command makes this page and [the page of judges](judges.md) from stored
numbers. All numbers, with seeds, settings and environment, are in
[`benchmarks/results/reproduce`](../benchmarks/results/reproduce).

{scale}
"""
_AGAIN = """## Repeated from scratch

These figures were made a second time with an empty store (`--store EMPTY --out
benchmarks/results/reproduce/again`), so that all models were trained again. All other
figures were run once.

"""


def main() -> None:
    """Write the pages and copy the pictures."""
    parser = parser_of("benchmarks.reproduce.page", __doc__)
    parser.parse_args()
    matplotlib.use("Agg")
    pictures = DOCS / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    found = stored(RESULTS)
    _publish(found, RESULTS)
    _publish(stored(REPLICATION), REPLICATION)
    for name, content in found.items():
        if content:
            shutil.copy(RESULTS / f"{name}.png", pictures)
    shutil.copy(REPLICATION / "fig1-middle.png", pictures / "replication.png")
    for name, text in whole_pages(found).items():
        (DOCS / name).write_text(text, encoding="utf-8")


def _publish(found: dict[str, Content | None], folder: Path) -> None:
    """Write the stored figures of a folder anew."""
    for name, content in found.items():
        if content:
            facts = content["result"], content["scale"], content["environment"]
            publish(FIGURES[name], *facts, folder)


def whole_pages(found: dict[str, Content | None]) -> dict[str, str]:
    """Return the text of both pages, by the name of their file.

    Args:
        found: The published content of each figure, or None if it has not been run.
    """
    text = page_of(found, stored(AGAIN), stored(REPLICATION), RESULTS)
    return {"results.md": text, "judges.md": judges_page(EARLIER)}


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
    found: dict[str, Content | None],
    again: dict[str, Content | None],
    other: dict[str, Content | None],
    results: Path,
    earlier: Path = EARLIER,
) -> str:
    """Return the text of docs/results.md.

    Args:
        found: The published content of each figure, or None if it has not been run.
        again: That of a second run.
        other: That on another data set.
        results: The folder with the figures' tables.
        earlier: The folder of earlier results, which can be described only.
    """
    verdicts, figures = {}, []
    for name, content in found.items():
        if content:
            verdicts[name] = Verdict.from_json(content)
            table = results / f"{name}.md"
            figures.append(section(FIGURES[name], verdicts[name], table))
        elif before := described(earlier, name):
            verdicts[name] = before[0]
            figures.append(section_of_earlier(FIGURES[name], *before))
        else:
            verdicts[name] = Verdict(NOT_RUN)
            figures.append(f"{head(FIGURES[name], verdicts[name])}\n")
    known = [content for content in found.values() if content]
    return _TEXT.format(
        summary=summary(verdicts),
        claims=table_of_claims(verdicts),
        figures="\n".join(figures),
        replication=replication_of(found, other),
        counted=counted(other) or "It has not been run.",
        again=again_of(found, again),
        scale=_scale(known[0]) if known else "Nothing has been run.",
    )


def again_of(found: dict[str, Content | None], again: dict[str, Content | None]) -> str:
    """Return a table of a second run from scratch beside the first."""
    rows = [["figure", "verdict", "verdict when repeated", "numbers"]]
    for name, second in again.items():
        first = found[name]
        if first and second:
            why = dict.fromkeys(one.reason for one in Verdict.from_json(second).judged)
            same = _compared(first["result"], second["result"])
            rows.append(
                [name, first["verdict"], second["verdict"], sentences(same, *why)]
            )
    return f"{_AGAIN}{markdown(rows)}\n\n"


def _compared(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return how many of the numbers that two results share are equal."""
    shared = first.keys() & second.keys()
    other = sorted(name for name in shared if first[name] != second[name])
    if other:
        return f"not the same to the last digit: {', '.join(other)}"
    what = "" if first.keys() == second.keys() else "what both runs stored is "
    return f"{what}the same to the last digit"


def _scale(content: Content) -> str:
    """Describe the main experiment and the machine of a figure."""
    main, where = content["scale"]["sgd"], content["environment"]
    recipe = main["recipe"]
    packages = ", ".join(f"{name} {one}" for name, one in where["packages"].items())
    return (
        f"**Scale** of the main experiment: {main['num_train']:,} training and "
        f"{main['num_test']:,} test images of {main['dataset']}, model "
        f"{recipe['model']}, {recipe['num_epochs']} epochs of SGD, learning rate "
        f"{recipe['learning_rate']}, momentum {recipe['momentum']}, Poisson batches of "
        f"{recipe['batch_size']} in expectation; {main['num_seeds']} trainings; "
        f"{main['num_sets']} forget sets of {main['set_size']} images; "
        f"{main['num_oracles']} oracles for each set. fig1-left trains and unlearns by "
        "SGLD, fig4 and certified are experiments of their own, ranks has further data "
        "sets and a further model, and fig8 a further size of the sets. The settings "
        "of each figure are in its JSON.\n\n"
        f"**Environment**: Python {where['python']}, {where['machine']}, "
        f"{where['cores']} cores, {packages}."
    )


if __name__ == "__main__":
    main()
