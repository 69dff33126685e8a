"""Find out which tensors that a model holds no forward pass reads.

The state of a metric that is an attribute of the model is changed by the training loop
at every step, but no output depends on it. A copy of the model is run in its mode and
in evaluation mode, and every tensor is noted that a function of torch is given.

Only tensors of submodules count that are not in the model's ``state_dict``: the others
are a part of the model that may be published.

**What breaks it.** The passes that were repeated read only what they read: a model may
begin to read a tensor later, for example after a number of updates. Functions of
compiled extensions that torch does not know, and a backward pass of the user's own, are
not seen.

>>> class Shifted(nn.Linear):
...     def forward(self, x):
...         return super().forward(x) + self.shift
>>> model = nn.Sequential(Shifted(2, 1))
>>> model[0].count, model[0].shift = torch.ones(1), torch.ones(1)
>>> sorted(unread_tensors(ProbedCall(model, (torch.ones(3, 2),), {}, 0, 3)))
['0.count']
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from opacus_pi._torch_compat import own_buffers
from opacus_pi.custody.probed_call import ProbedCall
from opacus_pi.custody.weights import is_plain
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.models.batches import tensors_of

__all__ = ["unread_tensors"]


def unread_tensors(call: ProbedCall) -> set[str]:
    """Return the names of tensors of submodules that are neither saved nor read.

    Args:
        call: A call of the model.

    Returns:
        Names such as ``"accuracy.tp"``; empty if the model cannot be run again.
    """
    names = {n for found in _unsaved(call.model).values() for n in found}
    try:
        for is_training in (True, False) if names else ():
            names -= _read(replace(call, is_training=is_training))
    except MODEL_ERRORS:
        return set()
    return names


def _read(call: ProbedCall) -> set[str]:
    """Return the names of the tensors that a call reads.

    Args:
        call: The call.
    """
    found: set[str] = set()

    @contextmanager
    def watch(model: nn.Module) -> Iterator[None]:
        with _Reads(_unsaved(model), found):
            yield

    call.run(watch=watch)
    return found


def _unsaved(model: nn.Module) -> dict[int, set[str]]:
    """Return the names of unsaved tensors of submodules, by address of their storage.

    Args:
        model: The model, or a copy of it.
    """
    saved, found = model.state_dict().keys(), dict[int, set[str]]()
    for prefix, layer in model.named_modules():
        for key, value in {**own_buffers(layer), **vars(layer)}.items():
            name = f"{prefix}.{key}"
            is_tensor = isinstance(value, torch.Tensor) and is_plain(value)
            if prefix and is_tensor and value.numel() and name not in saved:
                address = value.untyped_storage().data_ptr()
                found.setdefault(address, set()).add(name)
    return found


class _Reads(TorchFunctionMode):
    """Context that notes which tensors functions of torch are given.

    Args:
        names: The names of the tensors, by address of their storage.
        found: The names of those that were given are added to it.
    """

    def __init__(self, names: Mapping[int, set[str]], found: set[str]) -> None:
        super().__init__()
        self._names, self._found = names, found

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note the tensors, and call the function."""
        options = dict(kwargs or {})
        for tensor in tensors_of((args, options)):
            if is_plain(tensor):
                address = tensor.untyped_storage().data_ptr()
                self._found |= self._names.get(address, set())
        return function(*args, **options)
