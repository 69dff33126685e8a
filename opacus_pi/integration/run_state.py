"""What a checkpoint holds besides weights and record, for a run to be resumed exactly.

These are the random states, the position in the pass over the loader, the samplers'
epochs, and the noise multiplier and clip norm that schedules and adaptive clipping have
changed by then (Opacus saves none of them).
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.utils.data import DataLoader

from opacus_pi._validate import expect
from opacus_pi.attribution.loader_position import Position
from opacus_pi.recording.random_states import RandomStates

_RANDOM, _POSITION, _EPOCH, _SETTING = "random.", "position.", "epoch.", "setting."
_SETTINGS = ("noise_multiplier", "max_grad_norm")
_SAMPLERS = ("batch_sampler", "sampler")
_WITHIN_AN_UPDATE = (
    "It was taken within a batch that was given in parts, and the gradients of the "
    "parts before are not saved. Save after an update."
)
_SECURE = "Random numbers of secure_mode cannot be drawn again."


class RunState:
    """The state of a run that was prepared, beyond its weights and its record.

    Args:
        loader: The loader that is trained from; its passes are followed from now on.
        optimizer: Opacus's, if it is one.
        noise_generator: Of the noise; None: torch's global one.
        is_secure: Whether numbers come from a source that has no state.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        noise_generator: torch.Generator | None = None,
        is_secure: bool = False,
    ) -> None:
        own = {name: getattr(loader, name, None) for name in _SAMPLERS}
        self._samplers = {n: s for n, s in own.items() if s is not None}
        holders = {"loader": loader, **self._samplers}
        generators = {n: getattr(h, "generator", None) for n, h in holders.items()}
        generators["noise"] = noise_generator
        self._is_secure = is_secure
        self._random_states = RandomStates(
            {} if is_secure else {n: g for n, g in generators.items() if g is not None}
        )
        self._position = Position(self._random_states, loader)
        is_private = isinstance(optimizer, DPOptimizer)
        self._optimizer = weakref.ref(optimizer) if is_private else _nothing

    def state_dict(self) -> dict[str, Any]:
        """The state of now, as tensors, numbers and strings."""
        obstacle = self._obstacle()
        if obstacle:
            return {"obstacle": obstacle}
        optimizer = self._optimizer()
        settings = (
            {} if optimizer is None else {n: vars(optimizer)[n] for n in _SETTINGS}
        )
        parts = {
            _RANDOM: self._random_states.collect(),
            _POSITION: self._position.state(),
            _EPOCH: {
                name: sampler.epoch
                for name, sampler in self._samplers.items()
                if isinstance(getattr(sampler, "epoch", None), int)
            },
            _SETTING: {name: _copied(value) for name, value in settings.items()},
        }
        flat = {f"{p}{n}": v for p, part in parts.items() for n, v in part.items()}
        return {"obstacle": "", **flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to the state that ``state_dict`` returned.

        Args:
            state: It.

        Raises:
            ValueError: If the run cannot be resumed exactly from there, or the run now
                prepared has other generators; nothing is changed then.
        """
        obstacle = state.get("obstacle", "It holds no random states. Save it by ours.")
        known = obstacle if isinstance(obstacle, str) else "It is damaged."
        expect(not known, "restore_rng", True, "to be possible", known)
        random_states = _part(state, _RANDOM)
        self._check_settings(state)
        self._position.check(_part(state, _POSITION))
        self._random_states.restore(random_states)
        self._position.resume(_part(state, _POSITION), random_states)
        for name, epoch in _part(state, _EPOCH).items():
            self._samplers[name].epoch = epoch
        optimizer = self._optimizer()
        for name, value in _part(state, _SETTING).items() if optimizer else ():
            setattr(optimizer, name, _copied(value))

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        """Refuse epochs of other samplers, and settings that are none."""
        epochs, settings = _part(state, _EPOCH), _part(state, _SETTING)
        expect(
            set(epochs) <= set(self._samplers)
            and all(type(epoch) is int for epoch in epochs.values())
            and set(settings) <= set(_SETTINGS)
            and all(_is_setting(value) for value in settings.values()),
            "the checkpoint",
            {**epochs, **settings},
            f"to hold epochs of {sorted(self._samplers)}, and numbers for {_SETTINGS}",
            "Resume with the loader of the run saved, from its own checkpoint.",
        )

    def _obstacle(self) -> str:
        """Why the run cannot be resumed exactly from this moment."""
        if self._is_secure:
            return _SECURE
        if getattr(self._optimizer(), "_is_last_step_skipped", False):
            return _WITHIN_AN_UPDATE
        return self._position.obstacle()


def _part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _is_setting(value: Any) -> bool:
    """Whether it is a number that noise or clipping can be set to."""
    is_one = isinstance(value, Tensor) and value.numel() == 1
    return (is_one or type(value) in (int, float)) and 0 <= float(value) < float("inf")


def _copied(setting: Any) -> Any:
    """A setting that later updates leave alone; adaptive clipping's is a tensor."""
    return setting.detach().clone() if isinstance(setting, Tensor) else setting


def _nothing() -> None:
    """A reference to nothing."""
