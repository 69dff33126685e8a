"""Filtered rewinds of tiny trainings, compared with their exact law in both directions.

40 random trainings in each run; ``OPACUS_PI_EXACT_CASES=300`` takes more. Which state
is gone back to depends on the recorded norms of the run, and so on its weights. The
norms are rounded up to a few levels, so all runs with the same levels can be followed
together, and ``restart_update`` decides for each of them.
"""

import itertools
import math
import os

import numpy as np
import pytest

from opacus_pi.accounting.conversion import gaussian_delta, gaussian_epsilon
from opacus_pi.accounting.filtered_rewind import (
    DeletionPolicy,
    restart_update,
    restart_updates,
)
from opacus_pi.ledger.participation_record import ParticipationRecord
from tests.accounting.exact_training import (
    Case,
    TinyTraining,
    hockey_stick,
    random_case,
    renyi,
    without,
)

NUM_CASES = int(os.environ.get("OPACUS_PI_EXACT_CASES", "40"))
ORDERS = (1.25, 2.0, 4.0, 16.0)
EPSILONS = (0.1, 0.5, 1.0, 2.0)
ROUNDING = 1e-9


def record_of(ratios, *, clip=1.0, noise=1.0, unattributed=None, rate=0.5):
    """A record in which example i had the ratio ``ratios[t, i]``; NaN: not drawn."""
    ratios = np.asarray(ratios, dtype=float)
    steps, indices = np.nonzero(~np.isnan(ratios))
    size = len(ratios)
    return ParticipationRecord(
        num_examples=ratios.shape[1],
        sampling="poisson",
        sample_rate=rate,
        data_set="toy",
        run="run",
        steps=steps + 1,
        indices=indices,
        norms=ratios[steps, indices] * noise,
        noise_std=np.full(size, noise),
        max_grad_norm=np.full(size, clip),
        sample_rates=np.full(size, rate),
        num_unattributed=np.zeros(size) if unattributed is None else unattributed,
    )


class Rewinds:
    """The law of the models that are rewound, for one training and one budget.

    Args:
        case: The training and its group. The schedule of the group is 0 or 1.
        mu: The budget.
        states: Updates of which a state was saved.
    """

    def __init__(self, case, mu, states):
        self.case, self.mu, self.states = case, mu, states
        self.group = list(case.group)
        clip = case.training.max_grad_norm / case.training.noise_std
        self.levels = clip * np.array([0.0, 0.4, 0.75, 1.0])
        ratios = case.training.ratios[:, self.group]
        self.level = np.searchsorted(self.levels, ratios * (1 - 1e-12))

    def start(self, prefix, last):
        """What the library decides if the rest of the run has one level."""
        total, drawn = len(self.case.schedule), np.array(self.case.schedule)
        levels = np.full((total, len(self.group)), last)
        levels[: len(prefix)] = prefix[:total]
        ratios = np.where(drawn[:, self.group] > 0, self.levels[levels], np.nan)
        record = record_of(
            ratios,
            clip=self.case.training.max_grad_norm,
            noise=self.case.training.noise_std,
        )
        members = np.arange(len(self.group))
        return restart_update(record, members, self.mu, self.states)

    def split(self, parts):
        """Parts of the law by the levels at their weights, after those before."""
        found = {}
        for prefix, law in parts.items():
            for key in {tuple(row) for row in self.level[np.flatnonzero(law)].tolist()}:
                here = (self.level == key).all(axis=1)
                found[(*prefix, key)] = np.where(here, law, 0)
        return found

    def law(self):
        """The law after the rewinds."""
        training, schedule = self.case.training, list(self.case.schedule)
        rest = [without(rates, self.group) for rates in schedule]
        total, final = len(schedule), 0
        parts = {(): training.start(self.case.start)}
        for step in range(total):
            going_on = {}
            for prefix, law in self.split(parts).items():
                starts = {self.start(prefix, last) for last in (0, 1, 3)}
                assert len(starts) == 1 or min(starts) > step  # it does not look ahead
                if min(starts) == step and step in self.states:
                    final = final + training.run(law, rest[step:])
                else:
                    going_on[prefix] = training.step(law, schedule[step])
            parts = going_on
        return final + sum(parts.values(), np.zeros(len(training.states)))


