"""Gaussian unlearning score: does the model still know the noise it trained on?

The protocol has three steps. Train with noise added to the inputs of the forget set
(:class:`GaussianPoison`). Unlearn the forget set. Compute the score before and after,
and for a model retrained without the forget set, which has never seen the noise: its
score is 0 up to a standard error of noise_std / √m.

>>> data_set = torch.utils.data.TensorDataset(torch.zeros(5, 2), torch.zeros(5).long())
>>> poisoned = GaussianPoison(data_set, [1, 3], 0.25, torch.Generator().manual_seed(0))
>>> inputs, labels = poisoned.clean()
>>> bool(torch.equal(poisoned[3][0], inputs[1] + poisoned.noise[1]))
True
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, positive
from opacus_pi.models.backward_gradients import gradients_by_backward
from opacus_pi.models.batches import device_of, size_of
from opacus_pi.models.copies import evaluation_copy
from opacus_pi.models.losses import Losses, float64_losses, unit_cotangents
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.models.own_losses import Criterion


def gaussian_unlearning_score(
    model: nn.Module,
    criterion: Criterion,
    clean_inputs: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    batch_size: int = 256,
) -> float:
    r"""Compute the mean inner product of the noise with the input gradient's direction.

    :math:`\frac1m \sum_i \langle g_i, \xi_i \rangle / \|g_i\|_2` with
    :math:`g_i = \nabla_x \ell(x_i, y_i)` at the clean input. For noise that the model
    has never seen, the score has mean 0 and standard deviation noise_std / √m. An
    example whose gradient is exactly 0 has no direction and contributes 0.

    Args:
        model: Plain or wrapped by Opacus. A copy in evaluation mode is evaluated.
        criterion: ``criterion(outputs, labels)``, one loss per example.
        clean_inputs: Inputs without the noise, floating-point, ``(m, ...)``.
        labels: Their labels, ``(m,)``.
        noise: The noise that was added in training, in the unit of the inputs,
            ``(m, ...)``.
        batch_size: Batch size; it does not change the result.

    Returns:
        The score, in the unit of the noise.

    Raises:
        ValueError: If shapes disagree, there is no example, or the inputs are not
            floating-point numbers.

    Source: paper, Appendix E; Pawelczyk et al. 2024 (arXiv:2406.17216).
    """
    _check_examples(clean_inputs, labels, noise)
    losses, copied = float64_losses(criterion), evaluation_copy(model)
    copied.requires_grad_(False)  # only gradients of inputs are needed
    device = device_of(copied)
    total = 0.0
    with random_state_untouched():
        for x, y, stored in zip(
            *(part.split(batch_size) for part in (clean_inputs, labels, noise)),
            strict=True,
        ):
            directions = _directions(copied, losses, x.to(device), y.to(device))
            total += float((directions.cpu() * stored.cpu().double().flatten(1)).sum())
    return total / len(noise)


def _directions(model: nn.Module, losses: Losses, x: Tensor, y: Tensor) -> Tensor:
    """Return input gradients of unit length (or 0), float64 ``(b, d)``.

    Args:
        model: In evaluation mode, so that the examples do not influence each other and
            one backward pass gives the gradient of each.
        losses: Per-example losses in float64.
        x: Inputs ``(b, ...)``, flattened to d numbers in the result.
        y: Labels ``(b,)``.
    """
    x = x.detach().requires_grad_()
    outputs = model(x)
    # only the direction matters, and cotangents of unit length do not underflow
    units, _ = unit_cotangents(losses, outputs, y)
    (gradients,) = gradients_by_backward(outputs, [x], units[0])
    flat = torch.zeros_like(x) if gradients is None else gradients
    flat = flat.double().flatten(1)
    lengths = flat.norm(dim=1, keepdim=True)
    return flat / torch.where(lengths > 0, lengths, 1.0)


def _check_examples(clean_inputs: Tensor, labels: Tensor, noise: Tensor) -> None:
    """Raise unless inputs, labels and noise describe the same examples.

    Token ids are refused as well, because no output can be differentiated with respect
    to them.

    Raises:
        ValueError: If shapes disagree, or the inputs are not floating-point numbers.
    """
    expect(
        noise.shape == clean_inputs.shape and len(labels) == len(noise) > 0,
        "clean_inputs, labels, noise",
        f"shapes {[tuple(t.shape) for t in (clean_inputs, labels, noise)]}",
        "must have shapes (m, ...), (m,) and (m, ...) with m > 0",
        "Pass the clean inputs and the noise of the same examples.",
    )
    expect(
        clean_inputs.is_floating_point(),
        "clean_inputs",
        clean_inputs.dtype,
        "must have a floating-point dtype",
        "Pass floating-point inputs: the score differentiates with respect to them, "
        "and token ids have no gradient.",
    )


class GaussianPoison(Dataset[Any]):
    """A data set with fixed Gaussian noise added to some inputs; labels do not change.

    Args:
        data_set: Pairs ``(input, label)``. Inputs are floating-point tensors of one
            shape and the same at every access; apply random augmentation to this
            wrapper.
        forget_indices: Which examples are poisoned, shape ``(m,)``.
        noise_std: Standard deviation of the noise on every entry of an input. The paper
            uses variance 0.062, the original article 0.32.
        generator: Source of the noise.

    Attributes:
        forget_indices: Sorted int64 ``(m,)``.
        noise: The noise that was added to each of them, ``(m, ...)``.

    Raises:
        ValueError: If the indices are empty, repeated or out of range, ``noise_std`` is
            not above 0, or an input is not a floating-point tensor.

    Source: Pawelczyk et al. 2024 (arXiv:2406.17216), Section 3.
    """

    def __init__(
        self,
        data_set: Dataset[Any],
        forget_indices: ArrayLike,
        noise_std: float,
        generator: torch.Generator,
    ) -> None:
        size = size_of(data_set)
        self.forget_indices = distinct_indices("forget_indices", forget_indices, size)
        positive(
            noise_std=noise_std,
            remedy=("Pass a noise above 0: without noise nothing is poisoned."),
        )
        self._data_set = data_set
        self._position = {int(i): k for k, i in enumerate(self.forget_indices)}
        example = data_set[int(self.forget_indices[0])][0]
        expect(
            isinstance(example, Tensor) and example.is_floating_point(),
            "data_set[i][0]",
            getattr(example, "dtype", type(example).__name__),
            "must be a tensor with a floating-point dtype",
            "Convert inputs to tensors in the data set's transform.",
        )
        shape = (len(self.forget_indices), *example.shape)
        self.noise = noise_std * torch.randn(
            shape, generator=generator, dtype=example.dtype, device=generator.device
        ).to(example.device)

    def __len__(self) -> int:
        """Return the number of examples, poisoned or not."""
        return size_of(self._data_set)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return one example, with its noise if it is poisoned."""
        x, label = self._data_set[index]
        position = self._position.get(int(index))
        return (x if position is None else x + self.noise[position]), label

    def clean(self) -> tuple[Tensor, Tensor]:
        """Return the poisoned examples without their noise, in the order of ``noise``.

        Returns:
            Inputs ``(m, ...)`` and labels ``(m,)``.
        """
        pairs = [self._data_set[int(i)] for i in self.forget_indices]
        inputs, labels = zip(*pairs, strict=True)
        return torch.stack(inputs), torch.as_tensor(labels)
