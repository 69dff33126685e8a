r"""Per-example epsilon by numerical composition of the recorded norms.

**Idea.** A Rényi divergence at one order bounds δ(ε) and is a few per cent too large.
The moments at all complex orders on one line determine δ(ε) exactly: it is an integral
over the line. Moments of updates multiply, so an example's integrand needs only the
logarithms of the moments of single updates, added with the number of updates of each
ratio r (clipped norm over noise). These logarithms are tabulated once, at ratios on a
grid; every example's δ(ε) is then a sum over 144 points of the line.

The same composition of the largest ratio, clip norm over noise, is a bound for any
example (``composed_worst_case``).

**Guarantee.** For norms that were observed or swept, every step rounds ε up. Ratios
are rounded up to the grid, by 1/128 at most. One tiny Gaussian update is added: it
makes the terms that are left out smaller than a number that is added to δ. The sum
is the integral plus the values of e^{tilt·ε}·δ(ε) at other ε, which are not negative.
Rounding of floating-point numbers is added to δ. Where norms were not observed, the
logarithms are means over plausible norms, and the result is an estimate like these.

**What breaks it.** Nothing makes the value of an example a bound for other runs: the
norms are those of one run (``privacy_losses``). Both directions are computed, with the
example against without it and the reverse, and the larger ε is returned.

Source: own derivation, docs/theory.md, Section 15. The integral is that of Zhu, Dong
and Wang (arXiv:2106.08567), the tilt that of Alghamdi et al. (arXiv:2208.09595).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.accounting.conversion import epsilon_offset
from opacus_pi.accounting.losses import RunNorms, norms_of_runs
from opacus_pi.accounting.rules import intervals, require_steps, worst_case_of_fixed
from opacus_pi.accounting.update_transforms import (
    ADDED,
    REMOVED,
    Line,
    log_transforms,
)
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.ledger.mechanism import NoisySGD

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["composed_epsilons", "composed_worst_case"]

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
_STEP = 1 / 128  # ratio of two neighbours of the grid of r, minus 1
_SMALLEST = 1e-4  # smallest r of the grid, as a share of the largest
_LARGEST = 8.0  # larger ratios are charged as if every update drew the example
_TILTS = np.geomspace(0.01, 3e4, 30)
_FARTHEST = 30.0  # largest r·(tilt + 1) for which a moment is computed
_UNUSABLE = 1e30  # stands for the logarithm of a moment that is not computed
_NUM_POINTS = 144
_DECAY = 3.8  # ratio of the update that is added, times the last frequency
_PRECISION = 1e-12  # of the logarithm of one update's moment
_BISECTIONS = 18
_ENTRIES = 1 << 23  # norms looked at together
_PER_GAP = 10  # norms that an update may have had, of an example that it did not draw
_AT_ONCE = 1 << 11  # examples whose sums are in memory together


def composed_epsilons(
    runs: Sequence[GradNormLedger], delta: float, gaps: str = "smoothed"
) -> Array:
    """Return per-example epsilons at a given delta, by numerical composition.

    Args:
        runs: One run, as ``runs_of`` returns it.
        delta: δ in (0, 1).
        gaps: As in ``privacy_losses``.

    Returns:
        float64 ``(n,)``, at least 0; ``inf`` where no ε could be computed.

    Raises:
        ValueError: If there are several runs.
    """
    expect(
        len(runs) == 1,
        "ledger",
        f"{len(runs)} runs",
        'must be one run for composition="numerical"',
        'Pass one ledger. For several runs use composition="renyi": its theorem has a '
        "mean over runs.",
    )
    (run,) = runs
    entries = max(1, run.num_rows) * (_PER_GAP if run.source == "observed" else 1)
    size = max(1, min(run.num_examples, _ENTRIES // entries))
    blocks = [
        norms_of_runs(run, gaps=gaps, columns=slice(start, start + size))
        for start in range(0, max(run.num_examples, 1), size)
    ]
    return np.concatenate([_of_block(block, delta) for block in blocks])


def composed_worst_case(
    mechanism: NoisySGD, delta: float, *, steps: ArrayLike | None = None
) -> float:
    """Return a bound on ε of any one example, by numerical composition.

    Each update is charged at the largest ratio, clip norm over noise, which dominates
    every update that the example can take part in. Fixed sampling is charged as by
    ``worst_case_loss``.

    Args:
        mechanism: Noise, clip norm and sampling of the run.
        delta: δ in (0, 1).
        steps: The ledger's steps ``(N,)``; needed if the mechanism has a schedule.

    Returns:
        ε, at least 0, for both directions; ``inf`` without clipping or noise. Ratios
        above 8 are charged as if every update drew the example, which Rényi divergences
        can undercut.

    Raises:
        ValueError: If the steps are needed and missing.

    Source: Zhu, Dong and Wang (arXiv:2106.08567); docs/theory.md, Section 15.
    """
    is_changed = require_steps(mechanism, steps)
    rows = np.asarray(steps) if is_changed else np.array([mechanism.num_steps])
    largest = _largest_ratio(mechanism)
    if math.isinf(largest):
        return math.inf
    if mechanism.sampling == "poisson":
        unbounded = np.full((1, len(rows), 1), math.inf)
        return float(_of_block(RunNorms(mechanism, rows, unbounded), delta)[0])
    parts = intervals(rows, mechanism.num_steps)
    facts = [mechanism.at_row(part.right) for part in parts]
    squares = [float(fact.ratios(math.inf)) ** 2 for fact in facts]
    total = worst_case_of_fixed(parts, facts, squares)
    return float(_epsilons_of(ChargedUpdates.gaussians(total), delta)[0])


def _largest_ratio(mechanism: NoisySGD) -> float:
    """Return the largest ratio of a clipped norm to the noise."""
    with np.errstate(divide="ignore"):
        bounds = np.divide(mechanism.max_grad_norm, mechanism.noise_std)
    return float(np.max(bounds))


def _of_block(runs: RunNorms, delta: float) -> Array:
    """Return the epsilons of some examples of one run, ``(n,)``."""
    largest = min(_largest_ratio(runs.mechanism), _LARGEST)
    return _epsilons_of(charged_updates(runs, RatioGrid(largest)), delta)


def _epsilons_of(updates: "ChargedUpdates", delta: float) -> Array:
    """Return the epsilons of the examples that are charged some updates, ``(n,)``."""
    zero = np.zeros(len(updates.gaussian))
    removed = _largest(updates, delta, REMOVED, zero)
    return _largest(updates, delta, ADDED, removed)


@dataclass(frozen=True)
class RatioGrid:
    """Ratios to which an example's are rounded up.

    Args:
        largest: The first ratio of the grid; the others are smaller.
    """

    largest: float

    def places(self, ratios: Array) -> NDArray[np.int64]:
        """Return the position on the grid of the next larger ratio."""
        with np.errstate(divide="ignore"):
            below = np.log(self.largest / ratios) / math.log1p(_STEP)
        last = math.ceil(-math.log(_SMALLEST) / math.log1p(_STEP))
        return np.clip(np.floor(below - 1e-9), 0, last).astype(np.int64)

    def at(self, places: NDArray[np.int64]) -> Array:
        """Return the ratios at positions on the grid."""
        ratios: Array = self.largest * (1 + _STEP) ** -places.astype(np.float64)
        return ratios


@dataclass(frozen=True, eq=False)
class ChargedUpdates:
    """How many updates of which kind each example is charged.

    Args:
        counts: ``(n, B)``, sparse: updates of each kind.
        ratios: float64 ``(B,)``, the ratio of each kind.
        rates: float64 ``(B,)``, its sample rate, below 1.
        gaussian: float64 ``(n,)``, the sum of the squared ratios of the updates that
            drew the example with certainty.
    """

    counts: "csr_array"
    ratios: Array
    rates: Array
    gaussian: Array

    @classmethod
    def gaussians(cls, total: float) -> "ChargedUpdates":
        """Return the updates of one example that is certain to be drawn.

        Args:
            total: The sum of their squared ratios.
        """
        from scipy.sparse import csr_array  # takes a tenth of a second

        none = np.empty(0)
        return cls(csr_array((1, 0)), none, none, np.array([total]))

    def of_examples(self, rows: NDArray[np.int64]) -> "ChargedUpdates":
        """Return the updates of some examples, without kinds that they do not use."""
        counts = self.counts[rows]
        used = np.unique(counts.indices)
        kinds = (counts[:, used], self.ratios[used], self.rates[used])
        return ChargedUpdates(*kinds, self.gaussian[rows])

    def log_moments(self, line: Line, direction: str) -> Iterator[Complex]:
        """Return the logarithms of the examples' moments on a line.

        Args:
            line: The points.
            direction: ``REMOVED`` or ``ADDED``.

        Yields:
            complex128 ``(m, F)``, some examples after the others.
        """
        s = line.points
        kinds = log_transforms(self.ratios, self.rates, line, direction)
        for start in range(0, len(self.gaussian), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            counts = self.counts[some]
            total = self.gaussian[some, None] * (s * (s + 1) / 2)
            total += counts @ kinds.real + 1j * (counts @ kinds.imag)
            yield total

    def log_moments_at(self, tilts: Array, direction: str) -> Array:
        """Return the logarithms of the moments at real numbers, ``(n, A)``."""
        kinds = np.full((len(self.ratios), len(tilts)), _UNUSABLE)
        for column, tilt in enumerate(tilts):
            near = self.ratios * (tilt + 1) <= _FARTHEST
            facts = self.ratios[near], self.rates[near]
            moments = log_transforms(*facts, Line(float(tilt)), direction)
            kinds[near, column] = moments[:, 0].real
        total: Array = self.gaussian[:, None] * (tilts * (tilts + 1) / 2)
        total += self.counts @ kinds
        return total


def charged_updates(runs: RunNorms, grid: RatioGrid) -> ChargedUpdates:
    """Return the updates that the examples of one run are charged.

    Args:
        runs: The run.
        grid: The ratios of the result.
    """
    from scipy.sparse import coo_array  # takes a tenth of a second

    is_poisson = runs.mechanism.sampling == "poisson"
    num_examples = runs.norms.shape[2]
    rates, codes = np.unique(runs.mechanism.sample_rate, return_inverse=True)
    codes = np.broadcast_to(codes, (len(runs.steps),))
    gaussian = np.zeros(num_examples)
    none = np.empty(0, dtype=np.int64)
    kinds, examples, counts = [none], [none], [np.empty(0)]
    for part in intervals(runs.steps, runs.mechanism.num_steps):
        code = codes[part.right]
        share = 1.0 if is_poisson else runs.share_of_updates(part)
        certain_rate = not is_poisson or rates[code] == 1
        for weights, norms in _plausible(runs, part.right):
            charged = weights * share * part.num_updates * (rates[code] > 0)
            ratios = runs.mechanism.at_row(part.right).ratios(norms)
            certain = certain_rate | (ratios > _LARGEST)
            with np.errstate(over="ignore"):  # of next to no noise: ε is then inf
                squares = np.where(certain & (charged > 0), ratios, 0.0) ** 2
            gaussian += np.where(squares > 0, charged * squares, 0.0)
            used = np.flatnonzero(~certain & (charged > 0) & (ratios > 0))
            examples.append(used)
            counts.append(charged[used])
            kinds.append(grid.places(ratios[used]) * len(rates) + code)
    different, columns = np.unique(np.concatenate(kinds), return_inverse=True)
    matrix = coo_array(
        (np.concatenate(counts), (np.concatenate(examples), columns.reshape(-1))),
        shape=(num_examples, len(different)),
    )
    return ChargedUpdates(
        matrix.tocsr(),
        grid.at(different // len(rates)),
        rates[different % len(rates)],
        gaussian,
    )


def _plausible(runs: RunNorms, row: int) -> Iterator[tuple[Array, Array]]:
    """Return norms that a row's updates may have had, with the share of each."""
    norms = runs.norms[0, row]
    if not runs.predictions:
        return iter([(np.ones(len(norms)), norms)])
    (predicted,) = runs.predictions
    assert predicted is not None
    return predicted.plausible(row, norms)


