"""The kind of random generator that the noise of a training run was drawn from.

A bound on DP-SGD assumes that nobody can predict the noise. Noise of a pseudo-random
generator can be computed by anyone who knows its seed, so whether the generator was
secure belongs to the assumptions of a guarantee. The kind is recorded in every update;
a run that drew from several kinds has the weakest of them.

>>> weakest("secure", "global")
'global'
>>> weakest(None, "secure") is None
True
"""

from types import MappingProxyType

from opacus_pi._validate import expect

__all__ = [
    "GLOBAL",
    "NOISE_GENERATORS",
    "PASSED",
    "SECURE",
    "checked_noise_generator",
    "kind_of",
    "weakest",
]

GLOBAL, PASSED, SECURE = "global", "passed", "secure"
#: What each kind is, in words, from the weakest to the strongest.
NOISE_GENERATORS = MappingProxyType(
    {
        GLOBAL: "torch's global pseudo-random generator",
        PASSED: "a pseudo-random generator other than torch's global one",
        SECURE: "a cryptographically secure generator (secure_mode)",
    }
)


def checked_noise_generator(kind: str | None) -> str | None:
    """Return a kind of generator, or refuse one that is not known.

    Args:
        kind: One of ``NOISE_GENERATORS``; None: not recorded.

    Raises:
        ValueError: If it is something else.
    """
    expect(
        kind is None or kind in tuple(NOISE_GENERATORS),
        "noise_generator",
        repr(kind),
        f"must be one of {', '.join(NOISE_GENERATORS)}, or None",
        "Pass None if the generator is not known.",
    )
    return kind


def kind_of(generator: object | None, *, is_secure: bool) -> str:
    """Return the kind of the generator that an optimizer draws its noise from.

    Args:
        generator: The optimizer's own generator; None: it uses torch's global one.
        is_secure: Whether the engine was made with ``secure_mode``.
    """
    if generator is None:
        return GLOBAL
    return SECURE if is_secure else PASSED


def weakest(*kinds: str | None) -> str | None:
    """Return the weakest kind among several generators of noise.

    Args:
        *kinds: The kind of each part of the run; None: not recorded.

    Returns:
        The kind that is easiest to predict; None if one of them is not known.
    """
    known = [kind for kind in kinds if kind is not None]
    if not known or len(known) < len(kinds):
        return None
    return min(known, key=tuple(NOISE_GENERATORS).index)
