"""Callbacks of ``Unlearner.unlearn``, and one that logs its metrics.

A callback is told about the start of a run, each evaluation and the end. It only
watches: it must not change the model, because what may be claimed was computed before
the run and would not cover such a change. To end a run early, pass ``stop``.

>>> class Show(Callback):
...     def on_epoch_end(self, unlearner, epoch, metrics):
...         print(epoch, metrics)
>>> Show().on_epoch_end(None, 1, {"forget_loss": 0.5})
1 {'forget_loss': 0.5}
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from opacus_pi._validate import expect
from opacus_pi.evaluation.trace import UnlearningTrace

__all__ = ["Callback", "LogMetrics", "Watched"]

Metrics = Mapping[str, float]
# Lightning's loggers, TensorBoard's SummaryWriter, a run of Weights & Biases.
_METHODS = ("log_metrics", "add_scalar", "log")


class Watched(Protocol):
    """The attributes of a running ``Unlearner`` that a callback may read.

    Attributes:
        model: The copy that is being changed.
        trace: The evaluations so far.
    """

    model: nn.Module
    trace: UnlearningTrace


class Callback:
    """Base class of callbacks: override the methods that you need."""

    def on_start(self, unlearner: Watched, metrics: Metrics) -> None:
        """Handle the start of a run; not called when a saved run is continued.

        Args:
            unlearner: The unlearner; ``unlearner.model`` has not changed yet.
            metrics: The first evaluation; empty if ``evaluate`` was not given.
        """

    def on_epoch_end(self, unlearner: Watched, epoch: int, metrics: Metrics) -> None:
        """Handle the end of an epoch.

        Args:
            unlearner: The unlearner; ``unlearner.trace`` has all evaluations so far.
            epoch: Epochs done, from 1.
            metrics: The evaluation after it; empty if ``evaluate`` was not given.
        """

    def on_end(self, unlearner: Watched) -> None:
        """Handle the end of the run, whether or not it was stopped early.

        Args:
            unlearner: The unlearner.
        """


class LogMetrics(Callback):
    """Callback that sends every evaluation to a logger, with the epoch as its step.

    Args:
        logger: A logger of Lightning (anything with ``log_metrics(metrics, step)``,
            such as ``TensorBoardLogger``, ``WandbLogger`` or ``CSVLogger``), a
            ``SummaryWriter`` of TensorBoard (``add_scalar``), or a run of Weights &
            Biases (``log``), as ``wandb.init`` returns it.

    The metrics reveal facts about the forget set. Use a logger that sends them to a
    server only if that server may know these facts.

    Raises:
        ValueError: If the logger has none of these methods.
    """

    def __init__(self, logger: Any) -> None:
        known = [name for name in _METHODS if callable(getattr(logger, name, None))]
        expect(
            bool(known),
            "logger",
            type(logger).__name__,
            f"must have one of the methods {', '.join(_METHODS)}",
            "Pass a logger of Lightning, a SummaryWriter or a run of wandb.",
        )
        self._logger, self._method = logger, known[0]

    def _log(self, metrics: Metrics, epoch: int) -> None:
        """Send one evaluation; there is nothing to send without ``evaluate``."""
        if not metrics:
            return
        values = {name: float(value) for name, value in metrics.items()}
        if self._method == "add_scalar":
            for name, value in values.items():
                self._logger.add_scalar(name, value, epoch)
        else:
            getattr(self._logger, self._method)(values, step=epoch)

    def on_start(self, unlearner: Watched, metrics: Metrics) -> None:
        """Log the evaluation before the first update as step 0."""
        self._log(metrics, 0)

    def on_epoch_end(self, unlearner: Watched, epoch: int, metrics: Metrics) -> None:
        """Log the evaluation after an epoch."""
        self._log(metrics, epoch)

    def on_end(self, unlearner: Watched) -> None:
        """Have the logger write what it has not written yet."""
        write = {"log_metrics": "save", "add_scalar": "flush"}.get(self._method, "")
        if write and hasattr(self._logger, write):
            getattr(self._logger, write)()