def _largest(
    updates: ChargedUpdates, delta: float, direction: str, others: Array
) -> Array:
    """Return the larger one of the epsilons in one direction and others, ``(n,)``.

    Args:
        updates: What the examples are charged.
        delta: δ.
        direction: ``REMOVED`` or ``ADDED``.
        others: float64 ``(n,)``, at least 0.
    """
    moments = updates.log_moments_at(_TILTS, direction)
    renyi = moments / _TILTS + epsilon_offset(_TILTS + 1, delta)
    result = renyi.min(axis=1)
    larger = result > others  # where not, the exact value is not larger either
    result = np.where(larger, result, others)
    wanted = larger & np.isfinite(result)
    lines = [_line(tilt, delta) for tilt in _TILTS]
    best = _best_lines(lines, moments, np.where(wanted, result, 0.0), delta)
    for place in np.unique(best[wanted]):
        rows = np.flatnonzero((best == place) & wanted)
        group = updates.of_examples(rows)
        line = lines[place]
        start = 0
        for logs in group.log_moments(line, direction):
            some = slice(start, start + len(logs))
            inversion = _Inversion.of(line, logs, group, some)
            own = inversion.epsilons(delta, result[rows[some]])
            result[rows[some]] = np.maximum(own, others[rows[some]])
            start = some.stop
    return result


