"""Find out whether a model's outputs depend on the number of examples.

A model that multiplies its outputs by the size of the batch treats no example
differently when another one is replaced. But if an example is left out, the gradients
of all others change, so clipping does not bound what the example contributes. The last
example of a batch is therefore left out, and the outputs of the others must stay.

Dropout and other random draws depend on the shapes of tensors. So if the model draws
random numbers, both runs are made without dropout, and in evaluation mode if it still
draws. Kernels may round differently for another number of rows, so outputs that are not
equal bit for bit are compared again in float64.

**Guarantee.** A model whose outputs, on the given batch, depend on the number of
examples by more than 1e-9 of the largest output is found.

**What breaks it.** The outputs are not compared if the model cannot be run with another
number of examples, if it draws random numbers in evaluation mode, or if the batch has
fewer than three examples. A number of examples that the loop passes as an argument of
its own is not changed.
"""

from dataclasses import replace

from torch import Tensor

from opacus_pi.custody.finding import Finding
from opacus_pi.custody.probed_call import (
    ProbedCall,
    ProbedRun,
    distance,
    rounding_of,
)
from opacus_pi.gradients.fallback import MODEL_ERRORS

__all__ = ["compare_without_one"]

_FEWEST = 3  # with two, the other run has one example, whose dimension may be squeezed
_TOLERANCE = 1e-9  # in float64, relative to the largest output

_SAME = (
    "Replacing half of a batch of {size} examples, or leaving one out, did not change "
    "the model's outputs for the others."
)
_COUNTED = (
    "The model's outputs depend on the number of examples in the batch: without one of "
    "{size} examples, the outputs of the others changed by {share:.1g} times the "
    "largest output. So each example changes the gradients of all others, and "
    "max_grad_norm does not bound what an example contributes. Do not use the number "
    "of examples in the model."
)
_PERHAPS_COUNTED = (
    "Without one of {size} examples, the model's outputs for the others changed. "
    "There are two possible causes. If the model uses the number of examples, change "
    "it so that it does not. If one of its inputs is a table shared by all examples, "
    "make this table a buffer of the model."
)


def compare_without_one(call: ProbedCall, whole: ProbedRun) -> Finding | None:
    """Compare the outputs of a batch with those of the batch without its last example.

    Args:
        call: A call whose outputs depend on no other example's values.
        whole: Its run.

    Returns:
        What was found; None if the outputs could not be compared.
    """
    if call.size < _FEWEST:
        return None
    try:
        calm, whole = _without_draws(call, whole)
        share = _change(whole, calm.without_last().run(), call.size)
    except MODEL_ERRORS:
        return None
    if share is None or whole.has_drawn:
        return None
    if share == 0.0 or _is_rounding(calm):
        return Finding("checked", _SAME.format(size=call.size))
    if any(tensor.shape.count(call.size) > 1 for tensor in call.inputs[1:]):
        return Finding("unchecked", _PERHAPS_COUNTED.format(size=call.size))
    return Finding("broken", _COUNTED.format(size=call.size, share=share))


def _without_draws(call: ProbedCall, whole: ProbedRun) -> tuple[ProbedCall, ProbedRun]:
    """Return a call that draws as few random numbers as possible, and its run.

    Args:
        call: A call on the whole batch.
        whole: Its run.
    """
    if whole.has_drawn:
        call = replace(call, has_dropout=False)
        whole = call.run()
    if whole.has_drawn:
        call = replace(call, is_training=False)
        whole = call.run()
    return call, whole


def _is_rounding(call: ProbedCall) -> bool:
    """Return whether outputs change by rounding only, as far as float64 can tell.

    Args:
        call: A call on the whole batch that draws no random numbers.
    """
    try:
        exact, tolerance = call.in_float64(), _TOLERANCE
        whole, fewer = exact.run(), exact.without_last().run()
    except MODEL_ERRORS:  # it computes in a type of its own
        tolerance = rounding_of(call)
        whole, fewer = call.run(), call.without_last().run()
    share = _change(whole, fewer, call.size)
    return share is None or share <= tolerance


def _change(whole: ProbedRun, fewer: ProbedRun, size: int) -> float | None:
    """Return the largest change of outputs, relative to the largest output.

    Args:
        whole: The run with all examples.
        fewer: The run without the last one.
        size: The number of all examples.

    Returns:
        None if no output has one row for each example.
    """
    if len(whole.outputs) != len(fewer.outputs):
        return None
    changes = []
    for one, other in zip(whole.outputs, fewer.outputs, strict=True):
        found = [
            distance([one.narrow(dim, 0, size - 1)], [other])
            for dim in _example_dims(one, other, size)
        ]
        changes += [min(found)] if found else []
    return max(changes) if changes else None


def _example_dims(one: Tensor, other: Tensor, size: int) -> list[int]:
    """Return the dimensions along which an output has one entry less.

    Args:
        one: Outputs of all examples.
        other: Outputs without the last one.
        size: The number of all examples.
    """
    if one.dim() != other.dim():
        return []
    found = []
    for dim, length in enumerate(one.shape):
        shorter = [*one.shape[:dim], size - 1, *one.shape[dim + 1 :]]
        if length == size and list(other.shape) == shorter:
            found.append(dim)
    return found
