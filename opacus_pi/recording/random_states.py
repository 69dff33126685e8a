"""The states of a run's random number generators, as tensors and numbers.

A run that is resumed from a checkpoint ends with the same ledger as an uninterrupted
one only if all generators continue where they stopped. ``RandomStates`` saves and
restores them. It does not cover generators in a loader's worker processes, nor
generators of the training loop that are not in ``generators``.

>>> states = RandomStates({})
>>> saved = states.collect()
>>> first = torch.rand(2), random.random()
>>> states.restore(saved)
>>> bool((torch.rand(2) == first[0]).all()), random.random() == first[1]
(True, True)
"""

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opacus_pi._validate import expect
from opacus_pi.models.accelerators import (
    accelerator_in_use,
    device_random_states,
    num_accelerators,
    set_device_random_states,
)

_OWN = "generator."
_DEVICES = "device."
_REST = ("pos", "has_gauss", "gauss")


class RandomStates:
    """Collects and restores the states of all generators that a run draws from.

    These are the global ones of ``random``, numpy and torch, those of the accelerators
    that are in use, and the run's own.

    Args:
        generators: The run's own generators by name.
    """

    def __init__(self, generators: Mapping[str, torch.Generator]) -> None:
        self.generators = dict(generators)

    def collect(self) -> dict[str, Any]:
        """Return the current states, as tensors and numbers."""
        _, words, gauss = random.getstate()
        states = {
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": float("nan") if gauss is None else gauss,
            **_numpy_states(),
            "torch": torch.get_rng_state(),
        }
        if devices := device_random_states():
            states[f"{_DEVICES}{accelerator_in_use()}"] = torch.stack(devices)
        own = {f"{_OWN}{n}": g.get_state() for n, g in self.generators.items()}
        return states | own

    def check(self, states: Mapping[str, Any]) -> None:
        """Refuse states that do not fit the generators of this run.

        Args:
            states: What ``collect`` returned.

        Raises:
            ValueError: If the run has other generators than the saved one, or a saved
                state is damaged.
        """
        saved = {key for key in states if key.startswith(_OWN)}
        present = {f"{_OWN}{name}" for name in self.generators}
        expect(
            saved == present,
            "the run's own generators",
            sorted(name.removeprefix(_OWN) for name in present),
            f"must be {sorted(name.removeprefix(_OWN) for name in saved)}",
            "Pass a generator of your own to the loader, the sampler or the noise "
            "exactly where the saved run had one.",
        )
        expect(
            "numpy" in states,
            "the saved run's global generator of NumPy",
            "one of another type",
            "must be MT19937, NumPy's default",
            "The saved run had replaced it, so its state is not in the checkpoint, and "
            "the run cannot be resumed exactly. Load the checkpoint without "
            "restore_rng, or train anew with NumPy's default.",
        )
        wrong = sorted(_wrong(states))
        expect(
            not wrong,
            "the saved random states",
            wrong,
            "must be complete states of random generators",
            "Resume from another checkpoint.",
        )
        for kind, saved_states in _device_states(states):
            present_devices = num_accelerators(kind)
            expect(
                len(saved_states) <= present_devices,
                f"the number of {kind} devices",
                present_devices,
                f"must be at least {len(saved_states)}",
                "Resume on at least as many devices as the saved run had.",
            )

    def restore(self, states: Mapping[str, Any]) -> None:
        """Set all generators to the states that ``collect`` returned.

        Args:
            states: What ``collect`` returned.

        Raises:
            ValueError: As ``check`` does; nothing is changed then.
        """
        self.check(states)
        gauss = states["python_gauss"]
        words = tuple(states["python"].tolist())
        random.setstate((3, words, None if math.isnan(gauss) else gauss))
        key = states["numpy"].cpu().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, *(states[f"numpy_{n}"] for n in _REST)))
        torch.set_rng_state(_bytes(states["torch"]))
        for _, saved_states in _device_states(states):
            set_device_random_states([_bytes(state) for state in saved_states])
        for name, generator in self.generators.items():
            generator.set_state(_bytes(states[f"{_OWN}{name}"]))


def _device_states(states: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield each kind of accelerator with its saved states, ``(devices, bytes)``."""
    for key, value in states.items():
        if key.startswith(_DEVICES):
            yield key.removeprefix(_DEVICES), value


def _numpy_states() -> dict[str, Any]:
    """Return the state of numpy's global generator; empty if it is not the default."""
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return {}
    return {
        "numpy": torch.from_numpy(state["state"]["key"].astype(np.int64)),
        "numpy_pos": int(state["state"]["pos"]),
        "numpy_has_gauss": int(state["has_gauss"]),
        "numpy_gauss": float(state["gauss"]),
    }


def _wrong(states: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of entries that are not states of generators."""
    yield from _wrong_of_python(states)
    yield from _wrong_of_numpy(states)
    for name in ("torch", *(key for key in states if key.startswith(_OWN))):
        if not _is_torch_state(states.get(name)):
            yield name


def _wrong_of_python(states: Mapping[str, Any]) -> Iterator[str]:
    """Yield the entries that ``random.setstate`` would refuse or misread.

    Its state is the 624 words of the Mersenne Twister, followed by the position of the
    next word to use, and a normal number that was drawn in advance (NaN: none).
    """
    words = states.get("python")
    if not _are_words(words, 625) or not 1 <= int(states["python"][-1]) <= 624:
        yield "python"
    if type(states.get("python_gauss")) is not float:
        yield "python_gauss"


def _wrong_of_numpy(states: Mapping[str, Any]) -> Iterator[str]:
    """Yield the entries that ``numpy.random.set_state`` would refuse or misread.

    numpy keeps the 624 words and the position apart, and a flag says whether a normal
    number was drawn in advance.
    """
    if not _are_words(states.get("numpy"), 624):
        yield "numpy"
    for name, most in (("numpy_pos", 624), ("numpy_has_gauss", 1)):
        if type(states.get(name)) is not int or not 0 <= states[name] <= most:
            yield name
    if type(states.get("numpy_gauss")) is not float:
        yield "numpy_gauss"


def _are_words(value: Any, length: int) -> bool:
    """Return whether a value is an int64 tensor of so many 32-bit words."""
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.int64
        and value.shape == (length,)
        and bool(((value >= 0) & (value < 2**32)).all())
    )


def _is_torch_state(value: Any) -> bool:
    """Return whether torch accepts a value as the state of a generator."""
    try:
        torch.Generator().set_state(_bytes(value))
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True


def _bytes(state: Tensor) -> Tensor:
    """Return a state on the CPU, where generators need it."""
    return state.cpu().contiguous()
