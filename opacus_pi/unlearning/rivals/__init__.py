"""The field's most used methods that look at the forget set, to compare with.

None of them comes with a guarantee. Each is one paper's update rule, run by the same
loop on the same batches as fine-tuning.
"""

from opacus_pi.unlearning.rivals.paired import NegGradPlus, RandomLabels
from opacus_pi.unlearning.rivals.salun import SalUn
from opacus_pi.unlearning.rivals.scrub import SCRUB
from opacus_pi.unlearning.rivals.ssd import SSD

__all__ = ["SCRUB", "SSD", "NegGradPlus", "RandomLabels", "SalUn"]
