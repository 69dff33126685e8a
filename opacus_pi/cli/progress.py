"""Lines about how far a run is, where no terminal shows a progress bar.

Output that goes to a file or to another program has no bar, and a long run would look
as if it hung. A short run prints nothing.
"""

import sys
import time
from collections.abc import Callable

from opacus_pi.unlearning.callbacks import Callback, Metrics, Watched

_SECONDS = 15.0  # between two lines


class ProgressLines(Callback):
    """Callback that prints the epochs done to the standard error, now and then.

    Args:
        num_epochs: Epochs of the run at most.
        clock: Returns seconds, for tests.
    """

    def __init__(
        self, num_epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_epochs, self._clock = num_epochs, clock
        self._last = clock()

    def on_epoch_end(self, unlearner: Watched, epoch: int, metrics: Metrics) -> None:
        """Print a line if the last one was long ago and no bar is shown."""
        now = self._clock()
        if sys.stderr.isatty() or now - self._last < _SECONDS:
            return
        self._last = now
        print(f"unlearning: {epoch} of {self._num_epochs} epochs", file=sys.stderr)
