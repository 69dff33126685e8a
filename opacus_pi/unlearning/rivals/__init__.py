"""Published methods that use the forget set, for comparison.

Many papers unlearn by training *against* the forget set: they raise its loss, give it
wrong labels, or shrink the weights that matter to it. Such a method uses the examples
that it is to forget, so no bound on its distance from retraining is known, and its
guarantee here is always empirical. Each class is the update rule of one paper, run by
the same loop on the same batches as ``FineTune``.

A method that computes something from the trained model first (a teacher, a mask, a
factor for each weight) does so in ``prepare`` and returns a private subclass that holds
it. The object that the user made holds settings only, and can be used again.
"""

from opacus_pi._promised import promise
from opacus_pi.unlearning.rivals.paired import NegGradPlus, RandomLabels
from opacus_pi.unlearning.rivals.salun import SalUn
from opacus_pi.unlearning.rivals.scrub import SCRUB
from opacus_pi.unlearning.rivals.ssd import SSD

__all__ = ["SCRUB", "SSD", "NegGradPlus", "RandomLabels", "SalUn"]

promise(__name__)
