"""What the callbacks for the trainers of Lightning and Hugging Face have in common."""

from typing import Any

from opacus_pi._validate import expect

__all__ = ["require_preparation", "require_setting", "require_three"]

_PREPARATIONS = ("make_private", "make_private_with_epsilon", "make_monitored")


def require_preparation(prepare: str) -> None:
    """Raise unless an argument names a method of the engine that prepares a run.

    Args:
        prepare: The argument.

    Raises:
        ValueError: If there is no such method.
    """
    expect(
        prepare in _PREPARATIONS,
        "prepare",
        repr(prepare),
        f"must be one of {_PREPARATIONS}",
        "Name the method of PrivacyEngine that prepares the run.",
    )


def require_setting(name: str, value: Any, *, equals: Any, remedy: str) -> None:
    """Raise unless a setting of a trainer has the one value that can be accounted for.

    Args:
        name: The name of the setting.
        value: Its value.
        equals: The value that it must have.
        remedy: What to do, in sentences.

    Raises:
        ValueError: If it has another value.
    """
    expect(value == equals, name, value, f"must be {equals}", remedy)


def require_three(prepared: tuple[Any, ...], grad_sample_mode: Any) -> None:
    """Raise unless an engine prepared model, optimizer and loader, and nothing else.

    Args:
        prepared: What the engine returned.
        grad_sample_mode: The mode that it was asked for.

    Raises:
        ValueError: If it also returned a criterion, which a trainer would not call.
    """
    expect(
        len(prepared) == 3,
        "grad_sample_mode",
        repr(grad_sample_mode),
        "must be a mode that keeps the loss of the trainer",
        'Use "hooks" or "fast": ghost clipping replaces the criterion by one of its '
        "own.",
    )
