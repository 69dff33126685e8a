"""Record a training loop in a ledger: which data of each update is kept, and when.

``Recorder`` decides how often a row is written and what it contains. After training,
``gram_ledger`` computes the inner products that bounds for a group of examples need.
"""

from opacus_pi._errors import AccountingError
from opacus_pi._promised import promise
from opacus_pi.recording.checkpoints import Checkpoints
from opacus_pi.recording.deletable_last import DeletableLast
from opacus_pi.recording.gram_recording import gram_ledger
from opacus_pi.recording.recorder import Recorder

__all__ = ["AccountingError", "Checkpoints", "DeletableLast", "Recorder", "gram_ledger"]

promise(__name__)
