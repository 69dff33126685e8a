"""One function for each figure of the paper: it takes arrays and returns Axes.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
Every curve has its own marker, and the spread over runs is always drawn.

| Figure | Function |
|---|---|
| 1 left and middle, 6, 7, 8 | ``plot_time_to_unlearn`` |
| 1 right | ``plot_barriers`` |
| 2 | ``plot_proxies`` |
| 3 | ``plot_hardest_sets`` |
| 4 | ``plot_group_divergences`` |
| 5 | ``plot_curves`` |
| 9 | ``plot_pictures`` |
| not in the paper: histogram of a number over examples | ``plot_distribution`` |
| not in the paper: ε of all examples below the worst case | ``plot_epsilons`` |

Nothing here computes a privacy loss or runs a model, and nothing imports torch. A
figure can therefore be drawn again from saved numbers on any machine, and be part of a
larger figure: pass ``ax``. No function calls ``show`` or saves a file.
"""

from opacus_pi._promised import promise
from opacus_pi.plotting.barriers import plot_barriers
from opacus_pi.plotting.curves import plot_curves
from opacus_pi.plotting.distributions import plot_distribution
from opacus_pi.plotting.epsilons import plot_epsilons
from opacus_pi.plotting.groups import plot_group_divergences
from opacus_pi.plotting.pictures import plot_pictures
from opacus_pi.plotting.proxies import plot_proxies
from opacus_pi.plotting.times import plot_hardest_sets, plot_time_to_unlearn

__all__ = [
    "plot_barriers",
    "plot_curves",
    "plot_distribution",
    "plot_epsilons",
    "plot_group_divergences",
    "plot_hardest_sets",
    "plot_pictures",
    "plot_proxies",
    "plot_time_to_unlearn",
]

promise(__name__)
