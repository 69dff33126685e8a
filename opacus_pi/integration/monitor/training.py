"""Connect a training loop without clipping to a recorder.

The loop itself is not touched. Hooks on the optimizer count its updates and, if there
is noise, add it to the gradients; a forward hook on the model and an observer of the
loader establish which batch an update was made from. At the rows of the ledger the
recorder calls a sweep, which measures the norms of all examples at the present weights.

**What it guarantees.** Without noise, and with the user's own loader, training is bit
for bit the training without recording. With noise, a recorded update is the noisy
mechanism of :mod:`~opacus_pi.integration.monitor.noise`.

**What breaks it.** The optimizer's hooks are called by ``optimizer.step()`` only: an
update that writes the weights in another way is neither counted nor noised. The loss
must be the mean over the batch of the criterion that is passed: with noise, the first
updates are compared with it (``gradient_scale``).
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from opacus.data_loader import DPDataLoader
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import BatchNormBase
from opacus_pi._validate import expect, require
from opacus_pi.accounting import fingerprint
from opacus_pi.attribution import ForwardProbe, Tracker, keeps_order, observe
from opacus_pi.custody import Chain
from opacus_pi.custody.buffers import BufferLink, watch_buffers
from opacus_pi.custody.draws import DrawLink
from opacus_pi.custody.loaded_states import watch_loading
from opacus_pi.custody.model_probe import MODEL_NOT_RUN, ModelProbe
from opacus_pi.custody.weights import WeightsLink, WeightSnapshot
from opacus_pi.gradients import Sweep
from opacus_pi.integration.earlier_updates import say_earlier_updates
from opacus_pi.integration.held_weights import held_by
from opacus_pi.integration.monitor.earlier_gradients import EarlierGradients
from opacus_pi.integration.monitor.gradient_scale import GradientScale
from opacus_pi.integration.monitor.noise import NoiseHook
from opacus_pi.integration.monitor.sampling import (
    BatchCounter,
    BatchTracker,
    SamplingScheme,
    sampling_scheme,
)
from opacus_pi.integration.noised_steps import CallLast
from opacus_pi.integration.schedules import (
    UnchangedSchedule,
    overlapping,
    unknown_schedule,
    user_collate_fn,
)
from opacus_pi.integration.sweep_order import InItemOrder
from opacus_pi.integration.swept_model import SweptModel
from opacus_pi.integration.training_states import TrainingStates
from opacus_pi.models.batches import size_of
from opacus_pi.models.copies import unwrap
from opacus_pi.recording import Recorder
from opacus_pi.recording.distributed import Processes, shared_sweep
from opacus_pi.recording.weights import LastWeights

__all__ = ["monitor"]

_BATCH_NORM = (
    "BatchNorm layers are in training mode, so the gradient of an update for one "
    "example depends on the others. The recorded norms are those of evaluation mode."
)

# Hooks that a call of ``monitor`` added to a module or an optimizer. The next call
# with the same object removes them: a second set would add noise twice.
_HOOK_HANDLES: WeakKeyDictionary[Any, list[RemovableHandle]] = WeakKeyDictionary()
# What watches the buffers in the run of an optimizer; hooks refer to it weakly.
_BUFFER_LINKS: WeakKeyDictionary[Optimizer, BufferLink] = WeakKeyDictionary()


_SWEPT = "Sweeps over the data set measured the norms, one example at a time."
_TWICE = (
    "An example was in several of the batches whose gradients were accumulated for one "
    "update, so its gradient entered that update more than once, and is charged once. "
    "Call optimizer.step() before the loader begins its next pass."
)
_UNKNOWN_BATCH = (
    "It was not seen which delivered batch an update used, so its examples are not "
    "counted. Give the model the batches of the returned loader, in training mode, and "
    "transform inputs in the data set."
)
_NOT_COMPARED = (
    "Without noise, the gradients of the training loop are not compared with those of "
    "the criterion that make_monitored was given. Every update is taken to be one on "
    "the mean of this criterion over its batch. If the loop trains on another loss, or "
    "multiplies the loss by a factor that changes, the recorded norms are not those of "
    "its updates."
)
_EVIDENCE = {
    "schedule": "The loader's samplers are known.",
    "identity": _SWEPT,
    "rows": _SWEPT,
    "norm": _SWEPT,
    "noise": "A hook on optimizer.step added the recorded noise once for each update.",
}


@dataclass(frozen=True)
class _Custody:
    """The chain of custody of a monitored run, and what watches its links.

    Args:
        chain: The chain.
        draws: Watches how delivered batches are used.
        weights: Watches for writes to the weights that are not the optimizer's.
        snapshot: Of the weights, taken after each update.
        model_probe: Finds out whether the model mixes examples; None: it is not run.
    """

    chain: Chain
    draws: DrawLink
    weights: WeightsLink
    snapshot: WeightSnapshot
    model_probe: ModelProbe | None

    @classmethod
    def of(
        cls,
        scheme: SamplingScheme,
        module: nn.Module,
        recorder: Recorder,
        num_examples: int,
    ) -> "_Custody":
        """Begin the chain of a run, with what is known before it starts.

        Args:
            scheme: How the loader samples a batch.
            module: The model.
            recorder: May declare that the model does not mix examples.
            num_examples: Number of examples of the data set.
        """
        chain = Chain()
        for link, evidence in _EVIDENCE.items():
            chain.check(link, evidence)
        draws = DrawLink(
            chain,
            is_poisson=scheme.sampling == "poisson",
            num_examples=num_examples,
        )
        snapshot = WeightSnapshot()
        weights = WeightsLink(chain, snapshot)
        model_probe = _new_model_probe(recorder, module, chain)
        return cls(chain, draws, weights, snapshot, model_probe)


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
    """Record a training run without clipping, with or without noise.

    The loader, and the forward passes of the module in training mode, are observed.

    *Without noise* nothing else is changed: with the user's own loader, weights and
    random states are those of the loop without recording. An update on the accumulated
    gradients of several batches is recorded with the sum of their sample rates
    (``Recorder(every=...)`` still counts an epoch as ``1 / sample_rate`` updates of one
    batch).

    *With noise* every gradient that the optimizer holds gets ``N(0, noise_std²)`` added
    just before its step; a parameter without a gradient is not changed. An empty batch
    counts as gradient 0. The gradients of several batches must not be accumulated for
    one update: the ledger of such a run is refused.

    Args:
        recorder: A recorder with ``mode="swept"``; it begins a run here.
        tracker: Identifies the batch of an update. Not used if there is no noise:
            then only the number of batches matters.
        module: The model; returned as it is. Under ``DistributedDataParallel`` (allowed
            without noise only) every process calls this, and the processes share the
            sweeps.
        optimizer: Any torch optimizer of the module's parameters; returned as it is.
        data_loader: A loader of a data set with a length, yielding ``(x, y)``.
        noise_std: Standard deviation of the noise on the mean gradient; 0: plain SGD.
        criterion: ``criterion(outputs, targets)``, one loss per example; a torch loss
            module is converted.
        poisson_sampling: Whether to replace the loader by Opacus's Poisson loader;
            False keeps it.
        noise_generator: Draws the noise; default: torch's global generator.
        sampling_generator: Draws the Poisson batches; default: the loader's.

    Returns:
        Module, optimizer, and the loader to iterate over.

    Raises:
        ValueError: If an argument cannot be monitored; nothing is changed then.

    Source: paper, section 5.1 and Appendix D.
    """
    # First everything that may raise, then everything that changes an object.
    _check_recorder(recorder, noise_std)
    _check_training(module, optimizer, noise_std)
    _check_data(data_loader)
    processes = Processes() if isinstance(module, DDP) else None
    collate_fn = InItemOrder(user_collate_fn(data_loader))
    data_set, swept = data_loader.dataset, SweptModel(module, optimizer)
    measure = _sweeps(swept, criterion, collate_fn, recorder, processes)
    # A sweep of two examples raises for what cannot be swept, before anything changes.
    measure(Subset(data_set, range(min(2, size_of(data_set)))))

    loader = data_loader
    if poisson_sampling:
        is_shared = processes is not None
        loader = DPDataLoader.from_data_loader(
            data_loader, generator=sampling_generator, distributed=is_shared
        )
    scheme = sampling_scheme(loader)
    if noise_std == 0:
        tracker = BatchTracker()  # which samples a batch has does not matter here
    custody = _Custody.of(scheme, module, recorder, size_of(data_set))
    collate_fn.chain = custody.chain
    training = TrainingStates(module, optimizer, mean_batch_size=scheme.mean_batch_size)
    if recorder.checkpoints is not None:
        training.remember()  # before a forward pass can change the buffers
    measured_by = partial(measure, data_set)
    _begin_record(
        recorder, module, data_set, scheme, measured_by, processes, custody, training
    )
    _break_schedule(custody.chain, loader, processes)
    noise, chain = None, custody.chain
    if noise_std > 0:
        scale = GradientScale(module, criterion, tracker, chain)
        size, generator = scheme.mean_batch_size, noise_generator
        noise = NoiseHook(noise_std, size, recorder, chain, tracker, scale, generator)
    _add_hooks(module, optimizer, recorder, tracker, scheme, noise, custody)
    _watch_weights(module, optimizer, custody, swept, noise)
    _watch_loop(loader, optimizer, chain, has_noise=noise is not None)
    observe(loader, tracker, is_in_order=keeps_order(user_collate_fn(data_loader)))
    return module, optimizer, loader


def _sweeps(
    swept: SweptModel,
    criterion: Callable[[Any, Any], Tensor],
    collate_fn: InItemOrder,
    recorder: Recorder,
    processes: Processes | None,
) -> Callable[[Dataset[Any]], Sweep]:
    """Return a function that measures all examples of a data set at present.

    It is called when a row of the ledger is due, within ``optimizer.step()``, and sees
    the weights of that moment.

    Args:
        swept: Returns the model; its own ``train()`` mode does not matter, and stays.
        criterion: One loss per example.
        collate_fn: Makes the sweep's batches.
        recorder: Has the batch size of a sweep.
        processes: Those that share the sweep; None: this process sweeps alone.
    """

    def measure(data_set: Dataset[Any]) -> Sweep:
        return shared_sweep(
            swept(),
            criterion,
            data_set,
            processes=processes,
            batch_size=recorder.batch_size,
            collate_fn=collate_fn,
        )

    return measure


def _begin_record(
    recorder: Recorder,
    module: nn.Module,
    data_set: Dataset[Any],
    scheme: SamplingScheme,
    measure: Callable[[], Sweep],
    processes: Processes | None,
    custody: "_Custody",
    training: TrainingStates,
) -> None:
    """Begin recording a run.

    Args:
        recorder: Begins a run, or continues the one that was loaded into it.
        module: The model, whose weights a row may be saved with.
        data_set: The examples, in the order in which the ledger has them.
        scheme: How the loader samples a batch.
        measure: Measures all examples of the data set.
        processes: Those that train together; None: one.
        custody: What is known about how the numbers of the run come to be.
        training: Gives the states that the recorder saves, if it saves any.

    Raises:
        ValueError: If a saved run was loaded, and it is another one.
    """
    recorder.begin(
        num_examples=size_of(data_set),
        sample_rate=scheme.sample_rate,
        sampling=scheme.sampling,
        data_set=fingerprint(data_set),
        sweep=measure,
        weights=module.state_dict,
        processes=processes,
        last_weights=LastWeights(module, custody.snapshot),
        chain=custody.chain,
        training=training,
    )


def _break_schedule(
    chain: Chain, loader: DataLoader[Any], processes: Processes | None
) -> None:
    """Refuse the ledger if it is not known how often an example is drawn.

    Training goes on without a ledger.

    Args:
        chain: The chain of custody of the run, which has begun.
        loader: The loader that the training loop will iterate over.
        processes: The processes that train together. Each must draw from its own part:
            otherwise an example may enter one update several times.
    """
    is_fixed = sampling_scheme(loader).sampling == "fixed"
    for link, reason in (
        ("schedule", unknown_schedule(loader) if is_fixed else None),
        ("rows", overlapping(loader, processes.size) if processes else None),
    ):
        if reason is not None:
            chain.break_link(link, reason)


def _add_hooks(
    module: nn.Module,
    optimizer: Optimizer,
    recorder: Recorder,
    tracker: Tracker,
    scheme: SamplingScheme,
    noise: NoiseHook | None,
    custody: "_Custody",
) -> None:
    """Add the hooks that count updates and, if there is noise, apply it.

    They replace the hooks of an earlier call. Torch calls pre-hooks of ``step`` before
    the weights are written, which is where noise belongs, and post-hooks afterwards,
    which is when the update counts: a step that raises is not recorded.

    Args:
        module: The model; a forward hook reports its inputs to the tracker.
        optimizer: The optimizer, with a hook before its step and one after it.
        recorder: Counts the updates.
        tracker: Follows batches from the loader to the update.
        scheme: How the loader samples a batch.
        noise: Adds the noise; None without noise.
        custody: Told which batches entered each update.
    """
    chain, draws, model_probe = custody.chain, custody.draws, custody.model_probe
    for owner in (module, optimizer):
        for handle in _HOOK_HANDLES.pop(owner, []):
            handle.remove()
    noise_std = 0.0 if noise is None else noise.noise_std
    count_batches, earlier = BatchCounter(tracker), EarlierGradients(chain)
    tracker.saw_backward.append(earlier.backward_began)
    chain.on_read(partial(tracker.report_left_out, chain))

    def count_update(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        finding = None if model_probe is None else model_probe.run()
        if finding is not None:
            finding.tell(chain, "model")
        # With noise, an update of several batches was refused by the noise hook.
        num_batches = count_batches() if noise is None else 1
        batches = tracker.end_update()
        known = count_batches.examples_of(batches)
        is_known = 0 < len(batches) == len(known)
        together = np.concatenate([np.empty(0, np.int64), *known])
        examples, counts = np.unique(together[together >= 0], return_counts=True)
        # before the step, which may close the row that they belong to
        recorder.count_participations(examples)
        if not is_known:
            recorder.note_unattributed()
        recorder.step(
            noise_std=noise_std * scheme.mean_batch_size,  # on the sum of gradients
            max_grad_norm=math.inf,  # nothing is clipped
            sample_rate=min(1.0, num_batches * scheme.sample_rate),
        )
        draws.update_was_made(batches)
        earlier.update_was_made(held_by(optimizer))
        if not is_known:
            chain.leave_unchecked("draw", _UNKNOWN_BATCH, warn=False)
        if (counts > 1).any():
            chain.leave_unchecked("rows", _TWICE)

    # Connects the tensors that enter the model with the backward pass that follows.
    probe = ForwardProbe()
    probe.report_to(tracker, saw_pass=[model_probe.saw] if model_probe else [])
    _HOOK_HANDLES[module] = [module.register_forward_hook(probe, with_kwargs=True)]

    def begin_update(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is None:
            earlier.update_begins()
        say_earlier_updates(optimizer, recorder, chain)
        recorder.begin_update()

    _HOOK_HANDLES[optimizer] = [
        optimizer.register_step_pre_hook(begin_update),
        optimizer.register_step_post_hook(count_update),
    ]
    if noise is not None and noise.scale is not None:
        before_forward = noise.scale.before_forward
        handle = module.register_forward_pre_hook(before_forward, with_kwargs=True)
        _HOOK_HANDLES[module].append(handle)
    if noise is not None:
        _HOOK_HANDLES[optimizer].append(optimizer.register_step_pre_hook(noise))


def _watch_loop(
    loader: DataLoader[Any], optimizer: Optimizer, chain: Chain, *, has_noise: bool
) -> None:
    """Compare the settings of the loader in each update; say that losses are not.

    Args:
        loader: The loader that the training loop will iterate over.
        optimizer: The optimizer of the run.
        chain: The chain of custody of the run.
        has_noise: Whether a hook adds noise, which compares gradients, too.
    """
    if not has_noise:
        chain.leave_unchecked("loss", _NOT_COMPARED, warn=False)
    schedule = UnchangedSchedule(loader, chain)
    handle = optimizer.register_step_post_hook(lambda *_: schedule.compare())
    _HOOK_HANDLES[optimizer].append(handle)


def _watch_weights(
    module: nn.Module,
    optimizer: Optimizer,
    custody: "_Custody",
    swept: SweptModel,
    noise: NoiseHook | None,
) -> None:
    """Watch for writes to the weights that are not the optimizer's.

    Also for gradients that a step uses in place of those to which noise was added.

    Args:
        module: All of its weights are watched from the optimizer's next step on:
            another optimizer may train some of them.
        optimizer: The optimizer of the run.
        custody: Its snapshots will be of the model's weights.
        swept: Knows the weights that the last sweep has measured.
        noise: Adds the noise; None without noise.
    """
    weights, chain = custody.weights, custody.chain
    custody.snapshot.watch(module.parameters())
    buffers = None if isinstance(module, DDP) else watch_buffers(module, chain)
    _BUFFER_LINKS.pop(optimizer, None)
    chain.keep_while(unwrap(module), weights, buffers)
    if buffers is None:
        loaded = watch_loading(module, weights)
        _HOOK_HANDLES[module].append(loaded)
    else:
        loaded = watch_loading(module, weights, buffers)
        _HOOK_HANDLES[module] += [*buffers.handles, loaded]
        _BUFFER_LINKS[optimizer] = buffers

    def before_step(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        weights.before_update()
        if noise is not None:
            noise.steps.step_begins(stepping, args, kwargs)

    def after_step(stepping: Optimizer, *_: Any) -> None:
        if noise is not None:
            noise.steps.step_was_made(stepping)
        weights.after_update()
        swept.update_was_made(chain)

    last = optimizer.register_step_pre_hook(before_step)
    _HOOK_HANDLES[optimizer] += [last, optimizer.register_step_post_hook(after_step)]
    if noise is not None:
        noise.last_hook = last
    _HOOK_HANDLES[module].append(module.register_forward_pre_hook(CallLast(last)))


def _new_model_probe(
    recorder: Recorder, module: nn.Module, chain: Chain
) -> ModelProbe | None:
    """Return what finds out whether the model mixes the examples of a batch.

    Args:
        recorder: May declare that the model does not.
        module: The model. BatchNorm, which is known to mix them, is allowed here: the
            link then stays unchecked, and says so.
        chain: The chain of custody of the run.

    Returns:
        None if the model is not to be run a second time.
    """
    layers = (m for m in module.modules() if isinstance(m, BatchNormBase))
    if any(layer.training for layer in layers):
        chain.leave_unchecked("model", _BATCH_NORM, warn=False)
    elif recorder.probe_model:
        return ModelProbe(weakref.ref(unwrap(module)))
    else:
        chain.leave_unchecked("model", MODEL_NOT_RUN, warn=False)
    return None


def _check_recorder(recorder: Recorder, noise_std: float) -> None:
    """Raise for a recorder that would wait for norms that are never computed.

    Also raise for noise that is not a standard deviation.

    Args:
        recorder: Must sweep: only training with clipping computes norms by itself.
        noise_std: Standard deviation of the noise on the mean gradient.
    """
    expect(
        recorder.mode == "swept",
        "recorder.mode",
        repr(recorder.mode),
        'must be "swept"',
        'Training without clipping computes no norms: use Recorder(mode="swept").',
    )
    is_number = noise_std is not None and not isinstance(noise_std, str)
    expect(
        is_number and math.isfinite(noise_std) and noise_std >= 0,
        "noise_std",
        noise_std,
        "must be finite and at least 0",
        "Pass the standard deviation of the noise on the mean gradient, or 0 for plain "
        "SGD.",
    )


def _check_training(module: nn.Module, optimizer: Optimizer, noise_std: float) -> None:
    """Raise for a wrapped module, or for an optimizer that does not fit the module.

    A parallel wrapper is allowed only where all processes hold equal weights and equal
    gradients, which their sweeps and the count of updates rely on.

    Args:
        module: The model.
        optimizer: The optimizer, which must update parameters of the model only.
        noise_std: Standard deviation of the noise; above 0 in one process only.
    """
    expect(
        not isinstance(module, AbstractGradSampleModule),
        "module",
        type(module).__name__,
        "must be a plain module",
        "The wrapper computes per-example gradients that are not needed here: pass "
        "module.to_standard_module().",
    )
    expect(
        not isinstance(module, (DPDDP, FSDPModule)),
        "module",
        type(module).__name__,
        "must be trained by one process or under DistributedDataParallel",
        "Record other distributed training with make_private.",
    )
    expect(
        not isinstance(module, DDP) or noise_std == 0,
        "noise_std",
        noise_std,
        "must be 0 under DistributedDataParallel, where each process would add its own",
        "Train with noise in one process, or with make_private.",
    )
    expect(
        isinstance(optimizer, Optimizer) and not isinstance(optimizer, DPOptimizer),
        "optimizer",
        type(optimizer).__name__,
        "must be a plain torch optimizer",
        "Pass the optimizer that make_private wrapped: optimizer.original_optimizer.",
    )
    # Sweeps measure the gradient by the module's parameters. An update of others would
    # depend on the examples in a way that is not measured.
    own = set(module.parameters())
    held = held_by(optimizer)
    expect(
        all(p in own for p in held),
        "optimizer",
        f"{type(optimizer).__name__} with other parameters",
        "must have only parameters of module",
        "Make the optimizer from module.parameters().",
    )


def _check_data(data_loader: DataLoader[Any]) -> None:
    """Raise for a data set whose examples have no positions, or an empty loader."""
    data_set = data_loader.dataset
    ordered = hasattr(data_set, "__len__") and not isinstance(data_set, IterableDataset)
    expect(
        ordered,
        "data_loader.dataset",
        type(data_set).__name__,
        "must be a map-style data set with __len__ and __getitem__",
        "Put the examples in a list or in such a data set.",
    )
    require(
        len(data_loader) > 0,
        f"data_loader has no batch: its data set has {len(data_set)} examples.",  # type: ignore[arg-type]
        "Choose a batch_size that the data set can fill.",
    )
