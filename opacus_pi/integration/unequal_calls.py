"""Find layers that one forward pass calls with different numbers of rows.

Opacus adds up the per-example gradients of all calls that a layer has before its
backward pass: row j of each call counts for example j of the batch. A model may call a
layer again for some examples only (``x[hard]``), or for rows of no example, such as
prototypes that go through the encoder. Their gradients are then added to those of
examples that they do not belong to. Which rows a call has is not known; how many is.

*Guarantee.* Every forward pass is looked at, and so is every layer whose gradients
Opacus computes from its inputs, also if two layers share a parameter. What is found is
reported only if a backward pass follows: Opacus then drops the inputs that it kept of
the calls. So an evaluation in training mode is not reported. Nothing is computed with
tensors, and layers that are called once cost 0.1 µs.

*What breaks it.* Calls of equally many rows in another order: ``custody/layer_rows.py``
looks for them. The layers inside of Opacus's recurrent layers, which are called for
each time step, with fewer rows where a sequence has ended. A loop that itself drops the
inputs that Opacus kept: that is taken to be a backward pass.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opacus.grad_sample import AbstractGradSampleHooks
from opacus.layers.dp_rnn import RNNLinear
from opacus.optimizers import DPOptimizer
from torch import Tensor

from opacus_pi.custody import Chain
from opacus_pi.integration.held_weights import ids_held_by
from opacus_pi.integration.opacus_compat import inputs_of_calls, module_of

__all__ = ["UnequalCalls"]

_UNEQUAL = (
    "Before one backward pass, {name} (or a layer that shares its parameter) was "
    "called with different numbers of rows. Opacus adds the gradient of row j of each "
    "call to that of example j of the batch. If the rows of a smaller call are not the "
    "first examples of the batch, in its order, a norm and a clipped gradient are made "
    "of several examples. Call engine.audit(criterion), which compares the norms with "
    "those of single examples. Give each call one row for each example, in the order "
    "of the batch, or use a layer of its own for other rows."
)


@dataclass(frozen=True)
class _Found:
    """Calls of a layer that have different numbers of rows.

    Args:
        name: Of the layer.
        kept: The inputs of its calls, while Opacus keeps them for a backward pass.
    """

    name: str
    kept: list[weakref.ref[Tensor]]

    def had_backward(self) -> bool:
        """Return whether a backward pass has used some of the calls."""
        return any(reference() is None for reference in self.kept)


class UnequalCalls:
    """Compares how many rows the calls of a layer have in each forward pass.

    Args:
        hooks: What Opacus made of the model; it computes gradients in hooks.
        optimizer: What Opacus made of the optimizer; referred to weakly.
        chain: Its link "rows" is left unchecked.
    """

    def __init__(
        self, hooks: AbstractGradSampleHooks, optimizer: DPOptimizer, chain: Chain
    ) -> None:
        module = module_of(hooks)
        self._optimizer, self._chain = weakref.ref(optimizer), chain
        self._batch_dim = 0 if hooks.batch_first else 1
        self._found: _Found | None = None  # no backward pass of it was seen
        uses = Counter(
            id(p) for m in module.modules() for p in m.parameters(recurse=False)
        )
        # each with its name, and whether another layer has one of its parameters
        self._layers = [
            (weakref.ref(layer), name, any(uses[id(p)] > 1 for p in own))
            for name, layer in module.named_modules()
            if (own := list(layer.parameters(recurse=False)))
            and not isinstance(layer, RNNLinear)
        ]

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Compare the calls of a forward pass that has just ended.

        Args:
            args: The positional inputs of the model; not used.
            kwargs: Its inputs by keyword; not used.
            outputs: Its outputs; not used.
        """
        self.gradients_were_used()  # before another finding replaces this one
        names: dict[int, str] = {}
        found: dict[int, list[Tensor]] = {}  # inputs of calls, by id of the parameter
        for reference, name, is_tied in self._layers:
            layer = reference()
            calls = inputs_of_calls(layer)
            if layer is not None and calls and (is_tied or len(calls) > 1):
                inputs = [call[-1] for call in calls if call]
                for parameter in layer.parameters(recurse=False):
                    found.setdefault(id(parameter), []).extend(inputs)
                    names.setdefault(id(parameter), name)
        unequal = [k for k, inputs in found.items() if self._have_unequal_rows(inputs)]
        optimizer = self._optimizer()
        trained = ids_held_by(optimizer) if unequal and optimizer is not None else ()
        for key in unequal:
            if key in trained:
                self._found = _Found(names[key], list(map(weakref.ref, found[key])))
                return

    def _have_unequal_rows(self, inputs: Iterable[Tensor]) -> bool:
        """Return whether inputs have different numbers of rows, as Opacus counts them.

        Args:
            inputs: Of calls of layers that have the same parameter.
        """
        dim = self._batch_dim
        return len({given.shape[dim] for given in inputs if given.dim() > dim}) > 1

    def gradients_were_used(self) -> None:
        """Report what was found if a backward pass has followed."""
        if self._found is not None and self._found.had_backward():
            self._report(self._found.name)
            self._found = None

    def _report(self, name: str) -> None:
        """Leave the link unchecked; the numbers of rows change from batch to batch."""
        shown = f"the layer {name!r}" if name else "the model"
        self._chain.leave_unchecked("rows", _UNEQUAL.format(name=shown))
