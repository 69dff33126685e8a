"""Vectors computed independently with 50 digits hold to 1e-10 relative."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    log_moment,
    privacy_losses,
    rdp_to_delta,
    rdp_to_epsilon,
    renyi_divergence,
)
from opacus_pi.accounting.composition import (
    corrected_order,
    hoelder_losses,
    printed_order,
    published_orders,
    weighted_log_moments,
)
from opacus_pi.accounting.trajectory import trajectory_losses_of_sums

CASES = json.loads((Path(__file__).parent / "vectors.json").read_text())
MODES = {"int": "exact", "interp": "chord", "ceil": "ceil", "exact": "exact"}


def lnm(r, q, alpha, mode):
    return log_moment(r, q, alpha, mode=MODES[mode])


def kl_step(r, q):
    return renyi_divergence(r, q, 1)


def compose_holder(r, q, alpha, p, mode):
    steps = len(r)
    return sum(
        hoelder_losses(
            np.array(runs)[:, None],
            q,
            alpha,
            (steps - t, steps - t),
            hoelder_p=float(p),
            mode=MODES[mode],
        )[0]
        for t, runs in enumerate(r, start=1)
    )


def compose_printed(r, q, alpha, p):
    return sum(
        weighted_log_moments(
            np.array(runs)[:, None],
            q,
            *published_orders(alpha, t, hoelder_p=p, convention="icml2025"),
            hoelder_p=p,
            mode="exact",
        )[0]
        for t, runs in enumerate(r, start=1)
    )


def compose_sum(r, q, alpha, mode):
    return renyi_divergence(r, q, alpha, mode=MODES[mode]).sum()


def compose_trajectory(runs, q, alpha, kappa, mode):
    inner = 1 + kappa / (kappa - 1) * (alpha - 1)
    sums = renyi_divergence(runs, q, inner, mode=MODES[mode]).sum(axis=1)
    return trajectory_losses_of_sums(sums[:, None], alpha, kappa)[0]


def checkpoint_ledger(r, checkpoints, steps, q):
    """Ratios kept to float64 by the noise, since norms are float32."""
    mechanism = NoisySGD(num_steps=steps, sample_rate=q, noise_std=1 / np.array(r))
    return GradNormLedger(mechanism, checkpoints, np.ones((len(r), 1)))


def checkpoints_rigorous(r, checkpoints, T, q, alpha, p, rule, mode):
    ledger = checkpoint_ledger(r, checkpoints, T, q)
    return privacy_losses(ledger, alpha, rule=rule, hoelder_p=p, mode=MODES[mode])[0]


def checkpoints_printed(r, checkpoints, T, q, alpha, p):
    ledger = checkpoint_ledger(r, checkpoints, T, q)
    return privacy_losses(ledger, alpha, convention="icml2025", hoelder_p=p)[0]


COMPUTE = {
    "lnM": lnm,
    "kl_step": kl_step,
    "order_rigorous": lambda alpha, p, i: corrected_order(alpha, p, i),
    "order_printed": lambda alpha, p, t: printed_order(alpha, p, t),
    "compose_holder": compose_holder,
    "compose_printed": compose_printed,
    "compose_sum": compose_sum,
    "compose_trajectory": compose_trajectory,
    "checkpoints_rigorous": checkpoints_rigorous,
    "checkpoints_printed": checkpoints_printed,
    "rdp_to_eps": lambda alpha, rdp, delta: rdp_to_epsilon([rdp], [alpha], delta),
    "rdp_to_delta": lambda alpha, rdp, eps: rdp_to_delta([rdp], [alpha], eps),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_vector(case):
    value = float(COMPUTE[case["kind"]](**case["inputs"]))
    assert math.isclose(value, float(case["expected"]), rel_tol=1e-10)


def test_all_kinds_are_present():
    assert {case["kind"] for case in CASES} == set(COMPUTE)
    assert len(CASES) == 46
