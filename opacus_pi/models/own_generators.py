"""Restore torch generators that user code draws from, besides the global ones.

A model, a criterion or a data set may draw from a ``torch.Generator`` of its own. A
call that is made only to measure something must not advance it: the training would
draw other random numbers.

**What breaks it.** Generators of NumPy and Python that are objects of the user's, and
draws of torch's that do not pass the generator to a function (samplers in C++).

>>> generator = torch.Generator().manual_seed(0)
>>> with OwnGenerators() as own:
...     first = torch.rand(1, generator=generator)
>>> own.were_used, bool(first == torch.rand(1, generator=generator))
(True, True)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["OwnGenerators"]


class OwnGenerators(TorchFunctionMode):
    """Context that restores every generator that is passed to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[int, tuple[torch.Generator, Tensor]] = {}

    @property
    def were_used(self) -> bool:
        """Whether a generator was passed to a function."""
        return bool(self._states)

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function; note the state of a generator before its first use."""
        options = dict(kwargs or {})
        for value in (*args, *options.values()):
            if isinstance(value, torch.Generator) and id(value) not in self._states:
                self._states[id(value)] = value, value.get_state()
        return function(*args, **options)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch has no types
        for generator, state in self._states.values():
            generator.set_state(state)
