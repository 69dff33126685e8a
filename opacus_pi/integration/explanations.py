"""Notes on errors of Opacus that name the parameters at fault and what to do.

Opacus stacks the norms of all parameters. A parameter that is used on one row for the
whole batch, such as a position embedding, has one gradient instead of one for each
example, and a layer that is given all nodes of a graph has one for each node. Then
``torch.stack`` fails without naming the parameters. The error keeps its type; the note
is added to it.

Torch refuses to overwrite the output of a layer with backward hooks. The note on this
error names ``opacus_pi.compatible.make_compatible`` as the remedy.

A forward pass without a backward pass leaves Opacus waiting, and later steps fail with
errors about missing gradients or shared parameters. So does activation checkpointing,
which calls layers again during the backward pass. The note names the possible causes.
An empty Poisson batch makes some models fail; the note says so.
Ghost clipping allows one call of each layer before a backward pass. If outputs of an
earlier forward pass still wait for theirs, or if the first forward pass of the model
already fails, the note names this cause alone.

>>> model = nn.ModuleDict({"words": nn.Linear(2, 1), "position": nn.Linear(2, 1)})
>>> parameters = dict(model.named_parameters())
>>> counts = {p: 1 if n.startswith("position") else 4 for n, p in parameters.items()}
>>> unusual_numbers(model, counts)
{'position.weight': 1, 'position.bias': 1}
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from opacus.grad_sample import AbstractGradSampleHooks
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from opacus_pi._class_swap import swap_class
from opacus_pi._torch_compat import (
    BACKWARD_HOOK_FUNCTION,
    current_backward_pass,
    forward_hooks,
)
from opacus_pi.attribution.forward_probe import ForwardProbe
from opacus_pi.integration.opacus_compat import (
    keep_handle,
    module_of,
    norms_of_parameters,
    unfinished_calls,
)
from opacus_pi.models.batches import tensors_of
from opacus_pi.models.copies import unwrap

_NUM_NAMES = 3
REPLACE_LAYERS = (
    "module = opacus_pi.compatible.make_compatible(module) replaces BatchNorm by "
    "GroupNorm, and lets in-place operations work on copies. Create the optimizer "
    "after it, from the new module's parameters."
)
"""What to do with a model that Opacus cannot train as it is."""

_IN_PLACE = (
    "Opacus cannot train a model that overwrites the output of a layer in place. "
    f"{REPLACE_LAYERS}"
)
_UNUSUAL_NUMBERS = (
    "Every parameter needs one gradient per example. The batch has {size} examples, "
    "but these parameters have another number of gradients: {unusual}. The usual cause "
    "is a layer that is given one row for the whole batch, such as a position "
    "embedding: models of transformers make one row of position_ids if none are "
    "passed. Give each example its own row "
    "(position_ids=torch.arange(length).expand(batch, -1)), or freeze these parameters "
    '(requires_grad_(False)), or try grad_sample_mode="fast", which works if '
    "torch.func.vmap can run the model."
)
_OTHER_ROWS = (
    "Every parameter needs one gradient per example, but a layer has one for each row "
    "that it is given, and these numbers differ: {counts}. This happens if some layers "
    "are given all nodes of a graph and others only those of the batch, or if the "
    "model makes several rows of an example. Give each layer one row for each example, "
    'or try grad_sample_mode="fast", which works if torch.func.vmap can run the model '
    "for each example alone."
)
_FROZEN_SINCE = (
    "Parameters were frozen (requires_grad_(False)) after make_private. Ghost clipping "
    "still adds their gradient norms, which are those of an earlier batch. Call "
    'make_private after freezing layers, or use grad_sample_mode="hooks".'
)
_UNFINISHED = (
    "Opacus waits for the backward pass of some calls of the model's layers, in later "
    "batches too. There are several possible causes. A forward pass had no backward "
    "pass, because its loss or a part of its outputs was not used: make it under "
    "torch.no_grad() or in evaluation mode. Or a forward pass failed half-way (out of "
    "memory) and was repeated: go on from a checkpoint with a new make_private. Or "
    "activation checkpointing (torch.utils.checkpoint, gradient checkpointing) called "
    'the layers twice: use grad_sample_mode="fast", or train without it.'
)
_CALLED_IN_BACKWARD = (
    "A layer was called again during the backward pass, as activation checkpointing "
    "does (torch.utils.checkpoint, gradient checkpointing). Ghost clipping allows one "
    'call of each layer. Use grad_sample_mode="fast", or train without checkpointing.'
)
_TWO_PASSES = (
    "The model was called again while the outputs of an earlier forward pass still "
    "exist, and no backward pass has run for them. Ghost clipping allows one forward "
    "pass for each backward pass. If both enter one loss, use "
    'grad_sample_mode="hooks" or "fast". If the earlier one needs no gradients, make '
    "it under torch.no_grad() or in evaluation mode."
)
_CALLED_TWICE = (
    "The model calls a layer more than once in one forward pass. Ghost clipping allows "
    'one call of each layer. Use grad_sample_mode="hooks" or "fast".'
)
_EMPTY = (
    "The batch is empty: Poisson sampling draws each example by chance, and drew none. "
    "This model cannot run on 0 samples. Use a larger batch size, with which an empty "
    "batch is rare (e to the power of -batch_size), or poisson_sampling=False."
)
_TYING = "Parameter tying"  # of Opacus's error for parameters that are called twice
_EXPANDED_INDICES = (
    "Ghost clipping cannot use indices that are one row shared by all examples, such "
    "as the token types and positions that a model of transformers makes by itself. "
    "Put them into each example (token_type_ids=torch.zeros_like(input_ids), "
    "position_ids=torch.arange(length)), or freeze these embeddings "
    "(requires_grad_(False))."
)
_SIZES_ERROR = "must match the size of tensor"  # torch's, for losses and clip factors
_VIEW_ERROR = "view size is not compatible"  # torch's, for indices that are expanded


def explain_numbers_of_gradients(
    error: RuntimeError, model: nn.Module, counts: Mapping[nn.Parameter, int]
) -> None:
    """Add to an error which parameters have too few or too many gradients.

    Args:
        error: The error, changed in place; left as it is if all numbers are equal.
        model: The model with these parameters, plain or wrapped.
        counts: How many per-example gradients each parameter has.
    """
    unusual = unusual_numbers(model, counts)
    if unusual and set(unusual.values()) == {1}:
        shown = ", ".join(f"{name!r} ({count})" for name, count in unusual.items())
        size = _usual_number(counts)
        add_note(error, _UNUSUAL_NUMBERS.format(size=size, unusual=shown))
    elif unusual:
        add_note(error, _OTHER_ROWS.format(counts=_shown(model, counts)))


def _shown(model: nn.Module, counts: Mapping[nn.Parameter, int]) -> str:
    """Return the numbers of gradients, each with the first parameters that have it."""
    names: dict[int, list[str]] = {}
    for name, parameter in unwrap(model).named_parameters():
        if parameter in counts:
            names.setdefault(counts[parameter], []).append(name)
    return "; ".join(f"{num} for {listed(names[num])}" for num in sorted(names))


def explain_unfinished(error: Exception, parameters: Iterable[nn.Parameter]) -> None:
    """Add to an error that calls of layers await their backward pass, if some do.

    Args:
        error: Opacus's, changed in place: some parameters lack their gradients.
        parameters: Those that are trained.
    """
    if any(map(unfinished_calls, parameters)):
        add_note(error, _UNFINISHED)


def unusual_numbers(
    model: nn.Module, counts: Mapping[nn.Parameter, int]
) -> dict[str, int]:
    """Return the parameters whose number of gradients differs from that of most.

    Args:
        model: The model with these parameters, plain or wrapped.
        counts: How many per-example gradients each parameter has.

    Returns:
        The number for each such parameter, by the name that the user's model gives it.
    """
    usual = _usual_number(counts)
    return {
        name: counts[parameter]
        for name, parameter in unwrap(model).named_parameters()
        if counts.get(parameter, usual) != usual
    }


def _usual_number(counts: Mapping[nn.Parameter, int]) -> int:
    """Return the number that most parameters have; the largest of several."""
    frequencies = Counter(counts.values())
    return max(frequencies, key=lambda number: (frequencies[number], number))


def explain_ghost_losses(criterion: DPLossFastGradientClipping) -> None:
    """Add the same notes to errors in the backward passes of ghost clipping.

    Args:
        criterion: What Opacus made of the user's criterion, changed in place.
    """
    swap_class(criterion, _returning_explained_losses)


def _returning_explained_losses(base: type) -> type:
    """Make a criterion whose losses explain their errors."""

    class Criterion(base):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return swap_class(super().__call__(*args, **options), _explained_loss)

    return Criterion


def _explained_loss(base: type) -> type:
    """Make a loss that explains the errors of its backward passes."""

    class Loss(base):
        def backward(self) -> None:
            try:
                super().backward()
            except RuntimeError as error:
                num_losses = self.loss_per_sample.numel()
                _explain_backward(error, module_of(self.module), num_losses)
                raise

    return Loss


def _explain_backward(error: RuntimeError, model: nn.Module, num_losses: int) -> None:
    """Explain an error of ghost clipping by the norms that it left at the parameters.

    Args:
        error: The error, changed in place.
        model: The user's model. The backward pass has stored norms at some of its
            parameters before it failed; their lengths show which of them differ.
        num_losses: How many examples the criterion returned losses of.
    """
    parameters = list(model.parameters())
    norms = zip(parameters, norms_of_parameters(parameters), strict=True)
    counts = {p: len(found) for p, found in norms if found is not None}
    if any(not parameter.requires_grad for parameter in counts):
        add_note(error, _FROZEN_SINCE)
    elif _TYING in str(error):
        add_note(error, _CALLED_IN_BACKWARD)
    elif _VIEW_ERROR in str(error):
        add_note(error, _EXPANDED_INDICES)
    elif _SIZES_ERROR in str(error) and set(counts.values()) - {num_losses}:
        shown = f"{_shown(model, counts)}; {num_losses} losses of the criterion"
        add_note(error, _OTHER_ROWS.format(counts=shown))
    elif counts:
        explain_numbers_of_gradients(error, model, counts)


def _has_shared_parameters(model: nn.Module) -> bool:
    """Return whether several layers of a model have the same parameter."""
    named = model.named_parameters(remove_duplicate=False)
    return len(list(named)) > len(list(model.parameters()))


def explain_forward_errors(hooks: AbstractGradSampleHooks) -> None:
    """Add notes to errors that hooks cause in a forward pass of the model.

    Torch raises one when a model overwrites the output of a hooked layer, and Opacus
    when ghost clipping meets a layer that is called twice before its backward pass.

    Args:
        hooks: What ``make_private`` returned for the model: a wrapper, or its hooks.
            Removing its hooks removes this one, too.
    """
    root = module_of(hooks)
    table = forward_hooks(root).values()
    if not any(isinstance(hook, _ExplainsForward) for hook in table):
        handle = root.register_forward_hook(
            _ExplainsForward(), always_call=True, with_kwargs=True
        )
        keep_handle(root, handle)


class _ExplainsForward:
    """Adds a note to errors of forward passes; a forward hook with ``always_call``.

    Torch calls such a hook also while an error of the forward pass is being raised.
    """

    def __init__(self) -> None:
        self._is_first = True  # no forward pass has left calls that wait

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Look at the error of a forward pass that has just ended, if there is one."""
        error = sys.exc_info()[1]
        if error is not None and _is_empty((args, kwargs)):
            add_note(error, _EMPTY)
        elif isinstance(error, RuntimeError) and BACKWARD_HOOK_FUNCTION in str(error):
            add_note(error, _IN_PLACE)
        elif isinstance(error, NotImplementedError) and _TYING in str(error):
            is_in_backward = current_backward_pass() >= 0  # whose loss adds the note
            if not (is_in_backward or _has_shared_parameters(module)):
                self._explain_calls(error, module)
        self._is_first = False

    def _explain_calls(self, error: Exception, module: nn.Module) -> None:
        """Say which calls came before the one that ghost clipping refuses.

        Args:
            error: Opacus's, changed in place.
            module: The user's model.
        """
        if self._is_first:
            add_note(error, _CALLED_TWICE)
        elif _has_waiting_pass(module):
            add_note(error, _TWO_PASSES)
        else:
            explain_unfinished(error, module.parameters())


