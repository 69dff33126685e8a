"""One setting for all property tests: a loaded machine is not a failure."""

import matplotlib
from hypothesis import settings

matplotlib.use("Agg")
settings.register_profile("opacus_pi", deadline=None)
settings.load_profile("opacus_pi")
