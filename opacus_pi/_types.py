"""Short names for long types, so that ``help`` shows readable signatures.

>>> import inspect
>>> def total(values: ArrayLike) -> float: ...
>>> inspect.signature(total)
<Signature (values: ArrayLike) -> float>
"""

import numpy.typing
from typing_extensions import TypeAliasType

__all__ = ["ArrayLike"]

ArrayLike = TypeAliasType("ArrayLike", numpy.typing.ArrayLike)
