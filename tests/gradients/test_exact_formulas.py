"""Every exact formula gives the norm of the explicit gradient, chosen or not."""

import pytest
import torch
from torch import nn

from opacus_pi.gradients import products
from opacus_pi.gradients.layers import conv

CONVOLUTIONS = {
    "dense": (nn.Conv2d(4, 6, 3, padding=1), (5, 7)),
    "no-padding": (nn.Conv2d(4, 6, (2, 3)), (5, 7)),
    "wide-padding": (nn.Conv2d(4, 6, 3, padding=(4, 1)), (5, 3)),
    "longer-than-input": (nn.Conv2d(4, 6, 5, padding=2), (3, 2)),
    "one-dimension": (nn.Conv1d(4, 6, 3, padding=2), (7,)),
    "three-dimensions": (nn.Conv3d(2, 3, (2, 1, 3), padding=(1, 0, 1)), (3, 4, 4)),
    "point": (nn.Conv2d(4, 6, 1), (5, 3)),
    "point-strided": (nn.Conv2d(4, 6, 1, stride=(2, 3)), (5, 7)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (6, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (6, 7)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 6)),
}


def formulas(window):
    """The formulas that a window allows."""
    found = [conv.squares_by_groups, conv.squares_one_by_one]
    if window.groups == 1:
        found.append(conv.squares_of_patches)
        if window.is_dense:
            found.append(conv.squares_by_pixel_pairs)
        if window.is_point:
            found.append(conv.squares_of_points)
    return found


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_formulas(name):
    torch.manual_seed(0)
    layer, sizes = CONVOLUTIONS[name]
    layer = layer.double()
    x = torch.randn(4, layer.in_channels, *sizes, dtype=torch.float64)
    outputs = layer(x)
    grad = torch.randn_like(outputs)
    truth = []
    for i in range(len(x)):
        loss = (layer(x[i : i + 1]) * grad[i]).sum()
        truth.append(torch.autograd.grad(loss, layer.weight)[0].square().sum())
    truth = torch.stack(truth)
    padded, window = conv.window_of(layer, x)
    for transposed in (False, True):  # any memory layout
        if transposed:
            padded = padded.transpose(-1, 1).contiguous().transpose(-1, 1)
        for formula in formulas(window):
            found = formula(window, padded, grad)
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("t, d, p", [(1, 5, 4), (3, 40, 30), (30, 4, 3), (7, 6, 6)])
def test_outer_products(t, d, p, monkeypatch):
    torch.manual_seed(0)
    a, g = torch.randn(5, t, d).double(), torch.randn(5, t, p).double()
    truth = torch.einsum("btp,btd->bpd", g, a).flatten(1).square().sum(1)
    for block in (1, 1 << 18):  # one example at a time, or all
        monkeypatch.setattr(products, "_CPU_BLOCK", block)
        for formula in (
            products.outer_product_squares,
            products.gram_squares,
            products.direct_squares,
        ):
            torch.testing.assert_close(formula(a, g), truth, rtol=1e-12, atol=0)


def test_squared_lengths_of_long_rows_are_accurate():
    torch.manual_seed(0)
    rows = torch.randn(2, 1_000_000)
    truth = rows.double().square().sum(1)
    torch.testing.assert_close(products.squared_lengths(rows), truth, rtol=5e-7, atol=0)


def test_squares_are_added_up_in_float32():
    """Of numbers that are in bfloat16, as the products of matrices leave them."""
    torch.manual_seed(0)
    rows, other = torch.randn(2, 3, 50, 50).bfloat16()
    lengths = rows.double().flatten(1).square().sum(1)
    found = products.squared_lengths(rows)
    torch.testing.assert_close(found, lengths, rtol=1e-5, atol=0)
    pairs = (rows.double() * other.double()).flatten(1).sum(1).clamp(min=0)
    found = products.pair_squares(rows, other)
    torch.testing.assert_close(found, pairs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("length", [1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("t, d", [(2, 64), (64, 1024)])
def test_lengths_of_sums_that_cancel_are_not_too_small(length, t, d):
    """Long inputs that differ little, with opposite gradients: in float32 all is lost.

    Clipping by a length that is too small would not bound the example.
    """
    torch.manual_seed(0)
    unit = nn.functional.normalize
    base = length * unit(torch.rand(4, 1, d), dim=2)
    other = base + unit(torch.randn(4, 1, d), dim=2)
    g = unit(torch.randn(4, 1, 32), dim=2).expand(4, t // 2, 32)
    a = torch.cat([base.expand(4, t // 2, d), other.expand(4, t // 2, d)], 1)
    g = torch.cat([g, -g], 1)
    truth = (g.double().mT @ a.double()).flatten(1).square().sum(1)
    found = products.gram_squares(a.contiguous(), g.contiguous())
    assert (found >= truth * (1 - 1e-2)).all()
    assert (found <= (2e-3 * t * length) ** 2 + 1.01 * truth).all()
