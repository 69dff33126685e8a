"""What rounding may change is found from the results of a pass, wherever they are."""

import pytest
import torch
from torch import nn

from opacus_pi.models.precision import Precision


class MixedInside(nn.Linear):
    """Computes under autocast and returns single precision, as Accelerate's models."""

    def __init__(self, kind):
        super().__init__(3, 2)
        self.kind = kind

    def forward(self, x):
        with torch.autocast("cpu", self.kind):
            return super().forward(x).float()


@pytest.mark.parametrize(
    "make,eps",
    [
        (lambda: nn.Linear(3, 2), 2**-23),
        (lambda: nn.Linear(3, 2).double(), 2**-52),
        (lambda: MixedInside(torch.bfloat16), 2**-7),
        (lambda: MixedInside(torch.float16), 2**-10),
    ],
)
def test_the_coarsest_type_of_a_pass(make, eps):
    model = make()
    x = torch.ones(4, 3, dtype=next(model.parameters()).dtype)
    with Precision() as precision:
        model(x)
    assert precision.eps == eps
    assert precision.rounding == 8 * eps
    assert precision.is_half == (eps > 1e-5)
