"""Whether a model still has the weights that its last update left, and their name.

>>> model = nn.Linear(2, 1)
>>> last = LastWeights(model)
>>> last.updated()
>>> last.name() == weights_name(model)
True
>>> _ = nn.init.zeros_(model.weight)
>>> last.name()
'changed'
"""

import weakref

import torch
from torch import Tensor, nn

from opacus_pi.ledger.checks import CHANGED
from opacus_pi.models.copies import unwrap
from opacus_pi.models.weights_name import weights_name

_Marks = list[tuple[int, torch.dtype]]


class LastWeights:
    """Notes after each update how often every weight has been written to.

    That costs no pass over the weights; they are hashed when their name is asked for.
    A write that goes around autograd's counters (to ``weight.data``) is not seen.

    Args:
        model: The model in training, plain or wrapped; referred to weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(unwrap(model))
        self._tensors = [weakref.ref(t) for t in _tensors(unwrap(model))]
        self._marks: _Marks | None = None

    def updated(self) -> None:
        """An update was made."""
        held = [reference() for reference in self._tensors]
        self._marks = [_mark(t) for t in held if t is not None]

    def forget(self) -> None:
        """Whatever the weights are, no update seen here left them."""
        self._marks = None

    def name(self) -> str | None:
        """The weights' name; ``"changed"`` if the last update left others.

        Returns:
            None where no update was seen, or the model is gone.
        """
        model = self._model()
        if model is None or self._marks is None:
            return None
        now = [_mark(tensor) for tensor in _tensors(model)]
        return weights_name(model) if now == self._marks else CHANGED


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers themselves, in the model's order."""
    live = model.state_dict(keep_vars=True).values()
    return [value for value in live if isinstance(value, Tensor)]


def _mark(tensor: Tensor) -> tuple[int, torch.dtype]:
    """How often a tensor was written to, and its type."""
    version = -1 if tensor.is_inference() else tensor._version
    return version, tensor.dtype
