"""Figures: the data drawn are the data given, and spread is shown."""

from itertools import islice

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from opacus_pi.difficulty.agreement import binned_means
from opacus_pi.plotting import (
    plot_barriers,
    plot_curves,
    plot_epsilons,
    plot_group_divergences,
    plot_hardest_sets,
    plot_pictures,
    plot_proxies,
    plot_time_to_unlearn,
)
from opacus_pi.plotting.style import COLOURS, styles

STUDENT = 12.706  # two runs that differ by 2: half of Student's 95 % interval
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


def test_a_loss_of_zero_does_not_stretch_the_axis():
    ax = plot_time_to_unlearn([0.0, 1.0, 2.0], {"UA": [0, 1, 2]}, max_time=5)
    assert ax.get_xlim()[0] > 0.1


def means(container):
    """x, mean and the upper half of the bar of every point of an errorbar."""
    x, y = container.lines[0].get_data()
    ends = container.lines[2][0].get_segments()
    return x, y, [high - mean for (_, (_, high)), mean in zip(ends, y, strict=True)]


def test_hardest_sets_stand_side_by_side():
    times = {"loss": [[3, 5], [5, np.inf]], "el2n": [[1, 1], [1, 1]]}
    ax = plot_hardest_sets([600, 1000], times, max_time=7, unit="steps")
    first, second = (means(c) for c in ax.containers)
    np.testing.assert_allclose(first[1], [4, 6])
    np.testing.assert_allclose(first[2], [STUDENT, STUDENT], rtol=1e-4)
    np.testing.assert_allclose((first[0] + second[0]) / 2, [0, 1])
    assert (first[0] < second[0]).all()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["600", "1,000"]
    assert ax.get_ylabel() == "steps to unlearn"
    with pytest.raises(ValueError, match=r"times\['loss'\].*shape \(1, 2\)"):
        plot_hardest_sets([600, 1000], {"loss": [1, 2, 3]}, max_time=7)


def test_barriers_with_their_baseline():
    before, after = [[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]], [[0.5] * 3] * 2
    ax = plot_barriers(LOSSES, before, after, [0.4, 0.6])
    low, high = (
        ax.patches[0].get_y(),
        ax.patches[0].get_y() + ax.patches[0].get_height(),
    )
    np.testing.assert_allclose([low, high], [0.4, 0.6])
    was, now = (means(c) for c in ax.containers)
    np.testing.assert_allclose(was[1], [2, 2, 4])
    np.testing.assert_allclose(was[2], [STUDENT, 0, STUDENT], rtol=1e-4)
    np.testing.assert_allclose(now[1], 0.5)
    assert ax.collections[0].get_offsets().shape == (6, 2)
    with pytest.raises(ValueError, match="baseline"):
        plot_barriers(LOSSES, before, after, [])
    with pytest.raises(ValueError, match="after must .*shape"):
        plot_barriers(LOSSES, before, [[0.5] * 2] * 2, [0.5])


def test_a_baseline_of_each_set_follows_the_sets():
    runs, pairs = [[1.0, 2.0, 3.0]] * 2, [[0.1, 0.2, 0.3], [0.3, 0.2, 0.5]]
    ax = plot_barriers(LOSSES, runs, runs, pairs)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.2, 0.2, 0.4])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert {0.1, 0.2, 0.3, 0.5} <= set(np.round(band, 12)) and not ax.patches


def test_no_interval_of_times_goes_below_0():
    times = {"UA": [[0, 1, 2], [0, 3, 4]]}
    ax = plot_time_to_unlearn(LOSSES, times, max_time=20)
    ends = ax.containers[0].lines[2][0].get_segments()
    assert [low for (_, low), _ in ends] == [0, 0, 0]
    assert ends[2][1][1] == pytest.approx(3 + STUDENT, rel=1e-4)


def test_never_is_named_where_it_happens():
    def named(times):
        ax = plot_time_to_unlearn(LOSSES[:1], {"UA": times}, max_time=7)
        return [text.get_text() for text in ax.texts]

    assert named([0, 1, np.inf]) == ["never within 7 epochs"]
    assert named([0, 1, 7]) == []
    ax = plot_hardest_sets([10], {"loss": [np.inf]}, max_time=7, unit="steps")
    assert ax.texts[0].get_text() == "never within 7 steps"


def test_curves_that_coincide_are_both_seen():
    times = {"UA": [0, 1, 2], "MIA": [0, 1, 2]}
    ax = plot_time_to_unlearn(LOSSES[:1], times, max_time=7)
    first, second = (container.lines[0] for container in ax.containers)
    assert first.get_markersize() > second.get_markersize()
    assert first.get_linewidth() > second.get_linewidth()


