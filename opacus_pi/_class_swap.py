"""Give one object a subclass of its class, so that it stays the same object.

Opacus's models, optimizers and loaders are observed by overriding methods. A wrapper
would be another object of another type, which ``isinstance``, ``type(x) is ...``, saved
references and other libraries would notice. Here the object keeps its identity and its
attributes, and only ``__class__`` becomes a subclass with the name of the class before.

The object behaves as before wherever the subclass does not override a method. Pickling
breaks if the class is not found under its name; a subclass for objects that are pickled
therefore defines ``__reduce_ex__``. Python refuses the change for classes with another
memory layout (``__slots__``, built-in types).

>>> class Greeter:
...     def greet(self):
...         return "hello"
>>> def _louder(base):
...     class Louder(base):
...         def greet(self):
...             return super().greet().upper()
...
...     return Louder
>>> swap_class(Greeter(), _louder).greet()
'HELLO'
"""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_subclasses: dict[tuple[type, Callable[[type], type]], type] = {}


def swap_class(instance: T, factory: Callable[[type], type]) -> T:
    """Replace an object's class by the subclass that ``factory`` makes of it.

    Args:
        instance: The object, changed in place; left as it is if its class has been
            replaced by this factory before.
        factory: Makes a subclass with this one base (with several, Python refuses the
            assignment); called once per class.

    Returns:
        The same object; its class has the name of the one before.

    Raises:
        TypeError: If the memory layouts of the two classes differ.
    """
    base = type(instance)
    swaps = getattr(base, "_pi_swaps", ())
    if factory in swaps:
        return instance
    # one subclass for all objects of a class, so that their types stay comparable
    if (base, factory) not in _subclasses:
        made: Any = factory(base)
        made._pi_swaps = (*swaps, factory)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(made, name, getattr(base, name))
        _subclasses[base, factory] = made
    instance.__class__ = _subclasses[base, factory]
    return instance
