"""What the modules of a model are does not depend on how they are wrapped."""

import pickle

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from opacus_pi.models.module_list import difference, module_list


class Odd(nn.Module):
    def __init__(self, shown):
        super().__init__()
        self.shown = shown
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(2))])

    def extra_repr(self):
        if self.shown is None:
            raise RuntimeError
        return self.shown


def net(*more):
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LayerNorm(3), *more)


@pytest.mark.parametrize(
    "wrap",
    [
        GradSampleModule,
        torch.compile,
        nn.DataParallel,
        lambda model: nn.Sequential(torch.compile(model[0]), *model[1:]),
        lambda model: nn.Sequential(model[0], nn.ReLU(inplace=True), model[2]),
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.eval().double(),
    ],
)
def test_wrappers_and_modes_do_not_count(wrap):
    assert module_list(wrap(net())) == module_list(net())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (net(nn.Dropout(0.5)), "5 modules, in the training 4"),
        (nn.Sequential(*net()[:2], nn.LayerNorm(3, eps=1e-3)), "2: LayerNorm"),
        (nn.Sequential(*net()[:1], nn.Tanh(), net()[2]), "1: Tanh(), in the training"),
    ],
)
def test_other_modules_are_named(other, said):
    assert difference(module_list(net()), module_list(other)).startswith(said)


def test_what_a_module_says_may_be_anything():
    """An address changes with the process, and a text that fails says nothing."""
    ours, theirs = Odd("act=<f at 0x7f00aa>,\n  p=1"), Odd("act=<f at 0x6000>, p=1")
    assert module_list(ours) == module_list(theirs) != module_list(Odd(None))
    assert module_list(ours).split("\n")[0] == ": Odd(act=<f>, p=1)"
