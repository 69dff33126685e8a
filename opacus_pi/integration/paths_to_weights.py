"""Find weights that a loss uses outside of their layers' calls.

Opacus measures norms and per-example gradients by hooks at each layer's call. A path
from the loss to a weight that avoids the call, such as ``F.linear(x, layer.weight)`` or
``layer.forward(x)``, is not in them. What follows depends on the mode:

* **ghost clipping** adds up the gradients along every path in a second backward pass,
  so what an example contributes is not clipped to ``max_grad_norm``;
* **hooks and functorch** make the update of the per-example gradients only. The update
  is clipped, but norms and update are those of a part of each example's gradient.

The check walks through the graph that autograd made. Autograd numbers the nodes of a
thread in the order in which they were made, and hooks note the numbers at the beginning
and the end of each layer's call. Each node that hands a gradient to a weight must have
been made in between. In ghost clipping the walk begins at the loss, in the other modes
at the outputs of the model, because the loss is not known.

**Guarantee.** In a checked pass such a use is found however small its gradient is.
Nothing is computed with the model's tensors. Passes 1, 2, 4, 8, 16 and so on are
checked, and every 64th; in between the model has no additional hooks.

**What breaks it.** Compiled graphs and layers, checkpoints with ``use_reentrant=True``,
weights of FSDP: there autograd's graph does not lead to the parameters, and nothing is
reported. A loss that was computed before the check began (two losses before one
backward pass) is not judged.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import (
    backward_hooks,
    forward_hooks,
    forward_pre_hooks,
    remove_hooks,
    sequence_number,
)
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks
from opacus_pi.integration.explanations import listed
from opacus_pi.integration.opacus_compat import (
    has_functional_copy,
    keep_handle,
    module_of,
)
from opacus_pi.integration.outside_calls import OutsideCalls
from opacus_pi.integration.reporting_hook import ReportingHook
from opacus_pi.models.batches import tensors_of
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["PathsToWeights"]

_OUTSIDE = (
    "The loss uses {names} outside of the call of its layer, for example in a penalty "
    "on the weights, in a function such as F.linear(x, layer.weight), or by "
    "layer.forward(x). Ghost clipping measures norms at the calls of layers only, but "
    "the update has the gradients of all uses. So gradients were not clipped to "
    "max_grad_norm. Call the layer itself, and replace a penalty on the weights by the "
    "optimizer's weight_decay. Alternatively, use "
    'grad_sample_mode="fast", which clips the gradients of all uses in the model.'
)
_LEFT_OUT = (
    "The model uses {names} outside of the call of its layer, for example in a "
    "function such as F.linear(x, layer.weight), or by layer.forward(x). Opacus "
    "computes per-example gradients at the calls of layers only, and the update has no "
    "others. So the recorded norms are those of a part of each example's gradient, and "
    "the model is not trained on its loss. Call the layer itself; two layers can share "
    "one parameter (decoder.weight = encoder.weight). Alternatively, use "
    'grad_sample_mode="fast", which has the gradients of all uses in the model.'
)

# First and last number of the nodes that a call made.
_Range = tuple[int, int]


class PathsToWeights:
    """Checks some of the passes of a run.

    Args:
        hooks: What ``make_private`` returned for the model; referred to weakly.
        chain: Its link "norm" breaks; the first reason is enough.
        outside: Is told of calls of layers while the model is not running.
    """

    def __init__(
        self, hooks: AbstractGradSampleHooks, chain: Chain, outside: OutsideCalls
    ) -> None:
        self._module = weakref.ref(module_of(hooks))
        self._chain, self._outside = chain, outside
        self._looks = Looks()
        self._since = 0  # number of the first node that can be judged
        # of the layers that have a parameter, by its id
        self._ranges: dict[int, list[list[_Range]]] = {}
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._begin()

    def backward_begins(self, losses: Tensor) -> None:
        """Check a backward pass of ghost clipping if it is one of those to be checked.

        Args:
            losses: The losses of the examples, from which the pass begins.
        """
        self._check([losses], _OUTSIDE)

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Check a forward pass if it is one of those to be checked.

        Args:
            args: The positional inputs of the model.
            kwargs: Its inputs by keyword.
            outputs: Its outputs, with their graph.
        """
        self._check(outputs, _LEFT_OUT)

    def _check(self, results: Any, reason: str) -> None:
        """Walk from these tensors if the pass is to be checked.

        Args:
            results: Where autograd's graph ends, in any nesting.
            reason: Why a use outside of a call breaks the link, with ``{names}``.
        """
        self._looks.count()
        module = self._module()
        if self._handles and module is not None:
            outside = self._used_outside(tensors_of(results))
            self._end()
            if outside:
                named = [n for n, p in module.named_parameters() if id(p) in outside]
                text, shown = reason.format(names=listed(named)), reason is _OUTSIDE
                self._chain.break_link("norm", text, rules_out_epsilon=shown)
                return
        if self._looks.is_due:
            self._begin()

    def _begin(self) -> None:
        """Note from now on which nodes are made by which layer."""
        module = self._module()
        if module is None:
            return
        self._since, self._ranges, self._calls = _next_number(), {}, []
        model = _Call(ranges=[])
        for name, layer in module.named_modules():
            for table in (forward_pre_hooks(layer), forward_hooks(layer)):
                remove_hooks(table, _Call)
            if not any(map(is_hook_of_opacus, backward_hooks(layer).values())):
                continue
            ranges: list[_Range] = []
            for parameter in layer.parameters():
                self._ranges.setdefault(id(parameter), []).append(ranges)
            call = _Call(self._outside, name, ranges, model)
            self._calls.append(call)
            # torch repeats the call of some layers, with the forward hooks of the user
            is_first = not has_functional_copy(layer)
            self._handles += [
                layer.register_forward_pre_hook(call.begins),
                layer.register_forward_hook(call, prepend=is_first),
            ]
        self._handles += [  # the last ones, since the model itself may be a layer
            module.register_forward_pre_hook(model.begins),
            module.register_forward_hook(model),
        ]
        for handle in self._handles:
            keep_handle(module, handle)

    def _end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _used_outside(self, results: Sequence[Tensor]) -> set[int]:
        """Return the ids of parameters with a path that avoids their layers' calls.

        Layers whose calls were not noted, because they are compiled, are not judged.
        """
        for call in self._calls:
            call.ends()  # the model itself may be a layer, whose hooks still run
        outside: set[int] = set()
        for node, parameter in _uses_of_parameters(results):
            calls = self._ranges.get(id(parameter))
            number = sequence_number(node)
            if not calls or not any(calls) or number < self._since:
                continue
            if not any(first < number < last for c in calls for first, last in c):
                outside.add(id(parameter))
        return outside


