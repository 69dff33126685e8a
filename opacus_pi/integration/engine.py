"""Opacus's ``PrivacyEngine`` that also records each example's gradient norms.

Change the import and nothing else: training, its random numbers and ``get_epsilon``
stay Opacus's. Afterwards ``engine.ledger`` holds the norms of the run, and
``engine.privacy_losses`` and ``engine.epsilons`` compute each example's privacy loss
from it.

>>> import torch
>>> from torch import nn
>>> from torch.utils.data import DataLoader, TensorDataset
>>> _ = torch.manual_seed(0)
>>> data = TensorDataset(torch.randn(8, 2), torch.randint(0, 2, (8,)))
>>> net = nn.Linear(2, 2)
>>> engine = PrivacyEngine(accountant="rdp")
>>> model, optimizer, loader = engine.make_private(
...     module=net,
...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
...     data_loader=DataLoader(data, batch_size=4),
...     noise_multiplier=1.0,
...     max_grad_norm=1.0,
... )
>>> for x, y in loader:
...     optimizer.zero_grad()
...     nn.functional.cross_entropy(model(x), y).backward()
...     optimizer.step()
>>> engine.ledger.num_examples
8

"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import opacus
import torch
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi.integration.audit import Audit, audit_batch
from opacus_pi.integration.audited_run import AuditedRun
from opacus_pi.integration.mixin import PerInstanceMixin

__all__ = ["PerInstanceMixin", "PrivacyEngine", "audit"]

# What make_private returns: a wrapper of the module, or hooks if wrap_model=False.
Hooks: TypeAlias = AbstractGradSampleHooks
Prepared: TypeAlias = tuple[Hooks, DPOptimizer, DataLoader[Any]]
PreparedGhost: TypeAlias = tuple[
    Hooks, DPOptimizer, DPLossFastGradientClipping, DataLoader[Any]
]


class PrivacyEngine(PerInstanceMixin, opacus.PrivacyEngine):
    """Drop-in replacement of Opacus's ``PrivacyEngine`` that records every example.

    Args:
        recorder: How to record. Default: ``Recorder()``.
        renyi_filter: Individual budgets, see below. Default: none.
        **opacus_options: ``accountant`` and ``secure_mode``, as in Opacus;
            ``accountant`` may also be
            ``"per_instance"`` or ``"group"``.

    Recording changes no weight and no random number. Opacus trains some runs that
    cannot be accounted for: frozen BatchNorm in training mode, samplers that weight
    examples, ghost clipping with a clip scheduler or with two backward passes a step.
    Such runs train as with Opacus; only ``ledger``, ``privacy_losses`` and ``epsilons``
    raise an error, which says why.

    Recorded norms are the norms that Opacus compares with the clip norm. They belong to
    the gradient of each example's own loss if the criterion's reduction is
    ``loss_reduction`` and the loss is not scaled. With clipping by layer the recorded
    clip norm is the root of the sum of squares, an upper bound. Adaptive clipping also
    releases a noisy count of unclipped examples, divided by the true size of the batch.
    The recorded noise is the one that Opacus charges for both. It is not proved to
    cover the count, so it is marked as assumed: losses rank the examples, and no
    guarantee follows from them.

    ``make_private(grad_sample_mode="fast")`` makes the updates of ``"hooks"``, up to
    rounding, from one backward pass and without per-example gradients. The training
    loop and the returned objects stay the same. Until ``optimizer.step()`` it keeps the
    inputs and output gradients of all layers for one physical batch. It supports flat
    clipping in one process only.

    Under ``torch.distributed`` (``DistributedDataParallel``, Opacus's
    ``DifferentiallyPrivateDistributedDataParallel``, FSDP2 with ``ghost_fsdp``) every
    process has the same ledger. Observations are merged, and sweeps shared, when a row
    is written; ``recorder.merge()``, called by all processes, merges what was observed
    since. If a process dies, the others still have their ledgers. ``attribution``
    counts the samples of one process. Each process resumes from its own checkpoint.

    With a ``RenyiFilter`` an example is left out of every update that would exceed its
    budget: its per-example gradient is set to zero, and 0 is recorded as its norm. The
    same happens to unattributed samples, to samples whose norm is not finite, and to
    padding. The guarantee is then ``renyi_filter.epsilons`` (Feldman and Zrnic 2021,
    arXiv:2008.11193). ``get_epsilon`` still holds for every example, and ``epsilons``
    stays an estimate, computed from the recorded norms. Which examples were left out is
    sensitive. An ``AccountingError`` stops training where a spent budget would be
    computed wrongly: if samples are attributed without verification, if BatchNorm is in
    training mode, or if the noise is lowered within an update.
    """

    if TYPE_CHECKING:
        # The parameters as Opacus 1.6.0 declares them. Opacus declares one union as the
        # result, which no call can unpack; the number of objects depends on the mode.

        @overload  # type: ignore[override]  # the mixin passes on any arguments
        def make_private(
            self,
            *,
            module: nn.Module,
            optimizer: torch.optim.Optimizer,
            criterion: Any = ...,
            data_loader: DataLoader[Any],
            noise_multiplier: float,
            max_grad_norm: float | list[float],
            batch_first: bool = ...,
            loss_reduction: str = ...,
            poisson_sampling: bool = ...,
            clipping: str = ...,
            noise_generator: torch.Generator | None = ...,
            grad_sample_mode: Literal["ghost", "ghost_fsdp", "ghost_tp"],
            wrap_model: bool = ...,
            rand_on_empty: bool = ...,
            **kwargs: Any,
        ) -> PreparedGhost: ...

        @overload
        def make_private(
            self,
            *,
            module: nn.Module,
            optimizer: torch.optim.Optimizer,
            criterion: Any = ...,
            data_loader: DataLoader[Any],
            noise_multiplier: float,
            max_grad_norm: float | list[float],
            batch_first: bool = ...,
            loss_reduction: str = ...,
            poisson_sampling: bool = ...,
            clipping: str = ...,
            noise_generator: torch.Generator | None = ...,
            grad_sample_mode: str = ...,
            wrap_model: bool = ...,
            rand_on_empty: bool = ...,
            **kwargs: Any,
        ) -> Prepared: ...

        def make_private(self, **options: Any) -> Any:
            """Prepare model, optimizer and loader as Opacus does, and record the run.

            Args:
                **options: The arguments of Opacus; ``grad_sample_mode="fast"`` is
                    available too.

            Returns:
                Model, optimizer and loader; in the ghost modes the criterion is the
                third of four.
            """

        @overload  # type: ignore[override]  # as for make_private
        def make_private_with_epsilon(
            self,
            *,
            module: nn.Module,
            optimizer: torch.optim.Optimizer,
            criterion: Any = ...,
            data_loader: DataLoader[Any],
            target_epsilon: float,
            target_delta: float,
            epochs: int,
            max_grad_norm: float | list[float],
            batch_first: bool = ...,
            loss_reduction: str = ...,
            poisson_sampling: bool = ...,
            clipping: str = ...,
            noise_generator: torch.Generator | None = ...,
            grad_sample_mode: Literal["ghost", "ghost_fsdp", "ghost_tp"],
            wrap_model: bool = ...,
            **kwargs: Any,
        ) -> PreparedGhost: ...

        @overload
        def make_private_with_epsilon(
            self,
            *,
            module: nn.Module,
            optimizer: torch.optim.Optimizer,
            criterion: Any = ...,
            data_loader: DataLoader[Any],
            target_epsilon: float,
            target_delta: float,
            epochs: int,
            max_grad_norm: float | list[float],
            batch_first: bool = ...,
            loss_reduction: str = ...,
            poisson_sampling: bool = ...,
            clipping: str = ...,
            noise_generator: torch.Generator | None = ...,
            grad_sample_mode: str = ...,
            wrap_model: bool = ...,
            **kwargs: Any,
        ) -> Prepared: ...

        def make_private_with_epsilon(self, **options: Any) -> Any:
            """Do as ``make_private``, with the noise that reaches a target epsilon.

            Args:
                **options: The arguments of Opacus.

            Returns:
                As ``make_private``.
            """


def audit(
    model: nn.Module,
    criterion: Any,
    batch: Any,
    *,
    grad_sample_mode: str = "hooks",
    loss_reduction: str = "mean",
    batch_first: bool = True,
) -> Audit:
    """Compare the norms that private training would record with single gradients.

    Use it before anything is prepared, or for a model that another program trains;
    ``engine.audit`` does the same for a run that was prepared. The model stays as it
    is.

    Args:
        model: The model, plain or wrapped by Opacus.
        criterion: What the training loop calls as ``criterion(model(x), y)``.
        batch: ``(x, y)`` or a dict with ``"labels"``, of at least two examples.
        grad_sample_mode: As in ``make_private``.
        loss_reduction: As in ``make_private``.
        batch_first: As in ``make_private``.

    Returns:
        The comparisons; ``print`` shows them as a table.

    Raises:
        ValueError: If the batch has fewer than two examples, or Opacus does not accept
            the model.

    >>> x, y = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 1])
    >>> audit(nn.Linear(2, 2), nn.CrossEntropyLoss(), (x, y)).passed
    True
    >>> weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]))
    >>> audit(nn.Linear(2, 2), weighted, (x, y))["loss"].passed
    False
    """
    run = AuditedRun(grad_sample_mode, loss_reduction, batch_first)
    return audit_batch(
        model,
        criterion,
        batch,
        run=run,
        new_engine=lambda recorder: PrivacyEngine(recorder=recorder),
    )