def _is_empty(inputs: Any) -> bool:
    """Return whether a forward pass was given no samples.

    Args:
        inputs: Those of the pass, nested. Some may have one row for all samples.
    """
    sizes = {tensor.shape[0] for tensor in tensors_of(inputs) if tensor.dim()}
    return 0 in sizes and sizes <= {0, 1}


def _has_waiting_pass(module: nn.Module) -> bool:
    """Return whether outputs of a forward pass exist that had no backward pass.

    Args:
        module: The user's model.
    """
    probes = [h for h in forward_hooks(module).values() if isinstance(h, ForwardProbe)]
    trackers = [probe.tracker for probe in probes if probe.tracker is not None]
    passes = [f for tracker in trackers for f in tracker.awaiting_backward()]
    return any(not f.clipped for f in passes)


def listed(names: Iterable[str]) -> str:
    """Return the first few names of parameters, as a message shows them.

    Args:
        names: All of them.

    >>> listed(["f.weight", "f.bias", "g.weight", "g.bias"])
    "'f.weight', 'f.bias', 'g.weight', ..."
    """
    shown = list(names)
    more = ", ..." if len(shown) > _NUM_NAMES else ""
    return ", ".join(map(repr, shown[:_NUM_NAMES])) + more


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, whose type and message stay the same.

    Args:
        error: The error, changed in place. On Python 3.10, which has no notes, the
            note becomes a further argument of the error.
        note: The text to add.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = (*error.args, note)
