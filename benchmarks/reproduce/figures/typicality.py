"""Are the examples of high privacy loss atypical? Figure 9, and a number beside it.

Claim: examples that are easy to forget look typical, hard ones atypical. The paper
shows pictures. We also count how many of an example's nearest training images, by
Euclidean distance of the pixels, have another label. No model influences this number.

Data: all training images of the scale's main experiment. Seeds: pictures and shares use
the mean loss over the seeds' ledgers. Settings: 10 neighbours; hardest and easiest set
have the size of a forget set; 8 pictures of each kind. Primary statistic: Spearman's ρ
within classes, of up to 1,000 examples drawn at random, against 0.3; its interval is
over classes, and over the trainings' own ledgers. The limit was fixed after ρ over all
examples had been seen.
"""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure as Picture
from numpy.typing import NDArray
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.judging.examples import (
    Correlations,
    above,
    within_classes,
)
from benchmarks.reproduce.judging.verdicts import Verdict
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import trainings
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.accounting import privacy_losses
from opacus_pi.plotting import plot_pictures

NEIGHBOURS = 10
SHOWN = 8  # pictures of each kind
CORRELATED = 0.3  # Spearman's rho above this counts as confirming the claim
LABELS = {
    "fashion-mnist": (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
}


def disagreement(
    images: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of each image's nearest neighbours that have another label.

    Args:
        images: ``(n, ...)``, any shape of pixels.
        labels: ``(n,)``.

    Returns:
        Shares in [0, 1], ``(n,)``.
    """
    search = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute")
    search.fit(images.reshape(len(images), -1))
    others = search.kneighbors(
        return_distance=False
    )  # an image is not its own neighbour
    return (labels[others] != labels[:, None]).mean(1)


def _pictures(scale: Scale, workspace: Workspace) -> Result:
    images, labels = (t.numpy() for t in workspace.images(scale.sgd).train.tensors)
    ledgers, order = workspace.ledgers(scale.sgd), scale.sgd.order
    atypical = disagreement(images, labels)
    by_seed = [
        float(stats.spearmanr(privacy_losses([one], order), atypical).statistic)
        for one in ledgers
    ]
    losses = workspace.scores(scale.sgd)["privacy loss"]
    ranked = losses.argsort(kind="stable")
    size, drawn = scale.sgd.set_size, outcomes.drawn_examples(len(labels))
    rows = {"lowest loss": ranked[:SHOWN], "highest loss": ranked[::-1][:SHOWN].copy()}
    return {
        "dataset": scale.sgd.dataset,
        "neighbours": NEIGHBOURS,
        "num_examples": len(labels),
        "spearman": by_seed,
        "drawn": {
            "privacy loss": outcomes.rounded_to_json(losses[drawn]),
            "of another label": atypical[drawn].tolist(),
            "class": labels[drawn].tolist(),
        },
        "of_another_label": {
            "lowest loss": float(atypical[ranked[:size]].mean()),
            "highest loss": float(atypical[ranked[-size:]].mean()),
            "all": float(atypical.mean()),
        },
        "rows": {
            name: {
                "ids": ids.tolist(),
                "labels": labels[ids].tolist(),
                "losses": losses[ids].tolist(),
                "images": (images[ids] * 255).round().astype(int).tolist(),
            }
            for name, ids in rows.items()
        },
    }


def _judge_pictures(result: Result) -> Verdict:
    found = above(_within(result), CORRELATED, 2)
    share = {k: f"{100 * v:.0f} %" for k, v in result["of_another_label"].items()}
    labels = (
        f"of the {result['neighbours']} nearest training images "
        f"{share['highest loss']} have another label in the hardest set, "
        f"{share['lowest loss']} in the easiest, {share['all']} overall"
    )
    return replace(found, remarks=(labels, *found.remarks))


def _within(result: Result) -> Correlations:
    """Return the correlation with the privacy loss, of trainings and within classes."""
    drawn = result.get("drawn")
    of_classes = (
        within_classes(drawn["privacy loss"], drawn["of another label"], drawn["class"])
        if drawn
        else np.array([])
    )
    return Correlations(np.array(result["spearman"], dtype=np.float64), of_classes)


def _draw_pictures(result: Result) -> Picture:
    rows, names = result["rows"], LABELS.get(result["dataset"], ())
    titles = {
        name: [
            f"{names[label] if names else label}\nloss {loss:.1e}"
            for label, loss in zip(row["labels"], row["losses"], strict=True)
        ]
        for name, row in rows.items()
    }
    arrays = {name: np.array(row["images"]) / 255 for name, row in rows.items()}
    return plot_pictures(arrays, titles)[0, 0].figure


FIGURES = [
    Figure(
        "fig9",
        "Examples of high privacy loss look atypical.",
        lambda scale: list(trainings(scale.sgd)),
        _pictures,
        _judge_pictures,
        _draw_pictures,
        note="*Atypical* is measured by how many of the 10 nearest training images (by "
        "pixels) have another label; this share is correlated with the privacy loss, "
        "on up to 1,000 images drawn at random. The picture shows the eight images of "
        "lowest and the eight of highest loss.",
    ),
]