def _line(tilt: float, delta: float) -> Line:
    """Return the points on which δ(ε) is computed with a tilt."""
    spacing = 2 * math.pi * tilt / (1.5 * (9 - math.log(delta)))
    return Line(float(tilt), spacing, _NUM_POINTS)


def _best_lines(
    lines: Sequence[Line], moments: Array, epsilons: Array, delta: float
) -> NDArray[np.int64]:
    """Return which line gives each example's smallest upper bound of δ, about.

    A line with a large tilt adds more of what δ(ε) is farther away, a line with a small
    one leaves out more terms. Both are bounded by Rényi divergences.

    Args:
        lines: One for each tilt.
        moments: float64 ``(n, A)``, logarithms of the moments at the tilts.
        epsilons: float64 ``(n,)``, near the result.
        delta: δ.

    Returns:
        int64 ``(n,)``, positions in ``lines``.
    """
    constants = (_TILTS + 1) * np.log1p(-1 / (_TILTS + 1)) - np.log(_TILTS)
    at_result = moments - _TILTS * epsilons[:, None]
    errors = np.empty(moments.shape)
    for place, line in enumerate(lines):
        period = 2 * math.pi / line.spacing
        farther = (at_result + constants - _TILTS * period).min(axis=1)
        tail = np.log(_left_out(line, np.zeros(1)))
        errors[:, place] = np.logaddexp(
            line.tilt * period + farther, at_result[:, place] + tail
        )
    best: NDArray[np.int64] = errors.argmin(axis=1)
    return best


