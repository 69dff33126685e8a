"""The chain of custody: what is known about where the norms of an update come from.

``chain`` holds what is known about each link of a run, and every reading of the ledger
consults it. The other files watch one link each. ``opacus_pi.ledger.custody`` says what
the links are, and stores them in the ledger's file.

Nothing here knows Opacus: ``opacus_pi.integration`` tells the links what its optimizers
and loaders do.
"""

from opacus_pi._promised import promise
from opacus_pi.custody.chain import Chain, SampleCounts

__all__ = ["Chain", "SampleCounts"]

promise(__name__)
