"""Find out in which precision a model computes, to know what rounding may change.

The type of the parameters does not tell it: automatic mixed precision computes in half
precision with parameters of single precision. It may be switched on inside of the
model, as Accelerate does for ``bf16=True``, where a caller does not see it. So the
results of a pass are looked at.

**How large rounding is.** A logit z that is rounded to a type with spacing ``eps``
changes by up to ``eps |z| / 2``, and the gradient of its example by about this share.
Logits up to 16 give a share of 8 ``eps``: 6 % in bfloat16, 0.8 % in float16. Norms are
sums over many entries, so what the layers round adds less than that.

>>> with Precision() as precision:
...     _ = (torch.ones(2) / 3).bfloat16() * 2
>>> precision.rounding
0.0625
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from opacus_pi.models.batches import tensors_of

__all__ = ["ROUNDINGS", "Precision"]

ROUNDINGS = 8  # of the coarsest type of a pass


class Precision(TorchFunctionMode):
    """Context that notes the coarsest floating-point type of the results in it.

    Attributes:
        eps: The spacing of this type at 1; 0 if there was no result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    @property
    def rounding(self) -> float:
        """The relative difference of norms, losses and outputs that may be rounding."""
        return ROUNDINGS * self.eps

    @property
    def is_half(self) -> bool:
        """Whether a result was in half precision."""
        return self.eps > torch.finfo(torch.float32).eps

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function, and note the types of its results."""
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            kind = tensor.dtype
            if kind.is_floating_point:
                self.eps = max(self.eps, torch.finfo(kind).eps)
        return result
