import copy
import pickle

import pytest

from opacus_pi._class_swap import plain_class, swap_class


class Base:
    """A class."""

    def value(self):
        return 1


def plus_one(base):
    class Plus(base):
        def value(self):
            return super().value() + 1

    return Plus


def doubled(base):
    class Double(base):
        def value(self):
            return super().value() * 2

    return Double


def test_it_stays_the_same_object_of_a_subclass():
    instance, other = Base(), Base()
    assert swap_class(instance, plus_one) is instance
    assert instance.value() == 2 and other.value() == 1
    assert isinstance(instance, Base) and type(instance).__name__ == "Base"
    assert type(instance).__doc__ == Base.__doc__


def test_once_is_enough_and_classes_are_shared():
    instance, other = Base(), swap_class(Base(), plus_one)
    for _ in range(3):
        swap_class(instance, plus_one)
    assert instance.value() == 2 and type(instance) is type(other)


def test_different_swaps_add_up():
    instance = swap_class(swap_class(Base(), plus_one), doubled)
    assert instance.value() == 4
    assert swap_class(swap_class(instance, plus_one), doubled).value() == 4


def test_python_refuses_what_would_change_the_layout():
    class Slim(Base):
        pass

    with pytest.raises(TypeError, match="layout"):
        swap_class(Slim(), lambda base: type("Wide", (dict, base), {}))


class Reducing(Base):
    """A class that copies itself by calling its class."""

    def __init__(self, size=0):
        self.size = size

    def __reduce__(self):
        return type(self), (self.size,)


class Stateful(Base):
    """A class with a state of its own, and one that decides what it is made of."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (1,)

    def __getstate__(self):
        return {"kept": self.kept}


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {p}": lambda o, p=p: pickle.loads(pickle.dumps(o, p)) for p in range(6)
    },
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("swaps", [(plus_one,), (plus_one, doubled)])
def test_copies_are_plain(way, swaps):
    for made in (Base(), Reducing(3), Stateful()):
        plain = type(made)
        vars(made).update(kept=[1])
        for factory in swaps:
            swap_class(made, factory)
        vars(made).update(_pi_observer=lambda: None)  # it could not be pickled
        assert plain_class(made) is plain
        copied = WAYS[way](made)
        assert type(copied) is plain and copied.value() == 1
        expected = {"size": 3} if plain is Reducing else {"kept": [1]}
        assert vars(copied) == expected
