"""Which example of the data set is each row of a physical batch?

Between the data loader and the optimizer the user's loop may do anything. A row is
attributed by the strongest evidence there is, and to nobody rather than wrongly:

1. *storage*: the model was given (rows of) the very tensors the loader delivered;
2. *content*: it was given copies, recognised by a checksum of each row;
3. *latest*: it was given something computed from the one batch that is still unused.
   Believed, not verified: rows are taken to be in the order of delivery.
"""

from opacus_pi.attribution.evidence import NOBODY, UNKNOWN
from opacus_pi.attribution.forward_probe import probe
from opacus_pi.attribution.loader_watch import tracker_of, watch, watch_memory_manager
from opacus_pi.attribution.tracker import Tracker

__all__ = [
    "NOBODY",
    "UNKNOWN",
    "Tracker",
    "probe",
    "tracker_of",
    "watch",
    "watch_memory_manager",
]
