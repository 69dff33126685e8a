"""What a filter needs of ``make_private``, and its charges in checkpoints."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from opacus.privacy_engine import DDP, DPDDP, FSDPModule, PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi._validate import expect, positive
from opacus_pi.accounting import RenyiFilter
from opacus_pi.files.sealed_state import unsealed
from opacus_pi.integration import fast, refusals


def require_filterable(
    engine: PrivacyEngine,
    *,
    noise_multiplier: float,
    clipping: str = "flat",
    grad_sample_mode: str = "hooks",
    **options: Any,
) -> None:
    """Refuse a run that no filter can keep within budgets.

    Args:
        engine: Whose ``make_private`` was called.
        noise_multiplier: Its argument, like the others.
        clipping: How Opacus clips.
        grad_sample_mode: How Opacus gets at per-example gradients.
        **options: Its other arguments.

    Raises:
        ValueError: If an argument rules a filter out; it says why.
    """
    expect(
        grad_sample_mode != fast.MODE and not grad_sample_mode.startswith("ghost"),
        "grad_sample_mode",
        repr(grad_sample_mode),
        "to keep per-example gradients, which a RenyiFilter leaves out one by one",
        'Use grad_sample_mode="hooks".',
    )
    expect(
        clipping in ("flat", "per_layer"),
        "clipping",
        repr(clipping),
        'to be "flat" or "per_layer"',
        "Adaptive clipping also releases how many examples were clipped, which no "
        "budget covers.",
    )
    positive(
        noise_multiplier=noise_multiplier, remedy="No budget covers noiseless steps."
    )
    for reason in _unsuited(engine, **options):
        raise ValueError(f"A RenyiFilter cannot keep budgets here. {reason}")


def _unsuited(
    engine: PrivacyEngine,
    *,
    module: nn.Module,
    data_loader: DataLoader[Any],
    poisson_sampling: bool = True,
    **_: Any,
) -> Iterator[str]:
    """Why an engine, a model or a loader is none for a filter."""
    if isinstance(module, (DDP, DPDDP, FSDPModule)):
        yield (
            f"With {type(module).__name__} every process has a filter of its own, and "
            "none sees all the charges. Train in one process."
        )
    if not poisson_sampling and not refusals.is_poisson(data_loader):
        odd = refusals.unknown_schedule(data_loader)
        if odd:
            yield odd
    useless = refusals.clipping_without_effect(engine)
    if useless:
        yield useless


def saved_charges(renyi_filter: RenyiFilter) -> dict[str, Any]:
    """A filter's state as tensors, numbers and strings, for a checkpoint."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in renyi_filter.state_dict().items()
    }


def resume_charges(
    renyi_filter: RenyiFilter | None,
    charges: Mapping[str, Any] | None,
    num_steps: int,
) -> None:
    """Go on with the charges of a checkpoint, or say that they are missing.

    Args:
        renyi_filter: The engine's, if it has one.
        charges: What ``saved_charges`` gave, if the checkpoint has them.
        num_steps: Updates that the checkpoint's accountant has counted.

    Raises:
        ValueError: If updates were made without the filter, or with another one.
    """
    if renyi_filter is None:
        if charges is not None:
            warnings.warn(
                "The checkpoint was trained within budgets, and this engine keeps "
                "none. Use PrivacyEngine(renyi_filter=...) to train on within them.",
                stacklevel=3,
            )
        return
    expect(
        charges is not None or num_steps == 0,
        "checkpoint",
        f"{num_steps} updates without a filter",
        "to have charged the examples for its updates",
        "Resume from a checkpoint that was trained with this RenyiFilter.",
    )
    if charges is not None:
        arrays = {
            name: value.cpu().numpy() if isinstance(value, Tensor) else value
            for name, value in unsealed(charges).items()
        }
        renyi_filter.load_state_dict(arrays)
