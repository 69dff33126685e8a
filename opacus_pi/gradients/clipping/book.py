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

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from opacus_pi._validate import expect
from opacus_pi.gradients.bare import BareParameters
from opacus_pi.gradients.batches import floating, map_tensors
from opacus_pi.gradients.clipping.batch import Batch, Call, Inputs, WholeCall
from opacus_pi.gradients.clipping.layers import LayerListener, layer_rule
from opacus_pi.gradients.parameter_gradients import Formed, Gradients
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.gradients.taps import tapped

_ACCUMULATED = (
    "Poisson sampling is not compatible with grad accumulation. You need to call "
    "optimizer.step() after every forward/backward pass or consider using "
    "BatchMemoryManager"
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
        self.batches = []

    # ------------------------------------------------------------- the model's forward
    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called."""
        self._close()  # if an interrupt left it open
        is_copy = not self._listeners and self._bare is None
        if is_copy or not (model.training and torch.is_grad_enabled()):
            return
        inputs = Inputs((args, kwargs))
        sizes = [len(tensor) for tensor in inputs.tensors if tensor.dim()]
        expect(
            bool(sizes),
            "the model's input",
            ", ".join(type(v).__name__ for v in (*args, *kwargs.values())) or "nothing",
            "to hold a tensor with one row for each example",
            'Use grad_sample_mode="hooks".',
        )
        latest = self._latest
        if latest is None or latest in self.batches or latest.size != sizes[0]:
            latest = Batch(sizes[0])
        self._open = self._latest = latest
        self._open.calls.append(WholeCall(inputs))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter not in self._touch_hooks:
                handle = parameter.register_post_accumulate_grad_hook(self._touched)
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

    def _touched(self, parameter: Tensor) -> None:
        """A gradient reached a parameter by a way that is not listened to."""
        for batch in {*self.batches, self._latest}:
            if batch is not None:
                batch.leave_over([cast(nn.Parameter, parameter)])

    # ------------------------------------------------------------------ its operations
    def is_live(self, parameter: Any) -> bool:
        """Whether this is a parameter whose gradients are wanted here."""
        return isinstance(parameter, nn.Parameter) and parameter.requires_grad

    def wants(self, value: Any) -> bool:
        """Whether this is a tensor with one row for each example."""
        batch = self._running()
        return (
            batch is not None
            and isinstance(value, Tensor)
            and value.shape[:1] == (batch.size,)
            and torch.is_grad_enabled()
        )

    def _running(self) -> Batch | None:
        """The batch whose layers run: in a forward pass, or again in a backward pass.

        Layers run again where activations are not kept (``torch.utils.checkpoint``).
        """
        if self._open is not None or self._latest is None:
            return self._open
        again = self._is_training() and torch._C._current_graph_task_id() != -1
        return self._latest if again else None

    def miss(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A layer froze its parameters and cannot be tapped."""
        batch = self._running()
        if batch is not None:
            batch.leave_over(parameters.values())

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
        batch = self._running()
        assert batch is not None
        inputs = Inputs(call)

        def listen(grad: Tensor) -> None:
            self._reach(batch)
            if batch.size == 0:
                return
            found = None
            if inputs.are_unchanged:
                with torch.autocast(grad.device.type, enabled=False):  # of the loop
                    found = rule(inputs.widened, at_least_float32(grad))
            if found is None:
                batch.leave_over(parameters.values())
            else:
                batch.hear({parameters[n]: g for n, g in found.items()}, inputs)

        return tapped(output, self._anchor, listen)

    def tap_bare(
        self,
        output: Tensor,
        x: Tensor | None,
        parameter: nn.Parameter,
        gradient: Callable[[Tensor | None, Tensor], Tensor],
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
