"""The benchmark's noise is what its bound allows, and its steps are as described."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks.common.data import ImageData
from benchmarks.noisy_fine_tuning import DELTA, VARIANTS, Case, Trainer, Variant
from opacus_pi.accounting.conversion import gaussian_delta


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_both_restrictions_need_the_least_noise(epsilon):
    noise = {v.name: v.noise_std(epsilon) for v in VARIANTS if v.centre == "0"}
    assert noise["both"] <= min(noise.values())


def test_gradient_clipping_is_one_shift():
    """All steps together: the closed form of the drift, and a single Gaussian."""
    variant = Variant("gradient clipping", "0", radius=0.5, clip=0.3)
    std = variant.noise_std(1.0)
    c, k = 1 - variant.learning_rate * variant.weight_decay, variant.num_steps
    drift = 2 * variant.learning_rate * variant.clip
    reached = 2 * variant.radius * c**k + drift * (1 - c**k) / (1 - c)
    spread = std * math.sqrt((1 - c ** (2 * k)) / (1 - c * c))
    assert gaussian_delta(reached / spread, 1.0) == pytest.approx(DELTA, rel=1e-6)


@pytest.mark.parametrize("name", ["gradient clipping", "model clipping", "both"])
def test_two_starts_stay_as_near_as_the_bound_says(name):
    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(
        torch.randn(40, 1, 4, 4, generator=generator),
        torch.randint(0, 3, (40,), generator=generator),
    )
    case = Case("digits", "mlp", 40, 0, 1, 1, batch_size=8)
    trainer = Trainer(case, ImageData("digits", rows, rows, num_classes=3), seed=0)
    variant = Variant(name, "0", radius=0.5, clip=0.3, num_steps=4)
    centre = torch.zeros_like(trainer.initial)
    ends = [
        trainer.fine_tune(variant, 0.0, start, centre, rows)
        for start in (trainer.initial, -trainer.initial)
    ]
    apart = float((ends[0] - ends[1]).norm())
    c = 1 - variant.learning_rate * variant.weight_decay
    limit = 2 * variant.radius
    if name != "model clipping":
        for _ in range(variant.num_steps):
            limit = c * limit + 2 * variant.learning_rate * variant.clip
    if name != "gradient clipping":
        limit = min(limit, 2 * variant.radius)
    assert apart <= limit * (1 + 1e-5)
    again = trainer.fine_tune(variant, 0.0, trainer.initial, centre, rows)
    np.testing.assert_array_equal(again, ends[0])
