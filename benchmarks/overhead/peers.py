"""The contenders: ways to compute the gradient norm of every example of a batch.

Each contender is a function of ``(model, x, y)``. It prepares the model, which it may
change, and returns a function that measures the batch once and returns the norms, float
``(b,)``. ``plain`` and ``limit`` compute no norms and return None; they show what
training costs and what no method can undercut. Another library that is not installed,
or that rejects the model, raises ``Unsupported`` inside ``rejections``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from torch import Tensor, nn

from opacus_pi.gradients import per_example_grad_norms
from opacus_pi.gradients.fallback import raise_if_out_of_memory
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.batches import map_tensors

CRITERION = nn.CrossEntropyLoss()
# Contenders that must be able to measure every model
OWN = ("plain", "limit", "ours", "ours in a loop")
Measure = Callable[[], Tensor | None]
# Errors with which libraries reject a model or its layers
_REJECTIONS = (
    ImportError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
)


class Unsupported(Exception):
    """A library is not installed, or it cannot measure the model."""


@contextmanager
def rejections(name: str) -> Iterator[None]:
    """Turn the errors of another library into ``Unsupported``, with their first line.

    An error of one of ``OWN`` is raised as it is, and so is running out of memory.

    Args:
        name: The contender that is prepared or measured inside.

    Raises:
        Unsupported: The library is not installed or rejects the model.
    """
    try:
        yield
    except _REJECTIONS as error:
        if name in OWN:
            raise
        raise_if_out_of_memory(error)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise Unsupported(reason) from error


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Run forward and backward of the batch's mean loss, as a training step does."""

    def measure() -> None:
        model.zero_grad(set_to_none=True)
        CRITERION(model(x), y).backward()

    return measure


def limit(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Run the same with frozen weights: the least that one backward pass can cost."""
    model.requires_grad_(False)
    first = next(m for m in model.modules() if list(m.parameters(recurse=False)))
    anchor = torch.zeros((), device=x.device, requires_grad=True)

    def anchored(module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(lambda tensor: tensor + anchor, output)

    first.register_forward_hook(anchored)

    def measure() -> None:
        CRITERION(model(x), y).backward()

    return measure


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure as ``opacus_pi.gradients.norm_sweep`` does after its first batch."""
    engine = NormEngine(model, CRITERION)
    return lambda: engine.squares(x, y)[0].sqrt()


def in_a_loop(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure as ``per_example_grad_norms`` does when it is called in a loop."""
    return lambda: per_example_grad_norms(model, CRITERION, x, y)


def _grad_samples(wrapped: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Compute Opacus's per-example gradients, and their norms."""

    def measure() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        CRITERION(wrapped(x), y).backward()
        return _joint(p.grad_sample for p in wrapped.parameters())

    return measure


def _joint(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norms over all parameters, as Opacus computes them."""
    norms = [g.flatten(1).norm(2, dim=1) for g in gradients]
    return torch.stack(norms, 1).norm(2, dim=1)


def opacus_hooks(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with Opacus's ``grad_sample_mode="hooks"``."""
    return _grad_samples(GradSampleModule(model), x, y)


def opacus_functorch(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with Opacus's ``grad_sample_mode="functorch"``."""
    return _grad_samples(GradSampleModule(model, force_functorch=True), x, y)


def opacus_ew(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with Opacus's ``grad_sample_mode="ew"``."""
    return _grad_samples(GradSampleModuleExpandedWeights(model), x, y)


def opacus_ghost(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with Opacus's ``grad_sample_mode="ghost"``, up to the norms."""
    wrapped = GradSampleModuleFastGradientClipping(model)

    def measure() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        CRITERION(wrapped(x), y).backward()
        return wrapped.get_norm_sample()

    return measure


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Compute per-example gradients by ``torch.func``, and their norms."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(outputs, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: _joint(gradients(parameters, x, y).values())


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with BackPACK's ``BatchL2Grad``: linear and convolutional layers only."""
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    model, criterion = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def measure() -> Tensor:
        model.zero_grad(set_to_none=True)
        with recording(BatchL2Grad()):
            criterion(model(x), y).backward()
        return sum(p.batch_l2 for p in model.parameters()).sqrt()

    return measure


def fast_dp(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with FastDP, which then needs weight gradients of first layers only."""
    from fastDP.autograd_grad_sample import add_hooks

    for parameter in model.parameters():
        parameter.initially_requires_grad = True
        parameter.requires_grad_(False)
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    for layer in layers:  # the backward pass must reach the first layer of each path
        if layer is layers[0] or isinstance(layer, nn.Embedding):
            bias = getattr(layer, "bias", None)
            (layer.weight if bias is None else bias).requires_grad_(True)
    add_hooks(model, loss_reduction="mean", clipping_mode="MixOpt", block_heads=[])

    def measure() -> Tensor:
        model.zero_grad(set_to_none=True)
        CRITERION(model(x), y).backward()
        norms = _collected(model)
        for layer in layers:
            del layer.activations, layer.backprops
        return norms

    return measure


def private_transformers(model: nn.Module, x: Tensor, y: Tensor) -> Measure:
    """Measure with the ghost norms of private-transformers."""
    from private_transformers import autograd_grad_sample as hooks

    hooks.set_hooks_mode("ghost_norm")
    hooks.add_hooks(model, loss_reduction="mean")

    def measure() -> Tensor:
        model.zero_grad(set_to_none=True)
        CRITERION(model(x), y).backward()
        return _collected(model)

    return measure


def _collected(model: nn.Module) -> Tensor:
    """Return joint norms from those of each parameter, and delete the latter."""
    norms = []
    for parameter in model.parameters():
        norms.append(parameter.norm_sample)
        for name in ("norm_sample", "grad_sample"):
            if hasattr(parameter, name):
                delattr(parameter, name)
    return torch.stack(norms, 1).norm(2, dim=1)


CONTENDERS = {
    "plain": plain,
    "limit": limit,
    "ours": ours,
    "ours in a loop": in_a_loop,
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "Opacus functorch": opacus_functorch,
    "Opacus ew": opacus_ew,
    "torch.func": torch_func,
    "BackPACK": backpack,
    "FastDP": fast_dp,
    "private-transformers": private_transformers,
}
