"""Errors in place of a number that would be wrong, and of a log that is in use."""


class AccountingError(RuntimeError):
    """The run cannot be accounted for, so no privacy loss is given for it.

    Training itself is not affected. The message says why, and what to do.
    """


class LogInUseError(RuntimeError):
    """Another process is carrying out requests of a deletion log."""
