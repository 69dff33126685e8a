"""The command line ``opacus-pi``: it parses arguments, calls the library, prints text.

``parser`` declares all commands and imports neither torch nor opacus. Each command is
a module with a function ``run(options)``, imported when that command runs.
"""

from opacus_pi.cli.program import main

__all__ = ["main"]