def _extra(line: Line) -> float:
    """Return the squared ratio of the update that is added to the run."""
    return (_DECAY / (line.spacing * line.num_frequencies)) ** 2


def _left_out(line: Line, gaussian: Array) -> Array:
    """Bound the sum of the terms above the last frequency.

    Args:
        line: The points.
        gaussian: The sum of squared ratios of updates that drew the example with
            certainty, ``(n,)``.
    """
    first = line.spacing * line.num_frequencies
    bound: Array = np.exp(-(gaussian + _extra(line)) * first**2 / 2)
    bound /= math.pi * line.spacing * (line.num_frequencies - 1)
    return bound


@dataclass(frozen=True, eq=False)
class _Inversion:
    """Upper bounds of δ(ε) of examples, as sums over the points of one line.

    Args:
        line: The points.
        log_scale: float64 ``(n,)``, the logarithm of the moment at the first point.
        terms: complex128 ``(F, n)``, the moments at the points over that at the first,
            times the weights of the integral.
        error: float64 ``(n,)``, what is added to the sum for terms that are left out
            and for rounding.
    """

    line: Line
    log_scale: Array
    terms: Complex
    error: Array

    @classmethod
    def of(
        cls, line: Line, logs: Complex, updates: ChargedUpdates, some: slice
    ) -> "_Inversion":
        """Return the sums of some examples.

        Args:
            line: The points.
            logs: complex128 ``(m, F)``, the logarithms of their moments.
            updates: What they and others are charged.
            some: Which examples they are.
        """
        s = line.points
        logs = logs + _extra(line) * (s * (s + 1) / 2)
        log_scale = logs[:, 0].real
        terms = np.exp(logs - log_scale[:, None]) / (s * (s + 1))
        terms *= line.spacing / math.pi
        terms[:, 0] /= 2
        num_updates = 1 + updates.counts[some].sum(axis=1)
        rounding = np.expm1(np.minimum(_PRECISION * num_updates, 1.0))
        error = _left_out(line, updates.gaussian[some])
        error = error + rounding * np.abs(terms).sum(axis=1)
        return cls(line, log_scale, np.ascontiguousarray(terms.T), error)

    def deltas(self, epsilons: Array) -> Array:
        """Return upper bounds of δ at an ε for each example, ``(n,)``."""
        waves = np.exp(-1j * self.line.spacing * epsilons)
        sums = polyval(waves, self.terms, tensor=False).real + self.error
        scale = np.exp(np.minimum(self.log_scale - self.line.tilt * epsilons, 700.0))
        found: Array = sums * scale
        return found

    def epsilons(self, delta: float, limits: Array) -> Array:
        """Return the smallest ε whose δ is small enough, as far as bisection finds.

        Args:
            delta: δ.
            limits: float64 ``(n,)``, an ε for each example that is known to suffice.
        """
        low: Array = np.zeros(len(limits))
        high: Array = limits.copy()
        high[self.deltas(low) <= delta] = 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            enough = self.deltas(middle) <= delta
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle)
        return high
