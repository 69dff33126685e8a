"""Unlearning methods: what each adds to fine-tuning on the retain set.

A method is a small frozen object; the loop that runs it is ``Unlearner``. Your own
method overrides what differs from fine-tuning, here weight decay that grows:

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class GrowingDecay(Method):
...     strength: float
...
...     def penalty(self, params, progress):
...         return self.strength * progress * sum((p**2).sum() for p in params)
>>> GrowingDecay(0.5).penalty([torch.ones(3)], progress=0.5)
tensor(0.7500)
"""

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi._validate import expect, positive
from opacus_pi.gradients import per_example_grad_norms
from opacus_pi.models.batches import forward, num_examples, size_of
from opacus_pi.models.own_losses import Criterion

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Task:
    """The model copy that a method changes, with the criterion and the data to use.

    Args:
        model: The copy, on its device.
        criterion: ``(outputs, targets) -> losses (b,)``.
        retain_loader: Batches ``(x, y)`` of the retain set; x is a tensor, or a tuple
            or dict of tensors for ``model(*x)`` or ``model(**x)``.
        forget_loader: Batches of the forget set; None unless the method uses it.
        generator: Source of all random numbers of the method.
    """

    model: nn.Module
    criterion: Criterion
    retain_loader: Iterable[Batch]
    forget_loader: Iterable[Batch] | None
    generator: torch.Generator

    @property
    def forget_batches(self) -> Iterable[Batch]:
        """The forget loader, for methods whose ``needs_forget_set`` is true.

        ``Unlearner.run`` refuses to start such a method without a forget loader, so it
        is never None there.
        """
        return cast(Iterable[Batch], self.forget_loader)


