"""Slow, independent truths for the tests of ``opacus_pi.gradients``."""

import torch


def call(model, x):
    """Hand a batch to a model."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def row(x, i):
    """Example ``i`` as a batch of one."""
    if isinstance(x, dict):
        return {key: value[i : i + 1] for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(value[i : i + 1] for value in x)
    return x[i : i + 1]


def double(x):
    """Inputs in float64 where they are floating."""
    if isinstance(x, dict):
        return {key: double(value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(double(value) for value in x)
    return x.double() if x.is_floating_point() else x


def loop_norms(model, losses, x, y):
    """Norms by a loop of ``autograd.grad`` in float64 over single examples.

    The model itself becomes a float64 one.
    """
    model = model.double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(y)):
        loss = losses(call(model, row(double(x), i)), y[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [g.flatten() for g in gradients if g is not None]
        norms.append(torch.cat(flat).norm())
    return torch.stack(norms)
