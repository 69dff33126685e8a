"""The error of a number that must not be given."""


class AccountingError(RuntimeError):
    """Training went on, but what was run cannot be accounted.

    The message says why, and what to do.
    """
