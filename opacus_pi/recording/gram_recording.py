"""Compute a group's Gram matrices along a run, after training, from saved weights.

A bound for a group of examples needs inner products of their gradients, which training
does not compute. Train with ``Recorder(weights_dir=...)``; afterwards ``gram_ledger``
loads the weights of every row into a copy of the model and measures there. Any forget
set can be asked about, and the training is not repeated:

    from opacus_pi.recording import gram_ledger

    grams = gram_ledger(directory, model, criterion, train_set, forget, engine.ledger)
    group_divergence(grams, order=8)

The matrices belong to the run only if weights, data set and model do. All three are
checked: the weights by their number of updates, their data set and the norms that were
recorded with them, the data set by its fingerprint, the model by the names and shapes
of its tensors.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, positive
from opacus_pi.accounting import GradNormLedger, GramLedger, NoisySGD, fingerprint
from opacus_pi.gradients import gradient_gram, minibatch_gram, norm_sweep
from opacus_pi.ledger.mechanism import SCHEDULED
from opacus_pi.models.batches import size_of
from opacus_pi.models.copies import training_copy
from opacus_pi.models.own_losses import Criterion
from opacus_pi.recording.weights import load_weights_
from opacus_pi.recording.weights_directory import weights_of

__all__ = ["gram_ledger"]

_SECONDS_BEFORE_BAR = 3.0


def gram_ledger(
    weights_dir: str | os.PathLike[str],
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    forget_indices: ArrayLike,
    ledger: GradNormLedger,
    *,
    kind: str = "forget",
    num_minibatches: int = 12,
    num_estimates: int = 20,
    generator: np.random.Generator | None = None,
    **options: Any,
) -> GramLedger:
    """Return Gram matrices of a forget set at every row whose weights were saved.

    Args:
        weights_dir: The directory that ``Recorder(weights_dir=...)`` wrote to.
        model: The trained architecture, plain or wrapped; a copy of it takes the saved
            weights.
        criterion: ``criterion(outputs, targets)`` of training, one loss per example; a
            torch loss module may have any reduction.
        data_set: The training set, in its order.
        forget_indices: Which examples to forget, ``(m,)``, each once. It may be empty:
            the divergence of an empty group is 0, so its bound shows how loose the
            bound is.
        ledger: The ledger of the run.
        kind: ``"forget"``: ⟨g_x, g_y⟩ of the forget examples, before clipping.
            ``"minibatch"``: for Theorem B.1, with batches drawn as in training.
        num_minibatches: J, the number of batches of the whole data set in each
            estimate. Use at least the Rényi order that the composition reaches, about
            1.4 times the ``order`` of ``group_divergence``.
        num_estimates: R, the number of estimates, each from other batches.
        generator: Source of the minibatches. Default: a generator with seed 0.
        **options: ``batch_size`` and ``collate_fn`` of ``gradients.gradient_gram``.

    Returns:
        The ledger for ``group_divergence``; sensitive. Gradients are clipped by their
        norm over all layers, so for a run that clipped per layer only
        ``method="scalar"`` is valid.

    Raises:
        ValueError: If the weights of a row are missing, or weights, data set, model or
            forget set do not belong to the run.
        AccountingError: If a link of the ledger's chain of custody is broken.

    Source: paper, Theorem B.1 and Appendix B.1.
    """
    _check_kind(kind)
    ledger.require_intact()
    size = size_of(data_set)
    forget = np.asarray(forget_indices)
    forget = distinct_indices("forget_indices", forget, size) if forget.size else forget
    ledger.require_data_set(fingerprint(data_set))
    files = weights_of(Path(weights_dir), ledger)
    copied = training_copy(model)
    if kind == "forget":
        measure: _Forget | _Minibatches = _Forget(forget.astype(np.int64), options)
    else:
        generator = np.random.default_rng(0) if generator is None else generator
        _check_minibatches(num_minibatches, num_estimates, forget.size < size)
        draw = _Draw(ledger.mechanism, size, forget.astype(np.int64), generator)
        measure = _Minibatches(draw, num_minibatches, num_estimates, options)
    mechanism = _mechanism_at(list(files), ledger)
    grams = []
    bar = tqdm(
        files.values(),
        "Gram matrices",
        delay=_SECONDS_BEFORE_BAR,
        leave=False,
        disable=None,
    )
    for row, path in enumerate(bar):
        load_weights_(copied, path, ledger.data_set)
        fact = mechanism.at_row(row)
        grams.append(measure(copied, criterion, data_set, fact))
    return GramLedger(
        mechanism,
        np.array(list(files), dtype=np.int64),
        np.stack(grams),
        kind=kind,
        example_ids=forget if forget.size else None,
        data_set=ledger.data_set,
    )


@dataclass(frozen=True)
class _Forget:
    """Measures inner products of the forget examples' own gradients."""

    indices: NDArray[np.int64]
    options: dict[str, Any]

    def __call__(
        self,
        model: nn.Module,
        criterion: Criterion,
        data_set: Dataset[Any],
        fact: NoisySGD,
    ) -> NDArray[np.float64]:
        """Return the Gram matrix ``(m, m)``."""
        if not self.indices.size:
            return np.zeros((0, 0))
        found = gradient_gram(model, criterion, data_set, self.indices, **self.options)
        return found.numpy()


