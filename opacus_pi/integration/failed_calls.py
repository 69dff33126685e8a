"""What an audit says of a model or a criterion that fails on a batch, or on a part.

An audit calls both on a batch, and on each example alone. The errors of torch name the
tensor that an operation was given, and not what the user can change. So an error on the
whole batch is raised again with the shapes of the inputs. If a model runs on the batch
and fails on one example, this is a result of the audit: BatchNorm fails there if each
channel has one value in an example, and a layer may need a fixed number of rows.

*What breaks it.* A model that fails by chance: its error is then raised as it is.
"""

from typing import Any

from torch import nn

from opacus_pi._torch_compat import BatchNormBase
from opacus_pi.custody.finding import Finding
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.integration.audited_update import TrainedLoss, forward_with_precision
from opacus_pi.integration.explanations import listed
from opacus_pi.models.backward_gradients import gradients_by_backward
from opacus_pi.models.batches import forward, num_examples, rows_of, tensors_of
from opacus_pi.models.live_modules import ModelInCriterion
from opacus_pi.models.own_losses import CoupledLoss
from opacus_pi.models.precision import Precision

__all__ = ["failure_alone", "outputs_of_batch", "require_fitting"]

_NOT_RUN = (
    "model(x) fails for inputs of the shape {inputs}: {error}. Training would fail, "
    "too. Change the model, or what the data set and collate_fn return, so that the "
    "model runs on a batch."
)
_NOT_CALLED = (
    "criterion(outputs, targets) fails for outputs of the shape {outputs} and targets "
    "of the shape {targets}: {error}."
)
_TOKENS = (
    "The model gives each example several labels. Pass TokenLoss() of "
    "opacus_pi.integration.hugging_face as criterion, or TokenLoss(shift=True) for a "
    "causal language model, and train with it: "
    "Trainer(compute_loss_func=...), or the same call in your loop."
)
_FITTING = "Pass the criterion with which the loop computes its loss from the logits."
_ALONE = (
    "The {part} runs on the batch of {size} examples but fails on one of them alone "
    "({error}), so the norms could not be compared."
)
_BATCH_NORM = (
    "BatchNorm in training mode ({layers}) computes statistics over the batch: every "
    "output depends on all of its examples, and no gradient belongs to one. Call "
    ".eval() on such layers after model.train(), or replace them by nn.GroupNorm (by "
    "nn.LayerNorm where an example is a vector)."
)
_ANY_SIZE = (
    "The usual causes are statistics over the batch, a fixed number of rows, and "
    "squeeze(). A batch of training may have one example, too: Poisson sampling may "
    "draw it, or the last batch is smaller. Training would fail there. Change the "
    "{part} so that one example can be a batch, and audit again."
)


def _first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def _shapes(tree: Any) -> str:
    """Return the shapes of the tensors in a nested structure, as text."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(tree))


def outputs_of_batch(model: nn.Module, x: Any) -> tuple[Any, Precision]:
    """Return the outputs of a model, and in which precision it computed them.

    Args:
        model: A copy of the model.
        x: Inputs of a batch.

    Raises:
        ValueError: If the model fails; the message has the shapes.

    >>> import torch
    >>> outputs_of_batch(nn.Linear(3, 2), torch.ones(4, 5))
    Traceback (most recent call last):
        ...
    ValueError: model(x) fails for inputs of the shape (4, 5): ...
    """
    try:
        return forward_with_precision(model, x)
    except MODEL_ERRORS as error:
        raise_if_out_of_memory(error)
        text = _NOT_RUN.format(inputs=_shapes(x), error=_first_line(error))
        raise ValueError(text) from error


def require_fitting(loss: TrainedLoss, outputs: Any, y: Any) -> None:
    """Raise if a criterion cannot be called on the outputs of a batch.

    Args:
        loss: The criterion.
        outputs: Of the model.
        y: The targets.

    Raises:
        ValueError: If it cannot; the message has the shapes.
    """
    try:
        loss(outputs, y)
    except (CoupledLoss, ModelInCriterion):
        return
    except MODEL_ERRORS as error:
        given, wanted = tensors_of(outputs), tensors_of(y)
        is_tagged = len(given) == len(wanted) == 1 and (
            given[0].dim() == 3 and given[0].shape[:2] == wanted[0].shape
        )
        remedy = _TOKENS if is_tagged else _FITTING
        text = _NOT_CALLED.format(
            outputs=_shapes(outputs), targets=_shapes(y), error=_first_line(error)
        )
        raise ValueError(f"{text} {remedy}") from error


def failure_alone(
    model: nn.Module, loss: TrainedLoss, x: Any, y: Any, dim: int
) -> Finding | None:
    """Say why a model or its loss fails on single examples of a batch.

    Args:
        model: A copy of the model, which runs on the batch.
        loss: The criterion.
        x: Inputs of b examples.
        y: Their targets.
        dim: The dimension of the inputs along which the examples are.

    Returns:
        "broken" if BatchNorm is the cause, else "unchecked"; None if neither fails.
    """
    size, part = num_examples(y), ""
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for i in range(size):
            one, target = rows_of((x, y), [i], size, dim)
            part = "model"
            outputs = forward(model, one)
            part = "criterion"
            gradients_by_backward(loss(outputs, target), parameters)
    except (CoupledLoss, ModelInCriterion):
        return None
    except MODEL_ERRORS as error:
        raise_if_out_of_memory(error)
        text = _ALONE.format(part=part, size=size, error=_first_line(error))
        layers = [
            name or type(layer).__name__
            for name, layer in model.named_modules()
            if isinstance(layer, BatchNormBase) and layer.training
        ]
        if part == "model" and layers:
            remedy = _BATCH_NORM.format(layers=listed(layers))
            return Finding("broken", f"{text} {remedy}")
        return Finding("unchecked", f"{text} {_ANY_SIZE.format(part=part)}")
    return None
