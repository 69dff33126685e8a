"""Accountants for Opacus that know more than the worst case.

``PerInstanceAccountant`` is registered as ``"per_instance"``. In a pipeline built by
hand, without an engine:

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

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from opacus.accountants import IAccountant, RDPAccountant
from opacus.optimizers import DPOptimizer
from safetensors import SafetensorError

from opacus_pi import accounting
from opacus_pi._errors import AccountingError
from opacus_pi.accounting import GradNormLedger
from opacus_pi.files.sealed_state import sealed, unsealed
from opacus_pi.recording import Recorder

__all__ = ["PerInstanceAccountant"]

_RECORD = "per_instance_record"


def num_steps_of(accountant: IAccountant) -> int:
    """Updates that an accountant has counted; 0 if it does not say in Opacus's way.

    Args:
        accountant: Any accountant; Opacus's keep (noise, rate, number) in ``history``.
    """
    try:
        return sum(int(count) for _, _, count in accountant.history)
    except (TypeError, ValueError):
        return 0


def noise_std_of(optimizer: DPOptimizer) -> float:
    """Return the noise on the summed gradient that an optimizer is charged for.

    With adaptive clipping Opacus also releases how many examples were not clipped, and
    ``noise_multiplier`` describes both releases together: at the clip norm they cost as
    much as one gradient with that noise. The noise on the gradient itself is larger.

    Args:
        optimizer: The optimizer, with its present settings.

    Returns:
        The standard deviation, ``noise_multiplier * max_grad_norm``.

    Source: Andrew et al. 2021, arXiv:1905.03871, Theorem 1.
    """
    return float(optimizer.noise_multiplier) * float(optimizer.max_grad_norm)


class PerInstanceAccountant(RDPAccountant):
    """The worst case over all examples, and an estimate for each example.

    ``get_epsilon`` is plain Rényi accounting, which holds for every example, observed
    or not. ``privacy_losses`` and ``epsilons`` are the per-example values. They need
    per-example norms, which reach the accountant in one of two ways:

    * ``opacus_pi.PrivacyEngine(accountant="per_instance")`` records them;
    * a pipeline built by hand calls ``begin`` once and ``record`` before each
      ``optimizer.step()``, with the hook of ``get_optimizer_hook_fn`` attached.

    Opacus's own engine tells an accountant neither indices nor norms: there
    ``get_epsilon`` works, and the per-example values are refused unless the loop calls
    ``begin`` and ``record`` itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorder: Recorder | None = None
        self._fed_by_engine = False

    @classmethod
    def mechanism(cls) -> str:
        """The name it is registered by."""
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
        """Start the per-example record of a pipeline built by hand.

        Args:
            num_examples: Number of examples, n.
            sample_rate: Expected share of the examples in an update.
            sampling: ``"poisson"``, or ``"fixed"`` for any other schedule that does
                not look at the data and draws an example at most once an epoch.
            data_set: ``opacus_pi.ledger.fingerprint(data_set)``, or a name.
            recorder: When rows are written. Default: ``Recorder()``, once an epoch.

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
        self._recorder, self._fed_by_engine = recorder, False

    def record(self, indices: Any, grad_norms: Any) -> None:
        """Report the rows of a physical batch, before ``optimizer.step()``.

        Args:
            indices: int64 ``(b,)``, positions in the data set.
            grad_norms: float ``(b,)``, norms before clipping, as
                ``GradSampleModule.per_sample_gradient_norms``.

        Raises:
            ValueError: If lengths differ or an index is no example's.
            AccountingError: Before ``begin``.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        self._begun().observe(rows, torch.as_tensor(grad_norms))

    def follow(self, recorder: Recorder) -> None:
        """Let an engine fill the record.

        Args:
            recorder: The engine's, which it reports every update to.
        """
        self._recorder, self._fed_by_engine = recorder, True

    def get_optimizer_hook_fn(
        self, sample_rate: float
    ) -> Callable[[DPOptimizer], None]:
        """The hook that counts an optimizer's updates.

        Args:
            sample_rate: Sample rate of one backward pass.

        Returns:
            A function for ``DPOptimizer.attach_step_hook``.
        """
        count = super().get_optimizer_hook_fn(sample_rate)

        def hook(optimizer: DPOptimizer) -> None:
            count(optimizer)
            if self._recorder is not None and not self._fed_by_engine:
                self._recorder.step(
                    noise_std=noise_std_of(optimizer),
                    max_grad_norm=float(optimizer.max_grad_norm),
                    sample_rate=min(1.0, self.history[-1][1]),
                )

        return hook

    @property
    def ledger(self) -> GradNormLedger:
        """The per-example record, if it holds every update that was counted.

        Raises:
            AccountingError: If there is none, or it cannot be accounted.
        """
        ledger, counted = self._begun().ledger, num_steps_of(self)
        if counted > ledger.mechanism.num_steps:
            raise AccountingError(
                f"{counted} updates were counted and {ledger.mechanism.num_steps} "
                "recorded. Call begin before the first update, and count updates by "
                "the hook of get_optimizer_hook_fn."
            )
        return ledger

    def privacy_losses(self, order: float, **options: Any) -> NDArray[np.float64]:
        """Each example's Rényi privacy loss, an estimate.

        Args:
            order: Rényi order, above 1.
            **options: Of ``opacus_pi.accounting.privacy_losses``.

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If there is no per-example record of all updates.
        """
        return accounting.privacy_losses(self.ledger, order, **options)

    def epsilons(self, delta: float) -> NDArray[np.float64]:
        """Each example's epsilon, an estimate; with Poisson at most ``get_epsilon``.

        Args:
            delta: Failure probability, in (0, 1).

        Returns:
            float64 ``(n,)``.

        Raises:
            AccountingError: If there is no per-example record of all updates.
        """
        ledger = self.ledger
        values = accounting.epsilons(ledger, delta)
        mechanism = ledger.mechanism
        if (
            mechanism.sampling == "poisson"
            and num_steps_of(self) >= mechanism.num_steps
        ):
            values = np.minimum(values, max(0.0, self.get_epsilon(delta)))
        return values

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """History and, of a pipeline built by hand, the record as bytes.

        An engine's record travels in the engine's checkpoint.

        Args:
            destination: A dict to fill; default: a new one.
        """
        state: dict[str, Any] = super().state_dict(destination)
        if self._recorder is not None and not self._fed_by_engine:
            state[_RECORD] = _comparable(sealed(self._recorder.state_dict()))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue what ``state_dict`` saved.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it is no state of this kind of accountant, or damaged.
        """
        super().load_state_dict(state_dict)
        record = state_dict.get(_RECORD)
        if record is not None:
            recorder = self._recorder or Recorder()
            recorder.load_state_dict(unsealed(_as_saved(record)))
            self._recorder, self._fed_by_engine = recorder, False

    def _begun(self) -> Recorder:
        """The recorder, once there is one."""
        if self._recorder is None:
            raise AccountingError(
                "No per-example norms have reached this accountant. Train with "
                "opacus_pi.PrivacyEngine, or call accountant.begin(...) once and "
                "accountant.record(indices, grad_norms) before each optimizer.step(). "
                "accountant.get_epsilon(delta) holds for every example."
            )
        return self._recorder


def _comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state that ``==`` can compare, as Opacus does: tensors become bytes."""
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    facts = {k: v for k, v in state.items() if k not in tensors}
    return {"facts": facts, "tensors": safetensors.torch.save(tensors)}


def _as_saved(record: Any) -> dict[str, Any]:
    """The state that ``_comparable`` was given; nothing if the record is none."""
    try:
        tensors = safetensors.torch.load(record["tensors"])
        return {**record["facts"], **tensors}
    except (SafetensorError, TypeError, KeyError, AttributeError):
        return {}
