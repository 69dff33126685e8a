import json

import numpy as np
import pytest

from benchmarks.common.training import Recipe
from benchmarks.reproduce import outcomes
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.figures.typicality import NEIGHBOURS, disagreement
from benchmarks.reproduce.figures.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    Verdict,
    combined,
    ordering,
)
from benchmarks.reproduce.forget_sets import STRATA, ForgetSet, strata
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.workspace import Workspace

TINY = Experiment(
    "digits", 120, 60, Recipe("mlp", 2, 32, 0.1), num_seeds=2, num_checkpoints=3
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every figure at scale smoke, made twice from one store."""
    store = tmp_path_factory.mktemp("store")
    outs = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for out in outs:
        main(["all", "--jobs", "1", "--store", str(store), "--out", str(out)])
    return outs


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_numbers_a_picture_and_a_verdict(published, name):
    content = json.loads((published[0] / f"{name}.json").read_text())
    assert content["claim"] and content["result"]
    assert content["because"] or content["parts"]
    assert content["verdict"] == NOT_TESTABLE  # two seeds prove nothing
    assert (published[0] / f"{name}.png").stat().st_size > 2_000


@pytest.mark.parametrize("name", FIGURES)
def test_from_the_store_the_json_is_the_same(published, name):
    first, second = ((out / f"{name}.json").read_bytes() for out in published)
    assert first == second


def test_table_of_methods_has_a_line_for_each_stratum(published):
    lines = (published[0] / "methods.md").read_text().splitlines()
    content = json.loads((published[0] / "methods.json").read_text())
    methods = content["result"]["panels"]
    assert len(lines) == 2 + len(methods) * len(STRATA)


def test_unknown_figure_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="FIGURE must be 'all' or .*got fig10"):
        main(["fig10", "--store", str(tmp_path), "--out", str(tmp_path)])


def test_rising_times_are_borne_out_and_falling_ones_are_not():
    rising = np.array([[0, 0, 1, 2, 5], [0, 1, 1, 2, np.inf], [0, 0, 0, 3, 4]])
    assert ordering(rising).verdict == BORNE_OUT
    assert ordering(rising[:, ::-1]).verdict == NOT_BORNE_OUT
    assert ordering(np.zeros((3, 5))).verdict == NOT_TESTABLE
    mixed = np.vstack([rising, rising[:, ::-1]])
    assert ordering(mixed).verdict == NOT_TESTABLE


def test_a_claim_over_several_measures_needs_all_of_them():
    yes, no, open_ = (Verdict(v, "") for v in (BORNE_OUT, NOT_BORNE_OUT, NOT_TESTABLE))
    assert combined({"a": yes, "b": yes}).verdict == BORNE_OUT
    assert combined({"a": yes, "b": no}).verdict == NOT_BORNE_OUT
    assert combined({"a": yes, "b": open_}).verdict == NOT_TESTABLE


def hardest(times, gaps):
    """What figure 3 is judged by: two scores of equal times and gaps, one of others."""
    others = dict.fromkeys(["C-Proxy", "mean norm", "EL2N"], ([[1.0]] * 3, [[0.1]] * 3))
    rows = others | {"privacy loss": (times, gaps)}
    return {
        "times": {"UA": {name: row[0] for name, row in rows.items()}},
        "gaps": {"UA": {name: row[1] for name, row in rows.items()}},
        "max_time": 5,
    }


def test_hardest_sets_are_compared_by_time_and_by_the_gap_only_if_none_arrived():
    judge = FIGURES["fig3"].judge
    # slower but nearer at the end: time decides
    assert judge(hardest([[3.0], [3.0], [4.0]], [[0.0]] * 3)).verdict == BORNE_OUT
    assert judge(hardest([[0.5], [0.4], [0.5]], [[0.9]] * 3)).verdict == NOT_BORNE_OUT
    never = hardest([[None]] * 3, [[0.3], [0.3], [0.4]])
    assert judge(never).verdict == BORNE_OUT  # the others arrived after one epoch
    never["times"]["UA"] = dict.fromkeys(never["times"]["UA"], [[None]] * 3)
    found = judge(never)
    assert (
        found.verdict == BORNE_OUT
        and "no run reached the oracle in 5 epochs" in found.because
    )
    assert "remaining gap larger by 0.233" in found.because
    never["gaps"]["UA"]["privacy loss"] = [[0.1], [0.2], [0.0]]
    assert judge(never).verdict == NOT_TESTABLE


def sizes(small, large):
    """What figure 8 is judged by: times of the easiest to the hardest set."""
    panels = {
        f"sets of {n}": {"times": dict.fromkeys(("UA", "MIA"), times), "max_time": 9}
        for n, times in (("few", small), ("many", large))
    }
    return {"panels": panels}


def test_separation_by_size_is_judged_beside_the_order():
    apart = [[0.0, 3.0, None], [0.0, 4.0, 8.0], [0.0, 3.0, None]]
    close = [[0.0, 1.0, 2.0], [0.0, 1.0, 3.0], [0.0, 1.0, 2.0]]
    found = FIGURES["fig8"].judge(sizes(apart, close))
    assert found.verdict == BORNE_OUT and "shrinks by 6.33" in found.because
    assert FIGURES["fig8"].judge(sizes(close, apart)).verdict == NOT_BORNE_OUT
    assert FIGURES["fig8"].judge(sizes(apart, apart)).verdict == NOT_TESTABLE


def private(times, num_tied):
    """One panel of private models: three strata, UA .2 under the hardest's oracles."""
    return {
        "times": {"UA": times},
        "max_time": 9,
        "epsilon": 3.0,
        "num_tied": num_tied,
        "num_examples": 1_000,
        "before": [[0.0, 0.1, 0.3], [0.0, 0.1, 0.5], [0.0, 0.1, 0.4]],
        "oracle": [[0.0, 0.0], [0.1, 0.1], [0.5, 0.7]],
    }


RISING = [[0.0, 1.0, 2.0], [0.0, 2.0, 3.0], [0.0, 1.0, 4.0]]
FALLING = [row[::-1] for row in RISING]


@pytest.mark.parametrize(
    ("panels", "verdict"),
    [
        ([(RISING, 20)], BORNE_OUT),
        ([(RISING, 980)], NOT_TESTABLE),
        ([(FALLING, 980), (RISING, 20)], BORNE_OUT),
        ([(RISING, 980), (FALLING, 20)], NOT_BORNE_OUT),
        ([(RISING, 500), (FALLING, 500)], NOT_BORNE_OUT),
    ],
)
def test_no_set_is_harder_where_most_examples_are_always_clipped(panels, verdict):
    result = {"panels": {str(i): private(*one) for i, one in enumerate(panels)}}
    found = FIGURES["private"].judge(result)
    assert found.verdict == verdict
    for _, num_tied in panels:
        assert f"{num_tied} of 1,000 examples share" in found.because
    assert "unlearning by 0.200 [-0.048, 0.448]" in found.because


def at_rate(times):
    """What one learning rate left of three strata; the oracles' UA is .6."""
    ends = dict.fromkeys(("UA after", "TA before", "TA after"), [[0.1, 0.2, 0.5]] * 3)
    return {"times": dict.fromkeys(("UA", "MIA"), times)} | ends


def test_every_learning_rate_is_judged():
    never = [[*row[:2], None] for row in RISING]
    result = {
        "rates": {"0.1": at_rate(RISING), "0.2": at_rate(never)},
        "oracle": [[0.0, 0.0], [0.1, 0.1], [0.5, 0.7]],
        "max_time": 9,
        "searched": {"learning_rate": 0.0512},
    }
    figure = FIGURES["rates"]
    assert figure.judge(result).verdict == BORNE_OUT
    table = figure.table(result)
    assert "| 0.1 | 3.0 ± 2.5 | 0.500 ± 0.000 |" in table
    assert "| 0.2 | 9.0 ± 0.0, never ×3 |" in table
    assert (
        "(oracles 0.600)" in table
        and "The search on a random set found the rate 0.0512." in table
    )
    result["rates"]["0.2"] = at_rate(FALLING)
    assert figure.judge(result).verdict == NOT_BORNE_OUT


def curves(hardest, other):
    """What figure 5 is judged by; every oracle is at 0."""
    of = {rule: other for rule in STRATA} | {STRATA[-1]: hardest}
    return {
        "curves": {"UA": of},
        "oracles": {"UA": dict.fromkeys(STRATA, [0.0])},
        "utility": {"RA": [[0.9, 0.92], [0.95, 0.94], [0.9, 0.91]]},
    }


def test_hard_sets_approach_last():
    judge = FIGURES["fig5"].judge
    near, far = (
        [[0.2, 0.0], [0.3, 0.0], [0.2, 0.1]],
        [[0.9, 0.5], [0.8, 0.4], [0.9, 0.5]],
    )
    assert judge(curves(far, near)).verdict == BORNE_OUT
    assert judge(curves(near, far)).verdict == NOT_BORNE_OUT
    away = [row[::-1] for row in far]
    assert judge(curves(away, near)).verdict == NOT_BORNE_OUT


def test_accuracies_must_end_alike_on_all_sets():
    result = curves([[0.9, 0.5], [0.8, 0.4], [0.9, 0.5]], [[0.2, 0.0]] * 3)
    judge = FIGURES["fig5"].judge
    assert (
        "RA alike: borne out (accuracies of the sets differ by 0.013"
        in judge(result).because
    )
    result["utility"]["RA"] = [[0.9, 0.95], [0.9, 0.95], [0.9, 0.96]]
    assert judge(result).verdict == NOT_TESTABLE
    result["utility"]["RA"] = [[0.9, 0.8], [0.9, 0.8], [0.9, 0.81]]
    assert judge(result).verdict == NOT_BORNE_OUT


def test_strata_are_those_of_the_mean_loss_and_the_same_for_every_seed(tmp_path):
    workspace = Workspace(tmp_path)
    losses = workspace.scores(TINY)["privacy loss"]
    order = np.argsort(losses, kind="stable")
    easiest, *_, hardest = (one.indices(workspace, TINY) for one in strata(TINY, 10))
    assert set(easiest) == set(order[:10])
    assert set(hardest) == set(order[-10:])
    top = ForgetSet("top", 10).indices(workspace, TINY)
    np.testing.assert_array_equal(top, hardest)


def test_never_survives_json():
    times = np.array([[0.0, np.inf], [3.0, 1.0]])
    listed = json.loads(json.dumps(outcomes.to_json(times)))
    np.testing.assert_array_equal(outcomes.from_json(listed), times)


def test_full_scale_is_the_papers():
    full = SCALES["full"].sgd
    assert full.recipe.num_epochs == 150 and full.recipe.milestones == (80, 120)
    assert full.stratum_size == 1_000 and full.num_seeds == 10


def test_disagreement_counts_the_nearest_of_another_label():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(40, 1, 3, 3)), rng.integers(0, 3, 40)
    flat = images.reshape(40, 9)
    for i, found in enumerate(disagreement(images, labels)):
        away = [(np.linalg.norm(flat[j] - flat[i]), j) for j in range(40) if j != i]
        nearest = [j for _, j in sorted(away)[:NEIGHBOURS]]
        assert found == np.mean([labels[j] != labels[i] for j in nearest])


def test_a_data_set_that_no_figure_reads_is_refused(tmp_path):
    words = ["all", "--store", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--data mine: at scale smoke .* read digits"):
        main([*words, "--data", "mine", str(tmp_path / "x.npz")])
    assert list(tmp_path.iterdir()) == []
