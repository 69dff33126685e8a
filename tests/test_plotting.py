import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from opacus_pi.plotting import plot_time_to_unlearn

LOSSES = np.array([[1e-3, 1.0, 1e3], [2e-3, 2.0, 2e3]])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_line_is_the_mean_and_never_counts_as_the_longest_run():
    times = {"UA": [[0, 2, np.inf], [0, 4, 10]]}
    ax = plot_time_to_unlearn(LOSSES, times, max_time=20)
    line = ax.containers[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [0, 3, 15])
    np.testing.assert_allclose(line.get_xdata(), np.sqrt(LOSSES[0] * LOSSES[1]))
    assert ax.get_xscale() == "log"
    assert ax.get_legend_handles_labels()[1] == ["UA"]


def test_a_run_that_never_arrives_is_hollow_at_the_top():
    ax = plot_time_to_unlearn(LOSSES[:1], {"UA": [0, 1, np.inf]}, max_time=7)
    full, hollow = ax.collections[:2]
    assert len(full.get_offsets()) == 2
    np.testing.assert_allclose(hollow.get_offsets(), [[1e3, 7.0]])
    assert len(hollow.get_facecolor()) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"times\['UA'\].*shape \(2, 3\)"):
        plot_time_to_unlearn(LOSSES, {"UA": [[0, 1]]}, max_time=5)