def adversary(rng):
    """Gradients that are long where the weights say that the group was there."""
    threshold, sign = rng.normal(), rng.choice([-1.0, 1.0])
    scales = rng.choice([0.1, 0.5, 1.0], 2)

    def gradients(weights):
        suspects = sign * (weights[:, :1] + threshold) > 0
        length = np.where(suspects, scales[0], scales[1]) * np.ones((1, 3))
        return np.stack([length, 0.3 * length * np.sin(weights[:, 1:])], axis=-1)

    return gradients


def tiny_case(rng):
    """A random training in which the group's batches are given, and others random."""
    if rng.random() < 0.5:
        case = random_case(rng, poisson=False)
        schedule = np.array(case.schedule)
    else:
        noise, num_steps = rng.uniform(0.7, 3), int(rng.integers(2, 5))
        reach = 3 * num_steps + 4 * noise * math.sqrt(num_steps)
        grid = np.linspace(-reach, reach, math.ceil(2 * reach / (0.75 * noise)) + 1)
        training = TinyTraining(adversary(rng), 1.0, noise, 1.0, grid)
        schedule = rng.integers(0, 2, (num_steps, 3)).astype(float)
        group = tuple(range(int(rng.integers(1, 3))))
        case = Case(training, (0.0, 0.0), (), group)
    others = np.setdiff1d(np.arange(schedule.shape[1]), case.group)
    schedule[:, others] = rng.choice([0.0, 0.3, 1.0], len(others))
    return Case(case.training, case.start, tuple(map(tuple, schedule)), case.group)


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_no_rewind_exceeds_its_policy_in_either_direction(seed):
    """Single examples and groups, with a state at every update or at a few."""
    rng = np.random.default_rng(seed)
    case = tiny_case(rng)
    total = len(case.schedule)
    in_batch = np.array(case.schedule)[:, list(case.group)].sum(axis=1)
    clip = case.training.max_grad_norm / case.training.noise_std
    mu = rng.uniform(0.2, 1.05) * clip * max(1.0, math.sqrt(np.square(in_batch).sum()))
    states = sorted({0} | {t for t in range(total) if rng.random() < 0.6})
    rewound = Rewinds(case, mu, states).law()
    retrained = case.laws[1]
    assert rewound.sum() == pytest.approx(1, rel=1e-9)
    for order in ORDERS:
        bound = order * mu**2 / 2 * (1 + ROUNDING) + ROUNDING
        assert renyi(rewound, retrained, order) <= bound
        assert renyi(retrained, rewound, order) <= bound
    for epsilon in EPSILONS:
        bound = float(gaussian_delta(mu, epsilon)) + ROUNDING
        assert hockey_stick(rewound, retrained, epsilon) <= bound
        assert hockey_stick(retrained, rewound, epsilon) <= bound


def test_the_oracle_finds_a_rule_that_looks_ahead():
    """Starting again because of what happened later exceeds the budget.

    The example shifts the first update by 0.2 standard deviations, and the second one
    by 2 where the first weight is above 0, else not at all. The rule lets the first
    update stay; runs in which the second one went over start again without both.
    """

    def gradients(weights):
        length = np.where(weights[:, 0] > 0, 2.0, 0.0)
        return np.stack([length, 0 * length], axis=-1)[:, None]

    training = TinyTraining(gradients, 2.0, 1.0, 1.0, np.linspace(-8, 8, 81))
    without_it = training.step(training.start((0.0, 0.0)), (0.0,))
    retrained = training.step(without_it, (0.0,))
    first = training.step(training.start((-0.2, 0.0)), (0.0,))
    over = training.states[:, 0] > 0
    looks_ahead = training.step(np.where(over, 0, first), (1.0,))
    looks_ahead = looks_ahead + first[over].sum() * retrained
    assert renyi(looks_ahead, retrained, 4.0) > 2 * (4 * 0.2**2 / 2)


def test_a_policy_is_the_shift_with_its_epsilon():
    for epsilon, delta in itertools.product((0.5, 1.0, 4.0), (1e-6, 1e-5)):
        mu = DeletionPolicy(epsilon, delta).mu
        assert gaussian_epsilon(mu, delta) <= epsilon
        assert gaussian_epsilon(mu * (1 + 1e-6), delta) > epsilon


