"""The authors' published per-step table, where its files are at hand."""

import csv
from pathlib import Path

import numpy as np
import pytest

from opacus_pi.accounting import GradNormLedger, NoisySGD, per_step_losses

FOLDER = Path(__file__).parents[3].parent / "shared/reference/gradients_look_alike"


def table(path, column):
    """steps ``(N,)`` and values ``(N, n)``."""
    cells = {}
    with path.open() as file:
        for line in csv.DictReader(file):
            cells[int(line["step"]), int(line["point"])] = float(line[column])
    steps = sorted({step for step, _ in cells})
    points = sorted({point for _, point in cells})
    return steps, np.array([[cells[s, p] for p in points] for s in steps])


@pytest.mark.skipif(not FOLDER.exists(), reason="the published tables are not here")
@pytest.mark.parametrize("number", [0, 1])
def test_every_value_of_the_published_table(number):
    steps, distances = table(FOLDER / f"res{number}.csv", "distance (sum)")
    published_steps, published = table(
        FOLDER / f"compo_res{number}.csv", "Privacy cost"
    )
    mechanism = NoisySGD(
        num_steps=9300, sample_rate=256 / 60000, noise_std=0.57891845703125
    )
    ledger = GradNormLedger(mechanism, steps, 256 * distances)
    losses = per_step_losses(ledger, 8, convention="thudi2024_code")
    losses = losses[[steps.index(step) for step in published_steps]]
    stated = published > 1e-9
    assert stated.sum() > 200
    np.testing.assert_allclose(losses[stated], published[stated], rtol=1e-6)
