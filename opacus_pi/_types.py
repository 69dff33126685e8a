"""Types under short names, so that ``help`` shows signatures that can be read.

>>> import inspect
>>> def total(values: ArrayLike) -> float: ...
>>> inspect.signature(total)
<Signature (values: ArrayLike) -> float>
"""

import numpy.typing
from typing_extensions import TypeAliasType

__all__ = ["ArrayLike"]

ArrayLike = TypeAliasType("ArrayLike", numpy.typing.ArrayLike)
