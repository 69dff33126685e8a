"""How often every example was used: counted, or refused; compared with brute force.

Clipping saturates in all of these runs: every gradient is longer than the clip norm. So
the exact loss of an example under fixed sampling is the number of updates that it was
in times the divergence of one, and the worst case is that of the example used most.
The loss of an example lies between the two, because it also bounds what the weights
show of its earlier updates. The numbers are counted from the index that every example
carries in its data.
"""

import io
import itertools
import random
import re
import warnings

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp

from opacus_pi import AccountingError
from opacus_pi.accounting import privacy_losses, worst_case_loss
from tests.custody import loop_parts
from tests.custody.hidden_ids import NUM_EXAMPLES, ids_of_batch
from tests.custody.loops import EACH_UPDATE, Loop, Run

ORDER, NOISE = 8.0, 2.0
ONE_UPDATE = ORDER / (2 * NOISE**2)
PRIVATE = {"max_grad_norm": 1e-3, "noise_multiplier": NOISE}
IN_ORDER = {"shuffle": False}


# --------------------------------------------------------------------------- schedules
def full_passes(run):
    for _ in range(3):
        for batch in run.loader:
            run.train(batch)


def left_early(run):
    """As ``limit_train_batches`` does."""
    for _ in range(6):
        for number, batch in enumerate(run.loader):
            if number == 2:
                break
            run.train(batch)


def sliced(run):
    for _ in range(6):
        for batch in itertools.islice(run.loader, 2):
            run.train(batch)


def first_batch_of_a_new_pass(run):
    for _ in range(10):
        run.train(next(iter(run.loader)))


def restarted_when_over(run):
    """An iterator that is made anew after it has ended, as loops by steps do."""
    batches = iter(run.loader)
    for _ in range(10):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(run.loader)
            batch = next(batches)
        run.train(batch)


def some_skipped(run):
    for _ in range(3):
        for number, batch in enumerate(run.loader):
            if number % 2:
                run.train(batch)


def peeked_first(run):
    next(iter(run.loader))
    full_passes(run)


def two_iterators(run):
    for first, second in zip(run.loader, run.loader, strict=True):
        run.train(first)
        run.train(second)


def two_passes_interleaved(run):
    """A pass that goes on while another one starts."""
    outer = iter(run.loader)
    run.train(next(outer))
    for batch in run.loader:
        run.train(batch)
    for batch in outer:
        run.train(batch)


def each_batch_three_times(run):
    for batch in run.loader:
        for _ in range(3):
            run.train(batch)


def copies_of_each_batch(run):
    for x, y in run.loader:
        for _ in range(3):
            run.train((x.clone(), y.clone()))


def permuted_again(run):
    """Minibatches of PPO: the same draw in another order."""
    for x, y in run.loader:
        for shift in range(3):
            run.train((x.roll(shift, 0), y.roll(shift, 0)))


def cycled(run):
    for batch in itertools.islice(itertools.cycle(run.loader), 12):
        run.train(batch)


def list_reused(run):
    for batch in list(run.loader) * 3:
        run.train(batch)


def replayed(run):
    """Every update is followed by one on a batch of an earlier update."""
    chance, seen = random.Random(3), []
    for batch in run.loader:
        run.train(batch)
        if seen:
            run.train(chance.choice(seen))
        seen.append(batch)


def replayed_much_later(run):
    """Batches come back when many others were delivered in between."""
    kept = list(itertools.islice(run.loader, 2))
    for batch in kept:
        run.train(batch)
    for _ in range(8):
        for batch in run.loader:
            run.train(batch)
    for batch in kept:
        run.train(batch)


def half_now_half_later(run):
    for x, y in run.loader:
        run.train((x[:1], y[:1]))
        run.train((x[1:], y[1:]))


def memory_managed_passes(run):
    for _ in range(2):
        with run.memory_managed() as loader:
            for batch in loader:
                run.train(batch)


def several_loaders(run):
    """A second loader over the same data set, from a second call of make_private."""
    first = run.loader
    for batch in first:
        run.train(batch)
    run.model.to_standard_module()
    run._prepare()
    for batch in run.loader:
        run.train(batch)


def both_loaders(run):
    """The prepared loader and the program's own, one after the other."""
    for batch in run.loader:
        run.train(batch)
    for batch in run.user_loader:
        run.train(batch)


# --------------------------------------------------------- what they are compared with
def participations(run):
    """In how many updates each example was, by the index in its data."""
    counts = np.zeros(NUM_EXAMPLES, int)
    for passes in run.updates:
        used = [ids for kept in passes for ids in ids_of_batch(kept.tensors)]
        for k in set().union(*used):
            counts[k] += 1
    return counts


def scheduled(updates, **options):
    return Loop(updates.__name__, updates=updates, private=PRIVATE, **options)


def trained(loop):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(loop)
        loop.updates(run)
    return run


