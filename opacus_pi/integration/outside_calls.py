"""Find layers that the training loop runs outside of the model's forward pass.

A loop may call a layer or another method of the model besides the model itself, such
as ``model.head(model.encoder(x))`` or ``model._module.score(x)``. Opacus adds the
gradients of such a call to those of the forward pass, row by row. But the inputs of
the call are compared with no batch, and the probe of the model does not repeat it. Its
rows may be those of other examples (``score(x[torch.randperm(b)])``); then each clipped
gradient is made of two examples, and clipping bounds what neither of them contributes.

``PathsToWeights`` has hooks at the calls of the model and of its layers. It reports
here the calls of layers while the model is not running, and a hook on the output notes
when a backward pass reaches it.

*Guarantee.* Calls are reported from the end of pass n - 1 to the end of pass n, for the
passes 1, 2, 4, 8, 16 and so on, and every 64th (of ghost clipping: between the
beginnings of the backward passes). Such a layer is found if its gradients enter an
update. Passes in evaluation mode or without gradients, layers that run again within a
backward pass (checkpointing) and gradients that are cleared before an update are not
reported.

*What breaks it.* Modes without such hooks: the fast mode refuses these gradients, and
with ew they are not in the update (``lost_gradients``). An update without any forward
pass of the model, whose samples are unattributed for that reason. A forward pass that
raised an error: calls up to the next checked pass then count as made within it.
"""

import weakref
from functools import partial
from typing import Any

from opacus.grad_sample import AbstractGradSampleHooks
from torch import Tensor, nn

from opacus_pi._torch_compat import current_backward_pass, is_functorch_wrapped_tensor
from opacus_pi.attribution import Tracker
from opacus_pi.attribution.causes import UNSEEN
from opacus_pi.custody import Chain
from opacus_pi.models.batches import tensors_of

__all__ = ["OutsideCalls"]

_OUTSIDE = (
    "The training loop ran the layer {name!r} outside of the model's forward pass, and "
    "used the result in the loss, for example by calling the layer itself or a method "
    "of the model other than forward. Opacus adds the gradient of row j of such a call "
    "to that of example j. The library does not see what the call was given. So it was "
    "not checked that its row j holds data of example j only, and that its result for "
    "one example depends on that example only. Call the model itself, for example with "
    "an argument of forward that chooses the method."
)


class OutsideCalls:
    """Notes calls of layers while the model's forward pass is not running.

    Args:
        hooks: What Opacus made of the model; referred to weakly.
        tracker: Knows whether forward passes of the model were seen at all.
        chain: Its links "rows" and "model" are left unchecked.
    """

    def __init__(
        self, hooks: AbstractGradSampleHooks, tracker: Tracker, chain: Chain
    ) -> None:
        self._hooks = weakref.ref(hooks)
        self._tracker, self._chain = tracker, chain
        self._found = ""  # a layer whose gradients no update has used yet
        self._is_told = False  # one layer is enough

    def saw(self, name: str, layer: nn.Module, output: Any) -> None:
        """Watch the output of a call while the model is not running, if Opacus does.

        Args:
            name: The layer's.
            layer: The layer, which was called with gradients enabled.
            output: What its ``forward`` has returned.
        """
        if self._is_told or current_backward_pass() != -1:
            return
        follows = getattr(self._hooks(), "hooks_enabled", False) and layer.training
        if not (follows and any(p.requires_grad for p in layer.parameters())):
            return
        for tensor in tensors_of(output):
            if tensor.requires_grad and not is_functorch_wrapped_tensor(tensor):
                tensor.register_hook(partial(self._was_reached, name))

    def _was_reached(self, name: str, _: Tensor) -> None:
        """Note that a backward pass has reached the output of a call."""
        self._found = name

    def gradients_were_cleared(self) -> None:
        """Forget what was found in passes whose gradients no update will use."""
        self._found = ""

    def gradients_were_used(self) -> None:
        """Report what was found: the gradients of the passes enter an update."""
        found, self._found = self._found, ""
        if found and UNSEEN.name not in self._tracker.causes:
            self._is_told = True
            sentence = _OUTSIDE.format(name=found)
            self._chain.leave_unchecked("rows", sentence)
            self._chain.leave_unchecked("model", sentence, warn=False)