class _Call(ReportingHook):
    """Notes which nodes were made in a module's ``forward``; copies of it do nothing.

    Args:
        outside: As for ``ReportingHook``; is told of a call that has ended, if the
            model was not running.
        name: The module's.
        ranges: Where the numbers of the nodes are appended.
        model: Notes the calls of the model; None: this is it.
    """

    def __init__(
        self,
        outside: OutsideCalls | None = None,
        name: str = "",
        ranges: list[_Range] | None = None,
        model: "_Call | None" = None,
    ) -> None:
        super().__init__(outside, name)
        self._ranges, self._model = ranges, model
        # the first node of each call that has not ended, if autograd followed it;
        # several, if a module calls itself
        self._begun: list[int | None] = []

    def begins(self, *_: Any) -> None:
        """Note the number at which a call begins."""
        if self._ranges is not None and not torch.compiler.is_compiling():
            is_followed = torch.is_grad_enabled()
            self._begun.append(_next_number() if is_followed else None)

    def __call__(self, layer: nn.Module, _: Any, output: Any) -> None:
        """Note that a call has ended, and report it."""
        self.ends()
        outside, model = self.owner, self._model
        if outside is None or model is None or model._begun:
            return
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            outside.saw(self.about, layer, output)

    def ends(self) -> None:
        """Note the number at which the call ended."""
        if self._ranges is None or torch.compiler.is_compiling() or not self._begun:
            return
        first = self._begun.pop()
        if first is not None:
            self._ranges.append((first, _next_number()))


def _next_number() -> int:
    """Return the number of the node that is made here, in the thread's order."""
    with torch.enable_grad():
        made = torch.ones((), requires_grad=True).neg().grad_fn
    assert made is not None
    return sequence_number(made)


def _uses_of_parameters(results: Sequence[Tensor]) -> Iterator[tuple[Node, Tensor]]:
    """Yield each node that hands a gradient to a parameter, and the parameter.

    Autocast casts a weight once and uses the result several times, so a node that hands
    a gradient to such a cast is one, too.

    Args:
        results: Where autograd's graph ends.
    """
    waiting = [tensor.grad_fn for tensor in results]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None or _is_compiled(node):
            continue
        for following, _ in node.next_functions:
            parameter = _parameter_of(following)
            if parameter is not None:
                yield node, parameter
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def _parameter_of(node: Node | None) -> Tensor | None:
    """Return the leaf to which a node hands its gradient, directly or as a cast."""
    if node is not None and node.name().startswith("ToCopyBackward"):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _is_compiled(node: Node) -> bool:
    """Return whether a node stands for a compiled graph."""
    return node.name().startswith("CompiledFunction")
