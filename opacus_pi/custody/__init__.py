"""The chain of custody: what is known about where the norms of an update come from.

A recorded norm belongs to one example only if several conditions hold: the *links* of
the chain, which ``opacus_pi.ledger.custody`` lists and stores in the ledger's file.
``chain`` keeps the state of each link during a run, and every function that reads the
ledger looks at it. The other files watch one link each.

Nothing here depends on Opacus: ``opacus_pi.integration`` reports to the links what
optimizers and loaders do.
"""

from opacus_pi._promised import promise
from opacus_pi.custody.chain import Chain, SampleCounts

__all__ = ["Chain", "SampleCounts"]

promise(__name__)
