"""Hooks a training loop without clipping up to a recorder."""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.privacy_engine import DDP, DPDDP, FSDPModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torch.utils.hooks import RemovableHandle

from opacus_pi._validate import expect
from opacus_pi.accounting import fingerprint
from opacus_pi.attribution import Tracker, watch
from opacus_pi.attribution.forward_probe import ForwardProbe
from opacus_pi.gradients import Sweep
from opacus_pi.integration.monitor.accumulated import BatchesBehind, BatchTracker
from opacus_pi.integration.monitor.draws import draws_of
from opacus_pi.integration.monitor.noisy_step import NoisyStep
from opacus_pi.integration.schedules import overlapping, unknown_schedule
from opacus_pi.models.batches import size_of
from opacus_pi.recording import Recorder
from opacus_pi.recording.last_weights import LastWeights
from opacus_pi.recording.processes import Processes
from opacus_pi.recording.shared_sweep import shared_sweep

# what a call hung on a module or an optimizer, for the next call to replace
_HANDLES: WeakKeyDictionary[Any, list[RemovableHandle]] = WeakKeyDictionary()


def monitor(
    *,
    recorder: Recorder,
    tracker: Tracker,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    noise_std: float,
    criterion: Callable[[Any, Any], Tensor],
    poisson_sampling: bool = True,
    noise_generator: torch.Generator | None = None,
    sampling_generator: torch.Generator | None = None,
) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
    """Record a training without clipping, with or without noise.

    The loader and the module's passes in training mode are watched. Without noise
    nothing else is done: with the user's own loader, weights and random states are
    those of the loop without recording. An update on the accumulated gradients of
    several batches has the sum of their sample rates on record (``Recorder(every=...)``
    still counts an epoch as ``1 / sample_rate`` updates of one batch). With noise,
    every gradient that the optimizer holds gets ``N(0, noise_std²)`` added just before
    its step (a parameter without a gradient stays as it is); an empty batch counts as
    gradient 0, and accumulated gradients end the record.

    Args:
        recorder: A swept recorder; it begins a run here.
        tracker: Follows the loader's batches through the module.
        module: The model; returned as it is. Under ``DistributedDataParallel``, without
            noise only, all processes call this, and sweeps are shared among them.
        optimizer: Any torch optimizer of its parameters; returned as it is.
        data_loader: Of a data set with a length, yielding ``(x, y)``.
        noise_std: Standard deviation of the noise on the mean gradient; 0: plain SGD.
        criterion: ``criterion(outputs, targets)``, one loss per example; a torch loss
            module will do.
        poisson_sampling: Whether the loader is replaced by Opacus's Poisson loader;
            False keeps it.
        noise_generator: For the noise; default: torch's global one.
        sampling_generator: For Poisson sampling; default: the loader's.

    Returns:
        Module, optimizer, and the loader to iterate over.

    Raises:
        ValueError: If an argument cannot be monitored; nothing is changed then.

    Source: paper, section 5.1 and Appendix D.
    """
    _check_recorder(recorder, noise_std)
    _check_training(module, optimizer, noise_std)
    _check_data(data_loader)
    processes = Processes() if isinstance(module, DDP) else None

    def measure(data_set: Dataset[Any]) -> Sweep:
        return shared_sweep(
            module,
            criterion,
            data_set,
            processes=processes,
            batch_size=recorder.batch_size,
            collate_fn=data_loader.collate_fn,
        )

    data_set = data_loader.dataset
    size = size_of(data_set)
    measure(Subset(data_set, range(min(2, size))))  # refuses what it cannot
    loader = data_loader
    if poisson_sampling:
        loader = DPDataLoader.from_data_loader(
            data_loader,
            generator=sampling_generator,
            distributed=processes is not None,
        )
    draws = draws_of(loader)
    recorder.begin(
        num_examples=size,
        sample_rate=draws.sample_rate,
        sampling=draws.sampling,
        data_set=fingerprint(data_set),
        sweep=lambda: measure(data_set),
        weights=module.state_dict,
        processes=processes,
        last_weights=LastWeights(module),
    )
    _refuse_schedule(recorder, loader, processes)
    if noise_std == 0:
        tracker = BatchTracker()  # whose examples they are need not be known
    noise = NoisyStep(
        noise_std, draws.mean_batch_size, recorder, tracker, noise_generator
    )
    _hang_hooks(module, optimizer, noise, draws.sample_rate)
    watch(loader, tracker)
    return module, optimizer, loader