class Method:
    """Fine-tuning on the retain set; the base of every method.

    One update is: ``loss`` and ``penalty`` are added and differentiated, ``perturb_``
    changes the gradients, the optimizer steps, ``project_`` changes the weights.

    Attributes:
        needs_forget_set: Whether the method uses batches of the forget set. If so,
            ``loss`` gets one together with each batch of the retain set, and the
            guarantee is
            empirical: a method that sets this wrongly makes a false claim.
    """

    needs_forget_set: ClassVar[bool] = False

    def prepare(self, task: Task) -> "Method":
        """Inspect model and data once before the first update.

        Args:
            task: The model and the data.

        Returns:
            The method to run: itself, or a copy that holds what it computed here.
        """
        return self

    def batches(
        self, task: Task, num_pass: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Yield (retain batch, forget batch) for each update of one pass.

        One pass goes over the retain set once. If the method needs the forget set, its
        batches are repeated as often as needed: it is usually much smaller, so its
        examples are used many times in a pass. None stands for a batch that the update
        does not use.

        Args:
            task: The model and the data.
            num_pass: Passes done before this one. A pass without updates ends the run.
        """
        forget = repeated(task.forget_batches) if self.needs_forget_set else None
        for batch in one_pass(task.retain_loader, "retain"):
            yield batch, None if forget is None else next(forget)

    def pass_length(self, task: Task, num_pass: int) -> int:
        """Return the number of updates that ``batches`` yields in a pass.

        Args:
            task: The model and the data.
            num_pass: Passes done before this one.
        """
        return len(cast(Sized, task.retain_loader))

    def loss(
        self, task: Task, retain: Batch | None, forget: Batch | None
    ) -> Tensor | None:
        """Return the scalar to differentiate, or None for no gradient at all.

        Args:
            task: The model and the data.
            retain: Batch of the retain set, or None if the update does not use one.
            forget: Batch of the forget set, or None if the update does not use one.
        """
        return mean_loss(task, retain)

    def penalty(self, params: Sequence[Tensor], progress: float) -> Tensor | None:
        """Return a scalar that is added to the loss, or None.

        Args:
            params: The trainable weights.
            progress: Fraction of the updates done before the current pass, in [0, 1).
        """
        return None

    def perturb_(self, params: Sequence[Tensor], generator: torch.Generator) -> None:
        """Change the gradients ``p.grad`` after the backward pass, in place.

        Args:
            params: The trainable weights.
            generator: Source of the method's random numbers.
        """

    def project_(self, params: Sequence[Tensor]) -> None:
        """Change the weights after the optimizer's step, in place.

        Args:
            params: The trainable weights.
        """


@dataclass(frozen=True)
class FineTune(Method):
    """Plain fine-tuning on the retain set (paper section 5.1)."""


@dataclass(frozen=True)
class Langevin(Method):
    """Noisy fine-tuning: updates use ḡ + N(0, noise_std² I), ḡ the mean gradient.

    With learning rate η and no momentum this is w ← w - η ḡ + √(2η) σ W with
    σ = noise_std √(η/2): see ``from_weight_noise``. An empty batch (Poisson sampling
    draws some) has mean gradient 0: the update is noise alone.

    Args:
        noise_std: Standard deviation of the noise on the **mean** gradient, at least 0.
        max_grad_norm: Clip norm of each example's gradient, or None. With it the sum
            of the clipped gradients is divided by the expected batch size, never by
            the drawn one, and the gradients are those of evaluation mode (dropout off,
            BatchNorm statistics kept), because only those belong to one example.
        projection_radius: After every update the weights are projected onto the ball
            ‖w‖₂ ≤ R around 0, all trainable weights together; None: no projection.

    Raises:
        ValueError: If an argument is outside its range.

    Source: Chien et al. 2024 (arXiv:2401.10371); paper section 3.1 and App. D.
    """

    noise_std: float
    max_grad_norm: float | None = None
    projection_radius: float | None = None

    def __post_init__(self) -> None:
        at_least_zero("noise_std", self.noise_std, "Pass 0 for plain fine-tuning.")
        if self.max_grad_norm is not None:
            positive(
                max_grad_norm=self.max_grad_norm, remedy="Pass None for no clipping."
            )
        if self.projection_radius is not None:
            positive(
                projection_radius=self.projection_radius,
                remedy="Pass None for no projection.",
            )

    @classmethod
    def from_weight_noise(
        cls,
        noise_std: float,
        learning_rate: float,
        **options: float | None,
    ) -> "Langevin":
        """Return the method whose update adds √(2η) σ W to the weights, W ~ N(0, I).

        Args:
            noise_std: σ of the weight-space form, at least 0.
            learning_rate: η, above 0, of an SGD without momentum.
            **options: ``max_grad_norm`` and ``projection_radius`` as in the class.

        Returns:
            ``Langevin`` with √(2/η) σ on the mean gradient.
        """
        positive(
            learning_rate=learning_rate,
            remedy=("Pass the learning rate of the optimizer."),
        )
        at_least_zero("noise_std", noise_std, "Pass 0 for plain fine-tuning.")
        return cls(math.sqrt(2 / learning_rate) * noise_std, **options)

    def loss(self, task: Task, retain: Batch | None, forget: Batch | None) -> Tensor:
        """Return the mean loss, or its clipped form: see the class."""
        batch = cast(Batch, retain)
        if self.max_grad_norm is None:
            return mean_loss(task, batch)
        return clipped_loss(task, batch, self.max_grad_norm)

    def perturb_(self, params: Sequence[Tensor], generator: torch.Generator) -> None:
        """Add the noise to every trainable weight's gradient."""
        if self.noise_std == 0:
            return
        for p in params:
            noise = torch.randn(
                p.shape, generator=generator, device=generator.device, dtype=p.dtype
            ).to(p.device)
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.add_(noise, alpha=self.noise_std)

    @torch.no_grad()
    def project_(self, params: Sequence[Tensor]) -> None:
        """Scale the weights back onto the ball, if there is one."""
        if self.projection_radius is None:
            return
        norm = torch.stack([p.double().pow(2).sum() for p in params]).sum().sqrt()
        if norm > self.projection_radius:
            for p in params:
                p.mul_(self.projection_radius / norm)


@dataclass(frozen=True)
class L1Sparse(Method):
    """Fine-tuning with an L1 penalty: loss + γ ‖w‖₁.

    Args:
        strength: γ at the start, at least 0.
        schedule: ``"linear"``: γ falls from pass to pass linearly to 0, γ (1 - e/E) in
            pass e of E, as the released code does; ``"constant"``: as in the paper.

    Raises:
        ValueError: If an argument is outside its range.

    Source: Liu et al. 2024a (arXiv:2304.04934); OPTML-Group/Unlearn-Sparse.
    """

    strength: float
    schedule: str = "linear"

    def __post_init__(self) -> None:
        at_least_zero("strength", self.strength, "Pass 0 for plain fine-tuning.")
        expect(
            self.schedule in ("linear", "constant"),
            "schedule",
            repr(self.schedule),
            'must be "linear" or "constant"',
            'Try "linear": like the released code, it decays the strength to 0.',
        )

    def penalty(self, params: Sequence[Tensor], progress: float) -> Tensor | None:
        """Return γ(progress) ‖w‖₁, or None if γ is 0."""
        weight = self.strength
        if self.schedule == "linear":
            weight *= 1 - progress
        if weight == 0:
            return None
        return weight * torch.stack([p.abs().sum() for p in params]).sum()


def one_pass(loader: Iterable[Batch], name: str) -> Iterator[Batch]:
    """Yield the batches of one pass over a loader, and refuse a pass without batches.

    A generator or an iterator, passed in place of a loader, is empty in the second
    pass. Without this check the run would end early and seem complete.

    Args:
        loader: The loader.
        name: Name of its set, ``"retain"`` or ``"forget"``, for the message.

    Raises:
        ValueError: If the loader yields no batch.
    """
    num_batches = 0
    for batch in loader:
        num_batches += 1
        yield batch
    expect(
        num_batches > 0,
        f"{name}_loader",
        "a loader without batches",
        "must yield batches (x, y)",
        f"Pass a loader over the {name} set: an iterator is used up in one pass.",
    )


def repeated(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a forget loader, pass after pass, without end.

    ``itertools.cycle`` would store the batches of the first pass and repeat them; here
    a loader that shuffles gives a new order in every pass.

    Args:
        loader: The loader.

    Raises:
        ValueError: If a pass yields no batch.
    """
    while True:
        yield from one_pass(loader, "forget")


def mean_loss(task: Task, batch: Batch | None) -> Tensor:
    """Return the mean of a batch's per-example losses; an empty batch gives 0.

    Args:
        task: The model and its criterion.
        batch: ``(x, y)``; Poisson sampling draws empty batches now and then.

    Raises:
        ValueError: If it is None: the update does not use a batch of that set.
    """
    expect(
        batch is not None,
        "batch",
        None,
        "must be a batch (x, y)",
        "The method's loss uses a batch that this update does not have. If the loss "
        "uses the forget set, set needs_forget_set = True in the method's class. If "
        "only some updates use a batch, do not compute its loss where it is None.",
    )
    x, y = cast(Batch, batch)
    if num_examples(y) == 0:
        return _zero(task.model)
    return task.criterion(forward(task.model, x), y).mean()


def clipped_loss(task: Task, batch: Batch, max_grad_norm: float) -> Tensor:
    """Return a scalar whose gradient is Σ_i min(1, C/‖g_i‖) g_i / expected batch size.

    No per-example gradient is stored: the norms are computed first, then one backward
    pass of the losses weighted by min(1, C/‖g_i‖) gives the clipped sum. Leaves the
    model in evaluation mode.

    Args:
        task: Model, criterion, and the loader that has the expected batch size.
        batch: ``(x, y)``.
        max_grad_norm: C.
    """
    x, y = batch
    if num_examples(y) == 0:
        return _zero(task.model)
    task.model.eval()
    norms = per_example_grad_norms(task.model, task.criterion, x, y)
    weights = (max_grad_norm / norms.clamp(min=max_grad_norm)).detach()
    losses = task.criterion(forward(task.model, x), y)
    total = (weights.to(losses) * losses).sum()
    return total / expected_batch_size(task.retain_loader)


def expected_batch_size(loader: Iterable[Batch]) -> float:
    """Return the mean size of a loader's batches, as it is known before drawing.

    Dividing by the drawn size instead would make the update depend on how many other
    examples were drawn, and clipping would not bound the influence of an example.

    Args:
        loader: A ``DataLoader``, or a Poisson loader with a ``sample_rate``.

    Raises:
        ValueError: If the loader has neither a batch size nor a sample rate.
    """
    owners = (loader, getattr(loader, "batch_sampler", None))
    rates, sizes = (
        [getattr(o, name) for o in owners if getattr(o, name, None) is not None]
        for name in ("sample_rate", "batch_size")
    )
    if rates:
        rate: float = rates[0]
        return rate * size_of(cast(DataLoader[Any], loader).dataset)
    expect(
        bool(sizes),
        "retain_loader",
        type(loader).__name__,
        "must have a batch_size or a sample_rate",
        "Clipping divides by the expected batch size; pass a torch DataLoader.",
    )
    return float(sizes[0])


def _zero(model: nn.Module) -> Tensor:
    """Return a scalar 0 whose gradient by every trainable weight is 0.

    It stands for the loss of an empty batch. A constant could not be differentiated,
    and the mean over no examples is NaN.
    """
    return torch.stack(
        [(p * 0).sum() for p in model.parameters() if p.requires_grad]
    ).sum()


def at_least_zero(name: str, value: float, remedy: str) -> None:
    """Check that a setting is finite and not negative.

    Args:
        name: Name of the setting.
        value: Its value.
        remedy: One sentence: what the caller can do.

    Raises:
        ValueError: If it is negative, infinite or NaN.
    """
    expect(
        math.isfinite(value) and value >= 0,
        name,
        value,
        "must be finite and at least 0",
        remedy,
    )
