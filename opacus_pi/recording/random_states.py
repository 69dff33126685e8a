"""The states of the random number generators of a run, as tensors and numbers.

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

_OWN = "generator."
_REST = ("pos", "has_gauss", "gauss")


class RandomStates:
    """Collects and restores the states of all generators that a run draws from.

    These are the global ones of ``random``, numpy and torch, of CUDA if it is in use,
    and the run's own.

    Args:
        generators: The run's own generators by name.
    """

    def __init__(self, generators: Mapping[str, torch.Generator]) -> None:
        self.generators = dict(generators)

    def collect(self) -> dict[str, Any]:
        """The states of now, as tensors and numbers."""
        _, words, gauss = random.getstate()
        states = {
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": float("nan") if gauss is None else gauss,
            **_numpy_states(),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():
            states["cuda"] = torch.stack(torch.cuda.get_rng_state_all())
        own = {f"{_OWN}{n}": g.get_state() for n, g in self.generators.items()}
        return states | own

    def check(self, states: Mapping[str, Any]) -> None:
        """Refuse states that this run has not all the generators for.

        Raises:
            ValueError: If the generators differ from those that were saved, or what
                was saved are no states.
        """
        saved = {key for key in states if key.startswith(_OWN)}
        present = {f"{_OWN}{name}" for name in self.generators}
        expect(
            saved == present,
            "the run's own generators",
            sorted(name.removeprefix(_OWN) for name in present),
            f"must be {sorted(name.removeprefix(_OWN) for name in saved)}",
            "Give loader, sampler and noise a generator where the run saved had one.",
        )
        expect(
            "numpy" in states,
            "numpy.random's bit generator",
            "one that is not its default",
            "must be MT19937",
            "Leave numpy's global generator as it is by default, then save again.",
        )
        wrong = sorted(_wrong(states))
        expect(
            not wrong,
            "the saved random states",
            wrong,
            "must be states of generators",
            "Resume from another checkpoint.",
        )
        num_devices = len(states.get("cuda", ()))
        expect(
            num_devices <= torch.cuda.device_count(),
            "the number of CUDA devices",
            torch.cuda.device_count(),
            f"must be at least {num_devices}",
            "Resume on as many devices as the run saved had.",
        )

    def restore(self, states: Mapping[str, Any]) -> None:
        """Go back to the states that ``collect`` returned.

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
        for device, state in enumerate(states.get("cuda", ())):
            torch.cuda.set_rng_state(_bytes(state), device)
        for name, generator in self.generators.items():
            generator.set_state(_bytes(states[f"{_OWN}{name}"]))


def _numpy_states() -> dict[str, Any]:
    """The state of numpy's global generator; of another than its default, nothing."""
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
    """Names of entries that are no states."""
    for name, length, top in (("python", 625, 2**32), ("numpy", 624, 2**32)):
        words: Any = states.get(name)
        fits = isinstance(words, Tensor) and words.dtype == torch.int64
        if not fits or words.shape != (length,):
            yield name
        elif not bool(((words >= 0) & (words < top)).all()):
            yield name
        elif name == "python" and not 1 <= int(words[-1]) <= 624:
            yield name
    numbers = {"numpy_pos": (int, 624), "numpy_has_gauss": (int, 1)}
    for name, (kind, most) in numbers.items():
        if type(states.get(name)) is not kind or not 0 <= states[name] <= most:
            yield name
    for name in ("python_gauss", "numpy_gauss"):
        if type(states.get(name)) is not float:
            yield name
    for name in ("torch", *(key for key in states if key.startswith(_OWN))):
        try:
            torch.Generator().set_state(_bytes(states[name]))
        except (KeyError, AttributeError, TypeError, RuntimeError):
            yield name


def _bytes(state: Tensor) -> Tensor:
    """A state as generators take it: on the CPU, wherever the checkpoint was loaded."""
    return state.cpu().contiguous()
