"""Everything of Opacus that the package uses and Opacus does not promise.

Opacus publishes no list of stable internals, so every attribute, function and hook
point that may change between its releases is reached through this module and through
no other: when Opacus changes, this file changes. All names were seen in, and
tested with, Opacus 1.6.0; ``setup.py`` admits releases 1.6 only.
``tests/integration/test_opacus_compat.py`` fails if a name is gone or means something
else, and ``tests/test_private_names.py`` if another file uses such a name.

Public names of Opacus (its classes, documented methods and arguments) are imported
directly where they are used.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, cast

from opacus import __version__ as _release
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.grad_sample import (
    AbstractGradSampleHooks,
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleHooksFastGradientClippingFSDP,
    GradSampleHooksFastGradientClippingTP,
    GradSampleModuleExpandedWeights,
)
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DistributedDPOptimizer,
    DistributedDPOptimizerFastGradientClipping,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
    FSDPOptimizerFastGradientClipping,
    SimpleDistributedPerLayerOptimizer,
)
from opacus.optimizers import optimizer as _optimizer_module
from opacus.utils import batch_memory_manager
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import (
    DPLossFastGradientAdaptiveClipping,
)
from opacus.utils.fast_gradient_clipping_utils import (
    DPLossFastGradientClipping,
    DPTensorFastGradientClipping,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import backward_hooks

__all__ = [
    "CRITERIA",
    "DISTRIBUTED",
    "GHOST_LOSS",
    "GHOST_METHODS",
    "OPTIMIZER_METHODS",
    "OVERRIDDEN_METHODS",
    "SEEN_IN",
    "STEP_METHODS",
    "clipped_norms",
    "draws_shipped_noise",
    "ends_draw",
    "has_functional_copy",
    "has_skipped_last_step",
    "inputs_of_calls",
    "keep_handle",
    "mark_as_processed",
    "module_of",
    "noise_function",
    "norms_of_parameters",
    "num_captures",
    "patch_memory_manager",
    "pop_removable_handles",
    "removable_handles",
    "require_unprocessed",
    "restore_memory_manager",
    "set_removable_handles",
    "unfinished_calls",
    "uses_opacus_gradients",
]

SEEN_IN = ("1.6.0",)
"""Releases of Opacus in which every name of this module was found and tested."""

DISTRIBUTED = (DDP, DPDDP, FSDPModule)
"""Wrappers for which Opacus 1.6.0 prepares a distributed run in ``make_private``."""

OVERRIDDEN_METHODS = {
    "_prepare_model": "Checks the recorder first, and prepares the fast mode. Called "
    "first by make_private; returns the wrapper or the hooks.",
    "_prepare_data_loader": "Notes the loader. Called second; returns Opacus's Poisson "
    "loader, or the user's own.",
    "_prepare_optimizer": "Notes the optimizer, and has it clip in the fast mode. "
    "Called third, before the accountant's step hook is attached.",
    "_prepare_criterion": "Adds explanations to the errors of ghost clipping. Called "
    "last, in the ghost modes only.",
}
"""Private methods of Opacus's engine (1.6.0) that ours overrides, with the reason.

They are the only places between the model, the loader and the optimizer at which a
subclass can act without repeating ``make_private``.
"""


def _functions(
    classes: Sequence[type], names: Sequence[str]
) -> dict[str, frozenset[Any]]:
    """Return the functions that classes of Opacus define, by name.

    A function that somebody else has put into a class is not among them, unless it
    wraps Opacus's as torch does: it has the same ``__module__``.

    Args:
        classes: Classes of Opacus.
        names: Of methods and properties.
    """
    found: dict[str, set[Any]] = {name: set() for name in names}
    for cls in classes:
        for name in found.keys() & vars(cls).keys():
            defined = vars(cls)[name]
            function = defined.fget if isinstance(defined, property) else defined
            if function.__module__ == cls.__module__:
                found[name].add(defined)
    return {name: frozenset(functions) for name, functions in found.items()}


_OPTIMIZERS = (
    DPOptimizer,
    DPPerLayerOptimizer,
    AdaClipDPOptimizer,
    DistributedDPOptimizer,
    SimpleDistributedPerLayerOptimizer,
    DPOptimizerFastGradientClipping,
    DistributedDPOptimizerFastGradientClipping,
    FSDPOptimizerFastGradientClipping,
)
OPTIMIZER_METHODS = _functions(
    _OPTIMIZERS,
    (
        "clip_and_accumulate",
        "accumulate",
        "grad_samples",
        "_get_flat_grad_sample",
        "add_noise",
    ),
)
"""What clips and adds noise in Opacus's optimizers (1.6.0), by name.

