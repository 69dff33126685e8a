"""Leave examples out of private updates once their privacy budget is spent.

A ``RenyiFilter`` holds a budget for each example. Before a batch is clipped, each of
its samples is charged for this update; a sample whose example cannot pay has its
per-example gradient set to zero, and 0 is recorded as its norm. The guarantee is the
filter's: no example's charges ever exceed its budget. It breaks if samples are charged
to the wrong example, if a gradient depends on several examples, or if less noise is
drawn than was charged for; each of these stops training with an ``AccountingError``.

Source: Feldman and Zrnic 2021, arXiv:2008.11193.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect, positive
from opacus_pi.accounting import NoisySGD, RenyiFilter, fingerprint
from opacus_pi.attribution import LEFT_OUT, Tracker
from opacus_pi.files.checksummed_state import verified_state
from opacus_pi.integration.checks import batch_statistics, clipping_without_effect
from opacus_pi.integration.fast import MODE as FAST_MODE
from opacus_pi.integration.opacus_compat import DISTRIBUTED, require_unprocessed
from opacus_pi.integration.schedules import is_poisson, unknown_schedule

_UNVERIFIED = (
    "A RenyiFilter charges examples, so every sample must be matched to its example "
    "with certainty. But the model's inputs are neither the tensors that the data "
    "loader delivered nor copies of them. Transform inputs in the data set or in "
    "collate_fn instead."
)
_NO_NOISE = (
    "Train with noise: without it every privacy loss is infinite, which no budget "
    "allows."
)
_LESS_NOISE = (
    "The noise was lowered between the physical batches of one update, so its examples "
    "were charged too little. Call a noise scheduler's step() only after "
    "optimizer.step() has updated the weights."
)


NO_BUDGETS = "A RenyiFilter cannot keep budgets here. {reason}"


# --------------------------------------------------------------------------- one update
@dataclass(eq=False)
class FilterGate:
    """Decides which samples of an update may enter it.

    The optimizer calls ``admit`` for each physical batch before it is clipped, and
    ``close`` once the update is complete, before noise is drawn. What an update charges
    depends on the noise, which is known before it is drawn, and on the norms, which are
    a function of the past: this is what the filter's theorem asks for.

    Args:
        renyi_filter: The budgets.
        tracker: Counts the samples that were matched without verification.
        batch_norms: Layers that mix examples while they are in training mode.
    """

    renyi_filter: RenyiFilter
    tracker: Tracker
    batch_norms: Sequence[nn.Module]
    _earlier_batches: list[NDArray[np.int64]] = field(init=False, default_factory=list)
    _charged_noise_std: float = field(init=False, default=0.0)

    def admit(
        self,
        parameters: Sequence[nn.Parameter],
        indices: NDArray[np.int64],
        norms: Tensor,
        *,
        noise_std: float,
        max_grad_norm: float,
    ) -> tuple[NDArray[np.int64], Tensor]:
        """Charge a physical batch, and zero the gradients of samples that cannot pay.

        A sample is left out if its example's budget does not allow the charge, if it is
        unattributed, if its norm is not finite, or if its example is in the update
        already.

        Args:
            parameters: Parameters with ``grad_sample``, to be clipped next.
            indices: Index of each sample in the data set, int64 ``(b,)``; negative if
                unattributed.
            norms: Norm of each sample's gradient before clipping, ``(b,)``.
            noise_std: Standard deviation of the noise on the sum, which this update
                will draw.
            max_grad_norm: What the gradients will be clipped to.

        Returns:
            Indices and norms as they enter: an example's second sample is no longer
            attributed to it, and the norm is 0 where a sample is left out.

        Raises:
            AccountingError: If a sample was matched to its example without
                verification, or a gradient depends on several examples.
            ValueError: If there is no noise.
        """
        mixed = batch_statistics(self.batch_norms)
        if mixed or self.tracker.counts["by_latest"]:
            raise AccountingError(mixed or _UNVERIFIED)
        positive(noise_std=noise_std, remedy=_NO_NOISE)
        indices = self._without_repetitions(indices)
        lengths = norms.detach().double().cpu().numpy()
        is_charged = (indices >= 0) & np.isfinite(lengths)
        step = NoisySGD(1, 1.0, noise_std, max_grad_norm)
        is_admitted = np.zeros(len(indices), dtype=np.bool_)
        is_admitted[is_charged] = self.renyi_filter.admit(
            indices[is_charged], step.ratios(lengths[is_charged])
        )
        # A charge is right only if at least this noise is drawn: see ``close``.
        self._charged_noise_std = max(self._charged_noise_std, noise_std)
        if not is_admitted.all():
            left_out = torch.from_numpy(~is_admitted)
            _zero_gradients(parameters, left_out)
            norms = norms.masked_fill(left_out.to(norms.device), 0.0)
        return indices, norms

    def _without_repetitions(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take the attribution from samples whose example is in the update already.

        The clip norm bounds one sample. An example that entered one update twice would
        contribute up to twice the clip norm, but be charged for one.

        Args:
            indices: Index of each sample of this physical batch; negative if
                unattributed.

        Returns:
            The same with ``LEFT_OUT`` at repetitions, also of earlier batches.
        """
        so_far = np.concatenate([*self._earlier_batches, indices])
        _, firsts = np.unique(so_far, return_index=True)
        is_first = np.zeros(len(so_far), dtype=np.bool_)
        is_first[firsts] = True
        is_first = is_first[len(so_far) - len(indices) :]
        self._earlier_batches.append(indices[indices >= 0])
        return np.where(is_first | (indices < 0), indices, LEFT_OUT)

    def close(self, noise_std: float) -> None:
        """Check the noise of a complete update, just before it is drawn.

        Args:
            noise_std: Standard deviation of the noise on the sum.

        Raises:
            AccountingError: If it is less than what the samples were charged for.
        """
        if noise_std < self._charged_noise_std:
            raise AccountingError(_LESS_NOISE)
        self._earlier_batches, self._charged_noise_std = [], 0.0


