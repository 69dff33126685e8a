"""The command line ``opacus-pi``: it parses arguments, calls the library, prints text.

``commands`` declares all commands; neither it nor ``parser`` imports torch or opacus.
Each command is a module with a function ``run(options)``, imported when that command
runs.

| module | what it does |
|---|---|
| ``program`` | runs a command and turns errors into exit codes |
| ``parser`` | parses a command line, with errors of one line |
| ``commands``, ``log_commands`` | declare the commands, and the actions of ``log`` |
| ``arguments``, ``declarations``, ``methods`` | what these are declared with |
| ``no_effect`` | which options are refused because they would change nothing |
| ``inputs``, ``imports`` | load the files and objects that the arguments name |
| ``owners`` | reads which examples a request, or a person, is about |
| ``sets`` | cuts forget, retain and test set in the same way for all commands |
| ``said_once`` | prints warnings as lines |
| ``output`` | prints text or JSON, formats tables |
| ``encoding`` | replaces characters that the output cannot hold |
| ``submission`` | enters requests in a deletion log, for ``unlearn`` and ``log`` |
| ``recorded_weights`` | refuses a ledger of other weights |
| ``run_files`` | the directory that ``unlearn`` writes |
| ``recognition`` | finds out what a file is, for ``verify`` |
| all others | one command each |

A command computes nothing itself. If its answer needs a number, the library has a
function that returns it, so that scripts can get the same number.
"""

from opacus_pi._promised import promise
from opacus_pi.cli.program import main

__all__ = ["main"]

promise(__name__)