The norms that are recorded, and the noise that is accounted for, are those of these
functions. An optimizer with another one contributes something else to an update.
"""

STEP_METHODS = _functions(_OPTIMIZERS, ("scale_grad", "pre_step", "step"))
"""What makes an update of noised gradients in Opacus's optimizers (1.6.0), by name.

Another function may do anything that calls Opacus's, which is seen by what it does.
"""

GHOST_METHODS = _functions(
    [
        GradSampleHooksFastGradientClipping,
        GradSampleHooksFastGradientClippingFSDP,
        GradSampleHooksFastGradientClippingTP,
    ],
    ("get_clipping_coef", "get_norm_sample", "capture_backprops_hook"),
)
"""What clips in the models of ghost clipping (1.6.0), by name."""

GHOST_LOSS = {
    DPLossFastGradientClipping: ("__call__",),
    DPTensorFastGradientClipping: ("backward",),
}
"""What weights the losses of ghost clipping (1.6.0): classes, and their methods."""


def noise_function() -> Any:
    """Return the function that draws the noise of all optimizers (1.6.0).

    It is ``_generate_noise`` of the module ``opacus.optimizers.optimizer``.
    """
    return _optimizer_module._generate_noise


CRITERIA = (DPLossFastGradientClipping, DPLossFastGradientAdaptiveClipping)
"""Criteria of ghost clipping whose weighting of the losses is known (1.6.0)."""


# ------------------------------------------------------------------------------- models
def module_of(hooks: AbstractGradSampleHooks) -> nn.Module:
    """Return the user's own module from what ``make_private`` returned (1.6.0).

    Opacus keeps it as ``_module``, whether it has wrapped the module or only hooked it.
    """
    module: nn.Module = hooks._module
    return module


def removable_handles(module: nn.Module) -> list[RemovableHandle] | None:
    """Return the handles of the hooks that Opacus will remove from a module.

    Opacus (1.6.0) lists the hooks that it has registered in an attribute of the user's
    root module, ``autograd_grad_sample_hooks``; ``remove_hooks`` empties the list.

    Returns:
        The list itself, or None: ``"ew"`` and ``"no_op"`` register no hooks.
    """
    return getattr(module, "autograd_grad_sample_hooks", None)


def set_removable_handles(module: nn.Module, handles: list[RemovableHandle]) -> None:
    """Mark a module as one with hooks, as Opacus does, and list their handles (1.6.0).

    Args:
        module: The user's root module.
        handles: The handles of all hooks that were added.
    """
    cast(Any, module).autograd_grad_sample_hooks = handles


def pop_removable_handles(module: nn.Module) -> list[RemovableHandle]:
    """Return the listed handles, and drop the mark that the module has hooks (1.6.0).

    Returns:
        An empty list if the module has no mark.
    """
    handles: list[RemovableHandle] = vars(module).pop("autograd_grad_sample_hooks", [])
    return handles


def keep_handle(module: nn.Module, handle: RemovableHandle) -> None:
    """Have Opacus remove a hook of ours together with its own, if it has any.

    Args:
        module: The user's root module.
        handle: Of a hook that is registered on it.
    """
    handles = removable_handles(module)
    if handles is not None:
        handles.append(handle)


def uses_opacus_gradients(hooks: AbstractGradSampleHooks, layer: nn.Module) -> bool:
    """Return whether a function of Opacus computes a layer's per-example gradients.

    Opacus (1.6.0) looks the function up by the exact type of the layer in
    ``GRAD_SAMPLERS``, where users register their own. For all other layers it puts
    ``ft_compute_sample_grad`` into the layer, and torch computes the gradients.
    Torch's expanded weights make the same mistakes for ``nn.Embedding``, which are
    counted as Opacus's.

    Args:
        hooks: What ``make_private`` returned for the model.
        layer: A layer of it.
    """
    if isinstance(hooks, GradSampleModuleExpandedWeights):
        return isinstance(layer, nn.Embedding)
    if not isinstance(hooks, GradSampleHooks) or has_functional_copy(layer):
        return False
    function = hooks.GRAD_SAMPLERS.get(hooks._get_module_type(layer))
    return function is not None and function.__module__.startswith("opacus.")


def samplers_of(
    hooks: AbstractGradSampleHooks, layer: nn.Module
) -> list[Callable[..., Any]]:
    """Return the registered functions that compute a layer's gradients or norms.

    Args:
        hooks: What ``make_private`` returned for the model.
        layer: A layer of it.

    Returns:
        Nothing in modes that use no such functions, and for layers whose gradients
        torch computes.
    """
    if not isinstance(hooks, GradSampleHooks) or has_functional_copy(layer):
        return []
    kind = hooks._get_module_type(layer)
    tables = [hooks.GRAD_SAMPLERS, getattr(hooks, "NORM_SAMPLERS", {})]
    return [table[kind] for table in tables if kind in table]


def has_functional_copy(layer: nn.Module) -> bool:
    """Return whether torch computes a layer's per-example gradients (1.6.0).

    It then repeats the whole call of the layer, with the hooks of the user.
    """
    return hasattr(layer, "ft_compute_sample_grad")


def num_captures(layer: nn.Module) -> int:
    """Return how many times Opacus computes the per-example gradients of a call.

    Opacus (1.6.0) registers ``capture_backprops_hook`` with a layer for each module
    that contains it, and adds up what the hooks compute.
    """
    functions = [getattr(hook, "func", None) for hook in backward_hooks(layer).values()]
    names = [getattr(function, "__name__", "") for function in functions]
    return names.count("capture_backprops_hook")


def inputs_of_calls(layer: nn.Module | None) -> Sequence[Sequence[Tensor]]:
    """Return the inputs of a layer's calls that await their backward pass (1.6.0).

    Opacus keeps them in the attribute ``activations``.

    Args:
        layer: A layer of a model in hooks or functorch mode; None: it does not exist
            any more.
    """
    return vars(layer).get("activations", ()) if layer is not None else ()


def clipped_norms(hooks: AbstractGradSampleHooks) -> Tensor | None:
    """Return the norms by which ghost clipping weighted the last batch (1.6.0).

    The public property of the same content raises where there are none yet.

    Returns:
        Norms before clipping, ``(b,)``; None before the first backward pass.
    """
    norms: Tensor | None = hooks._per_sample_gradient_norms
    return norms


def norms_of_parameters(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Return what ghost clipping left at each parameter (1.6.0: ``_norm_sample``).

    Returns:
        For each parameter the norms of its per-example gradients, ``(b,)``; None where
        no backward pass has reached it.
    """
    return [getattr(parameter, "_norm_sample", None) for parameter in parameters]


