"""Taps of a model that is being trained: fill a cache for clipping.

While the model runs in training mode, its layers are frozen and tapped
(:mod:`~opacus_pi.gradients.clipping.layer_hooks`), so that the backward pass computes
input gradients only. Each tap stores in the batch's cache the layer's input and output
gradient; weight gradients are computed once, as clipped sums, when all norms are known.

The guarantee: clipping gets each example's whole gradient from the cache, or an error.
A hook on each parameter is called when autograd reaches it in any other way. Its
per-example gradients are then computed by differentiating the whole model, and from the
next pass on it is no longer frozen. What breaks it: weights changed between the forward
pass and the step, and layers that draw random numbers and have no rule.

>>> import torch
>>> model, taps = nn.Linear(2, 1, bias=False), TrainingTaps()
>>> handles = taps.attach(model)
>>> model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
>>> (cache,) = taps.caches
>>> (gradients,) = cache.gradients(model.parameters(), model).values()
>>> gradients.squares, gradients.weighted_sum(torch.tensor([0.0, 1.0]))
(tensor([25.,  1.], dtype=torch.float64), tensor([0., 1.]))
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import current_backward_pass, forward_hooks
from opacus_pi.gradients.clipping.batch_cache import BatchCache, WholeCall
from opacus_pi.gradients.clipping.completeness import require_complete
from opacus_pi.gradients.clipping.layer_hooks import (
    LayerHooks,
    RecurrentHooks,
    layer_hooks,
)
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.gradients.parameters_outside_layers import ParametersOutsideLayers
from opacus_pi.gradients.position_tables import parameters_not_indexed_by_example
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.gradients.taps import Call, SavedInputs, TapRule, tapped
from opacus_pi.models.batches import floating, map_tensors
from opacus_pi.models.copies import same_mode_copy

_ACCUMULATED = (
    "Poisson sampling is not compatible with grad accumulation. You need to call "
    "optimizer.step() after every forward/backward pass or consider using "
    "BatchMemoryManager"
)  # the wording of Opacus

_UNEQUAL_CALLS = (
    "One backward pass went through calls of the model with different numbers of "
    "examples. The fast mode takes them for different batches, and under Poisson "
    "sampling an update has one. Call the model once with the examples of the batch, "
    "or several times with all of them, in the same order."
)
_AMBIGUOUS_BATCH = (
    "A backward pass through several batches ran layers again (torch.utils.checkpoint "
    "with use_reentrant=True), and it is not known for which of these batches. Use "
    "use_reentrant=False, or call backward() before the model is given the next batch."
)
_NO_TENSOR = (
    'grad_sample_mode="fast" needs a tensor with one row for each example among the '
    'inputs of the model, got {}. Use grad_sample_mode="hooks".'
)


class TrainingTaps:
    """Fill a cache for each physical batch whose backward pass has run.

    Copies of the object do nothing, so that a copied model is not tapped.

    Attributes:
        caches: One for each batch, in the order in which backward passes reached them.
        may_accumulate: Whether there may be more than one cache.
        shared_uses: Parameters used in a computation without a batch.
    """

    def __init__(self) -> None:
        self.caches: list[BatchCache] = []
        self.may_accumulate = True
        self.shared_uses: set[nn.Parameter] = set()
        # The batch that the model is running for now, and the one that it ran for last;
        # the latter may get further views until its backward pass begins.
        self._open: BatchCache | None = None
        self._latest: BatchCache | None = None
        self._backward_pass = -1  # the latest one through outputs of the model
        self._reached: list[BatchCache] = []  # by that backward pass
        self._accumulated: dict[nn.Parameter, Tensor] = {}  # by autograd, untapped
        self._left_to_autograd: set[nn.Parameter] | None = None  # None: not yet known
        self._anchor = torch.zeros((), requires_grad=True)  # see ``tapped``
        self._outside_layers: ParametersOutsideLayers | None = None
        self._is_training: Callable[[], bool] = bool
        self._layers: list[LayerHooks | RecurrentHooks] = []
        self._parameter_hooks: dict[nn.Parameter, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingTaps, ()

    def attach(self, model: nn.Module) -> list[Any]:
        """Intercept a model from now on.

        Parameters that belong to no tapped layer need a slower search among all
        operations of torch. It is switched on only if there are such parameters.

        Args:
            model: The model; gets forward hooks. The pre-hook comes before the user's,
                so that its inputs are those of the training loop.

        Returns:
            The handles that remove them.
        """
        reference = weakref.ref(model)  # hooks on parameters must not keep the model

        def is_training() -> bool:
            alive = reference()
            return alive is not None and alive.training

        self._is_training = is_training
        handles: list[Any] = []
        in_layers: set[nn.Parameter] = set()
        for module in model.modules():
            hooks = layer_hooks(self, module)
            if hooks is not None:
                self._layers.append(hooks)
                handles += hooks.attach(module)
                in_layers.update(module.parameters(recurse=False))
        if set(model.parameters()) - in_layers:
            self._outside_layers = ParametersOutsideLayers(self, model)
        else:
            self._outside_layers = None
        return [
            *handles,
            model.register_forward_pre_hook(
                self._before_model, with_kwargs=True, prepend=True
            ),
            model.register_forward_hook(
                self._after_model, with_kwargs=True, always_call=True
            ),
        ]

    def detach(self) -> None:
        """Drop all caches and the hooks on parameters."""
        self.clear()
        self._open = self._latest = None
        while self._parameter_hooks:
            self._parameter_hooks.popitem()[1].remove()

    def clear(self) -> None:
        """Drop the caches, except that of a forward pass awaiting its backward pass.

        A pass that was interrupted has left weights frozen. They are trainable again
        afterwards, so that Opacus, which skips frozen ones, clears their sums, too.
        """
        self._close()
        if self._latest in self.caches:
            self._latest = None
        self.caches, self._reached = [], []
        self._accumulated.clear()

    def require_complete(
        self, parameters: Iterable[nn.Parameter], model: nn.Module
    ) -> None:
        """Raise if autograd's sums contain a part that no example's gradient has.

        Args:
            parameters: The trained parameters, whose gradients the caches have
                returned.
            model: The live model.

        Raises:
            ValueError: If a part of the loss does not depend on the model's outputs;
                the message names the parameters that this part depends on.
        """
        full = [cache for cache in self.caches if cache.size]
        if not full:
            return
        touched = self._accumulated.keys() | {p for c in full for p in c.remainders}
        missed = {parameter for cache in full for parameter in cache.missed}
        compared = touched.intersection(parameters) - missed
        if compared:
            names = {p: name for name, p in model.named_parameters() if p in compared}
            remainders = [cache.remainders for cache in full]
            require_complete(names, remainders, self._accumulated)

    # ------------------------------------------------------------- hooks of the model
    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Open the batch's cache when the model is called.

        Passes in evaluation mode or without gradients are not changed. At the first
        batch of more than one example, parameters that are not indexed by examples are
        looked for, and left to autograd from then on.
        """
        self._close()  # an interrupt may have left it open
        self._reached = []
        is_copy = not self._layers and self._outside_layers is None
        if is_copy or not (model.training and torch.is_grad_enabled()):
            return
        inputs = SavedInputs((args, kwargs))
        cache = self._cache_for(inputs)
        if self._left_to_autograd is None and cache.size > 1:
            self._left_to_autograd = _not_indexed_by_example(
                model, inputs.call, cache.size
            )
        self._open = self._latest = cache
        cache.calls.append(WholeCall(inputs))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter not in self._parameter_hooks:
                handle = parameter.register_hook(partial(self._at_parameter, parameter))
                self._parameter_hooks[parameter] = handle
        if self._outside_layers is not None:
            self._outside_layers.__enter__()

    def _cache_for(self, inputs: SavedInputs) -> BatchCache:
        """Return the cache for a call: the latest one, or a new one.

        Two calls before a backward pass with equally many examples are taken for two
        views of one batch, as Opacus takes them; any other call begins a batch.

        Args:
            inputs: The arguments of the call. The length of the first tensor that has
                dimensions is the number of examples.

        Raises:
            ValueError: If there is no such tensor.
        """
        sizes = [len(tensor) for tensor in inputs.tensors if tensor.dim()]
        if not sizes:
            args, kwargs = inputs.call
            types = [type(v).__name__ for v in (*args, *kwargs.values())]
            raise ValueError(_NO_TENSOR.format(", ".join(types) or "no input"))
        latest = self._latest
        if latest is None or latest in self.caches or latest.size != sizes[0]:
            return BatchCache(sizes[0])
        return latest

    def _after_model(
        self, model: nn.Module, args: Any, kwargs: Any, outputs: Any
    ) -> Any:
        """Intercept the gradients at the outputs when the model has returned.

        Differentiating the whole model, for parameters without a rule, needs them.

        Returns:
            Outputs to be used in place of the model's; ``None``: the model's own.
        """
        cache = self._open
        self._close()
        if cache is None:
            return None
        if len(floating(outputs)) > 1:
            # One output may be computed from another: a view of each has a gradient
            # of its own. Loops scale a scalar loss in place, which views do not follow.
            outputs = map_tensors(
                lambda out: out.view_as(out) if out.dim() else out.clone(), outputs
            )
        for place, leaf in floating(outputs).items():
            if leaf.requires_grad:
                call = cache.calls[-1]
                leaf.register_hook(partial(self._at_output, cache, call, place))
        return outputs

    def _close(self) -> None:
        """Stop intercepting the forward pass.

        Called when the model has returned or failed, and again at its next call, in
        case an interrupt kept the forward hook from running.
        """
        if self._open is None:
            return
        self._open = None
        for layer in self._layers:
            layer.unfreeze()  # a layer that failed has not done it
        if self._outside_layers is not None:
            self._outside_layers.__exit__(None, None, None)

    def _at_output(
        self, cache: BatchCache, call: WholeCall, place: int, grad: Tensor
    ) -> None:
        """Note the gradient that reached an output of the model.

        A backward pass may reach several batches, in parts that torch runs one after
        the other. Parts of the same pass have the same number.

        Args:
            cache: The cache of the batch.
            call: The call that returned this output.
            place: Which of the floating outputs it is.
            grad: The gradient, ``(b, ...)``.
        """
        self._reach(cache)
        call.cotangents[place] = grad
        if self._backward_pass != (backward_pass := current_backward_pass()):
            self._backward_pass, self._reached = backward_pass, []
        if cache not in self._reached:
            self._reached.append(cache)

    def _at_parameter(self, parameter: nn.Parameter, grad: Tensor | None) -> None:
        """Note a gradient that reached a parameter through an operation without a tap.

        Its sum is kept to be compared with the examples' gradients
        (:meth:`require_complete`). To which batch it belongs is unknown, so every
        batch forms this parameter's gradients anew.

        Args:
            parameter: A parameter of the live model.
            grad: The gradient summed over the examples; what autograd adds to
                ``.grad``. ``None`` if a function with a backward pass of its own was
                given the parameter and returned nothing for it.
        """
        if grad is None:
            return
        for cache in {*self.caches, self._latest}:
            if cache is not None:
                cache.leave_over(parameter)
        if self._is_training():
            if self._left_to_autograd is not None:
                self._left_to_autograd.add(parameter)
            grad = grad.detach().to_dense()
            before = self._accumulated.get(parameter)
            total = grad.clone() if before is None else before + grad
            self._accumulated[parameter] = total

    # -------------------------------------------------------- the interface of ``Taps``
    def is_live(self, parameter: Any) -> bool:
        """Return whether this is a parameter whose gradients are wanted here.

        A parameter that an earlier pass has left to autograd is not: freezing it would
        lose the part that no tap sees.

        Args:
            parameter: Anything.
        """
        return (
            isinstance(parameter, nn.Parameter)
            and parameter.requires_grad
            and not (self._left_to_autograd and parameter in self._left_to_autograd)
        )

    def wants(self, value: Any) -> bool:
        """Return whether this is a tensor with one row for each example.

        The batch is that of the running forward pass, or, where layers run again within
        a backward pass, any that this backward pass may be computing.

        Args:
            value: Anything.
        """
        return (
            isinstance(value, Tensor)
            and torch.is_grad_enabled()
            and any(value.shape[:1] == (cache.size,) for cache in self._running())
        )

    def tap(
        self,
        output: Tensor,
        call: Call,
        parameters: Mapping[str, nn.Parameter],
        rule: TapRule,
    ) -> Tensor:
        """Store the gradients that follow from an output's gradient in the cache.

        Args:
            output: The output, ``(b, ...)``, computed with frozen parameters.
            call: The arguments of the operation.
            parameters: The live parameters, by the names that the rule returns.
            rule: Returns the examples' gradients from the arguments and the gradient
                at the output.

        Returns:
            The output, to be used in place of ``output``.
        """
        candidates, inputs = self._running(), SavedInputs(call)

        def store(grad: Tensor) -> None:
            if len(candidates) > 1:
                raise RuntimeError(_AMBIGUOUS_BATCH)
            (cache,) = candidates
            self._reach(cache)
            if cache.size == 0:
                return
            found = None
            if inputs.are_unchanged:
                # The training loop may run the backward pass under autocast.
                with torch.autocast(grad.device.type, enabled=False):
                    found = rule(inputs.widened, at_least_float32(grad))
                    found = found and {n: g.kept() for n, g in found.items()}
            if found is None:
                cache.miss(parameters.values())
            else:
                cache.add({parameters[n]: g for n, g in found.items()}, inputs)

        return tapped(output, self._anchor, store)

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Record that a layer froze its parameters and cannot be tapped.

        Its gradients are lost in this pass: neither autograd nor the cache has them, so
        they are formed through the whole model. From the next pass on the parameters
        stay live, and autograd has a sum to compare with.

        Args:
            parameters: The live parameters of the layer, by name.
        """
        for cache in self._running():
            cache.miss(parameters.values())
        if self._left_to_autograd is not None:
            self._left_to_autograd.update(parameters.values())

    def _running(self) -> list[BatchCache]:
        """Return the cache of the batch that layers run for now.

        Within a forward pass that is one. Within a backward pass, layers may run again
        because their activations were not kept (``torch.utils.checkpoint``); then it is
        each batch that this backward pass has reached. Otherwise there is none.
        """
        if self._open is not None:
            return [self._open]
        is_rerun = self._is_training() and current_backward_pass() != -1
        if not is_rerun or self._latest is None:
            return []
        return self._reached or [self._latest]

    def _reach(self, cache: BatchCache) -> None:
        """Record that a backward pass has reached a batch.

        Raises:
            ValueError: If it is the second one before a step, where Opacus allows one.
        """
        if cache in self.caches:
            return
        self.caches.append(cache)
        if len(self.caches) > 1 and not self.may_accumulate:
            is_same = self._reached and self._backward_pass == current_backward_pass()
            raise ValueError(_UNEQUAL_CALLS if is_same else _ACCUMULATED)


def _not_indexed_by_example(
    model: nn.Module, call: Call, size: int
) -> set[nn.Parameter]:
    """Return the live model's parameters applied to rows that are not the examples'.

    The search runs a copy, so that hooks, buffers and random states of the live model
    stay as they are.

    Args:
        model: The live model.
        call: The arguments of its first call.
        size: Number of examples in that call, at least 2.

    Returns:
        The parameters; none if the model cannot be copied or run on fewer examples.
        The comparison with autograd's sums remains then.
    """
    try:
        copied = same_mode_copy(model)
    except (*MODEL_ERRORS, copy.Error) as error:  # the model cannot be copied
        raise_if_out_of_memory(error)
        return set()
    for module in copied.modules():
        forward_hooks(module).clear()  # hooks of the user may store tensors
    found = parameters_not_indexed_by_example(copied, call, size)
    pairs = zip(copied.parameters(), model.parameters(), strict=True)
    return {ours for theirs, ours in pairs if theirs in found}
