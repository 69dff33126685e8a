"""Recorders begun on a toy run, and reports to them."""

from types import SimpleNamespace

import numpy as np
import torch

from opacus_pi.recording import Recorder

N = 6


INF = float("inf")


def begun(recorder=None, **changes):
    recorder = recorder or Recorder(every=1)
    facts = {"num_examples": N, "sample_rate": 0.5, "sampling": "poisson"}
    recorder.begin(**{**facts, "data_set": "toy", **changes})
    return recorder


def report(recorder, observed=(), **settings):
    if observed:
        indices, norms = zip(*observed, strict=True)
        recorder.observe(torch.tensor(indices), torch.tensor(norms))
    recorder.step(**{"noise_std": 2.0, "max_grad_norm": 1.0, **settings})


def random_run(recorder, num_steps, seed=0, start=0):
    """Reports that depend on the update alone, so that a part can be replayed."""
    for step in range(start, num_steps):
        rng = np.random.default_rng([seed, step])
        chosen = rng.permutation(N)[: rng.integers(0, N)]
        norms = rng.exponential(size=len(chosen))
        report(
            recorder,
            list(zip(chosen.tolist(), norms.tolist(), strict=True)),
            noise_std=2.0 + 0.1 * (step % 3),
        )


def sweep_of(counter):
    """A sweep whose numbers say how often it was called."""

    def sweep():
        counter.append(None)
        values = torch.arange(N, dtype=torch.float64) + len(counter)
        return SimpleNamespace(
            grad_norms=values,
            confidences=values / 100,
            errors=values / 10,
            correct=values > 3,
        )

    return sweep


def equal(a, b):
    assert a.mechanism == b.mechanism
    for name in ("steps", "grad_norms", "confidences", "errors", "correct"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or np.array_equal(x, y, equal_nan=True), name
    assert (a.source, a.data_set) == (b.source, b.data_set)
