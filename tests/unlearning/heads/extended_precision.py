"""Laws of noisy ridge descent and their divergences, step by step, in long double.

Nothing here shares a formula with the library: every step of every phase is made, and
divergences come from Cholesky factors of the full covariances.
"""

import numpy as np

REAL = np.longdouble
MORE_PRECISE = np.finfo(REAL).eps < 1e-18


def law(phases, *, learning_rate, penalty, noise_std, initial_std, denominator):
    """Mean and covariance after phases of ``(rows, targets, num_steps)``."""
    d, m = phases[0][0].shape[1], phases[0][1].shape[1]
    eye = np.eye(d, dtype=REAL)
    mean, cov = np.zeros((d, m), REAL), eye * REAL(initial_std) ** 2
    for rows, targets, num_steps in phases:
        x, y = rows.astype(REAL), targets.astype(REAL)
        hessian = x.T @ x / REAL(denominator) + REAL(penalty) * eye
        push = REAL(learning_rate) * (x.T @ y) / REAL(denominator)
        A = eye - REAL(learning_rate) * hessian
        for _ in range(num_steps):
            mean = A @ mean + push
            cov = A @ cov @ A.T + eye * REAL(noise_std) ** 2
    return mean, cov


def cholesky(matrices):
    """Lower factors of a stack of matrices; NaN where one is not positive definite."""
    lower = np.zeros_like(matrices)
    for j in range(matrices.shape[-1]):
        known = np.einsum("nik,nk->ni", lower[:, j:, :j], lower[:, j, :j])
        rest = matrices[:, j:, j] - known
        with np.errstate(invalid="ignore", divide="ignore"):
            lower[:, j:, j] = rest / np.sqrt(rest[:, :1])
    return lower


def log_det(lower):
    return 2 * np.log(np.einsum("nii->ni", lower)).sum(axis=1)


def squared_length(lower, right):
    """Sum of the squares of u, where lower·u = right, for a stack of factors."""
    u = np.zeros((len(lower), *right.shape), REAL)
    for i in range(len(right)):
        known = np.einsum("nk,nkm->nm", lower[:, i, :i], u[:, :i])
        u[:, i] = (right[i] - known) / lower[:, i, i, None]
    return np.square(u).sum(axis=(1, 2))


def divergences(first, second, orders):
    """D_α(first ‖ second) at every order; inf where it is infinite."""
    (m1, S1), (m2, S2) = first, second
    a = np.asarray(orders, REAL)
    lower = cholesky(a[:, None, None] * S2 + (1 - a)[:, None, None] * S1)
    finite = np.isfinite(lower).all(axis=(1, 2))
    lower[~finite] = np.eye(len(S1), dtype=REAL)
    logs = [log_det(part) for part in (lower, cholesky(S1[None]), cholesky(S2[None]))]
    spread = (logs[0] - (1 - a) * logs[1] - a * logs[2]) / (2 * (1 - a))
    found = a / 2 * squared_length(lower, m1 - m2) + m1.shape[1] * spread
    return np.where(finite, found, np.inf).astype(float)


def log_ratio(first, second, weights):
    """ln dP/dQ at samples ``(n, d, m)``."""
    total = 0
    for sign, (mean, cov) in ((1, first), (-1, second)):
        lower = np.linalg.cholesky(cov.astype(float))
        scaled = np.linalg.solve(lower, weights - mean.astype(float))
        log_size = mean.shape[1] * np.log(np.diag(lower)).sum()
        total = total - sign * (np.square(scaled).sum(axis=(1, 2)) / 2 + log_size)
    return total


def sampled(pair, rng, number):
    """Samples of a law, ``(number, d, m)``."""
    mean, cov = (part.astype(float) for part in pair)
    noise = rng.normal(size=(number, *mean.shape))
    return mean + np.linalg.cholesky(cov) @ noise


def log_moments(first, second, z):
    """Λ(z) = ln E exp(z·L) under the second law, from the full covariances."""
    (m1, S1), (m2, S2) = [
        tuple(p.astype(float) for p in pair) for pair in (first, second)
    ]
    z = z[:, None, None]
    mixed = z * S2 + (1 - z) * S1
    gap = (m1 - m2).astype(complex)
    pull = (gap * np.linalg.solve(mixed, gap)).sum(axis=(1, 2))
    z = z[:, 0, 0]
    logs = np.log(np.linalg.eigvals(np.linalg.solve(S2, mixed))).sum(axis=1)
    own = np.linalg.slogdet(S1)[1] - np.linalg.slogdet(S2)[1]
    return z * (z - 1) / 2 * pull - gap.shape[1] / 2 * (logs - (1 - z) * own)


def delta_at(first, second, epsilon, num_nodes=3000):
    """δ(ε) by a fine rule on a long line, its slope in ε, and what may be missing."""
    lines = 1 + np.geomspace(1e-2, 1e3, 150)
    finite = np.isfinite(divergences(first, second, lines))
    lines = lines[finite]
    sizes = log_moments(first, second, lines + 0j).real - (lines - 1) * epsilon
    c = lines[sizes.argmin()]
    step = (c - 1) / 20
    z = c + 1j * step * np.arange(num_nodes)
    F = np.exp(log_moments(first, second, z) - (z - 1) * epsilon) / (z * (z - 1))
    total = step / np.pi * (F.real.sum() - F[0].real / 2)
    slope = step / np.pi * (((z - 1) * F).real.sum() - ((c - 1) * F[0]).real / 2)
    return total, slope, abs(F[-1]) * step * num_nodes
