import pytest

from opacus_pi._class_swap import swap_class


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
