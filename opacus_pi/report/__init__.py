"""A report about one run: privacy losses, the hardest examples, what may be claimed.

``score`` computes the numbers of every example, which the command ``opacus-pi score``
prints, and ``rank_persons`` those of persons with several examples. ``write_report``
adds an unlearning run, retrained models and the guarantee, and writes all of it as one
HTML page and one JSON file.

``scores`` and ``run`` collect facts as mappings that can be written as JSON; ``page``
and ``figures`` only show them. A number in the text of the page is therefore in the
JSON file, too. Both files name unusual examples: they are not for sharing.
"""

from opacus_pi._promised import promise
from opacus_pi.report.persons import PersonScore, rank_persons
from opacus_pi.report.run import Barriers
from opacus_pi.report.scores import Scores, score
from opacus_pi.report.write import training_facts, write_report

__all__ = [
    "Barriers",
    "PersonScore",
    "Scores",
    "rank_persons",
    "score",
    "training_facts",
    "write_report",
]

promise(__name__)
