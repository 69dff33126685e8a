"""Two processes that train one run: what fools one of them is said by both."""

import multiprocessing

import pytest
import torch

from tests.custody.distributed_loops import CASES, process
from tests.distributed_training import NUM_PROCESSES

ALL = [(*case, name) for case, names in CASES.items() for name in names]
RIGHT = ("plain", "weights clamped")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    context = multiprocessing.get_context("forkserver")
    started = [
        context.Process(target=process, args=(rank, folder))
        for rank in range(NUM_PROCESSES)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(240)
        one.kill()
    return [
        torch.load(folder / f"{rank}.pt", weights_only=False)
        for rank in range(NUM_PROCESSES)
    ]


def is_doubted(result):
    """Whether a process refuses, or leaves the loss or the norm unchecked."""
    states = result["states"]
    return bool(result["refusal"]) or "unchecked" in (states["loss"], states["norm"])


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_after_an_audit_every_process_refuses_or_doubts_another_loss(results, case):
    found = [of_rank[(*case, True)] for of_rank in results]
    assert all(result["passed"] for result in found)
    expected = case[-1] not in RIGHT
    assert [is_doubted(result) for result in found] == [expected] * NUM_PROCESSES


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_without_an_audit_nothing_is_checked_that_was_not_seen(results, case):
    found = [of_rank[(*case, False)] for of_rank in results]
    *_, mode, name = case
    is_known = mode == "ghost" and name in RIGHT
    assert [is_doubted(result) for result in found] == [not is_known] * NUM_PROCESSES
    if name.startswith(("gradients", "sums", "inverse")) and mode == "ghost":
        assert all(result["said"] or result["refusal"] for result in found)
    if name.startswith("gradients"):
        assert any(result["said"] for result in found)
    if name in RIGHT:
        assert not any(result["said"] for result in found)