def test_a_policy_survives_json_and_remembers_when_it_was_made():
    policy = DeletionPolicy(2.0, 1e-5)
    again = DeletionPolicy.from_json(policy.to_json())
    assert again == policy and again.made == policy.made
    with pytest.raises(ValueError, match="cannot be read"):
        DeletionPolicy.from_json("{}")


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_policies_outside_their_domain_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match="must be"):
        DeletionPolicy(epsilon, delta)


def by_definition(ratios, members, mu, states, clip=1.0):
    """The rule in plain loops: the first state at which the sum would exceed."""
    total = len(ratios)
    states = sorted({0, *states})
    for start, end in zip(states, [*states[1:], total], strict=True):
        spent = sum(np.nansum(ratios[t, members]) ** 2 for t in range(start))
        spent += np.nansum(ratios[start, members]) ** 2
        for t in range(start + 1, end):
            spent += (clip * (~np.isnan(ratios[t, members])).sum()) ** 2
        if spent * (1 + 2e-5) > mu**2 and spent > 0:
            return start
    return total


@pytest.mark.parametrize("seed", range(20))
def test_restarts_follow_the_rule_for_sets_and_for_all_examples_at_once(seed):
    rng = np.random.default_rng(seed)
    total, size = 9, 6
    ratios = rng.uniform(0, 1, (total, size))
    ratios[rng.random((total, size)) < 0.5] = np.nan
    record = record_of(ratios)
    states = [t for t in range(total) if rng.random() < 0.5]
    for mu in (0.3, 0.9, 1.3, 2.0):
        single = [restart_update(record, [i], mu, states) for i in range(size)]
        assert restart_updates(record, mu, states).tolist() == single
        assert single == [by_definition(ratios, [i], mu, states) for i in range(size)]
        members = rng.choice(size, 3, replace=False)
        found = restart_update(record, members, mu, states)
        assert found == by_definition(ratios, members, mu, states)
        assert found <= min(single[i] for i in members)  # sets cost at least as much


def test_charges_are_rounded_up_and_never_exceed_the_clip_norm():
    just_fits = record_of([[0.5], [0.5]])
    assert restart_update(just_fits, [0], math.sqrt(0.5), range(2)) == 1
    clipped = record_of([[7.0], [7.0]])
    assert restart_update(clipped, [0], math.sqrt(2) * (1 + 1e-8), range(2)) == 2


def test_unattributed_samples_charge_everybody_who_was_not_seen():
    nobody = np.full((3, 2), np.nan)
    nobody[0, 0] = 0.1
    record = record_of(nobody, unattributed=[1, 0, 1])
    assert restart_update(record, [1], 1.2, range(3)) == 2
    assert restart_update(record, [0], 1.2, range(3)) == 3  # it was seen in update 1
    assert record.first_updates().tolist() == [1, 1]
    with pytest.raises(ValueError, match="could not be matched to examples"):
        restart_updates(record, 1.0, range(3))


def test_a_group_is_charged_for_the_square_of_its_sum():
    together = record_of([[0.5, 0.5]])
    apart = record_of([[0.5, np.nan], [np.nan, 0.5]])
    assert restart_update(together, [0, 1], 0.8, range(2)) == 0
    assert restart_update(apart, [0, 1], 0.8, range(2)) == 2


@pytest.mark.parametrize(("noise", "clip"), [(0.0, 1.0), (1.0, math.inf)])
def test_updates_without_noise_or_clipping_have_no_charge(noise, clip):
    record = record_of([[0.5]], noise=noise, clip=clip)
    with pytest.raises(ValueError, match="exact rewind"):
        restart_update(record, [0], 1.0, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [5]}, "steps must be in"),
        ({"indices": [9]}, "indices must be in"),
        ({"norms": [-1.0]}, "norms must be in"),
        ({"noise_std": [np.nan]}, "noise_std must be in"),
        ({"norms": [1.0, 2.0]}, "the same length"),
        ({"learning_rates": np.ones((4, 1))}, "learning_rates"),
    ],
)
def test_records_outside_their_domain_are_refused(change, message):
    good = record_of([[0.5]])
    facts = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        ParticipationRecord(**{**facts, **change})
