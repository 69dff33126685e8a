"""The error that is raised in place of a number that would be wrong."""


class AccountingError(RuntimeError):
    """The run cannot be accounted for, so no privacy loss is given for it.

    Training itself is not affected. The message says why, and what to do.
    """
