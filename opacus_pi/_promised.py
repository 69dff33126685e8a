"""Tab completion that shows what is promised, and sub-modules that load when named.

>>> import opacus_pi.accounting
>>> "privacy_losses" in dir(opacus_pi.accounting), "rules" in dir(opacus_pi.accounting)
(True, False)
"""

import sys
from importlib import import_module
from typing import Any

__all__ = ["promise"]


def promise(package: str, *modules: str) -> None:
    """Have ``dir`` of a package list its ``__all__`` and these sub-modules, no more.

    A sub-module is imported when it is first named as an attribute, so that it can be
    used after a plain ``import opacus_pi``. Everything else stays importable.

    Args:
        package: The package's ``__name__``; call this after ``__all__`` is set.
        *modules: Names of sub-modules that the documentation names.
    """
    module = sys.modules[package]
    shown = sorted({*module.__all__, *modules})

    def load(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    vars(module).update(__getattr__=load, __dir__=lambda: list(shown))
