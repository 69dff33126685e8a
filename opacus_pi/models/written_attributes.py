"""Attributes that a model's forward pass writes, and whether it reads them first.

A model may store its last loss or its last attention weights on itself. If each forward
pass writes such an attribute before it reads it, or never reads it, its value does not
matter for the next pass. A copy of the model can then be used again as it is.

:class:`ObservedAttributes` compares the attributes of a copy before and after passes,
and watches the reads of those that are expected to be written. The guarantee: a read
through ``module.name`` is noticed. What breaks it: a read through ``vars(module)``.

>>> import torch
>>> class Stores(nn.Module):
...     last = None
...
...     def forward(self, x):
...         self.last = x.mean()
...         return x
>>> model = Stores()
>>> observed = ObservedAttributes(model)
>>> output = model(torch.ones(2))
>>> observed.end()
>>> observed.written, observed.read
(frozenset({(0, 'last')}), False)
"""

from typing import Any

from torch import Tensor, nn

from opacus_pi._class_swap import plain_class, swap_class
from opacus_pi._torch_compat import num_writes
from opacus_pi.models.structure import Place, own_modules

_WATCHED = "_pi_watched"  # the attribute in which a module keeps its ``_Reads``


class ObservedAttributes:
    """Observe the attributes of a copy until :meth:`end` is called.

    Attributes:
        written: The places of attributes that have changed, other than expected ones.
        read: Whether an expected attribute was read before the same pass wrote it.

    Args:
        model: The copy; its modules may get another class until the end.
        expected: The attributes whose reads are watched.
    """

    def __init__(
        self, model: nn.Module, expected: frozenset[Place] = frozenset()
    ) -> None:
        self.written: frozenset[Place] = frozenset()
        self.read = False
        self._expected = expected
        self._modules = own_modules(model)
        self._before = [
            {name: (value, _writes(value)) for name, value in vars(module).items()}
            for module in self._modules
        ]
        self._watches: list[_Watch] = []
        for number in {place[0] for place in expected}:
            names = {name for where, name in expected if where == number}
            self._watches.append(_Watch(self._modules[number], names))
        self._handle = (
            model.register_forward_pre_hook(self._begin) if expected else None
        )

    def _begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the copy: nothing is written yet in this pass."""
        for watch in self._watches:
            watch.written.clear()

    def end(self) -> None:
        """Compare, and give each module its class back."""
        if self._handle is not None:
            self._handle.remove()
        for watch in self._watches:
            watch.end()
        self.read = any(watch.has_read for watch in self._watches)
        self.written = frozenset(
            (number, name)
            for number, (module, before) in enumerate(
                zip(self._modules, self._before, strict=True)
            )
            for name in vars(module).keys() | before.keys()
            if (number, name) not in self._expected
            and _differ(before.get(name), vars(module).get(name))
        )
        self._before.clear()


class _Watch:
    """Notes of one module which attributes are written and read.

    Attributes:
        written: Names written in this pass.
        has_read: Whether one was read that this pass had not yet written.

    Args:
        module: The module; its class is replaced.
        names: The attributes to watch.
    """

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        self.written: set[str] = set()
        self.has_read = False
        self._module, self._names = module, names
        vars(module)[_WATCHED] = self
        swap_class(module, _watching)

    def note_write(self, name: str) -> None:
        """Note that an attribute was written."""
        self.written.add(name)

    def note_read(self, name: str) -> None:
        """Note that an attribute was read."""
        if name in self._names and name not in self.written:
            self.has_read = True

    def end(self) -> None:
        """Give the module its class back."""
        self._module.__class__ = plain_class(self._module)
        del vars(self._module)[_WATCHED]


def _watching(base: Any) -> type:
    """Return a subclass of a module's class that notes reads and writes."""

    class Watching(base):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("__"):
                watch = object.__getattribute__(self, "__dict__").get(_WATCHED)
                if watch is not None:
                    watch.note_read(name)
            return base.__getattribute__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            base.__setattr__(self, name, value)
            watch = vars(self).get(_WATCHED)
            if watch is not None:
                watch.note_write(name)

    return Watching


def _writes(value: Any) -> int:
    """Return how often a value was written to, 0 for what is not a tensor."""
    return num_writes(value) if isinstance(value, Tensor) else 0


def _differ(before: tuple[Any, int] | None, value: Any) -> bool:
    """Return whether an attribute is another object, or a tensor written to since."""
    return before is None or before[0] is not value or before[1] != _writes(value)
