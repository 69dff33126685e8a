"""A report about one run: privacy losses, the hardest examples, what may be claimed."""

from opacus_pi.report.run import Barriers
from opacus_pi.report.scores import Scores, score
from opacus_pi.report.write import training_facts, write_report

__all__ = ["Barriers", "Scores", "score", "training_facts", "write_report"]
