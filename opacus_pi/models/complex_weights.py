"""Trainable parameters with complex entries, whose gradients are not recorded.

A complex entry has two real coordinates. Noise that torch draws for a complex tensor
has half of the variance on each of them, so less than the standard deviation that is
recorded, and the rules for norms are for real numbers.

>>> import torch
>>> complex_parameter(nn.Linear(2, 1)) is None
True
>>> complex_parameter(nn.Linear(2, 1, dtype=torch.complex64))
'weight'
"""

from torch import nn

from opacus_pi._validate import expect

__all__ = ["complex_parameter", "require_real"]


def complex_parameter(model: nn.Module) -> str | None:
    """Return the name of the first trainable parameter that is complex, if any is.

    Args:
        model: Any module.
    """
    named = model.named_parameters()
    return next((n for n, p in named if p.requires_grad and p.is_complex()), None)


def require_real(model: nn.Module) -> None:
    """Raise if a trainable parameter of a model is complex.

    Args:
        model: Any module.

    Raises:
        ValueError: If there is one.
    """
    name = complex_parameter(model)
    expect(
        name is None,
        f"the parameter {name}",
        "complex",
        "must have real entries",
        "Store its real and imaginary parts as one real parameter with a last "
        "dimension of size 2, and use torch.view_as_complex(parameter) in forward.",
    )
