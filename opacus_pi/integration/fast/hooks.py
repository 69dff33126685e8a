"""What ``make_private`` makes of a model in fast mode: Opacus's interface, a book."""

from typing import Any, cast

from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from torch import nn

from opacus_pi.gradients.clipping import Book


class FastHooks(AbstractGradSampleHooks):
    """Listens to a model without wrapping it.

    Kept in memory until ``optimizer.step()`` has clipped: for each layer either its
    input and the gradient at its output, or the examples' gradients where these are
    smaller. No ``grad_sample`` is ever set, nor ``grad`` before the step.

    Args:
        m: The model.
        batch_first: Must be true: examples are along the first dimension.
        loss_reduction: ``"mean"`` or ``"sum"``, the criterion's.

    Raises:
        NotImplementedError: If a trainable layer has buffers, as Opacus has it.
    """

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean"
    ) -> None:
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        GradSampleHooks.validate(module=m, strict=True)
        if hasattr(m, "autograd_grad_sample_hooks"):
            raise ValueError("Trying to add hooks twice to the same model")
        self.book = Book()
        cast(Any, m).autograd_grad_sample_hooks = self.book.attach(m)

    def set_grad_sample_to_none(self) -> None:
        """Forget the batches whose backward pass was made."""
        super().set_grad_sample_to_none()
        self.book.clear()

    def forbid_grad_accumulation(self) -> None:
        """From now on, a second backward pass before a step is an error."""
        self.book.may_accumulate = False

    def allow_grad_accumulation(self) -> None:
        """From now on, several backward passes may precede a step."""
        self.book.may_accumulate = True

    def remove_hooks(self) -> None:
        """Listen no longer."""
        for handle in self._module.__dict__.pop("autograd_grad_sample_hooks", []):
            handle.remove()
        self.book.detach()


class FastGradSampleModule(FastHooks, AbstractGradSampleModule):
    """The same as a wrapper of the model.

    Args:
        m: The model.
        **options: Of ``FastHooks``.
    """

    def __init__(self, m: nn.Module, **options: Any) -> None:
        nn.Module.__init__(self)
        FastHooks.__init__(self, m, **options)
        self.grad_accumulation_hook = None
