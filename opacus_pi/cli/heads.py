"""``opacus-pi heads``: what a head that forgets with a certificate would cost.

A head is trained on the features of a frozen model, and the command says how accurate
it is, how many steps it takes to forget an example or a set, and which examples are the
hardest. It is a rehearsal and writes no head: the noise of a head that is released must
never be drawn again, so train that head in Python and keep it there.
"""

import argparse
from typing import Any

import numpy as np

from opacus_pi.cli.errors import about
from opacus_pi.cli.inputs import (
    import_collate,
    import_data_set,
    load_model,
    read_indices,
)
from opacus_pi.cli.output import answer, table
from opacus_pi.cli.sets import require_unseen
from opacus_pi.report.scores import SENSITIVE
from opacus_pi.unlearning.heads import (
    RidgeHead,
    SoftmaxHead,
    extract_features,
    unit_rows,
)
from opacus_pi.unlearning.heads.noisy_head import NoisyHead

FORMAT = "opacus_pi.cli.heads.v1"
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def run(options: argparse.Namespace) -> int:
    """Train a head on frozen features, and print what forgetting costs.

    Args:
        options: The parsed arguments of ``heads``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file or an object cannot be used, or the labels do not fit.
        ValueError: If an option is outside its domain.
    """
    train_set = import_data_set("--data", options.train_set)
    model = load_model(options, options.weights)
    collate = import_collate(options)
    rows, labels = _features(model, train_set, collate, "--data")
    head = _head(options)
    remedy = "Labels must be whole numbers from 0 to one less than --classes."
    with about("--data", remedy):
        head.fit(rows, labels)
    target = {"epsilon": options.epsilon, "delta": options.delta}
    steps, epsilons = head.steps_to(**target), head.epsilons(options.delta)
    top = head.ranking(options.delta)[: options.top]
    facts: dict[str, Any] = {
        "format": FORMAT,
        "sensitive": SENSITIVE,
        "head": options.head,
        "num_examples": len(rows),
        "num_features": rows.shape[1],
        "num_training_steps": head.num_steps,
        "noise_std": head.noise_std,
        **target,
        "accuracy": {"train": head.score(rows, labels), "test": None},
        "quantiles": {
            "probability": list(_QUANTILES),
            "epsilon": _quantiles(epsilons),
            "steps": _quantiles(steps),
        },
        "hardest": [
            {"id": int(i), "epsilon": float(epsilons[i]), "steps": int(steps[i])}
            for i in top
        ],
        "forget": _cost(options, head, target),
    }
    if options.test_set is not None:
        test = import_data_set("--test", options.test_set)
        require_unseen(train_set, test)
        on_test = _features(model, test, collate, "--test")
        facts["accuracy"]["test"] = head.score(*on_test)
    answer(options, facts, _text(facts))
    return 0


def _features(model: Any, data_set: Any, collate: Any, flag: str) -> tuple[Any, Any]:
    """Return unit feature vectors and labels of a data set."""
    with about(flag, "Name a model that returns one feature vector for each example."):
        features, labels = extract_features(model, data_set, collate_fn=collate)
        return unit_rows(features, intercept=True), labels


def _head(options: argparse.Namespace) -> NoisyHead:
    """Return the head that the options describe, before it is trained.

    An option that was not given keeps the default of the class.
    """
    kind = {"ridge": RidgeHead, "softmax": SoftmaxHead}[options.head]
    given = {
        "num_classes": options.num_classes,
        "noise_std": options.noise_std,
        "num_steps": options.num_steps,
        "regularisation": options.regularisation,
    }
    settings: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    return kind(seed=options.seed, **settings)


def _quantiles(values: np.ndarray[Any, Any]) -> list[float]:
    """Return quantiles over the examples; each is the value of an example."""
    found = np.quantile(values, _QUANTILES, method="nearest")
    return [float(value) for value in found]


def _cost(
    options: argparse.Namespace, head: NoisyHead, target: dict[str, float]
) -> dict[str, Any] | None:
    """Return what it would take to forget the set that was named, or None."""
    if options.forget_indices is None:
        return None
    indices = read_indices(options.forget_indices)
    cost = head.cost(indices, **target)
    return {
        "num_examples": len(indices),
        "epsilon_before": cost.epsilon_before,
        "steps": cost.num_steps,
        "epsilon": cost.epsilon,
        "retraining_steps": cost.num_retraining_steps,
    }


def _text(facts: dict[str, Any]) -> str:
    """Return the answer as text for a person."""
    quantiles, accuracy = facts["quantiles"], facts["accuracy"]
    on_test = "" if accuracy["test"] is None else f", test {accuracy['test']:.4g}"
    exact = "exact" if facts["head"] == "ridge" else "an upper bound"
    about_head = (
        f"{facts['head']} head on {facts['num_examples']} examples of "
        f"{facts['num_features']} features: accuracy train {accuracy['train']:.4g}"
        f"{on_test}, after {facts['num_training_steps']} steps with noise "
        f"{facts['noise_std']:g}.\nε at δ = {facts['delta']:g} is {exact}. "
        f"The column 'steps' has the unlearning steps until ε ≤ {facts['epsilon']:g}."
    )
    share = (f"{100 * p:g} %" for p in quantiles["probability"])
    rows = zip(share, quantiles["epsilon"], quantiles["steps"], strict=True)
    hardest = [[row["id"], row["epsilon"], row["steps"]] for row in facts["hardest"]]
    parts = [
        facts["sensitive"],
        about_head,
        "Quantiles over examples\n"
        + table(("", "ε before", "steps"), [[p, e, int(s)] for p, e, s in rows]),
        "Hardest examples\n" + table(("id", "ε before", "steps"), hardest),
    ]
    if cost := facts["forget"]:
        parts.append(
            f"To forget the {cost['num_examples']} examples together: ε "
            f"{cost['epsilon_before']:.4g} before, {cost['steps']} steps to ε "
            f"{cost['epsilon']:.4g}. Retraining takes {cost['retraining_steps']} steps."
        )
    return "\n\n".join(parts)
