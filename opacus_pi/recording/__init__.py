"""From a training loop to a ledger: what to keep of every update, and when."""

from opacus_pi._errors import AccountingError
from opacus_pi.recording.recorder import Recorder

__all__ = ["AccountingError", "Recorder"]
