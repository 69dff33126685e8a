"""Bounds against vectors computed once with 50 digits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opacus_pi.accounting import published
from opacus_pi.accounting.group.gaussian_mixture import mixture_log_moment, scalar_law
from opacus_pi.accounting.group.moments import (
    coupled_log_moment,
    log_mean_exp,
    pair_exponents,
    subset_sums,
)
from opacus_pi.accounting.langevin import shifted
from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.contraction import (
    dobrushin_bound,
    first_step,
    hypercontractive_bound,
    log_dobrushin_coefficient,
    source_bound,
)
from opacus_pi.accounting.langevin.learning_phase import (
    contractive_divergence,
    halved_noise_divergence,
)
from opacus_pi.accounting.langevin.lsi import bounded_support_lsi, lsi_track
from opacus_pi.accounting.moments import log_moment

CASES = json.loads((Path(__file__).parent / "vectors_bounds.json").read_text())


def process(eta, sigma, case, L, m=0.0, R=math.inf, Mlip=math.inf, **_):
    return LangevinConstants(
        learning_rate=eta,
        noise_variance=2 * eta * sigma**2,
        smoothness=L,
        strong_convexity={"strongly_convex": m, "convex": 0.0, "nonconvex": -L}[case],
        radius=R,
        gradient_bound=Mlip,
    )


def gaussian(mu2):
    return lambda order: order * mu2 / 2


def delta(U, Uprime):
    V = np.subtract(U, Uprime)
    return -2 * pair_exponents(V @ V.T, np.arange(len(V))[None])[0]


def theorem_b1(retain, forget, q, sigma, alpha):
    """By all minibatches, through the library's exponents of tuples."""
    full, log_p = subset_sums(np.array(retain + forget) / sigma, q)
    rest, log_q = subset_sums(np.array(retain) / sigma, q)
    tuples = np.stack(np.meshgrid(*[np.arange(len(full))] * alpha), -1)
    tuples = tuples.reshape(-1, alpha)
    weights = log_p[tuples].sum(axis=1)
    logs = [
        log_mean_exp(pair_exponents((full - u) @ (full - u).T, tuples), weights)
        for u in rest
    ]
    return float(np.exp(log_q) @ logs)


def coupled(forget, q, sigma, alpha):
    G = np.array(forget) / sigma
    return coupled_log_moment(G @ G.T, q, alpha).log_moment


def learning(alpha, S, Mlip, n, eta, sigma, T, C0, factor, **kwargs):
    constants = process(eta=eta, sigma=sigma, **kwargs)
    shared = {
        "lipschitz": constants.lipschitz,
        "noise_variance": constants.noise_variance,
    }
    lsi = lsi_track(C0, T, cap=constants.lsi_cap, **shared)
    shifts = np.full(T, eta * factor * S * Mlip / n)
    return halved_noise_divergence(shifts, alpha, lsi=lsi, **shared)


def cor41(alpha, eps_prime_4a, eps_4a_minus_1, eps_2a_minus_1, sumR):
    return published.corollary_4_1(
        alpha, eps_prime_4a, eps_4a_minus_1, eps_2a_minus_1, sumR
    )


def cor44(alpha, P_4a, eps_4a_minus_1, eps_2a_minus_1, delta, R):
    return published.corollary_4_4_steps(
        alpha, P_4a, eps_4a_minus_1, eps_2a_minus_1, target=delta, rate=R
    )


def steps(bound, divergence, alpha, target, R):
    return first_step(lambda k: bound(divergence, alpha, R * k) <= target, 10**6)


EVALUATE = {
    "delta": delta,
    "group_printed": theorem_b1,
    "group_coupled": coupled,
    "group_scalar": lambda norms, q, sigma, alpha: mixture_log_moment(
        *scalar_law(np.array(norms) / sigma, q), alpha
    ),
    "lsi_schedule_last": lambda C0, k, **kw: lsi_track(
        C0,
        k,
        lipschitz=process(**kw).lipschitz,
        noise_variance=process(**kw).noise_variance,
    )[-1],
    "lnG": lambda C0, k, **kw: process(**kw).log_growth(C0, k)[-1],
    "lsi_bounded_support": lambda R, s: bounded_support_lsi(R, s),
    "chien_eps0_strongly_convex": lambda alpha, S, Mlip, m, sigma, n: (
        published.chien_learning_divergence(
            alpha,
            num_points=S,
            gradient_bound=Mlip,
            strong_convexity=m,
            sigma=sigma,
            num_examples=n,
        )
    ),
    "chien_strongly_convex_R": lambda eta, sigma, m, C_lsi: published.chien_rate(
        learning_rate=eta, sigma=sigma, strong_convexity=m, lsi=C_lsi
    ),
    "learning_eps0_lsi": learning,
    "cor41": cor41,
    "cor44_steps": cor44,
    "steps_same_kernel": lambda alpha, D, target, R: steps(
        source_bound, D, alpha, target, R
    ),
    "steps_hyper_closed": lambda alpha, D, target, R: steps(
        hypercontractive_bound, D, alpha, target, R
    ),
    "steps_hyper_gaussian": lambda mu2, alpha, target, R: steps(
        hypercontractive_bound, gaussian(mu2), alpha, target, R
    ),
    "langevin_hyper_gaussian": lambda mu2, alpha, G: hypercontractive_bound(
        gaussian(mu2), alpha, math.log(G)
    ),
    "sequential_chien": lambda mu2, alpha, sumR: published.chien_sequential(
        alpha, gaussian(mu2), sumR
    ),
    "dobrushin_bound": lambda D, alpha, rho, s, k: dobrushin_bound(
        D, alpha, k * log_dobrushin_coefficient(rho, s)
    ),
    "pabi_mu2": lambda c, d, s, z0: shifted.shifted_mu_squared(
        c, d, s, initial_distance=z0
    ),
    "pabi_learn_unlearn_closed": lambda c, eta_delta, T, K, s: (
        shifted.learn_unlearn_mu_squared(c, eta_delta, T, K, s)
    ),
    "compose_contractive": lambda delta, s, C, c, alpha, p, theta: (
        contractive_divergence(
            delta,
            alpha,
            lsi=C,
            lipschitz=c,
            noise_variance=s,
            hoelder_p=p,
            noise_share=theta,
        )
    ),
}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["kind"] in EVALUATE],
    ids=lambda case: case["id"],
)
def test_vector(case):
    value = EVALUATE[case["kind"]](**case["inputs"])
    expected = float(case["expected"])
    assert value == pytest.approx(expected, rel=1e-10, abs=0)


def test_remove_direction_is_smaller():
    case = next(case for case in CASES if case["kind"] == "lnM_reverse")
    r, q, order = (case["inputs"][name] for name in ("r", "q", "alpha"))
    z = np.linspace(-14, 14, 20_001)
    log_ratio = np.log1p(q * np.expm1(r * z - r * r / 2))
    log_normal = -(z**2) / 2 - math.log(2 * math.pi) / 2 + math.log(z[1] - z[0])
    removed = np.log(np.exp(log_normal + (1 - order) * log_ratio).sum())
    assert removed == pytest.approx(float(case["expected"]), rel=1e-10)
    assert removed <= log_moment(r, q, order)


def test_every_kind_is_covered():
    assert {case["kind"] for case in CASES} == {*EVALUATE, "lnM_reverse"}
