"""Every sample of every loop is attributed rightly, or unattributed and counted."""

import warnings

import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from opacus_pi.attribution.causes import CHANGED_IN_PLACE
from opacus_pi.recording import AccountingError
from tests.attribution import loops, runs

pytestmark = pytest.mark.filterwarnings(
    "ignore:This run has no ledger", "ignore:PrivacyEngine detected new dataset"
)

ALL_MODES = ("hooks", "functorch", "ew", "ghost")
X, Y = runs.tensors()
FIXED = {"poisson": False}


def check(loop, *, evidence, factor=1.0, data=(X, Y), **options):
    """Run a loop; every report is right, and what is missing is counted."""
    run = runs.Run(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(run)
    truth = runs.true_norms(factor * data[0], data[1])
    assert min(abs(a - b) for i, a in enumerate(truth) for b in truth[:i]) > 1e-4
    wrong = [r for r in run.recorder.reports if abs(truth[r[0]] - r[1]) > 1e-5]
    assert not wrong, f"{len(wrong)} of {len(run.recorder.reports)} samples are wrong"
    counts = run.engine.attribution
    assert sum(counts.values()) == run.num_samples > 0
    assert len(run.recorder.reports) == run.num_samples - counts["unattributed"]
    assert {name for name, count in counts.items() if count} == set(evidence.split())
    return run


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_plain_loop(mode, poisson):
    if mode == "ew" and poisson:
        pytest.skip("Opacus's expanded weights fail on empty Poisson batches")
    check(loops.plain, evidence="by_storage", mode=mode, poisson=poisson)


BY_STORAGE = [
    loops.stop_early,
    loops.skip_some,
    loops.peek,
    loops.listed_first,
    loops.interleaved,
    loops.look_ahead,
    loops.zero_grad_between,
    loops.looks_between,
    loops.discarded,
]


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("loop", BY_STORAGE)
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_tensors_as_delivered(loop, mode, poisson):
    check(loop, evidence="by_storage", mode=mode, poisson=poisson)


@pytest.mark.parametrize(
    "loop",
    [
        loops.zero_grad_after,
        loops.closures,
        loops.attacked,
        loops.half_batches,
        loops.two_views,
    ],
)
def test_tensors_as_delivered_hooks(loop):
    check(loop, evidence="by_storage", **FIXED)


@pytest.mark.parametrize("loop", [loops.accumulated, loops.chunks_accumulated])
def test_gradient_accumulation(loop):
    check(loop, evidence="by_storage", **FIXED)


@pytest.mark.parametrize(
    "options",
    [
        {"persistent_workers": True},
        {"prefetch_factor": 4},
        {"in_order": False, "poisson": False},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize(
    "loop", [loops.plain, loops.stop_early, loops.look_ahead_copies]
)
def test_workers(loop, options):
    evidence = "by_content" if loop is loops.look_ahead_copies else "by_storage"
    check(loop, evidence=evidence, num_workers=2, **options)


@pytest.mark.parametrize("loop", [loops.skip_some, loops.peek])
def test_workers_and_batches_left_out(loop):
    check(loop, evidence="by_storage", num_workers=2, **FIXED)


def test_a_worker_that_fails():
    for workers in (0, 2):
        check(
            loops.errors_caught,
            evidence="by_storage",
            data_set=runs.Fails(X, Y),
            num_workers=workers,
            **FIXED,
        )


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(
    "loop", [loops.memory_manager, loops.memory_manager_left_early]
)
def test_memory_manager(loop, mode, poisson):
    check(loop, evidence="by_storage", mode=mode, poisson=poisson)


def test_memory_manager_with_workers():
    check(loops.memory_manager, evidence="by_storage", num_workers=2)


def test_dict_batches():  # not by Poisson: Opacus takes an example for a sequence
    data_set = runs.AsDicts(X, Y)
    check(loops.keywords, evidence="by_storage", data_set=data_set, **FIXED)
    check(loops.user_dict, evidence="by_content", data_set=data_set, **FIXED)


@pytest.mark.parametrize("loop", [loops.masked_copies, loops.masked_copies_permuted])
def test_masks_that_are_alike_in_all_samples_are_no_evidence(loop):
    check(loop, evidence="by_content", data_set=runs.AsDicts(X, Y, mask=True), **FIXED)


@pytest.mark.parametrize("poisson", [True, False])
def test_subset_and_concatenation_count_positions_in_the_loaders_data_set(poisson):
    subset = runs.keyed_data()
    odd = X[1::2], Y[1::2]
    check(
        loops.plain, evidence="by_storage", data_set=subset, data=odd, poisson=poisson
    )
    check(
        loops.plain, evidence="by_storage", data_set=runs.joined_data(), poisson=poisson
    )


def test_samplers_of_ones_own_are_followed_but_not_accounted():
    run = check(loops.plain, evidence="by_storage", batch_sampler=runs.Weird(), **FIXED)
    with pytest.raises(AccountingError, match="Weird"):
        _ = run.engine.ledger
    sampler = WeightedRandomSampler(torch.arange(1.0, 25.0), 24)
    options = {"sampler": sampler, "shuffle": None, **FIXED}
    run = check(loops.plain, evidence="by_storage", **options)
    with pytest.raises(AccountingError, match="WeightedRandomSampler"):
        _ = run.engine.ledger


def test_items_without_collation():
    options = {"batch_size": None, "shuffle": False, **FIXED}
    run = runs.Run(**options)
    for x, y in run.loader:
        run.step(x[None], y[None])
    truth = runs.true_norms(X, Y)
    assert [i for i, _ in run.recorder.reports] == list(range(24))
    assert all(abs(truth[i] - norm) < 1e-5 for i, norm in run.recorder.reports)
    assert run.engine.attribution["by_storage"] == 24


BY_CONTENT = [
    loops.copied,
    loops.widened,
    loops.permuted,
    loops.half_batches_copied,
    loops.look_ahead_copies,
]


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("loop", BY_CONTENT)
def test_copies(loop, poisson):
    if poisson and loop is loops.half_batches_copied:
        pytest.skip("nothing left of some batches")
    check(loop, evidence="by_content", poisson=poisson)


def test_a_permutation_in_place_is_followed():
    evidence = "by_content by_storage"  # samples that happen to stay
    check(loops.permuted_in_place, evidence=evidence, **FIXED)


def test_a_normalisation_in_place_is_assumed_to_keep_the_order():
    run = check(loops.normalised_in_place, evidence="by_latest", factor=2.0, **FIXED)
    assert set(run.engine._run.tracker.causes) == {CHANGED_IN_PLACE.name}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("loop", [loops.transformed, loops.transformed_after_peek])
def test_inputs_transformed_in_the_loop_are_assumed_the_latest(loop, verify):
    check(loop, evidence="by_latest", factor=2.0, verify=verify, **FIXED)


def test_a_batch_left_out_makes_the_rest_of_its_epoch_uncertain():
    run = check(
        loops.transformed_after_skip,
        evidence="by_latest unattributed",
        factor=2.0,
        **FIXED,
    )
    assert run.engine.attribution == {
        "by_storage": 0,
        "by_content": 0,
        "by_latest": 8,
        "unattributed": 32,
    }


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_look_ahead_and_transformed(verify, poisson):
    check(
        loops.look_ahead_transformed,
        evidence="unattributed",
        factor=2.0,
        verify=verify,
        poisson=poisson,
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "loop", [loops.interleaved_transformed, loops.listed_first_transformed]
)
def test_several_batches_in_use_and_transformed(loop, verify):
    check(loop, evidence="unattributed", factor=2.0, verify=verify, **FIXED)


def test_look_ahead_copies_without_verification():
    check(loops.look_ahead_copies, evidence="unattributed", verify=False, **FIXED)


def test_inputs_that_are_recognised_only_sometimes():
    run = runs.Run(**FIXED)
    with pytest.warns(UserWarning, match="in the order of the latest batch"):
        loops.sometimes_transformed(run)
    one, other = (runs.true_norms(factor * X, Y) for factor in (1.0, 2.0))
    for i, norm in run.recorder.reports:
        assert min(abs(one[i] - norm), abs(other[i] - norm)) < 1e-5
    counts = run.engine.attribution
    assert counts["by_storage"] == counts["by_latest"] == 24


@pytest.mark.parametrize(
    "loop",
    [
        loops.two_batches_in_one_loss,
        loops.two_batches_in_one_input,
        loops.inner_layers_only,
        loops.other_loader,
    ],
)
def test_samples_that_stay_unattributed(loop):
    check(loop, evidence="unattributed", **FIXED)


def test_padding_of_empty_batches_is_of_no_example():
    run = runs.Run(batch_size=1, rand_on_empty=True)
    for x, y in run.loader:
        run.step(x, y)
    counts = run.engine.attribution
    assert run.num_samples > counts["by_storage"] == len(run.recorder.reports) > 0
    assert counts["unattributed"] == 0
    truth = runs.true_norms(X, Y)
    assert all(abs(truth[i] - norm) < 1e-5 for i, norm in run.recorder.reports)


WARNED = [
    (loops.transformed, "without verification.*collate_fn"),
    (loops.look_ahead_transformed, "several batches"),
    (loops.inner_layers_only, "Call the model itself"),
    (loops.two_batches_in_one_loss, "one batch per loss"),
    (loops.other_loader, "loader that make_private returned"),
]


@pytest.mark.parametrize("loop,cause", WARNED, ids=lambda v: getattr(v, "__name__", ""))
def test_the_cause_is_named_once_or_raised_if_strict(loop, cause):
    with pytest.warns(UserWarning, match=cause) as caught:
        loop(runs.Run(**FIXED))
    assert len([w for w in caught if "samples" in str(w.message)]) == 1
    with pytest.raises(AccountingError, match=cause):
        loop(runs.Run(strict=True, **FIXED))
