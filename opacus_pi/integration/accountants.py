"""An accountant for Opacus that also knows the privacy loss of each example.

``opacus_pi.integration`` registers it as ``"per_instance"``. Use it through an engine,
``PrivacyEngine(accountant="per_instance")``, or in a pipeline built by hand:

>>> from opacus.optimizers import DPOptimizer
>>> from opacus_pi.integration.grad_sample import GradSampleModule
>>> model = GradSampleModule(torch.nn.Linear(2, 1, bias=False))
>>> optimizer = DPOptimizer(
...     torch.optim.SGD(model.parameters(), lr=0.1),
...     noise_multiplier=2.0,
...     max_grad_norm=1.0,
...     expected_batch_size=2,
... )
>>> accountant = PerInstanceAccountant()
>>> accountant.begin(num_examples=4, sample_rate=0.5)
>>> optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.5))
>>> model(torch.tensor([[3.0, 4.0], [0.0, 0.5]])).mean().backward()
>>> accountant.record([0, 2], model.per_sample_gradient_norms)
>>> optimizer.step()
>>> accountant.ledger.grad_norms
array([[5. , nan, 0.5, nan]], dtype=float32)
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants import IAccountant, PRVAccountant, RDPAccountant
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from opacus_pi import accounting
from opacus_pi._errors import AccountingError
from opacus_pi._quiet import quiet
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.accounting.guarantee import EpsilonDelta
from opacus_pi.files.checksummed_state import verified_state, with_checksum
from opacus_pi.files.weights_file import tensors_from_bytes, tensors_to_bytes
from opacus_pi.integration.clip_norms import clip_norm_of
from opacus_pi.integration.missing_values import number_in
from opacus_pi.recording import Recorder

__all__ = [
    "AccountantBound",
    "PerInstanceAccountant",
    "bound_of",
    "charges_less",
    "gives_bound",
]

_RECORD = "per_instance_record"
_ALIKE = 1e-6  # relative difference of numbers that count as equal
_LATEST = 3  # entries of an accountant in which an update is looked for


def num_steps_of(accountant: IAccountant) -> int:
    """Return the number of updates that an accountant has counted.

    Args:
        accountant: Any accountant. Opacus's own keep triples of noise multiplier,
            sample rate and number of updates in ``history``.

    Returns:
        0 if ``history`` has another form, which a user's own accountant may choose.
    """
    try:
        return sum(int(count) for _, _, count in accountant.history)
    except (TypeError, ValueError):
        return 0


@dataclass(frozen=True)
class AccountantBound:
    """The guarantee of an accountant of Opacus for any one example, as it stands now.

    Args:
        accountant: A copy of the engine's accountant, which counts no further updates.
    """

    accountant: IAccountant

    def at(self, delta: float) -> EpsilonDelta | None:
        """Return ε at one δ, for training with an example compared to without it.

        The PRV accountant composes the privacy loss of the pair (with, without), so its
        ε is for this direction only; Rényi divergences hold for both
        (docs/theory.md, Section 10).

        Args:
            delta: δ in (0, 1).

        Returns:
            ε with its δ; None if the accountant cannot compute ε for this δ.
        """
        name = self.accountant.mechanism()
        try:
            with quiet():  # about orders; any of them gives a bound
                epsilon = float(self.accountant.get_epsilon(delta))
        except (RuntimeError, ValueError):  # PRV: the grid is too coarse for this δ
            return None
        if not math.isfinite(epsilon):
            return None
        source = f"the engine's {name.upper()} accountant"
        return EpsilonDelta(max(0.0, epsilon), delta, source, name == "rdp")


def bound_of(accountant: IAccountant, mechanism: NoisySGD) -> AccountantBound | None:
    """Return what an engine's accountant guarantees for a recorded training run.

    Args:
        accountant: The accountant.
        mechanism: Noise, clip norm and sampling of the training, as recorded.

    Returns:
        None if the accountant gives no bound (the central limit theorem of ``"gdp"`` is
        an approximation, and a user's own accountant is not known), if batches were not
        Poisson, or if it counted other updates than were recorded.
    """
    if type(accountant) not in (RDPAccountant, PRVAccountant):
        return None
    if mechanism.sampling != "poisson" or mechanism.assumed_noise:
        return None
    if not num_steps_of(accountant) == mechanism.num_steps > 0:
        return None
    noises, rates, _ = np.array(accountant.history, dtype=np.float64).T
    recorded = np.min(np.divide(mechanism.noise_std, mechanism.max_grad_norm))
    same_noise = math.isclose(noises.min(), recorded, rel_tol=1e-6)
    if not same_noise or not math.isclose(
        rates.max(), np.max(mechanism.sample_rate), rel_tol=1e-6
    ):
        return None
    return AccountantBound(copy.deepcopy(accountant))


def gives_bound(accountant: IAccountant) -> bool:
    """Return whether the ε of an accountant is known to hold for every example.

    Args:
        accountant: Any accountant. Opacus's ``"gdp"`` uses a limit theorem, so its ε
            may be too small. What other classes of the user's compute is not known,
            unless they are derived from Opacus's Rényi or PRV accountant.
    """
    return isinstance(accountant, RDPAccountant | PRVAccountant)


def charges_less(accountant: IAccountant | None, settings: Mapping[str, Any]) -> bool:
    """Return whether an accountant has counted a better update than the last one was.

    A hook of the user may change the optimizer before the accountant's own hook counts,
    or that hook may have been attached with another sample rate.

    Args:
        accountant: The accountant, after the update; None: there is none.
        settings: ``noise_std``, ``max_grad_norm`` and ``sample_rate`` of the update.

    Returns:
        Whether none of its latest entries has as little noise and as large a rate. The
        loop may have charged other releases after the update. False if it has no
        entries, or keeps none of this form.
    """
    entries: Any = getattr(accountant, "history", None)
    try:
        latest = [(float(noise), float(rate)) for noise, rate, _ in entries[-_LATEST:]]
    except (TypeError, ValueError):
        return False
    noise_std, clip_norm = settings["noise_std"], settings["max_grad_norm"]
    noise_std, rate = noise_std * (1 + _ALIKE), settings["sample_rate"] * (1 - _ALIKE)
    return bool(latest) and not any(
        [n * clip_norm <= noise_std and r >= rate for n, r in latest]
    )


def noise_std_of(optimizer: DPOptimizer) -> float:
    """Return the noise on the summed gradient that an optimizer is charged for.

    With adaptive clipping Opacus also releases how many examples were not clipped, and
    takes ``noise_multiplier`` to describe both releases together. The noise on the
    gradient itself is larger. That holds for a count with terms of ±1/2 and a fixed
    denominator; Opacus counts with 0 and 1 and divides by the true size of the batch.
    So the number ranks examples, and no bound follows from it (docs/theory.md).

    Args:
        optimizer: The optimizer, with its present settings.

    Returns:
        The standard deviation, ``noise_multiplier * max_grad_norm``.

    Raises:
        TypeError: If one of the two is no number.

    Source: Andrew et al. 2021, arXiv:1905.03871, Theorem 1.
    """
    noise = number_in(optimizer, "noise_multiplier")
    return noise * number_in(optimizer, "max_grad_norm")


class PerInstanceAccountant(RDPAccountant):
    """Rényi accounting for the worst case, with an estimate for each example.

    ``get_epsilon`` is plain Rényi accounting. It is a guarantee for every example,
    whether it was observed or not. ``privacy_losses`` and ``epsilons`` are estimates
    for the examples of this data set. They need per-example gradient norms, which reach
    the accountant in one of two ways:

    * ``opacus_pi.PrivacyEngine(accountant="per_instance")`` records them;
    * a pipeline built by hand calls ``begin`` once and ``record`` before each
      ``optimizer.step()``, with the hook of ``get_optimizer_hook_fn`` attached.

    Opacus's own engine passes neither indices nor norms to its accountant. With that
    engine ``get_epsilon`` works; the per-example values raise an error, unless the
    training loop calls ``begin`` and ``record`` itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorder: Recorder | None = None
        # Whether the recorder is an engine's, which reports the updates to it itself.
        self._is_engines_recorder = False

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which the accountant is registered."""
        return "per_instance"

    def begin(
        self,
        *,
        num_examples: int,
        sample_rate: float,
        sampling: Literal["poisson", "fixed"] = "poisson",
        data_set: str = "",
        recorder: Recorder | None = None,
    ) -> None:
        """Start per-example recording in a pipeline built by hand.

        Args:
            num_examples: Number of examples, n.
            sample_rate: Probability that an example is in an update, in (0, 1].
            sampling: ``"poisson"``, or ``"fixed"`` for any other schedule that does
                not look at the data and draws an example at most once an epoch.
            data_set: ``opacus_pi.ledger.fingerprint(data_set)``, or a name.
            recorder: Keeps the norms and decides when rows are written. Default:
                ``Recorder()``.

        Raises:
            ValueError: If an argument is outside its domain.
        """
        recorder = recorder or Recorder()
        recorder.begin(
            num_examples=num_examples,
            sample_rate=sample_rate,
            sampling=sampling,
            data_set=data_set,
        )
        self._recorder, self._is_engines_recorder = recorder, False

    def record(self, indices: Any, grad_norms: Any) -> None:
        """Report the samples of a physical batch, before ``optimizer.step()``.

        Args:
            indices: int64 ``(b,)``, their positions in the data set.
            grad_norms: float ``(b,)``, their gradient norms before clipping, such as
                ``GradSampleModule.per_sample_gradient_norms``.

        Raises:
            ValueError: If the lengths differ, or an index is not in the data set.
            AccountingError: If ``begin`` was not called.
        """
        examples = torch.as_tensor(indices, dtype=torch.int64)
        self._require_recorder().observe(examples, torch.as_tensor(grad_norms))

    def follow(self, recorder: Recorder) -> None:
        """Use the recording of an engine.

        Args:
            recorder: The engine's recorder, to which it reports every update.
        """
        self._recorder, self._is_engines_recorder = recorder, True

    def get_optimizer_hook_fn(
        self, sample_rate: float
    ) -> Callable[[DPOptimizer], None]:
        """Return the hook that counts an optimizer's updates.

        In a pipeline built by hand it also ends the update that is being recorded.

        Args:
            sample_rate: Probability that the batch of one backward pass contains an
                example.

        Returns:
            A function for ``DPOptimizer.attach_step_hook``.
        """
        count = super().get_optimizer_hook_fn(sample_rate)

        def hook(optimizer: DPOptimizer) -> None:
            count(optimizer)
            if self._recorder is not None and not self._is_engines_recorder:
                if isinstance(optimizer, AdaClipDPOptimizer):
                    self._recorder.assume_noise()
                self._recorder.step(
                    noise_std=noise_std_of(optimizer),
                    max_grad_norm=clip_norm_of(optimizer),
                    # Opacus has just multiplied the rate of one backward pass by the
                    # number of passes in this update.
                    sample_rate=min(1.0, self.history[-1][1]),
                )

        return hook

    @property
    def ledger(self) -> GradNormLedger:
        """The gradient norms of all examples, if every counted update was recorded.

        Raises:
            AccountingError: If nothing was recorded, updates are missing, or the
                run cannot be accounted for.
        """
        ledger, counted = self._require_recorder().ledger, num_steps_of(self)
        if counted > ledger.mechanism.num_steps:
            raise AccountingError(
                f"The accountant counted {counted} updates, but recorded "
                f"{ledger.mechanism.num_steps}. Call begin before the first update, "
                "and attach the hook of get_optimizer_hook_fn to the optimizer: it "
                "counts and records."
            )
        return ledger

    def privacy_losses(self, order: float, **options: Any) -> NDArray[np.float64]:
        """Return an estimate of each example's Rényi privacy loss.

        Args:
            order: Rényi order, above 1.
            **options: Options of ``opacus_pi.accounting.privacy_losses``.

        Returns:
            float64 ``(n,)``, in nats.

        Raises:
            AccountingError: If not every update was recorded per example.
        """
        return accounting.privacy_losses(self.ledger, order, **options)

    def epsilons(self, delta: float, **options: Any) -> NDArray[np.float64]:
        """Return an estimate of each example's epsilon.

        Args:
            delta: Failure probability, in (0, 1).
            **options: Options of ``opacus_pi.accounting.epsilons``.

        Returns:
            float64 ``(n,)``. Under Poisson sampling at most ``get_epsilon(delta)``.

        Raises:
            AccountingError: If not every update was recorded per example.
        """
        ledger = self.ledger
        values = accounting.epsilons(ledger, delta, **options)
        mechanism = ledger.mechanism
        # get_epsilon is a bound for every example only under Poisson sampling, and for
        # the recorded updates only if the accountant has counted all of them in full.
        if (
            mechanism.sampling == "poisson"
            and num_steps_of(self) >= mechanism.num_steps
            and not self._require_recorder().is_charged_too_little
        ):
            values = np.minimum(values, max(0.0, self.get_epsilon(delta)))
        return values

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the history and, in a pipeline built by hand, the norms as bytes.

        What an engine recorded is saved in the engine's checkpoint instead.

        Args:
            destination: A dict to fill. Default: a new one.

        Returns:
            The dict, for ``load_state_dict``.
        """
        state: dict[str, Any] = super().state_dict(destination)
        if self._recorder is not None and not self._is_engines_recorder:
            state[_RECORD] = _comparable(with_checksum(self._recorder.state_dict()))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state_dict: A dict returned by ``state_dict()``.

        Raises:
            ValueError: If it is not the state of such an accountant, or is damaged;
                nothing is changed then.
        """
        record = (state_dict or {}).get(_RECORD)
        if record is None:
            super().load_state_dict(state_dict)
            return
        recorder = self._recorder or Recorder()
        load = recorder.prepared_load(verified_state(_as_saved(record)))
        super().load_state_dict(state_dict)
        load()
        self._recorder, self._is_engines_recorder = recorder, False

    def _require_recorder(self) -> Recorder:
        """Return the recorder.

        Raises:
            AccountingError: If there is none yet.
        """
        if self._recorder is None:
            raise AccountingError(
                "No per-example norms have reached this accountant. Train with "
                "opacus_pi.PrivacyEngine, or call accountant.begin(...) once and "
                "accountant.record(indices, grad_norms) before each optimizer.step(). "
                "accountant.get_epsilon(delta) holds for every example."
            )
        return self._recorder


def _comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with its tensors as bytes.

    Opacus compares saved states with ``==``, which is ambiguous for tensors.
    """
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    facts = {k: v for k, v in state.items() if k not in tensors}
    return {"facts": facts, "tensors": tensors_to_bytes(tensors)}


def _as_saved(record: Any) -> dict[str, Any]:
    """Return the state that ``_comparable`` was given.

    Returns:
        An empty state if the recorded run has another form; loading it then raises.
    """
    try:
        tensors = tensors_from_bytes(record["tensors"])
        return {**record["facts"], **tensors}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
