"""A report about one run: privacy losses, the hardest examples, what may be claimed.

``score`` computes the numbers of every example, which the command ``opacus-pi score``
prints. ``write_report`` adds an unlearning run, retrained models and the guarantee, and
writes all of it as one HTML page and one JSON file.
"""

from opacus_pi.report.run import Barriers
from opacus_pi.report.scores import Scores, score
from opacus_pi.report.write import training_facts, write_report

__all__ = ["Barriers", "Scores", "score", "training_facts", "write_report"]
