"""Private trainings in the fast mode, beside the same ones in another."""

import torch
from torch.utils.data import TensorDataset

from tests.integration.fast.models import CLASSES, MODELS, MORE
from tests.private_training import Training

SLOW = "There is no formula for the per-example gradients of"


def training(mode, name="cnn", *, kind=torch.float32, num=24, **options):
    """A training of one of the models; those made alike draw alike."""
    build, inputs = {**MODELS, **MORE}[name]
    torch.manual_seed(7)
    module, x = build().to(kind), inputs(num)
    x = x.to(kind) if x.is_floating_point() else x
    data_set = TensorDataset(x, torch.randint(0, CLASSES, (num,)))
    options = {"batch_size": 6, "max_grad_norm": 0.5, "lr": 0.05, **options}
    return Training(
        module=module,
        data_set=data_set,
        grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(1),
        **options,
    )


def assert_alike(ours, theirs, start, rtol=1e-5):
    """The updates of every weight agree."""
    for a, b, w in zip(
        ours.net.parameters(), theirs.net.parameters(), start, strict=True
    ):
        assert (a - b).norm() <= rtol * (b - w).norm() + 1e-12


def both(name="cnn", epochs=1, **options):
    """The trainings in fast and in hooks mode, after some epochs."""
    pair = [training(mode, name, **options) for mode in ("fast", "hooks")]
    start = [p.detach().clone() for p in pair[0].net.parameters()]
    for one in pair:
        torch.manual_seed(3)
        one.train(epochs)
    return *pair, start