def unfinished_calls(parameter: nn.Parameter) -> int:
    """Return how many calls of its layers await their backward pass, as Opacus counts.

    Opacus (1.6.0) notes it in ``_forward_counter``, and gives a parameter its
    per-example gradients when none is left.
    """
    return getattr(parameter, "_forward_counter", 0)


# --------------------------------------------------------------------------- optimizers
def require_unprocessed(gradients: Any) -> None:
    """Refuse gradients that were clipped before (1.6.0: ``_check_processed_flag``).

    Args:
        gradients: A tensor or a list of tensors.

    Raises:
        ValueError: If they are marked as processed.
    """
    _optimizer_module._check_processed_flag(gradients)


def mark_as_processed(gradients: Any) -> None:
    """Mark gradients as clipped (1.6.0: ``_mark_as_processed``).

    Args:
        gradients: A tensor or a list of tensors.
    """
    _optimizer_module._mark_as_processed(gradients)


def has_skipped_last_step(optimizer: DPOptimizer) -> bool:
    """Return whether the optimizer is between the physical batches of one update.

    Opacus (1.6.0) notes it in ``_is_last_step_skipped``.
    """
    return bool(optimizer._is_last_step_skipped)


def draws_shipped_noise(add_noise: object) -> bool:
    """Return whether a bound method is ``DPOptimizer.add_noise`` as Opacus ships it.

    In 1.6.0 this method draws the noise of one parameter after another, each in
    ``_generate_noise``, which without ``secure_mode`` is one call of ``torch.normal``.
    Only then is it known how to draw the same noise. Functions of Opacus are recognised
    by their module, also if they were replaced before this package was imported.

    Args:
        add_noise: The method of an optimizer.

    Returns:
        False in any release that was not tested, for the method of a derived class, and
        if other code has replaced or wrapped the method or ``_generate_noise``.
    """
    own = vars(_optimizer_module)
    functions = getattr(add_noise, "__func__", None), own["_generate_noise"]
    return _release in SEEN_IN and all(
        getattr(function, "__globals__", None) is own for function in functions
    )


