"""Give one object a subclass of its class, so that it stays the same object.

Opacus's models, optimizers and loaders are observed by overriding methods. A wrapper
would be another object of another type, which ``isinstance``, ``type(x) is ...``, saved
references and other libraries would notice. Here the object keeps its identity and its
attributes, and only ``__class__`` becomes a subclass with the name of the class before.

The object behaves as before wherever the subclass does not override a method. Copies
and pickles of it are plain: they have the class from before, which can be imported, and
no attribute that begins with ``_pi_``, because such attributes observe this one object.
A subclass may define ``__reduce_ex__`` to decide otherwise. Python refuses the change
for classes with another memory layout (``__slots__``, built-in types).

>>> import copy
>>> class Greeter:
...     def greet(self):
...         return "hello"
>>> def _louder(base):
...     class Louder(base):
...         def greet(self):
...             return super().greet().upper()
...
...     return Louder
>>> greeter = swap_class(Greeter(), _louder)
>>> greeter.greet(), copy.copy(greeter).greet()
('HELLO', 'hello')
"""

from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar, cast

T = TypeVar("T")
# What unpickling calls by default to make an object: ``copyreg.__newobj__``.
_make_object: Any = object().__reduce_ex__(2)[0]
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
        made._pi_swaps, made._pi_base = (*swaps, factory), base
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(made, name, getattr(base, name))
        if made.__reduce_ex__ is base.__reduce_ex__:
            made.__reduce_ex__ = _reducing_as_plain(base)
        _subclasses[base, factory] = made
    instance.__class__ = _subclasses[base, factory]
    return instance


def plain_class(instance: object) -> type:
    """Return the class that an object had before its class was ever replaced."""
    cls: Any = type(instance)
    while "_pi_base" in vars(cls):
        cls = cls._pi_base
    return cast(type, cls)


def _made_of(cls: type, *arguments: Any) -> Any:
    """Make an object of a class without initialising it.

    ``copyreg.__newobj__`` does the same, but pickle knows that name, and requires that
    the class is the one of the object that is pickled.
    """
    return _make_object(cls, *arguments)


def _reducing_as_plain(base: Any) -> Callable[[Any, SupportsIndex], tuple[Any, ...]]:
    """Make the method by which objects are copied and pickled with their class before.

    Args:
        base: The class that the subclass replaces; it may reduce in its own way.
    """

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> tuple[Any, ...]:
        reduced = base.__reduce_ex__(self, max(2, protocol.__index__()))
        function, arguments, *rest = reduced
        if function is type(self):  # a __reduce__ that calls the class
            function = plain_class(self)
        elif function is _make_object:
            function, arguments = _made_of, (plain_class(self), *arguments[1:])
        if rest and isinstance(rest[0], dict):
            rest[0] = {k: v for k, v in rest[0].items() if not k.startswith("_pi_")}
        return function, arguments, *rest

    return __reduce_ex__
