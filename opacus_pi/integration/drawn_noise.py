"""Find noise that is smaller than what is recorded, and noise that was drawn before.

**Size.** ``add_noise`` sets ``p.grad`` to ``p.summed_grad`` plus noise, so their
difference is the noise. The sum of the squares of its d entries, divided by the
variance, has a chi-squared distribution with d degrees of freedom. If it is below the
quantile of 10^-12, less noise was drawn than is recorded.

*Guarantee.* In an update that is checked (1, 2, 4, 8, 16 and so on, and every 64th),
missing noise is found, and so is noise that is too small by more than about 5 / √d of
its size. Noise of the recorded size is reported once in 10^12 updates.

*What breaks it.* Noise so small that it vanishes in the rounding of the sum; such
parameters are left out. Noise that is too large is not reported: the numbers are then
still upper bounds. Distributed runs, where not every process draws, and adaptive
clipping, which draws more noise than is recorded, are not checked. Neither are
parameters on an accelerator, for which every update would have to wait, or complex
ones, with which no run is recorded.

**Repetition.** If the generator is in a state from which the noise of an earlier update
was drawn, the same noise is drawn again, and the two updates are not two draws of the
mechanism: ``custody/seen_states.py``. If it is only in a part of the stream that it has
passed before, noise may come again at other entries: ``custody/seen_blocks.py``.
"""

from collections.abc import Iterable

import torch
from scipy.stats import chi2
from torch import Tensor

from opacus_pi.custody import Chain
from opacus_pi.models.accelerators import random_state_of
from opacus_pi.recording import Recorder

__all__ = ["is_drawn_again", "missing_noise", "repeated_noise"]

_CHANCE = 1e-12
_ROUNDINGS = 100  # of the largest entry of a sum
_TOO_SMALL = (
    "add_noise changed the gradients by {found:.3g} on average (root mean square), "
    "but the noise should have a standard deviation of {std:.3g}. So a function that "
    "draws noise was replaced, for example torch.normal, and neither get_epsilon nor "
    "the ledger covers the update. Leave the drawing of noise to Opacus."
)
_REPEATED = (
    "The noise of update {step} was drawn from a generator in a state from which noise "
    "was drawn before in this run, so two updates have the same noise, and neither "
    "get_epsilon nor the ledger covers that. This happens if torch.manual_seed is "
    "called with one seed again, for example in every epoch or before a run is "
    "continued. Seed once, and continue a run by load_checkpoint(restore_rng=True), or "
    "with another seed."
)
_PASSED_BEFORE = (
    "The generator of the noise went back to a part of its stream from which noise was "
    "drawn before in this run. So noise may contain the numbers of earlier noise at "
    "other places, and neither get_epsilon nor the ledger covers that. This happens if "
    "torch.manual_seed is called with one seed again, and more or fewer numbers are "
    "drawn after it than before. Seed once, or draw what needs a seed within "
    "torch.random.fork_rng()."
)


def is_drawn_again(
    recorder: Recorder,
    generator: torch.Generator | None,
    device: torch.device,
    chain: Chain,
) -> bool:
    """Return whether the noise that is about to be drawn was drawn in this run before.

    If the generator only went back to numbers that it has passed before, the link
    "noise" is left unchecked.

    Args:
        recorder: Knows the states of earlier updates, and keeps this one.
        generator: Draws the noise; None: torch's global one.
        device: Of the noise.
        chain: The chain of custody of the run.
    """
    state = random_state_of(device) if generator is None else generator.get_state()
    if state is None:
        return False
    held = state.numpy().tobytes()
    goes_back, is_new = recorder.goes_back(held), recorder.is_new_state(held)
    if goes_back and is_new:
        chain.leave_unchecked("noise", _PASSED_BEFORE)
    return not is_new


def repeated_noise(recorder: Recorder) -> str:
    """Return the reason for refusing an update whose noise was drawn again.

    Args:
        recorder: Has counted the updates before it.
    """
    return _REPEATED.format(step=recorder.num_steps + 1)


def missing_noise(
    pairs: Iterable[tuple[Tensor | None, Tensor | None]], std: float
) -> str | None:
    """Return a reason if too little noise was drawn.

    Args:
        pairs: The sum of clipped gradients of each parameter, and the same with noise.
        std: The standard deviation that the noise should have.

    >>> total = torch.zeros(1000)
    >>> noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> missing_noise([(total, total + noise)], 1.0) is None
    True
    >>> missing_noise([(total, total + 0.5 * noise)], 1.0)[:38]
    'add_noise changed the gradients by 0.5'
    """
    if std <= 0:
        return None
    squares, count = [], 0
    with torch.no_grad():
        for total, noised in pairs:
            if total is None or noised is None or not total.numel():
                continue
            if total.device.type != "cpu" or total.is_complex():
                continue
            held = _widened(total)
            rounding = _ROUNDINGS * torch.finfo(total.dtype).eps
            if not std > rounding * float(held.abs().max()):
                continue
            squares.append((_widened(noised) - held).square().sum())
            count += total.numel()
        if not squares:
            return None
        found = float(torch.stack([s.cpu() for s in squares]).sum())
    if not found / std**2 < chi2.ppf(_CHANCE, count):
        return None
    return _TOO_SMALL.format(found=(found / count) ** 0.5, std=std)


def _widened(tensor: Tensor) -> Tensor:
    """Return the entries in single precision, or in double if they are."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(kind).flatten()
