"""Ways to get every example's gradient norm of a batch, and plain training beside them.

Each takes ``(model, x, y)`` and returns a function that measures the batch once and
returns the norms, float ``(b,)`` (``plain`` returns ``None``). Models are theirs to
change.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from opacus_pi.gradients.engine import NormEngine

CRITERION = nn.CrossEntropyLoss()
Measure = Callable[[], Tensor | None]


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Forward and backward of the batch's mean loss: what a training step costs."""

    def measure() -> None:
        model.zero_grad(set_to_none=True)
        CRITERION(model(x), y).backward()

    return measure


def limit(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """The same with frozen weights: the floor of any method with one backward pass."""
    model.requires_grad_(False)
    first = next(m for m in model.modules() if list(m.parameters(recurse=False)))
    anchor = torch.zeros((), requires_grad=True)
    first.register_forward_hook(lambda module, args, output: output + anchor)

    def measure() -> None:
        CRITERION(model(x), y).backward()

    return measure


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """One batch of ``opacus_pi.gradients.norm_sweep``, after the first."""
    engine = NormEngine(model, CRITERION)
    return lambda: engine.squares(x, y)[0].sqrt()


def opacus_hooks(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Opacus's per-example gradients, and their norms."""
    wrapped = GradSampleModule(model)

    def measure() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        CRITERION(wrapped(x), y).backward()
        norms = [p.grad_sample.flatten(1).norm(2, dim=1) for p in wrapped.parameters()]
        return torch.stack(norms, 1).norm(2, dim=1)

    return measure


def opacus_ghost(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Opacus's ghost clipping, up to the norms."""
    wrapped = GradSampleModuleFastGradientClipping(model)

    def measure() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        CRITERION(wrapped(x), y).backward()
        return wrapped.get_norm_sample()

    return measure


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """``vmap(grad)`` over ``functional_call``, and the norms."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(outputs, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def measure() -> Tensor:
        found = gradients(parameters, x, y).values()
        norms = [g.flatten(1).norm(2, dim=1) for g in found]
        return torch.stack(norms, 1).norm(2, dim=1)

    return measure


CONTENDERS = {
    "plain": plain,
    "limit": limit,
    "ours": ours,
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": opacus_ghost,
    "torch.func": torch_func,
}