@dataclass(frozen=True)
class _Draw:
    """Draws the batch of an update as training does."""

    mechanism: NoisySGD
    size: int
    forget: NDArray[np.int64]
    generator: np.random.Generator

    def __call__(self, sample_rate: float, *, retain: bool) -> NDArray[np.int64]:
        """Return positions of a batch drawn from all data, or from the retain set."""
        all_examples = np.arange(self.size, dtype=np.int64)
        pool = np.setdiff1d(all_examples, self.forget) if retain else all_examples
        if self.mechanism.sampling == "poisson":
            return pool[self.generator.random(len(pool)) < sample_rate]
        number = min(len(pool), max(1, round(sample_rate * self.size)))
        return self.generator.choice(pool, number, replace=False)


@dataclass(frozen=True)
class _Minibatches:
    """Measures summed clipped gradients of minibatches, minus one of retained data."""

    draw: _Draw
    num_minibatches: int
    num_estimates: int
    options: dict[str, Any]

    def __call__(
        self,
        model: nn.Module,
        criterion: Criterion,
        data_set: Dataset[Any],
        fact: NoisySGD,
    ) -> NDArray[np.float64]:
        """Return centred Gram matrices ``(R, J, J)``."""
        factors = None
        if np.isfinite(fact.max_grad_norm):
            norms = norm_sweep(
                model, criterion, data_set, progress=False, **self.options
            )
            with np.errstate(divide="ignore"):
                factors = np.minimum(1.0, fact.max_grad_norm / norms.numpy())
        rate = float(fact.sample_rate)
        found = []
        for _ in range(self.num_estimates):
            centre = self.draw(rate, retain=True)
            batches = [
                self.draw(rate, retain=False) for _ in range(self.num_minibatches)
            ]
            gram = minibatch_gram(
                model,
                criterion,
                data_set,
                batches,
                centre,
                factors=factors,
                **self.options,
            )
            found.append(gram.numpy())
        return np.stack(found)


def _check_kind(kind: str) -> None:
    """Refuse an unknown kind."""
    expect(
        kind in ("forget", "minibatch"),
        "kind",
        repr(kind),
        'must be "forget" or "minibatch"',
        'Pass "minibatch" for Theorem B.1, "forget" for the other bounds.',
    )


def _check_minibatches(
    num_minibatches: int, num_estimates: int, something_is_retained: bool
) -> None:
    """Refuse numbers and forget sets that ``kind="minibatch"`` cannot use."""
    positive(
        num_minibatches=num_minibatches,
        num_estimates=num_estimates,
        remedy=(
            "Try num_minibatches of 1.4 times the order, and 20 estimates as in the "
            "paper."
        ),
    )
    expect(
        something_is_retained,
        "forget_indices",
        "every example",
        "must leave at least one example in the retain set",
        "Leave some examples out of forget_indices: Theorem B.1 compares with "
        "minibatches of the retain set.",
    )


def _mechanism_at(steps: list[int], ledger: GradNormLedger) -> NoisySGD:
    """Return the mechanism, with scheduled values at the rows that have weights."""
    mechanism = ledger.mechanism
    rows = np.searchsorted(ledger.steps, steps)
    scheduled = {
        name: getattr(mechanism, name)[rows]
        for name in SCHEDULED
        if np.ndim(getattr(mechanism, name))
    }
    expect(
        not scheduled or len(steps) == len(ledger.steps),
        "weights_dir",
        f"weights of {len(steps)} of {len(ledger.steps)} rows",
        "must contain the weights of all rows, because the training changed "
        f"{', '.join(scheduled)}",
        "If training ended between two rows, the last row has no weights: end it at an "
        "update for which the recorder writes a row. Otherwise restore the missing "
        "files.",
    )
    return replace(mechanism, **scheduled)
