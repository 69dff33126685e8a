"""Run the command line with ``python -m opacus_pi``."""

import sys

from opacus_pi.cli import main

if __name__ == "__main__":
    sys.exit(main())