def _zero_gradients(parameters: Sequence[Any], left_out: Tensor) -> None:
    """Replace per-example gradients by copies with zeros.

    Copies, because gradients of two parameters, or of a parameter and an activation,
    may share storage.

    Args:
        parameters: Parameters with ``grad_sample``: a tensor, or a list of them where
            several backward passes preceded the step.
        left_out: Which samples, bool ``(b,)``, over all passes together.
    """
    for p in parameters:
        # Opacus's mark of gradients that were clipped before is lost in the copies
        require_unprocessed(p.grad_sample)
        is_list = isinstance(p.grad_sample, list)
        passes = p.grad_sample if is_list else [p.grad_sample]
        parts = left_out.split([len(g) for g in passes])
        kept = [
            g.masked_fill(part.to(g.device).view(-1, *[1] * (g.dim() - 1)), 0.0)
            for g, part in zip(passes, parts, strict=True)
        ]
        p.grad_sample = kept if is_list else kept[0]


# ------------------------------------------------------------------------- make_private
def require_filterable(
    engine: PrivacyEngine,
    *,
    module: nn.Module,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    clipping: str = "flat",
    grad_sample_mode: str = "hooks",
    poisson_sampling: bool = True,
    **_: Any,
) -> None:
    """Refuse a run for which a filter cannot keep budgets.

    Args:
        engine: The engine whose ``make_private`` was called.
        module: Its argument, like all that follow.
        data_loader: The user's loader.
        noise_multiplier: Must be above 0.
        clipping: How Opacus clips.
        grad_sample_mode: How Opacus computes per-example gradients.
        poisson_sampling: Whether Opacus replaces the loader's sampler.

    Raises:
        ValueError: If a filter cannot work with an argument; the message says why.
    """
    if grad_sample_mode == FAST_MODE or grad_sample_mode.startswith("ghost"):
        raise ValueError(
            f"grad_sample_mode={grad_sample_mode!r} keeps no per-example gradients, "
            "but a RenyiFilter sets them to zero one by one. Use "
            'grad_sample_mode="hooks".'
        )
    expect(
        clipping in ("flat", "per_layer"),
        "clipping",
        repr(clipping),
        'must be "flat" or "per_layer"',
        'Use "flat". Adaptive clipping also releases the number of clipped examples, '
        "which the budgets do not cover.",
    )
    positive(noise_multiplier=noise_multiplier, remedy=_NO_NOISE)
    keeps_loader = not poisson_sampling and not is_poisson(data_loader)
    reasons = [
        _several_processes(module),
        unknown_schedule(data_loader) if keeps_loader else None,
        clipping_without_effect(engine),
    ]
    for reason in filter(None, reasons):
        raise ValueError(NO_BUDGETS.format(reason=reason))


def begin_budgets(
    renyi_filter: RenyiFilter, engine: PrivacyEngine, **options: Any
) -> None:
    """Begin a filter, if its budgets can be kept with these arguments.

    Args:
        renyi_filter: The engine's budgets.
        engine: The engine whose ``make_private`` was called.
        **options: Its arguments.

    Raises:
        ValueError: If the budgets cannot be kept; the message says why.
    """
    require_filterable(engine, **options)
    data_set = options["data_loader"].dataset
    renyi_filter.begin(len(data_set), fingerprint(data_set))


def _several_processes(module: nn.Module) -> str | None:
    """Explain that no process of a distributed run sees all charges."""
    if not isinstance(module, DISTRIBUTED):
        return None
    return (
        f"With {type(module).__name__} every process has its own filter, which sees "
        "only the charges of that process. Train in one process."
    )


# -------------------------------------------------------------------------- checkpoints
def saved_charges(renyi_filter: RenyiFilter) -> dict[str, Any]:
    """Return a filter's state as tensors, numbers and strings, for a checkpoint.

    Args:
        renyi_filter: The filter; its own state has NumPy arrays, which ``torch.load``
            would refuse without unpickling.
    """
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in renyi_filter.state_dict().items()
    }


def prepared_charges(
    renyi_filter: RenyiFilter | None,
    charges: Mapping[str, Any] | None,
    num_steps: int,
) -> Callable[[], None]:
    """Check the charges of a checkpoint, and change nothing yet.

    Warns if the checkpoint has charges and the engine has no filter.

    Args:
        renyi_filter: The engine's filter, if it has one.
        charges: What ``saved_charges`` returned, if the checkpoint has it.
        num_steps: Updates that the checkpoint's accountant has counted.

    Returns:
        A function that continues with the charges.

    Raises:
        ValueError: If updates were made without the filter, or with another one.
    """
    if renyi_filter is None:
        if charges is not None:
            warnings.warn(
                "The checkpoint's run kept privacy budgets (RenyiFilter), but this "
                "engine keeps none. Use PrivacyEngine(renyi_filter=...) to keep them.",
                stacklevel=3,
            )
        return _nothing
    if charges is None and num_steps > 0:
        raise ValueError(
            f"The checkpoint's run made {num_steps} updates without a RenyiFilter, so "
            "no example was charged for them. Resume from a checkpoint of a run that "
            "used this RenyiFilter."
        )
    if charges is None:
        return _nothing
    arrays = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else value
        for name, value in verified_state(charges).items()
    }
    copy.deepcopy(renyi_filter).load_state_dict(arrays)
    return partial(renyi_filter.load_state_dict, arrays)


def _nothing() -> None:
    """Do nothing: there are no charges to continue with."""
