"""Layers' norms by the fastest of their exact formulas, timed once.

The default counts operations instead, so that results repeat bit for bit. Formulas
round differently: which one is fastest may change from run to run, and the last bits of
the norms with it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from opacus_pi._validate import expect
from opacus_pi.gradients.layers.conv import conv_formulas, conv_squares
from opacus_pi.gradients.layers.linear import linear_formulas, linear_squares
from opacus_pi.gradients.registry import NormRule

Formulas = Callable[[Any, Tensor, Tensor], Sequence[NormRule]]
_FORMULAS: dict[NormRule, Formulas] = {
    conv_squares: conv_formulas,
    linear_squares: linear_formulas,
}
_ROUNDS = 5  # after one that is not counted


def chooser(formulas: str) -> Callable[[NormRule], NormRule]:
    """Return what makes the rule of one layer of that of its type.

    Args:
        formulas: ``"flops"`` or ``"timed"``.

    Raises:
        ValueError: If it is neither.
    """
    expect(
        formulas in ("flops", "timed"),
        "formulas",
        repr(formulas),
        'to be "flops" or "timed"',
        "It says how each layer's formula is chosen.",
    )
    return _timed if formulas == "timed" else _counted


def _counted(rule: NormRule) -> NormRule:
    """The rule itself, which counts operations."""
    return rule


def _timed(rule: NormRule) -> NormRule:
    """A rule for one layer, timed if it has several formulas."""
    return Fastest(_FORMULAS[rule]) if rule in _FORMULAS else rule


class Fastest:
    """The rule of one layer: the formula that is fastest on its first batch.

    Args:
        formulas: Gives the candidates, all of them exact.
        clock: Seconds since some moment.
    """

    def __init__(
        self, formulas: Formulas, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._formulas, self._clock = formulas, clock
        self._chosen: NormRule | None = None

    def __call__(
        self, module: Any, x: Tensor, grad: Tensor, names: Collection[str]
    ) -> Tensor | None:
        """Squared norms ``(b,)``, as a norm rule gives them."""
        if self._chosen is None:
            candidates = self._formulas(module, x, grad)
            self._chosen = candidates[0]
            if len(candidates) > 1:
                self._chosen = self._fastest(candidates, (module, x, grad, names))
        return self._chosen(module, x, grad, names)

    def _fastest(self, candidates: Sequence[NormRule], call: Any) -> NormRule:
        """The candidate of least median time, in turns."""
        seconds: list[list[float]] = [[] for _ in candidates]
        for _ in range(1 + _ROUNDS):
            for of, formula in zip(seconds, candidates, strict=True):
                start = self._now(call[1])
                formula(*call)
                of.append(self._now(call[1]) - start)
        medians = [median(of[1:]) for of in seconds]
        return candidates[medians.index(min(medians))]

    def _now(self, x: Tensor) -> float:
        """The time, once all work on the tensor's device is done."""
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return self._clock()
