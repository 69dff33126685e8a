"""Time, memory and precision of this library, beside targets and other libraries.

``__main__`` is the command. It runs one module per section: ``norms``, ``memory``,
``precision``, ``tracking``, ``fast_step``, ``accountant`` and ``fused``. Each has
``measure``, which returns the numbers of one case as JSON, and ``rows``, which turns
stored numbers into lines of the table.
"""
