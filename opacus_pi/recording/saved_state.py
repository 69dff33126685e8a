"""Check that a state dict is the saved state of a run, before anything uses it.

Checkpoints may be damaged, edited, or written by another program. A state that passes
``require_whole`` has every entry, in its type, shape and range, so a run made from it
has the guarantees of a recorder. The checks cannot see values that were changed within
their range: the checksum of the checkpoint covers those.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opacus_pi._validate import expect, require
from opacus_pi.custody.seen_states import SeenStates
from opacus_pi.ledger.checks import checked_steps, checked_weights
from opacus_pi.ledger.custody import Custody
from opacus_pi.ledger.noise_generator import checked_noise_generator
from opacus_pi.recording.participations import has_whole_counts, layout_of_counts

VERSION = 1
ASSUMED = "assumed"
TOO_SMALL = "too small"
_FAR = 2**53  # larger numbers are not exact as floats, and no run counts so far
_MEASURED = ("grad_norms", "confidences", "errors", "correct")
_ROW = "rows."
GENERATOR_STATES = "generator_states"  # older releases do not save them
UNDONE = "num_undone"  # saved if it is not 0
FLAGS = "has_unattributed"  # of each row's interval, and last of the open one
_TYPES = {
    "source": (str,),
    "num_examples": (int,),
    "sample_rate": (float, int),
    "sampling": (str,),
    "data_set": (str,),
    "num_steps": (int,),
    "refusal": (str,),
}
# older releases do not save them
LATER_TEXTS = (
    "weights",
    "custody",
    "run_name",
    "noise_generator",
    "noise_is",
    "accountant_is",
)


def require_version(state: Any) -> None:
    """Refuse a state that another release saved.

    Args:
        state: What ``RecordedRun.state_dict`` returned.

    Raises:
        ValueError: If it is of another version.
    """
    found = state.get("version") if isinstance(state, Mapping) else None
    expect(
        type(found) is int and found == VERSION,
        "the saved run's version",
        found,
        f"must be {VERSION}",
        "Resume with the release of opacus_pi that saved it.",
    )


def require_whole(state: Mapping[str, Any]) -> None:
    """Refuse the state dict of a run with a missing or damaged entry.

    Args:
        state: What ``RecordedRun.state_dict`` returned.

    Raises:
        ValueError: If an entry is missing, of another type or shape, or out of range.
    """
    require_version(state)
    for name, types in _TYPES.items():
        _check(type(state.get(name)) in types, name, "missing or of another type")
    _check_facts(state)
    _check_arrays(state, _measured_rows(state))
    checked_steps(state["steps"].cpu().numpy(), state["num_steps"])
    for name in LATER_TEXTS:
        _check(type(state.get(name, "")) is str, name, "of another type")
    checked_weights(state.get("weights") or None)
    checked_noise_generator(state.get("noise_generator") or None)
    charged = state.get("accountant_is", "")
    _check(charged in ("", TOO_SMALL), "accountant_is", "unknown")
    _check(state.get("noise_is", "") in ("", ASSUMED), "noise_is", "unknown")
    _check(
        has_whole_counts(state),
        "participations",
        "missing or of another type",
    )
    seen = state.get(GENERATOR_STATES, SeenStates().state())
    _check(SeenStates.is_state(seen), GENERATOR_STATES, "of another type, or damaged")
    if state.get("custody"):
        Custody.from_json(state["custody"])
    expect(
        state.get("norms", "") == "",
        "the saved run's norms",
        repr(state.get("norms")),
        "must be exact",
        "An earlier release measured these norms in bfloat16, which is enough to rank "
        "examples but not to compute losses. Start the run again.",
    )


def _check_facts(state: Mapping[str, Any]) -> None:
    """Refuse strings and numbers that are unknown or out of range."""
    for name, right in {
        "source": state["source"] in ("observed", "swept"),
        "sampling": state["sampling"] in ("poisson", "fixed"),
        "num_examples": 0 < state["num_examples"] < _FAR,
        "num_steps": 0 <= state["num_steps"] < _FAR,
        UNDONE: 0 <= state.get(UNDONE, 0) < _FAR,
        "sample_rate": 0 < state["sample_rate"] <= 1,
        "open_interval": _length(state.get("open_interval")) in (0, 1),
    }.items():
        _check(right, name, "unknown or out of range")


def _measured_rows(state: Mapping[str, Any]) -> set[str]:
    """Return which measurements the rows hold, or refuse unknown or missing ones."""
    names = {name.removeprefix(_ROW) for name in state if name.startswith(_ROW)}
    needed = {"grad_norms"} if _length(state.get("steps")) else set()
    allowed = needed if state["source"] == "observed" else needed and set(_MEASURED)
    _check(
        needed <= names <= allowed,
        f"{_ROW}grad_norms",
        "missing, or was saved with measurements that this release does not know",
    )
    return names


def _check_arrays(state: Mapping[str, Any], rows: set[str]) -> None:
    """Refuse arrays of another type or shape, or with numbers out of range."""
    for name, (dtype, shape) in _layout(state, rows).items():
        value = state.get(name)
        _check(
            isinstance(value, Tensor) and (value.dtype, value.shape) == (dtype, shape),
            name,
            "missing, or of another type or shape",
        )
        _check(_is_in_range(name, state[name], state), name, "out of range")


def _layout(
    state: Mapping[str, Any], rows: set[str]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the type and shape that each array must have."""
    num_rows, num_examples = _length(state.get("steps")), state["num_examples"]
    size = num_examples if state["source"] == "observed" else 0
    return {
        "steps": (torch.int64, (num_rows,)),
        "intervals": (torch.float64, (num_rows, 3)),
        "open_interval": (torch.float64, (_length(state.get("open_interval")), 3)),
        "observed": (torch.float32, (size,)),
        "observed_at": (torch.int64, (size,)),
        **{f"{_ROW}{row}": (torch.float32, (num_rows, num_examples)) for row in rows},
        **layout_of_counts(state, num_rows, num_examples),
        **({FLAGS: (torch.int64, (num_rows + 1,))} if FLAGS in state else {}),
    }


def _length(value: Any) -> int:
    """Return the length of a tensor with dimensions, -1 for anything else."""
    return len(value) if isinstance(value, Tensor) and value.dim() > 0 else -1


def _is_in_range(name: str, value: Tensor, state: Mapping[str, Any]) -> bool:
    """Return whether the numbers of one entry can have been recorded."""
    numbers = value.cpu().numpy()
    if name == "observed_at":
        return bool((numbers <= state["num_steps"] + 1).all() and (numbers >= 0).all())
    if name != "observed" and not name.startswith(_ROW):
        return bool((numbers >= 0).all())  # not NaN either
    may_be_infinite = name == "observed" and bool(state["refusal"])
    bad = (numbers < 0) | (np.isinf(numbers) & (not may_be_infinite))
    return not bad.any()


def _check(condition: bool, name: str, problem: str) -> None:
    """Refuse the state because of one entry."""
    require(
        condition,
        f"The saved run is incomplete or damaged: its entry {name!r} is {problem}.",
        "Resume from another checkpoint.",
    )
