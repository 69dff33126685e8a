"""The figure of attacks: its sets, its judge on simulated attacks, and its picture."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks.common.set_ranges import pairs_within_classes
from benchmarks.common.training import Recipe
from benchmarks.reproduce.attack_units import AttackedExamples, Shadow, ShadowOracle
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.figures.attacks import METHOD, WHEN, measured
from benchmarks.reproduce.forget_sets import LOSS, apart, attacked_and_control
from benchmarks.reproduce.judging.jackknife import group_left, pseudo_values
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
)
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.units import Search, trainings
from benchmarks.reproduce.workspace import Workspace

FIGURE = FIGURES["attack"]
TINY = Experiment(
    "digits",
    200,
    60,
    Recipe("mlp", 2, 32, 0.1),
    num_seeds=2,
    num_oracles=2,
    num_checkpoints=3,
    set_size=5,
    num_sets=8,
    unlearn_epochs=1,
    num_trials=1,
    num_probe=20,
)


def test_both_sets_span_the_ranking_of_each_class_as_neighbours():
    rng = np.random.default_rng(0)
    scores, labels = rng.permutation(300).astype(float), np.arange(300) % 3
    excluded = rng.choice(300, 30, replace=False)
    both = pairs_within_classes(scores, labels, excluded, 60)
    assert not set(both[0]) & set(both[1])
    assert not set(np.concatenate(both)) & set(excluded)
    for label in range(3):
        left = np.setdiff1d(np.flatnonzero(labels == label), excluded)
        ranks = scores[left].argsort().argsort()
        one, other = (np.sort(ranks[np.isin(left, part)]) for part in both)
        assert len(one) == len(other) == 20
        assert (np.abs(one - other) == 1).all()  # neighbours
        assert abs((one - other).sum()) == 0  # none of the sets is the harder one
        assert min(one[0], other[0]) == 0
        assert max(one[-1], other[-1]) == len(left) - 1
        assert np.ptp(np.diff(one)) <= 4  # at even distances


def test_a_small_class_gives_as_many_pairs_as_it_has():
    labels = np.repeat([0, 1, 2], [50, 7, 1])
    both = pairs_within_classes(np.arange(58.0), labels, [], 60)
    assert [np.bincount(labels[one]).tolist() for one in both] == [[20, 3]] * 2
    with pytest.raises(ValueError, match="two sets of 2 examples of 3 classes"):
        pairs_within_classes(np.arange(58.0), labels, [], 2)


def test_sets_are_the_same_on_every_call_and_leave_out_the_search(tmp_path):
    here, there = (Workspace(tmp_path / name) for name in ("here", "there"))
    sets = attacked_and_control(40)
    found = [[one.indices(w, TINY) for one in sets] for w in (here, here, there)]
    for pair in found[1:]:
        np.testing.assert_array_equal(pair, found[0])
    searched = apart(TINY).indices(here, TINY)
    assert not set(searched) & set(np.concatenate(found[0]))
    labels = here.images(TINY).train.tensors[1].numpy()
    counts = [np.bincount(labels[one], minlength=10) for one in found[0]]
    np.testing.assert_array_equal(*counts)
    assert counts[0].max() == 4
    losses = [here.scores(TINY)[LOSS][one].mean() for one in found[0]]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


def test_models_of_the_attacks_rank_nothing_and_are_not_stored(tmp_path, monkeypatch):
    workspace, sets = Workspace(tmp_path), attacked_and_control(20)
    monkeypatch.setattr(Search, "run", lambda *rest: {"settings": {"learning_rate": 1}})
    for one in trainings(TINY):
        one.run(workspace)
    sets[0].indices(workspace, TINY), sets[1].indices(workspace, TINY)
    seeds, train = [], Workspace.train

    def trained(self, experiment, data_set, seed, rows):
        seeds.append((len(data_set), seed, rows))
        return train(self, experiment, data_set, seed, rows)

    monkeypatch.setattr(Workspace, "train", trained)
    files = set(tmp_path.glob("**/*.safetensors"))
    jobs = [Shadow(TINY, *sets, METHOD, number) for number in (0, 1)]
    shadows = [one.run(workspace) for one in jobs]
    oracle = ShadowOracle(TINY, *sets, 0).run(workspace)
    assert [size for size, _, _ in seeds] == [200, 200, 180]
    assert all(rows == 1 for _, _, rows in seeds)  # norms are not swept
    used = {seed for _, seed, _ in seeds}
    assert len(used) == 3 and not used & set(range(100))
    for one in shadows:
        assert len(one["trained"]) == len(one["unlearned"]) == len(oracle) == 40
        assert one["trained"] != one["unlearned"]
    assert shadows[0] != shadows[1]
    assert set(tmp_path.glob("**/*.safetensors")) == files
    monkeypatch.setattr(Workspace, "train", None)  # a second call reads the store
    assert [one.run(workspace) for one in jobs] == shadows
    examples = AttackedExamples(TINY, *sets).run(workspace)
    assert examples["forgotten"] == 20 and np.shape(examples["losses"]) == (2, 40)


def simulated(of_forgotten, of_retained, seed=0, models=32, trainings=5, per_class=40):
    """Draw margins that unlearning shifts by a function of the rank of the loss.

    Args:
        of_forgotten: From the rank in [0, 1] to the shift after unlearning, in standard
            deviations over models. Before unlearning it is a half larger.
        of_retained: The same for control examples.
        seed: Of the random numbers.
        models: Models on each side.
        trainings: Trainings that rank.
        per_class: Examples of each kind and class.
    """
    rng = np.random.default_rng(seed)
    number = 10 * per_class
    rank = np.tile(np.tile((np.arange(per_class) + 0.5) / per_class, 10), 2)
    noise = rng.normal(size=(trainings, 2 * number))
    losses = np.exp(8 * rank + 0.5 * rng.normal(size=2 * number) + 0.3 * noise)
    kinds = np.split(rank, 2)
    shift = np.concatenate([of_forgotten(kinds[0], rng), of_retained(kinds[1], rng)])
    centre = 6 - 8 * rank

    def margins(moved):
        own = rng.normal(size=(models, 1)) / 3  # of a model, the same for all examples
        return centre + moved + own + rng.normal(size=(models, 2 * number))

    examples = {
        "examples": list(range(2 * number)),
        "class": np.tile(np.repeat(np.arange(10), per_class), 2).tolist(),
        "forgotten": number,
        "losses": losses.tolist(),
    }
    trained, unlearned, oracles = margins(1.5 * shift), margins(shift), margins(0)
    return measured(examples, trained, unlearned, oracles)


def rising(rank, rng):
    return 4 * rank**2


def nothing(rank, rng):
    return np.zeros(len(rank))


def anywhere(rank, rng):
    """Large shifts that have nothing to do with the loss."""
    return rng.permutation(4 * rank**2)


RISES, MORE = "rises with the loss", "more on forgotten than on retained"


@pytest.mark.parametrize(
    ("of_forgotten", "of_retained", "verdict", "rises", "more"),
    [
        (rising, nothing, BORNE_OUT, {BORNE_OUT}, {BORNE_OUT}),
        (anywhere, nothing, NOT_BORNE_OUT, {NOT_BORNE_OUT}, {BORNE_OUT}),
        (rising, rising, UNDECIDED, {BORNE_OUT}, {UNDECIDED}),
        (nothing, nothing, UNDECIDED, {NOT_BORNE_OUT, UNDECIDED}, {UNDECIDED}),
        (nothing, rising, NOT_BORNE_OUT, {NOT_BORNE_OUT, UNDECIDED}, {NOT_BORNE_OUT}),
    ],
)
def test_the_loss_must_tell_and_controls_must_look_unlike(
    of_forgotten, of_retained, verdict, rises, more
):
    found = FIGURE.judge(simulated(of_forgotten, of_retained))
    assert found.verdict == verdict
    for attack in ("U-LiRA", "KLOM"):
        assert found.parts[f"{attack}, {RISES}"].verdict in rises
        assert found.parts[f"{attack}, {MORE}"].verdict in more


def test_small_classes_few_trainings_and_no_attack_are_not_testable():
    few = FIGURE.judge(simulated(rising, nothing, trainings=2, models=6))
    assert few.verdict == NOT_TESTABLE and "2 trainings rank" in few.because
    small = FIGURE.judge(simulated(rising, nothing, models=8, per_class=20))
    assert small.verdict == NOT_TESTABLE
    assert "no class has 30 examples of each kind" in small.because


def test_a_scale_without_attacks_has_no_jobs_and_says_so():
    scale = replace(SCALES["smoke"], attacked=0)
    assert FIGURE.units(scale) == []
    result = FIGURE.result(scale, None)
    assert FIGURE.judge(result).verdict == NOT_TESTABLE
    assert "No example is attacked" in FIGURE.table(result)
    plt.close(FIGURE.draw(result))


def test_cpu_has_enough_models_and_examples_of_each_class():
    cpu = SCALES["cpu"]
    assert cpu.shadows >= 32 and cpu.attacked >= 30 * 10
    jobs = FIGURE.units(cpu)
    assert len(jobs) == len(set(jobs)) == 1 + 2 * cpu.shadows


def test_table_picture_and_epsilon_show_what_was_simulated():
    result = simulated(rising, nothing, per_class=32)
    lines = FIGURE.table(result).splitlines()
    assert lines[2].startswith("| easiest | forgotten |")
    assert lines[9].startswith("| hardest | retained |")
    for when in WHEN:
        assert result["epsilon"][when]["forgotten"] > 0.5
        assert result["epsilon"][when]["retained"] == 0
    picture = FIGURE.draw(result)
    assert len(picture.axes) == 2
    for ax in picture.axes:
        forgotten, *_, retained = (one[0].get_ydata() for one in ax.containers)
        assert forgotten[-1] > retained[-1] + 0.2
    plt.close(picture)


def test_pseudo_values_of_a_mean_are_the_means_of_the_groups():
    values = np.random.default_rng(0).normal(size=(20, 3))
    left = [values[group_left(20, k, 5)].mean(0) for k in range(5)]
    groups = values.reshape(4, 5, 3).mean(0)
    np.testing.assert_allclose(pseudo_values(values.mean(0), left), groups)