# ------------------------------------------------------------------- BatchMemoryManager
def patch_memory_manager(observe: Callable[[Any, Any], None]) -> None:
    """Have a function called for every loader that ``BatchMemoryManager`` builds.

    ``BatchMemoryManager`` replaces the user's loader by one that it builds in
    ``batch_memory_manager.wrap_data_loader`` (1.6.0), a function of that module, and
    offers no other way to learn of the new loader. This is the only change that the
    package makes to an object of Opacus; it changes neither arguments nor result.
    Called again with the same function it does nothing; another function replaces it.

    Args:
        observe: ``observe(source, built)``, called with the loader that the manager
            was given and the loader that it built.
    """
    present = batch_memory_manager.wrap_data_loader
    if getattr(present, _OBSERVE, None) is observe:
        return
    build = _original_of(present)

    @wraps(build)
    def wrap_data_loader(
        *, data_loader: DataLoader[Any], **options: Any
    ) -> DataLoader[Any]:
        built: DataLoader[Any] = build(data_loader=data_loader, **options)
        observe(data_loader, built)
        return built

    vars(wrap_data_loader).update({_ORIGINAL: build, _OBSERVE: observe})
    batch_memory_manager.wrap_data_loader = wrap_data_loader


def restore_memory_manager() -> None:
    """Undo ``patch_memory_manager``; loaders that were built stay as they are.

    If other code has replaced the function meanwhile, its function stays.
    """
    present = batch_memory_manager.wrap_data_loader
    batch_memory_manager.wrap_data_loader = _original_of(present)


def ends_draw(sampler: Any) -> bool:
    """Return whether a part that ``BatchMemoryManager`` has made is the last of a draw.

    Its sampler tells the optimizer before each part whether more parts of the same draw
    follow, and Opacus (1.6.0) appends this to ``_step_skip_queue``.

    Args:
        sampler: The ``BatchSplittingSampler``, which has just returned a part.
    """
    queue = getattr(sampler.optimizer, "_step_skip_queue", None)
    return not (queue and queue[-1])


# Attributes of the function that is put in place: what it replaced, what it calls.
_ORIGINAL, _OBSERVE = "_pi_original", "_pi_observe"


def _original_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a function of ours replaced; any other function itself."""
    original: Callable[..., Any] = getattr(function, _ORIGINAL, function)
    return original
