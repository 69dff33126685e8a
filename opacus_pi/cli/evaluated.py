"""What ties an evaluation to an unlearning run: data set, forget set and weights.

``evaluate`` writes these facts beside its numbers, and ``report`` compares them with
the record of the run. Otherwise a report could show retrained models for one forget set
beside a model that forgot another.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from opacus_pi.accounting import fingerprint
from opacus_pi.cli.errors import BadInput
from opacus_pi.ledger.same_data import same_data_set
from opacus_pi.models.weights_name import weights_name

# Metrics of ``evaluation.summarise`` whose examples are the forget set.
_OF_FORGET_SET = (
    *("unlearning_accuracy", "forget_loss", "forget_confidence"),
    "membership_inference",
)
_OTHER_SET = (
    "The retrained models were evaluated on a forget set of {evaluated} examples. But "
    "the metrics of this run were computed on the {asked} examples that it forgot. So "
    "retrained models are shown only for metrics that do not depend on the forget "
    "set. {path} compares the model with the retrained ones on the {evaluated} "
    "examples."
)
_UNCHECKED = (
    "Whether the evaluation is of this unlearning run is not known, because an earlier "
    "release wrote {0}. Compare model and forget set yourself."
)


def subject_of(
    train_set: Any, forget: Iterable[int], model: nn.Module
) -> dict[str, str]:
    """Return what an evaluation is about.

    Args:
        train_set: The training set.
        forget: Positions of the forget set.
        model: The evaluated model.
    """
    return {
        "data_set": fingerprint(train_set),
        "forget_set": name_of_set(forget),
        "weights": weights_name(model),
    }


def name_of_set(positions: Iterable[int]) -> str:
    """Return a hash of positions, whatever their order.

    Args:
        positions: Whole numbers.
    """
    text = json.dumps(sorted({int(position) for position in positions}))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def require_of_run(
    evaluation: Mapping[str, Any], record: Mapping[str, Any], path: Any
) -> tuple[str, ...]:
    """Refuse an evaluation of another model, forget set or data set than a run's.

    The forget set may also be that of all requests until then.

    Args:
        evaluation: What ``evaluate`` wrote.
        record: Of the unlearning run.
        path: The evaluation's file, for the message.

    Returns:
        A sentence, if one of the two files does not say what it is about.

    Raises:
        BadInput: If they are about different things.
    """
    subject = evaluation.get("subject")
    weights = record.get("unlearned_weights")
    if not isinstance(subject, dict) or weights is None:
        older = path if weights is not None else "the run"
        return (_UNCHECKED.format(older),)
    asked, before = record["forget_indices"], record["forgotten_before"]
    sets = [name_of_set(asked), name_of_set([*asked, *before])]
    agrees = {
        "data set": same_data_set(
            str(subject.get("data_set")), str(record.get("data_set"))
        ),
        "forget set": subject.get("forget_set") in sets,
        "model": subject.get("weights") == weights,
    }
    differing = [name for name, same in agrees.items() if not same]
    if differing:
        raise BadInput(
            f"--evaluation: {path} is of another {' and another '.join(differing)} "
            "than the unlearning run. Run 'opacus-pi evaluate' with "
            "RUN_DIR/weights.safetensors and the forget set of the run."
        )
    return ()


def of_same_set(
    evaluation: Mapping[str, Any],
    record: Mapping[str, Any],
    oracle: Mapping[str, Any] | None,
    path: Any,
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the metrics of retrained models that can stand beside those of a run.

    The metrics of a run are computed on the examples that it forgot. An evaluation may
    be of all requests until then, which are more examples.

    Args:
        evaluation: What ``evaluate`` wrote, about this run.
        record: Of the unlearning run.
        oracle: The metrics of retrained models in the evaluation, or None.
        path: The evaluation's file, for the sentence.

    Returns:
        The metrics, without those of another forget set, and a sentence if there were
        such metrics.
    """
    if oracle is None:
        return None, ()
    asked = record["forget_indices"]
    evaluated = evaluation.get("num_forget", len(asked))
    subject = evaluation.get("subject")
    is_same = evaluated == len(asked)
    if isinstance(subject, dict):
        is_same = subject.get("forget_set") == name_of_set(asked)
    if is_same:
        return dict(oracle), ()
    kept = {name: x for name, x in oracle.items() if name not in _OF_FORGET_SET}
    return kept, (_OTHER_SET.format(evaluated=evaluated, asked=len(asked), path=path),)
