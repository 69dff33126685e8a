"""The command line, ``opacus-pi``: arguments in, the library's functions, text out."""

from opacus_pi.cli.program import main

__all__ = ["main"]
