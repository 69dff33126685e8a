"""Running out of memory is an error: it never turns into a slow loop, unnoticed."""

import pytest
import torch
from torch import nn

from opacus_pi._torch_compat import is_functorch_wrapped_tensor
from opacus_pi.gradients import gradient_gram, per_example_grad_norms
from opacus_pi.gradients.clipping import TrainingTaps
from opacus_pi.gradients.fallback import raise_if_out_of_memory

CRITERION = nn.CrossEntropyLoss()
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
]
OTHERS = [RuntimeError("vmap: called random operation"), ValueError("out of memory")]


class Fails(nn.Module):
    """A layer without a rule that fails where it runs for many examples at once."""

    def __init__(self, error):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.error = error

    def forward(self, x):
        if is_functorch_wrapped_tensor(x):
            raise self.error
        return torch.tensordot(x, self.weight, 1)


def batch():
    torch.manual_seed(0)
    return torch.randn(5, 4), torch.arange(5) % 3


def examples():
    return list(zip(*batch(), strict=True))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: str(e)[:20])
def test_it_reaches_the_user(error):
    model = nn.Sequential(Fails(error))
    with pytest.raises(RuntimeError) as caught:
        per_example_grad_norms(model, CRITERION, *batch())
    assert str(caught.value) == str(error)  # copied with the model
    with pytest.raises(RuntimeError) as caught:
        gradient_gram(model, CRITERION, examples(), [0, 1])
    assert str(caught.value) == str(error)  # copied with the model


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: str(e)[:20])
def test_it_reaches_the_user_from_a_private_step(error):
    model, taps = nn.Sequential(Fails(error)), TrainingTaps()
    taps.attach(model)
    x, y = batch()
    with pytest.raises(RuntimeError) as caught:
        CRITERION(model(x), y).backward()
    assert str(caught.value) == str(error)  # copied with the model


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: str(e)[:20])
def test_other_errors_have_a_slow_way(error):
    model, (x, y) = nn.Sequential(Fails(error)), batch()
    norms = per_example_grad_norms(model, CRITERION, x, y)
    assert (norms > 0).all()
    gram = gradient_gram(model, CRITERION, examples(), [0, 1])
    torch.testing.assert_close(gram.diagonal().sqrt(), norms[:2])
    raise_if_out_of_memory(error)
