"""Saving, loading and filling hold the norms of a ledger in memory hardly twice."""

import tracemalloc

import numpy as np
import pytest

from opacus_pi import GradNormLedger
from opacus_pi.ledger.gap_filling import fill_unobserved
from opacus_pi.ledger.mechanism import NoisySGD


@pytest.fixture(scope="module")
def ledger():
    norms = np.random.default_rng(0).random((35, 100_000), np.float32)
    norms[norms < 0.8] = np.nan
    mechanism = NoisySGD(35, 0.1, 1.0, max_grad_norm=1.0)
    return GradNormLedger(mechanism, np.arange(35) + 1, norms, source="observed")


def peak_of(task):
    """Return the most bytes that a call allocates beyond what is there before."""
    tracemalloc.start()
    try:
        task()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_ledger_is_saved_without_a_copy_and_loaded_once(ledger, tmp_path):
    path = tmp_path / "ledger.safetensors"
    assert peak_of(lambda: ledger.save(path)) < 0.1 * ledger.grad_norms.nbytes
    assert peak_of(lambda: GradNormLedger.load(path)) < 1.1 * ledger.grad_norms.nbytes


def test_filling_holds_the_result_and_a_sixth_more(ledger):
    size = 8 * ledger.grad_norms.size
    assert peak_of(lambda: fill_unobserved(ledger.grad_norms)) < 1.17 * size