def _refuse_schedule(
    recorder: Recorder, loader: DataLoader[Any], processes: Processes | None
) -> None:
    """Go on without a ledger if it is not known how often an example is drawn."""
    reasons = [
        unknown_schedule(loader) if draws_of(loader).sampling == "fixed" else None,
        overlapping(loader, processes.size) if processes else None,
    ]
    for reason in filter(None, reasons):
        recorder.refuse(reason)


def _hang_hooks(
    module: nn.Module, optimizer: Optimizer, noise: NoisyStep, sample_rate: float
) -> None:
    """Count the optimizer's steps, and add noise before them if there is any."""
    for owner in (module, optimizer):
        for handle in _HANDLES.pop(owner, []):
            handle.remove()
    settings = {
        "noise_std": noise.noise_std * noise.mean_batch_size,
        "max_grad_norm": math.inf,
    }
    batches_behind = BatchesBehind(noise.tracker)
    is_noisy = noise.noise_std > 0

    def count(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        num_batches = 1 if is_noisy else batches_behind()
        rate = min(1.0, num_batches * sample_rate)
        noise.recorder.step(**settings, sample_rate=rate)

    probe = ForwardProbe()
    probe.report_to(noise.tracker, module)
    _HANDLES[module] = [module.register_forward_hook(probe, with_kwargs=True)]
    _HANDLES[optimizer] = [optimizer.register_step_post_hook(count)]
    if is_noisy:
        _HANDLES[optimizer].append(optimizer.register_step_pre_hook(noise))


def _check_recorder(recorder: Recorder, noise_std: float) -> None:
    """Refuse a recorder that would wait for norms nobody computes."""
    expect(
        recorder.mode == "swept",
        "recorder.mode",
        repr(recorder.mode),
        'to be "swept"',
        'Training without clipping computes no norms: use Recorder(mode="swept").',
    )
    expect(
        math.isfinite(noise_std) and noise_std >= 0,
        "noise_std",
        noise_std,
        "to be finite and at least 0",
        "It is the standard deviation of the noise on the mean gradient; 0 is plain "
        "SGD.",
    )


def _check_training(module: nn.Module, optimizer: Optimizer, noise_std: float) -> None:
    """Refuse a module or an optimizer that is not the user's own."""
    expect(
        not isinstance(module, AbstractGradSampleModule),
        "module",
        type(module).__name__,
        "to be a plain module",
        "It computes per-example gradients nobody uses: pass "
        "module.to_standard_module().",
    )
    expect(
        not isinstance(module, (DPDDP, FSDPModule)),
        "module",
        type(module).__name__,
        "to be trained by one process or under DistributedDataParallel",
        "Other distributed training is recorded by make_private.",
    )
    expect(
        not isinstance(module, DDP) or noise_std == 0,
        "noise_std",
        noise_std,
        "to be 0 under DistributedDataParallel, where each process would add its own",
        "Train with noise in one process, or by make_private.",
    )
    expect(
        isinstance(optimizer, Optimizer) and not isinstance(optimizer, DPOptimizer),
        "optimizer",
        type(optimizer).__name__,
        "to be a plain torch optimizer",
        "Pass the one that make_private was given, original_optimizer.",
    )
    own = set(module.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    expect(
        all(p in own for p in held),
        "optimizer",
        type(optimizer).__name__,
        "to hold parameters of module",
        "Make the optimizer from module.parameters().",
    )


def _check_data(data_loader: DataLoader[Any]) -> None:
    """Refuse data whose examples cannot be told apart and measured."""
    data_set = data_loader.dataset
    ordered = hasattr(data_set, "__len__") and not isinstance(data_set, IterableDataset)
    expect(
        ordered and len(data_loader) > 0,
        "data_loader.dataset",
        type(data_set).__name__,
        "to have a length, an order and at least one batch",
        "Use a map-style data set: every example is measured by its position.",
    )
