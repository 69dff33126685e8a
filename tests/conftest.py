"""Settings of all tests, in one process or in several."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before NumPy and torch read it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
from hypothesis import settings

matplotlib.use("Agg")
settings.register_profile("opacus_pi", deadline=None)
settings.load_profile("opacus_pi")
