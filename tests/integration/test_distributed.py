"""Two processes keep one record: that of a single process with the same batches."""

import copy
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opacus_pi.recording import AccountingError, Recorder
from opacus_pi.recording.distributed import merge_
from opacus_pi.recording.run import RecordedRun
from opacus_pi.recording.weights import saved_weights
from tests.distributed_training import (
    CASES,
    EVERY,
    NUM_EXAMPLES,
    NUM_PROCESSES,
    data,
    network,
    process,
)
from tests.private_training import one_at_a_time

SWEPT = {"swept", "monitored"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed_training"])
    started = [
        context.Process(target=process, args=(rank, folder))
        for rank in range(NUM_PROCESSES)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(120)
        one.kill()
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [
        torch.load(folder / f"{rank}.pt", weights_only=False)
        for rank in range(NUM_PROCESSES)
    ]


def all_norms(weights):
    """Norms of all examples at these weights, one backward pass each."""
    model = network()
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data = value
    return torch.tensor(one_at_a_time(model, *data().tensors))


def by_one_process(ranks, mechanism):
    """The ledger of a recorder to which every sample is reported, measured slowly."""
    recorder = Recorder(every=EVERY)
    recorder.begin(
        num_examples=NUM_EXAMPLES,
        sample_rate=mechanism.sample_rate,
        sampling=mechanism.sampling,
        data_set="toy",
    )
    for step, weights in enumerate(ranks[0]["weights"][:-1]):
        drawn = torch.tensor([i for one in ranks for i in one["updates"][step]])
        recorder.observe(drawn, all_norms(weights)[drawn])
        recorder.step(noise_std=1.0, max_grad_norm=1.0)
    return recorder.ledger


@pytest.mark.parametrize("case", sorted(set(CASES) - SWEPT))
def test_the_merged_ledger_is_that_of_one_process(results, case):
    ranks = [one[case] for one in results]
    num_updates = 8 if case == "fixed" else 6
    for one in ranks:
        assert one["attribution"]["by_storage"] == sum(map(len, one["updates"])) > 0
        assert sum(one["attribution"].values()) == one["attribution"]["by_storage"]
        assert one["mechanism"].num_steps == len(one["updates"]) == num_updates
        wanted = by_one_process(ranks, one["mechanism"])
        assert one["mechanism"] == wanted.mechanism
        np.testing.assert_array_equal(one["steps"], wanted.steps)
        np.testing.assert_allclose(one["norms"], wanted.grad_norms, rtol=1e-5)
    for mine, other in zip(*(one["weights"] for one in ranks), strict=True):
        assert all(map(torch.equal, mine, other))
    np.testing.assert_array_equal(ranks[0]["norms"], ranks[1]["norms"])
    np.testing.assert_array_equal(ranks[0]["losses"], ranks[1]["losses"])
    assert 0 < np.isnan(ranks[0]["norms"]).mean() < 1


@pytest.mark.parametrize("case", sorted(SWEPT))
def test_a_shared_sweep_is_a_whole_one(results, case):
    for one in (ranks := [one[case] for one in results]):
        assert one["steps"].tolist() == list(EVERY)
        wanted = [all_norms(one["weights"][step]) for step in EVERY]
        np.testing.assert_allclose(one["norms"], torch.stack(wanted), rtol=1e-5)
        assert set(np.unique(one["correct"])) == {0, 1}
    np.testing.assert_array_equal(ranks[0]["norms"], ranks[1]["norms"])
    np.testing.assert_array_equal(ranks[0]["correct"], ranks[1]["correct"])


def test_the_first_process_keeps_the_weights(folder, results):
    assert list(saved_weights(folder / "weights")) == list(EVERY)


def test_each_process_draws_its_own_part(results):
    for case in CASES:
        for one, other in zip(*(r[case]["updates"] for r in results), strict=True):
            assert one and other and not set(one) & set(other), case


def test_each_process_resumes_from_its_own_checkpoint(results):
    for one in results:
        whole, resumed = one["resumed"]
        assert whole["updates"][3:] == resumed["updates"]
        for mine, other in zip(whole["weights"][-4:], resumed["weights"], strict=True):
            assert all(map(torch.equal, mine, other))
        np.testing.assert_array_equal(whole["norms"], resumed["norms"])
        np.testing.assert_array_equal(whole["steps"], resumed["steps"])
        assert whole["mechanism"] == resumed["mechanism"]
        assert whole["mechanism"].num_steps == 6


def test_one_process_refuses_for_all(results):
    assert results[1]["one refuses"] == (6, "no")
    assert results[0]["one refuses"] == (6, "Process 1: no")


def test_unsupported_runs_are_refused_with_the_reason(results):
    for one in results:
        assert (
            "cannot record an FSDP module, because no process"
            in one["refused"]["fsdp swept"]
        )
        assert "RandomSampler draws from the whole" in one["refused"]["overlapping"]


def test_the_ledger_survives_the_death_of_a_process(results):
    left = results[0]["dead"]
    assert left["steps"].tolist()[:3] == list(EVERY)
    whole = ~np.isnan(left["norms"][:3])
    assert whole.sum() > 0.5 * (~np.isnan(results[0]["dpddp hooks"]["norms"][:3])).sum()
    assert left["losses"].shape == (NUM_EXAMPLES,)


# ------------------------------------------------------------------- merging by itself


def observed(*rows):
    """A record with (example, norm, update) observed."""
    run = RecordedRun("observed", 5, 0.5, "fixed", "toy", num_steps=9)
    for index, norm, step in rows:
        run.observe(np.array([index]), np.array([norm], np.float32), steps=step)
    return run


def merged(*runs):
    """Merge records as processes do; return what each got."""
    tables, counts, texts = [], [], [run.refusal for run in runs]

    def gather(rows):
        tables.append(rows)
        return [rows]

    def add(values):
        counts.append(values)
        return values

    probe = SimpleNamespace(gather=gather, gather_texts=lambda text: [text], sum=add)
    for run in runs:  # a first pass over copies collects what each will send
        merge_(copy.deepcopy(run), probe)
    processes = SimpleNamespace(
        gather=lambda _: tables,
        gather_texts=lambda _: texts,
        sum=lambda _: torch.stack(counts).sum(dim=0),
    )
    return [merge_(run, processes) for run in runs]


def test_the_latest_update_stays():
    runs = (
        observed((0, 1.0, 3), (1, 2.0, 7), (1, 2.5, 8)),
        observed((0, 9.0, 5), (1, 8.0, 6), (4, 7.0, 1)),
    )
    assert merged(*runs) == ["", ""]
    for run in runs:
        np.testing.assert_array_equal(run.observed, [9, 2.5, np.nan, np.nan, 7])
        assert run.num_unmerged == 0
    assert merged(*runs) == ["", ""]  # nothing is sent a second time
    runs[0].observe(np.array([4]), np.array([6], np.float32), steps=9)
    merged(*runs)
    assert runs[1].observed[4] == 6


def test_what_was_not_merged_is_merged_after_resuming():
    run = observed((2, 3.0, 1))
    resumed = RecordedRun.from_state_dict(run.state_dict())
    other = observed()
    merged(resumed, other)
    assert other.observed[2] == 3


def test_two_processes_that_draw_the_same_example():
    runs = observed((3, 1.0, 4)), observed((3, 1.0, 4))
    reasons = merged(*runs)
    assert reasons[0] == reasons[1]
    assert "drew example 3 for update 4" in reasons[0]


def test_the_reasons_of_all():
    runs = observed(), observed()
    runs[1].refusal = "why"
    assert merged(*runs) == ["Process 1: why", "why"]


def test_a_strict_recorder_raises_in_every_process():
    recorder = Recorder(strict=True, every=1.0)
    other = observed()
    other.refusal = "why"
    processes = SimpleNamespace(
        rank=0,
        gather=lambda rows: [rows],
        gather_texts=lambda text: [text, "why"],
        sum=lambda values: values,
    )
    recorder.begin(
        num_examples=5,
        sample_rate=0.5,
        sampling="fixed",
        data_set="toy",
        processes=processes,
    )
    recorder.step(noise_std=1.0, max_grad_norm=1.0)
    with pytest.raises(AccountingError, match="Process 1: why"):
        recorder.step(noise_std=1.0, max_grad_norm=1.0)


def test_alone_there_is_nothing_to_merge():
    recorder = Recorder()
    with pytest.raises(AccountingError, match="Nothing is being recorded"):
        recorder.merge()
    recorder.begin(num_examples=2, sample_rate=1.0, sampling="fixed", data_set="toy")
    recorder.observe(torch.tensor([1]), torch.tensor([0.5]))
    recorder.merge()
    recorder.step(noise_std=1.0, max_grad_norm=1.0)
    assert recorder.ledger.grad_norms[0, 1] == 0.5