def test_proxies_are_binned_and_carry_their_correlation():
    losses = np.geomspace(0.01, 100, 60)
    ax = plot_proxies(losses, {"el2n": np.sqrt(losses), "c": -losses}, num_bins=6)
    found, turned = ax.lines
    expected = binned_means(losses, np.sqrt(losses), num_bins=6)
    np.testing.assert_allclose(found.get_xydata(), np.c_[expected.x, expected.mean])
    assert [line.get_label() for line in ax.lines] == [
        "el2n (ρ = 1.00)",
        "c (ρ = -1.00)",
    ]
    assert turned.get_ydata().min() >= -1 and len(ax.collections) == 2
    assert ax.get_xscale() == "log"
    with_zero = plot_proxies([0.0, 1, 2, 3], {"c": [1, 2, 3, 4]}, num_bins=2)
    assert with_zero.get_xscale() == "linear"


def test_group_divergences_have_one_standard_deviation():
    values = {"printed": [[10, 12, 14], [14, 12, 10]], "coupled": [0.1, 1.0, 100.0]}
    ax = plot_group_divergences(LOSSES[0], values)
    printed, coupled = (means(c) for c in ax.containers)
    np.testing.assert_allclose(printed[1], [12, 12, 12])
    np.testing.assert_allclose(printed[2], [2, 0, 2])
    np.testing.assert_allclose(coupled[2], 0)
    assert ax.get_yscale() == "log"
    negative = plot_group_divergences(LOSSES[0], {"printed": [-1, 1, 1]})
    assert negative.get_yscale() == "symlog"
    with pytest.raises(ValueError, match="mean_losses"):
        plot_group_divergences([1.0, 2.0], values)


def test_curves_carry_their_oracle_in_their_colour():
    curves = {"first": [[0, 0, 0]], "last": [[0, 0.2, 0.4], [0, 0.4, 0.6]]}
    ax = plot_curves([0, 1, 2], curves, {"last": [0.5, 0.7]}, metric="UA")
    first, last, oracle = ax.lines
    np.testing.assert_allclose(last.get_ydata(), [0, 0.3, 0.5])
    np.testing.assert_allclose(oracle.get_ydata(), 0.6)
    assert oracle.get_color() == last.get_color() != first.get_color()
    assert oracle.is_dashed() and not last.is_dashed()
    band = ax.collections[1].get_paths()[0].vertices
    assert {0.2, 0.4, 0.6} <= set(np.round(band[:, 1], 12))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["first", "last", "retrained"]
    with pytest.raises(ValueError, match=r"curves\['first'\]"):
        plot_curves([0, 1], curves, metric="UA")


def test_pictures_in_rows():
    grey, colour = np.zeros((2, 1, 4, 5)), np.ones((2, 3, 4, 5))
    colour[:, 0] = 0.25
    titles = {"hard": ["3", "5"]}
    grid = plot_pictures({"easy": grey, "hard": colour}, titles)
    assert grid.shape == (2, 2)
    np.testing.assert_array_equal(grid[0, 1].images[0].get_array(), grey[1, 0])
    np.testing.assert_array_equal(grid[1, 0].images[0].get_array()[..., 0], 0.25)
    assert [ax.get_title() for ax in grid[1]] == ["3", "5"]
    assert [line[0].get_ylabel() for line in grid] == ["easy", "hard"]
    assert plot_pictures({"flat": grey[:, 0]}).shape == (1, 2)


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            {"a": np.zeros((2, 4, 4)), "b": np.zeros((3, 4, 4))},
            "rows of the same length",
        ),
        ({"a": np.zeros((2, 4, 4, 3))}, "Put the channels before"),
        ({}, "rows of"),
    ],
)
def test_bad_pictures_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        plot_pictures(rows)


def test_drawing_into_given_axes_makes_no_figure():
    _, ax = plt.subplots()
    before = plt.get_fignums()
    assert plot_time_to_unlearn([1], {"UA": [0]}, max_time=1, ax=ax) is ax
    assert plot_curves([0], {"a": [[1]]}, metric="UA", ax=ax) is ax
    assert plt.get_fignums() == before


def test_styles_differ_in_both_colour_and_marker():
    used = list(islice(styles(), len(COLOURS)))
    assert len({s["color"] for s in used}) == len({s["marker"] for s in used}) == 7


def test_epsilons_are_drawn_in_increasing_order_with_their_own_limits():
    ax = plot_epsilons([3.0, 1.0, 2.0], 4.0, [3.5, 1.25, 4.0])
    dots, worst, line = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), [1, 2, 3])
    np.testing.assert_array_equal(dots.get_ydata(), [1.25, 4.0, 3.5])
    np.testing.assert_allclose(line.get_xdata(), [100 / 6, 50, 500 / 6])
    assert set(worst.get_ydata()) == {4.0}


def test_without_a_bound_there_is_no_line_of_the_worst_case():
    assert len(plot_epsilons([1.0, 2.0], np.inf).lines) == 1


@pytest.mark.parametrize(
    ("epsilons", "limits", "message"),
    [
        ([], None, "epsilons must be finite"),
        ([1.0, np.inf], None, "2 numbers, 1 of them finite"),
        ([1.0, 2.0], [1.0], "limits must have one number per example"),
    ],
)
def test_epsilons_and_limits_must_fit(epsilons, limits, message):
    with pytest.raises(ValueError, match=message):
        plot_epsilons(epsilons, 1.0, limits)
