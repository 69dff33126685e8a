"""Listen to a model that is being trained, and keep what clipping will need.

While a layer with a rule runs, its parameters are frozen, so that the backward pass
computes input gradients only; a tap on its output hears the gradient that arrives.
Weight gradients are computed when clip factors are known, by the weighted sums of
:mod:`~opacus_pi.gradients.parameter_gradients`.

>>> import torch
>>> model, book = nn.Linear(2, 1, bias=False), Book()
>>> handles = book.attach(model)
>>> model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
>>> (batch,) = book.batches
>>> (gradients,) = batch.gradients(model.parameters(), model).values()
>>> gradients.squares, gradients.weighted(torch.tensor([0.0, 1.0]))
(tensor([25.,  1.], dtype=torch.float64), tensor([0., 1.]))
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import current_backward_pass, forward_hooks
from opacus_pi._validate import expect
from opacus_pi.gradients.bare import BareParameters, ExampleGradients
from opacus_pi.gradients.clipping.batch import Batch, Call, Inputs, WholeCall
from opacus_pi.gradients.clipping.completeness import require_complete
from opacus_pi.gradients.clipping.layers import LayerListener, layer_rule
from opacus_pi.gradients.parameter_gradients import Formed, Gradients
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.gradients.shared_rows import weights_of_shared_rows
from opacus_pi.gradients.taps import tapped
from opacus_pi.models.batches import floating, map_tensors
from opacus_pi.models.copies import same_mode_copy

_ACCUMULATED = (
    "Poisson sampling is not compatible with grad accumulation. You need to call "
    "optimizer.step() after every forward/backward pass or consider using "
    "BatchMemoryManager"
)

_WHICH_BATCH = (
    "Layers ran again in a backward pass that goes through several batches "
    "(torch.utils.checkpoint with use_reentrant=True), and it is not known for which. "
    "Use use_reentrant=False, or call backward() before the model is given the next "
    "batch."
)

Rule = Callable[[Call, Tensor], Mapping[str, Gradients] | None]


class Book:
    """What backward passes have left for clipping, batch by batch.

    Attributes:
        batches: Those that a backward pass has reached, in that order.
        may_accumulate: Whether there may be more than one.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.may_accumulate = True
        self._open: Batch | None = None  # while the model runs
        self._latest: Batch | None = None
        self._pass_id = -1  # of the latest backward pass through outputs of the model
        self._under_way: list[Batch] = []  # those that it has reached
        self._unheard: dict[nn.Parameter, Tensor] = {}
        self._for_autograd: set[nn.Parameter] | None = None  # listened to no more
        self._anchor = torch.zeros((), requires_grad=True)
        self._bare: BareParameters | None = None
        self._is_training: Callable[[], bool] = bool
        self._listeners: list[LayerListener] = []
        self._touch_hooks: dict[nn.Parameter, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Book, ()  # copies are of nobody's training

    def attach(self, model: nn.Module) -> list[Any]:
        """Listen to a model from now on.

        Args:
            model: The model; gets forward hooks.

        Returns:
            The handles that remove them.
        """
        self._is_training = lambda: model.training
        handles: list[Any] = []
        heard: set[nn.Parameter] = set()
        for module in model.modules():
            rule = layer_rule(module)
            if rule is not None:
                listener = LayerListener(self, rule)
                self._listeners.append(listener)
                handles += listener.attach(module)
                heard.update(module.parameters(recurse=False))
        self._bare = BareParameters(self) if set(model.parameters()) - heard else None
        return [
            *handles,
            model.register_forward_pre_hook(
                self._begin, with_kwargs=True, prepend=True
            ),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Forget everything, and what hangs on the parameters."""
        self.clear()
        self._open = self._latest = None
        while self._touch_hooks:
            self._touch_hooks.popitem()[1].remove()

    def clear(self) -> None:
        """Forget the batches; a forward pass whose backward pass is to come stays."""
        if self._latest in self.batches:
            self._latest = None
        self.batches, self._under_way = [], []
        self._unheard.clear()

    def require_all_heard(
        self, parameters: Iterable[nn.Parameter], model: nn.Module
    ) -> None:
        """Raise if the examples' gradients are not all that autograd knows of.

        Args:
            parameters: Those that are trained; the batches have given their gradients.
            model: The live model.

        Raises:
            ValueError: If a part of the loss came by other ways than what the model
                returned, with the parameters that this part has reached.
        """
        full = [batch for batch in self.batches if batch.size]
        if not full:
            return
        touched = self._unheard.keys() | {p for batch in full for p in batch.owed}
        missed = {parameter for batch in full for parameter in batch.missed}
        looked_at = touched.intersection(parameters) - missed
        if looked_at:
            names = {p: name for name, p in model.named_parameters() if p in looked_at}
            require_complete(names, [batch.owed for batch in full], self._unheard)

    # ------------------------------------------------------------- the model's forward
    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called."""
        self._close()  # if an interrupt left it open
        self._under_way = []
        is_copy = not self._listeners and self._bare is None
        if is_copy or not (model.training and torch.is_grad_enabled()):
            return
        inputs = Inputs((args, kwargs))
        sizes = [len(tensor) for tensor in inputs.tensors if tensor.dim()]
        expect(
            bool(sizes),
            "the model's input",
            ", ".join(type(v).__name__ for v in (*args, *kwargs.values())) or "nothing",
            "must hold a tensor with one row for each example",
            'Use grad_sample_mode="hooks".',
        )
        latest = self._latest
        if latest is None or latest in self.batches or latest.size != sizes[0]:
            latest = Batch(sizes[0])
        if self._for_autograd is None and latest.size > 1:
            self._for_autograd = _used_on_shared_rows(model, inputs.call, latest.size)
        self._open = self._latest = latest
        self._open.calls.append(WholeCall(inputs))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter not in self._touch_hooks:
                handle = parameter.register_hook(partial(self._touched, parameter))
                self._touch_hooks[parameter] = handle
        if self._bare is not None:
            self._bare.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        """The model has returned, or failed."""
        batch = self._open
        self._close()
        if batch is None:
            return None
        if len(floating(outputs)) > 1:  # one may follow from another: hear each alone
            outputs = map_tensors(lambda output: output.view_as(output), outputs)
        for place, leaf in floating(outputs).items():
            if leaf.requires_grad:
                leaf.register_hook(partial(self._arrive, batch, batch.calls[-1], place))
        return outputs

    def _close(self) -> None:
        """Listen to the forward pass no longer."""
        if self._open is None:
            return
        self._open = None
        for listener in self._listeners:  # after an error within one
            listener.thaw()
        if self._bare is not None:
            self._bare.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _arrive(self, batch: Batch, call: WholeCall, place: int, grad: Tensor) -> None:
        """A gradient reached an output of the model."""
        self._reach(batch)
        call.cotangents[place] = grad
        if self._pass_id != (pass_id := current_backward_pass()):
            self._pass_id, self._under_way = pass_id, []
        if batch not in self._under_way:
            self._under_way.append(batch)

    def _touched(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """A gradient reached a parameter by a way that is not listened to."""
        for batch in {*self.batches, self._latest}:
            if batch is not None:
                batch.leave_over([parameter])
        if self._is_training():
            if self._for_autograd is not None:
                self._for_autograd.add(parameter)
            grad = grad.detach().to_dense()
            before = self._unheard.get(parameter)
            self._unheard[parameter] = grad.clone() if before is None else before + grad

    # ------------------------------------------------------------------ its operations
    def is_live(self, parameter: Any) -> bool:
        """Whether this is a parameter whose gradients are wanted here."""
        return (
            isinstance(parameter, nn.Parameter)
            and parameter.requires_grad
            and not (self._for_autograd and parameter in self._for_autograd)
        )

    def wants(self, value: Any) -> bool:
        """Whether this is a tensor with one row for each example."""
        return (
            isinstance(value, Tensor)
            and torch.is_grad_enabled()
            and any(value.shape[:1] == (batch.size,) for batch in self._running())
        )

    def _running(self) -> list[Batch]:
        """The batch whose layers run; in a backward pass, those that may run again.

        Layers run again where activations are not kept (``torch.utils.checkpoint``).
        """
        if self._open is not None:
            return [self._open]
        again = self._is_training() and current_backward_pass() != -1
        if not again or self._latest is None:
            return []
        return self._under_way or [self._latest]

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A layer froze its parameters and cannot be tapped."""
        for batch in self._running():
            batch.miss(parameters.values())
        if self._for_autograd is not None:
            self._for_autograd.update(parameters.values())

    def tap(
        self,
        output: Tensor,
        call: Call,
        parameters: Mapping[str, nn.Parameter],
        rule: Rule,
    ) -> Tensor:
        """Listen to the gradient that will arrive at an operation's output.

        Args:
            output: The output, ``(b, ...)``, of frozen parameters.
            call: The arguments.
            parameters: The live parameters, by name.
            rule: Gives each one's gradients by arguments and output gradient.

        Returns:
            The output, to be used in place of it.
        """
        batches, inputs = self._running(), Inputs(call)

        def listen(grad: Tensor) -> None:
            if len(batches) > 1:  # layers that run only to be heard again are not heard
                raise RuntimeError(_WHICH_BATCH)
            (batch,) = batches
            self._reach(batch)
            if batch.size == 0:
                return
            found = None
            if inputs.are_unchanged:
                with torch.autocast(grad.device.type, enabled=False):  # of the loop
                    found = rule(inputs.widened, at_least_float32(grad))
            if found is None:
                batch.miss(parameters.values())
            else:
                batch.hear({parameters[n]: g for n, g in found.items()}, inputs)

        return tapped(output, self._anchor, listen)

    def tap_bare(
        self,
        output: Tensor,
        x: Tensor | None,
        parameter: nn.Parameter,
        gradient: ExampleGradients,
    ) -> Tensor:
        """Listen to an operation on one parameter, as ``BareParameters`` has it."""

        def rule(call: Call, grad: Tensor) -> dict[str, Gradients]:
            (x,), _ = call
            return {"parameter": Formed(gradient(x, grad))}

        return self.tap(output, ((x,), {}), {"parameter": parameter}, rule)

    def _reach(self, batch: Batch) -> None:
        """A backward pass has come to a batch."""
        if batch in self.batches:
            return
        self.batches.append(batch)
        if len(self.batches) > 1 and not self.may_accumulate:
            raise ValueError(_ACCUMULATED)


def _used_on_shared_rows(model: nn.Module, call: Call, size: int) -> set[nn.Parameter]:
    """The live model's parameters whose rows are not the examples'."""
    try:
        twin = same_mode_copy(model)
    except Exception:  # of any kind: a model that cannot be copied
        return set()
    for module in twin.modules():
        forward_hooks(module).clear()  # the user's may collect what they see
    found = weights_of_shared_rows(twin, call, size)
    pairs = zip(twin.parameters(), model.parameters(), strict=True)
    return {ours for theirs, ours in pairs if theirs in found}
