"""Saliency unlearning: random labels on a part of the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opacus_pi._validate import in_range, positive
from opacus_pi.unlearning.methods import Method, Task
from opacus_pi.unlearning.rivals.gradients import mean_gradient, trainable
from opacus_pi.unlearning.rivals.paired import RandomLabels


@dataclass(frozen=True)
class SalUn(RandomLabels):
    """``RandomLabels`` on the weights that are salient for the forget set; others stay.

    θ = m ⊙ (θ₀ + Δ) + (1 - m) ⊙ θ₀ with m = 1[|∇L_forget(θ₀)| ≥ γ], where γ is such
    that m is 1 for the share ``salient_share`` of all weights; the gradient is of the
    forget set's mean loss, in evaluation mode.

    Args:
        retain_weight: α of ``RandomLabels``.
        salient_share: Share of the weights that count as salient and may change, in
            (0, 1]; the paper's is 0.5.

    Source: Fan et al. 2024 (arXiv:2310.12508), equations 3-5.
    """

    salient_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(salient_share=self.salient_share, remedy="Pass a share above 0.")
        in_range(
            0,
            1,
            salient_share=self.salient_share,
            remedy="Pass a share of at most 1; with 1 all weights are trained.",
        )

    def prepare(self, task: Task) -> Method:
        """Find the salient weights, those with the largest gradients on the forget set.

        All weights are ranked together, not layer by layer, so in one layer all
        weights may change, and in another none. Weights that tie at the threshold may
        all change.

        Args:
            task: The model and the data.

        Returns:
            The method with its mask, and with the weights to set the others back to.
        """
        params = trainable(task.model)
        salience = torch.cat([g.abs().flatten() for g in mean_gradient(task, params)])
        num_salient = max(1, round(self.salient_share * salience.numel()))
        threshold = salience.topk(num_salient).values[-1]
        masks = [m.view_as(p) for m, p in _split(salience >= threshold, params)]
        start = tuple(p.detach().clone() for p in params)
        return _SalUnRun(self.retain_weight, self.salient_share, tuple(masks), start)


@dataclass(frozen=True, eq=False)
class _SalUnRun(SalUn):
    """SalUn with the mask and the weights from before the run.

    The other weights are set back after each update. To mask their gradients would not
    be enough: weight decay also changes weights whose gradient is 0.

    Args:
        masks: For each weight a tensor of its shape, true where it may change.
        start: The weights before the run.
    """

    masks: tuple[Tensor, ...] = ()
    start: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def project_(self, params: Sequence[Tensor]) -> None:
        """Set every weight that is not salient back to its value before the run."""
        for p, mask, start in zip(params, self.masks, self.start, strict=True):
            p.copy_(torch.where(mask, p, start))


def _split(
    flat: Tensor, params: list[nn.Parameter]
) -> Iterator[tuple[Tensor, nn.Parameter]]:
    """Split a flat vector into the parts that belong to each weight.

    Args:
        flat: One number for each entry of all weights, in their order.
        params: The weights.
    """
    return zip(flat.split([p.numel() for p in params]), params, strict=True)