FIXED = [
    scheduled(full_passes),
    scheduled(full_passes, loader=IN_ORDER),
    scheduled(full_passes, loader={"batch_size": 5, "drop_last": True}),
    scheduled(full_passes, loader={"batch_size": 5}),
    scheduled(full_passes, loader={"num_workers": 2}),
    scheduled(
        full_passes,
        loader={"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
    ),
    scheduled(left_early),
    scheduled(left_early, loader=IN_ORDER),
    scheduled(left_early, loader={"num_workers": 2, **IN_ORDER}),
    scheduled(sliced),
    scheduled(sliced, loader=IN_ORDER),
    scheduled(first_batch_of_a_new_pass),
    scheduled(first_batch_of_a_new_pass, loader=IN_ORDER),
    scheduled(restarted_when_over),
    scheduled(some_skipped, loader=IN_ORDER),
    scheduled(peeked_first),
    scheduled(two_iterators),
    scheduled(two_passes_interleaved),
    scheduled(each_batch_three_times),
    scheduled(copies_of_each_batch),
    scheduled(permuted_again),
    scheduled(cycled),
    scheduled(list_reused),
    scheduled(replayed),
    scheduled(half_now_half_later),
    scheduled(both_loaders),  # one and the same without Poisson sampling
    scheduled(memory_managed_passes),
    scheduled(memory_managed_passes, mode="ghost"),
    scheduled(loop_parts.accumulated),
    scheduled(loop_parts.in_chunks),
    scheduled(left_early, mode="ghost"),
    scheduled(left_early, mode="fast"),
    scheduled(cycled, mode="ghost"),
]
FRESH = [
    scheduled(full_passes),
    scheduled(full_passes, loader={"num_workers": 2}),
    scheduled(left_early),
    scheduled(sliced),
    scheduled(first_batch_of_a_new_pass),
    scheduled(restarted_when_over),
    scheduled(some_skipped),
    scheduled(peeked_first),
    scheduled(two_iterators),
    scheduled(two_passes_interleaved),
    scheduled(loop_parts.all_listed),
    scheduled(memory_managed_passes),
    scheduled(left_early, mode="ghost"),
    scheduled(left_early, mode="fast"),
]
REUSED = [
    scheduled(each_batch_three_times),
    scheduled(copies_of_each_batch),
    scheduled(permuted_again),
    scheduled(cycled),
    scheduled(list_reused),
    scheduled(replayed),
    scheduled(replayed_much_later),
    scheduled(half_now_half_later),
    scheduled(each_batch_three_times, mode="ghost"),
    scheduled(each_batch_three_times, mode="fast"),
    scheduled(cycled, mode="ghost"),
]


def name_of(loop):
    options = "".join(f"-{key}={value}" for key, value in loop.loader.items())
    return f"{loop}{options}"


@pytest.mark.parametrize("every", [EACH_UPDATE, 0.7], ids=["each", "few"])
@pytest.mark.parametrize("loop", FIXED, ids=name_of)
def test_fixed_schedules_are_counted(loop, every):
    run = trained(loop.having(sampling="fixed", every=every))
    counts = participations(run)
    ledger = run.engine.ledger
    assert ledger.mechanism.num_steps == len(run.updates) > 3
    exact = counts.max() * ONE_UPDATE
    worst = worst_case_loss(ledger.mechanism, ORDER, steps=ledger.steps)
    assert worst == pytest.approx(exact)
    losses = privacy_losses(ledger, ORDER)
    assert (losses >= counts * ONE_UPDATE * (1 - 1e-9)).all()
    assert losses.max() == pytest.approx(exact)
    assert np.array_equal(ledger.participations.sum(0), counts)


@pytest.mark.parametrize("loop", FRESH, ids=name_of)
def test_fresh_poisson_draws_are_accounted_as_opacus_does(loop):
    run = trained(loop.having(sampling="poisson"))
    ledger = run.engine.ledger
    assert ledger.mechanism.num_steps == len(run.updates) > 3
    rate = 1 / len(run.user_loader)
    exact = compute_rdp(
        q=rate, noise_multiplier=NOISE, steps=len(run.updates), orders=[ORDER]
    )
    worst = worst_case_loss(ledger.mechanism, ORDER, steps=ledger.steps)
    assert worst == pytest.approx(exact[0])
    assert privacy_losses(ledger, ORDER).max() <= worst * (1 + 1e-9)


@pytest.mark.parametrize("loop", REUSED, ids=name_of)
def test_a_poisson_draw_that_is_used_again_is_refused(loop):
    run = trained(loop.having(sampling="poisson"))
    with pytest.raises(AccountingError, match=re.compile("draw|batch", re.IGNORECASE)):
        _ = run.engine.ledger


@pytest.mark.parametrize(
    ("schedule", "sampling"),
    [
        (several_loaders, "poisson"),
        (several_loaders, "fixed"),
        (both_loaders, "poisson"),
        (replayed_much_later, "fixed"),
    ],
)
def test_what_cannot_be_counted_is_refused(schedule, sampling):
    run = trained(scheduled(schedule, sampling=sampling))
    with pytest.raises(AccountingError):
        run.engine.privacy_losses(ORDER)


@pytest.mark.parametrize("num_before", [2, 4, 5])
def test_a_fixed_schedule_is_counted_on_after_a_resume(num_before):
    loop = scheduled(full_passes, sampling="fixed")
    first = trained(
        loop.having(
            updates=lambda run: [
                run.train(batch)
                for batch in itertools.islice(
                    itertools.chain(run.loader, run.loader), num_before
                )
            ]
        )
    )
    file = io.BytesIO()
    parts = {"module": first.model, "optimizer": first.optimizer}
    first.engine.save_checkpoint(path=file, **parts)
    file.seek(0)
    second = Run(loop)
    parts = {"module": second.model, "optimizer": second.optimizer}
    second.engine.load_checkpoint(path=file, restore_rng=True, **parts)
    full_passes(second)
    counts = participations(first) + participations(second)
    ledger = second.engine.ledger
    worst = worst_case_loss(ledger.mechanism, ORDER, steps=ledger.steps)
    assert worst == pytest.approx(counts.max() * ONE_UPDATE)
    assert np.array_equal(ledger.participations.sum(0), counts)
