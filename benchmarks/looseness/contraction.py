"""Bounds on the divergence after unlearning, from the divergence after learning."""

from collections.abc import Callable

from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.unlearning import unlearning_divergence

PUBLISHED = "D·G^(−1/α)"
Bounds = dict[str, float]


def unlearning_bounds(
    learned: Callable[[float], float],
    order: float,
    num_steps: int,
    constants: LangevinConstants,
    initial_lsi: float,
    forms: tuple[str, ...] = ("hypercontractive",),
) -> tuple[Bounds, Bounds]:
    """Return the library's bounds by form, and the published one.

    Args:
        learned: Divergence after learning, by order; asked for orders above 1 only.
        order: Of the bounds.
        num_steps: Steps of unlearning.
        constants: Of these steps.
        initial_lsi: LSI constant of the retrained law before them.
        forms: Forms of the library's bound.
    """

    def bound(form: str) -> float:
        return unlearning_divergence(
            lambda a: learned(max(a, 1 + 1e-6)),
            order,
            num_steps,
            constants,
            initial_lsi=initial_lsi,
            form=form,
        ).divergence

    return {form: bound(form) for form in forms}, {PUBLISHED: bound("source")}
