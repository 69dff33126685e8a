"""What is needed to measure a row, and what was measured, as the ledger keeps it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opacus_pi._validate import expect

_MEASURED = ("grad_norms", "confidences", "errors", "correct")


def float32_row(measured: Any, num_examples: int) -> dict[str, NDArray[np.float32]]:
    """What a sweep returned, as arrays of the ledger.

    Args:
        measured: An object with ``grad_norms`` and possibly ``confidences``, ``errors``
            and ``correct``.
        num_examples: Number of examples, n.

    Returns:
        float32 ``(n,)`` by name.

    Raises:
        ValueError: If one has another shape.
    """
    given = {name: getattr(measured, name, None) for name in _MEASURED}
    row = {
        name: torch.as_tensor(values).detach().cpu().to(torch.float32).numpy()
        for name, values in given.items()
        if values is not None
    }
    for name, values in row.items():
        expect(
            values.shape == (num_examples,),
            f"sweep().{name}",
            f"an array of shape {values.shape}",
            f"must have shape ({num_examples},)",
            "A sweep measures every example of the data set.",
        )
    return row


def require_callable(name: str, given: Any, needed: bool, remedy: str) -> None:
    """Refuse a recorder without a function that one of its options calls for.

    Args:
        name: Of the option.
        given: The function, or None.
        needed: Whether the option is used.
        remedy: What to pass.

    Raises:
        ValueError: If it is needed and not given.
    """
    expect(
        given is not None or not needed,
        name,
        given,
        "must be a function",
        f"This recorder calls it at every row: pass {remedy} to say how.",
    )
