"""Per-example gradients of Opacus against one backward pass for each example.

The oracle is ``torch.autograd.grad`` on one example at a time. ``WRONG`` lists the
cases in which Opacus 1.6.0 does not agree with it; all other cases have to agree, and
only the ones of the list may be refused.
"""

import copy

import numpy as np
import pytest
import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_pi.compatible import make_compatible
from opacus_pi.custody import Chain
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.fast import FastGradSampleModule, clip_from_cache
from opacus_pi.integration.wrong_layers import layers_opacus_gets_wrong, watch_inputs
from opacus_pi.recording import AccountingError, Recorder
from tests.private_training import Training

SIZE = 5
MODES = ("hooks", "ghost", "functorch", "ew")


# -------------------------------------------------------------------------------- cases
class Use(nn.Module):
    """A layer, called in some way; the first tensor that it returns."""

    def __init__(self, layer, call=None):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *inputs):
        out = self.layer(*inputs) if self.call is None else self.call(self, *inputs)
        return out[0] if isinstance(out, tuple) else out


def twice(use, x):
    return use.layer(torch.tanh(use.layer(x)))


def weighted_by_keyword(use, tokens, offsets, weights):
    return use.layer(tokens, offsets, per_sample_weights=weights)


def one_of(inputs, i):
    return [x[i : i + 1] for x in inputs]


class Bags:
    """Tokens of all examples behind each other, and where each example starts."""

    def __init__(self, bags, *, weights=None):
        self.bags = [torch.tensor(bag, dtype=torch.int64) for bag in bags]
        lengths = torch.tensor([0, *map(len, bags)])
        self.offsets = lengths[:-1].cumsum(0)
        self.weights = weights

    @property
    def inputs(self):
        more = [] if self.weights is None else [self.weights]
        return [torch.cat(self.bags), self.offsets, *more]

    def one_of(self, inputs, i):
        start, length = self.offsets[i], len(self.bags[i])
        more = [x[start : start + length] for x in inputs[2:]]
        return [self.bags[i], torch.tensor([0]), *more]


DISTINCT = [[1], [0, 4], [3, 2, 6], [5], [6, 0]]
REPEATED = [[1], [4, 4], [2, 2, 6], [5], [0, 6, 0]]
WITH_EMPTY = [[1, 2], [], [3], [4, 5], []]


def embeddings():
    tokens = torch.randint(1, 7, (SIZE, 9))
    padded = tokens.clone()
    padded[:, 5:] = 0
    yield "Embedding, tokens twice", nn.Embedding(7, 4), [tokens]
    yield "Embedding, one token", nn.Embedding(7, 4), [tokens[:, 0]]
    yield "Embedding, 3 dimensions", nn.Embedding(7, 4), [tokens.view(SIZE, 3, 3)]
    yield "Embedding, no padding", nn.Embedding(7, 4, padding_idx=0), [tokens]
    yield "Embedding, padding", nn.Embedding(7, 4, padding_idx=0), [padded]
    layer = Use(nn.Embedding(7, 4, padding_idx=0), lambda use, x: use.layer(x)[:, :5])
    yield "Embedding, padding masked", layer, [padded]
    frequencies = nn.Embedding(7, 4, scale_grad_by_freq=True)
    yield "Embedding, scale_grad_by_freq", frequencies, [tokens]
    bags = {
        "distinct": Bags(DISTINCT),
        "repeated": Bags(REPEATED),
        "empty": Bags(WITH_EMPTY),
    }
    for name, mode in (
        ("distinct", "sum"),
        ("distinct", "mean"),
        ("empty", "mean"),
        ("distinct", "max"),
        ("repeated", "sum"),
        ("repeated", "mean"),
    ):
        yield (
            f"EmbeddingBag, {mode}, {name}",
            nn.EmbeddingBag(7, 4, mode=mode),
            bags[name],
        )
    layer = nn.EmbeddingBag(7, 4, mode="sum", padding_idx=6)
    yield "EmbeddingBag, padding", layer, bags["distinct"]
    weighted = Bags(DISTINCT, weights=torch.rand(9) + 0.5)
    layer = Use(nn.EmbeddingBag(7, 4, mode="sum"), weighted_by_keyword)
    yield "EmbeddingBag, per_sample_weights", layer, weighted


def linear_layers():
    for shape in ((4,), (6, 4), (SIZE, 4), (2, 6, 4), (2, 2, 3, 4)):
        yield (
            f"Linear, {len(shape)}, {shape[0]}",
            nn.Linear(4, 3),
            [torch.randn(SIZE, *shape)],
        )
    bias_only, weight_only = nn.Linear(4, 3), nn.Linear(4, 3)
    bias_only.weight.requires_grad_(False)
    weight_only.bias.requires_grad_(False)
    x = torch.randn(SIZE, 6, 4)
    yield "Linear, frozen weight", bias_only, [x]
    yield "Linear, frozen bias", weight_only, [x]
    yield "Linear, no bias", nn.Linear(4, 3, bias=False), [x]
    yield "Linear, twice", Use(nn.Linear(4, 4), twice), [x]
    yield "PReLU", nn.PReLU(6), [x]


CONVOLUTION_OPTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "stride, rest": {"stride": 3},
    "dilation": {"dilation": 2},
    "padding": {"padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "same": {"padding": "same"},
    "same, dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "no bias": {"bias": False},
    "everything": {"stride": 2, "dilation": 2, "padding": 2, "groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular, none": {"padding": 0, "padding_mode": "circular"},
    "circular, same": {"padding": "same", "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


def convolutions():
    for dims, cls in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        x = torch.randn(SIZE, 4, *[7] * dims)
        for name, options in CONVOLUTION_OPTIONS.items():
            yield f"{cls.__name__}, {name}", cls(4, 4, 3, **options), [x]
        even = cls(4, 4, 2, padding="same")
        yield f"{cls.__name__}, even kernel", even, [x]
        layer = Use(cls(4, 4, 3, padding=1), twice)
        yield f"{cls.__name__}, twice", layer, [x]
        swapped = x.transpose(1, -1).contiguous().transpose(1, -1)
        yield f"{cls.__name__}, swapped", cls(4, 4, 3), [swapped]
        wide = torch.randn(SIZE, 4, *[7] * (dims - 1), 14)[..., ::2]
        yield f"{cls.__name__}, sliced", cls(4, 4, 3), [wide]
    images = torch.randn(SIZE, 4, 9, 9)
    last = images.to(memory_format=torch.channels_last)
    yield "Conv2d, channels_last", nn.Conv2d(4, 4, 3), [last]
    yield "Conv2d, channels_last, padded", nn.Conv2d(4, 4, 3, padding=1), [last]
    turned = images.transpose(2, 3)
    yield "Conv2d, turned", nn.Conv2d(4, 4, 3), [turned]
    yield "Conv2d, turned, padded", nn.Conv2d(4, 4, 3, padding=1), [turned]


def normalisations():
    x = torch.randn(SIZE, 4, 6)
    yield "LayerNorm", nn.LayerNorm(6), [x]
    yield "LayerNorm, 2 dimensions", nn.LayerNorm((4, 6)), [x]
    yield "LayerNorm, twice", Use(nn.LayerNorm(6), twice), [x]
    yield (
        "LayerNorm, no affine",
        nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)),
        [x],
    )
    yield "GroupNorm", nn.GroupNorm(2, 4, eps=0.1), [x]
    yield "GroupNorm, no space", nn.GroupNorm(2, 4), [x[..., 0]]
    for dims, cls in (
        (1, nn.InstanceNorm1d),
        (2, nn.InstanceNorm2d),
        (3, nn.InstanceNorm3d),
    ):
        y = torch.randn(SIZE, 4, *[3] * dims)
        yield cls.__name__, cls(4, affine=True, eps=0.1), [y]
    yield "RMSNorm", nn.RMSNorm(6), [x]
    yield "RMSNorm, 2 dimensions", nn.RMSNorm((4, 6)), [x]


def sequences():
    x = torch.randn(SIZE, SIZE, 4)  # as many time steps as examples
    for cls in (DPLSTM, DPGRU, DPRNN):
        for options in (
            {},
            {"bidirectional": True, "num_layers": 2},
            {"bias": False},
        ):
            layer = cls(4, 3, batch_first=True, **options)
            yield f"{cls.__name__}, {len(options)}, {list(options)[:1]}", layer, [x]
    for options in ({}, {"add_zero_attn": True}, {"kdim": 3, "vdim": 2}):
        layer = DPMultiheadAttention(4, 2, batch_first=True, **options)
        key = torch.randn(SIZE, 3, options.get("kdim", 4))
        value = torch.randn(SIZE, 3, options.get("vdim", 4))
        yield f"attention, {list(options)[:1]}", layer, [x, key, value]


def tied():
    embedding, out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    out.weight = embedding.weight
    net = nn.Sequential(embedding, nn.Tanh(), out)
    yield "tied weights", net, [torch.randint(7, (SIZE, 6))]


def make_cases():
    torch.manual_seed(4)
    made = {}
    for source in (
        embeddings,
        linear_layers,
        convolutions,
        normalisations,
        sequences,
        tied,
    ):
        for name, layer, given in source():
            take = given.one_of if isinstance(given, Bags) else one_of
            inputs = given.inputs if isinstance(given, Bags) else given
            model = layer if isinstance(layer, Use) else Use(layer)
            made[name] = model, inputs, take
    return made


CASES = make_cases()
BAGS = "hooks", "ghost"
EMBEDDINGS = "hooks", "ghost", "ew"
WRONG = {
    "Embedding, padding": EMBEDDINGS,
    "Embedding, scale_grad_by_freq": EMBEDDINGS,
    "EmbeddingBag, max, distinct": BAGS,
    "EmbeddingBag, sum, repeated": BAGS,
    "EmbeddingBag, mean, repeated": BAGS,
    "EmbeddingBag, padding": BAGS,
    "EmbeddingBag, per_sample_weights": BAGS,
    **{
        f"Conv{d}d, {name}": BAGS
        for d in (1, 2, 3)
        for name in ("circular", "circular, same", "reflect", "replicate")
    },
    "Conv2d, swapped": BAGS,
    "Conv2d, channels_last": BAGS,
    "Conv2d, channels_last, padded": BAGS,
    "Conv2d, turned": BAGS,
}


# ------------------------------------------------------------------------------- oracle
def losses(out):
    """One loss per example, of which every output has another derivative."""
    out = out.reshape(len(out), -1)
    weights = torch.linspace(0.3, 1.7, out.shape[1])
    return (torch.sin(1.3 * out) * weights).sum(1) + 0.1 * (out**2).sum(1)


def true_norms(name):
    """Norms of the gradients of each example's own loss, one backward pass for each."""
    model, inputs, take = copy.deepcopy(CASES[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(SIZE):
        loss = losses(model(*take(inputs, i))).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = [(g**2).sum() for g in grads if g is not None]
        norms.append(torch.stack(squares).sum().sqrt().item())
    return np.array(norms)


def prepared(name, mode):
    model, inputs, _ = copy.deepcopy(CASES[name])
    if mode == "ghost":
        return inputs, GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=1.0
        )
    if mode == "ew":
        return inputs, GradSampleModuleExpandedWeights(model, loss_reduction="sum")
    return inputs, GradSampleModule(
        model, loss_reduction="sum", force_functorch=mode == "functorch"
    )


def norms_of_opacus(model, inputs, mode):
    """Norms after one backward pass; None where Opacus raises an error."""
    try:
        losses(model(*inputs)).sum().backward()
        if mode == "ghost":
            return model.get_norm_sample().numpy()
    except (
        AttributeError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        return None
    found = [p.grad_sample for p in model.parameters() if p.requires_grad]
    each = [g.reshape(SIZE, -1).norm(dim=1) for g in found]
    return torch.stack(each, 1).norm(dim=1).numpy()


@pytest.mark.parametrize("name", CASES)
def test_opacus_agrees_with_autograd_or_is_refused(name):
    expected = true_norms(name)
    for mode in MODES:
        if name.startswith("EmbeddingBag") and mode == "functorch":
            continue  # Opacus refuses it
        inputs, model = prepared(name, mode)
        reasons = [reason for reason, _ in layers_opacus_gets_wrong(model)]
        chain = Chain()
        chain.on_break(reasons.append)
        watch_inputs(model, chain)
        found = norms_of_opacus(model, inputs, mode)
        if found is None:
            continue  # training stops, which is no wrong number
        is_right = np.allclose(found, expected, rtol=2e-4, atol=1e-6)
        assert is_right == (mode not in WRONG.get(name, ())), (mode, found, expected)
        assert bool(reasons) == (not is_right), (mode, reasons)
        for reason in reasons:
            assert "the layer 'layer" in reason


@pytest.mark.parametrize("name", CASES)
def test_the_fast_mode_agrees_with_autograd_or_raises(name):
    model, inputs, _ = copy.deepcopy(CASES[name])
    hooks = FastGradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=SIZE,
        loss_reduction="sum",
    )
    assert not list(layers_opacus_gets_wrong(hooks))
    clip_from_cache(optimizer, hooks)
    try:
        losses(hooks(*inputs)).sum().backward()
        optimizer.step()
    except (RuntimeError, ValueError):
        assert name.startswith("EmbeddingBag")
        return
    found = optimizer.per_sample_gradient_norms.numpy()
    np.testing.assert_allclose(found, true_norms(name), rtol=2e-4, atol=1e-6)


# ------------------------------------------------------------------------ in a training
class Texts(Dataset):
    def __init__(self, bags):
        self.bags = bags

    def __len__(self):
        return len(self.bags)

    def __getitem__(self, index):
        return torch.tensor(self.bags[index]), index % 3


def behind_each_other(rows):
    bags = Bags([tokens.tolist() for tokens, _ in rows])
    return *bags.inputs, torch.tensor([label for _, label in rows])


class BagNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(7, 6, mode="sum"), nn.Linear(6, 3)

    def forward(self, tokens, starts):
        return self.out(self.bag(tokens, starts))


def train_bags(bags, mode):
    torch.manual_seed(0)
    # tokens of all examples in one tensor are not matched to examples
    recorder = Recorder(unattributed="worst_case")
    net, engine = BagNet(), PrivacyEngine(accountant="rdp", recorder=recorder)
    model, optimizer, *middle, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(Texts(bags), batch_size=5, collate_fn=behind_each_other),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    criterion = middle[0] if middle else nn.functional.cross_entropy
    for tokens, starts, labels in loader:
        optimizer.zero_grad()
        criterion(model(tokens, starts), labels).backward()
        optimizer.step()
    return engine


@pytest.mark.filterwarnings(
    "ignore:This run no longer has a ledger", "ignore:20 samples"
)
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_bags_are_refused_from_the_first_repeated_token_on(mode):
    assert train_bags(DISTINCT * 4, mode).ledger.num_rows >= 1
    engine = train_bags([*DISTINCT * 3, *REPEATED], mode)
    with pytest.raises(
        AccountingError, match=r"'bag' \(EmbeddingBag\): a token occurs"
    ):
        engine.epsilons(1e-3)


class Images(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 3, **options), nn.Linear(4, 3)

    def forward(self, x):
        x = x[..., None].expand(*x.shape, 6).contiguous()
        x = x.to(memory_format=torch.channels_last)
        return self.out(torch.tanh(self.conv(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
def test_reasons_name_the_layer_and_the_remedy_helps():
    for mode in ("hooks", "ghost"):
        training = Training(module=Images(), grad_sample_mode=mode).train(1)
        with pytest.raises(AccountingError, match="make_compatible"):
            _ = training.engine.ledger
        good = Training(module=make_compatible(Images()), grad_sample_mode=mode)
        assert good.train(1).engine.ledger.num_rows == 1
    options = {"padding": 1, "padding_mode": "reflect"}
    with pytest.warns(
        UserWarning, match=r"'conv' \(Conv2d\): Opacus ignores padding_mode"
    ):
        Training(module=Images(**options))
    for mode in ("functorch", "fast"):
        good = Training(module=Images(**options), grad_sample_mode=mode).train(1)
        assert good.engine.ledger.num_rows == 1


def test_weights_that_are_written_in_forward_passes():
    model = GradSampleModule(Use(nn.Embedding(7, 4, max_norm=1.0)))
    assert "without noise" in next(layers_opacus_gets_wrong(model))[0]


def test_layers_without_trainable_weights_do_not_matter():
    net = Use(nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")))
    net.requires_grad_(False)
    net.out = nn.Linear(2, 2)
    assert not list(layers_opacus_gets_wrong(GradSampleModule(net)))


def test_a_function_of_the_users_own_is_not_opacus(monkeypatch):
    functions = {**GradSampleModule.GRAD_SAMPLERS, nn.Embedding: lambda *_: {}}
    layer = nn.Embedding(7, 4, scale_grad_by_freq=True)
    assert list(layers_opacus_gets_wrong(GradSampleModule(Use(copy.deepcopy(layer)))))
    monkeypatch.setattr(GradSampleModule, "GRAD_SAMPLERS", functions)
    assert not list(layers_opacus_gets_wrong(GradSampleModule(Use(layer))))


def test_hooks_are_replaced_removed_and_not_copied():
    found, model = [], GradSampleModule(Use(nn.EmbeddingBag(7, 4, mode="sum")))
    counts, chain = [], Chain()
    chain.on_break(found.append)
    for _ in range(3):
        watch_inputs(model, chain)
        counts.append(len(model._module.layer._forward_hooks))
    assert counts == counts[:1] * 3
    copied = copy.deepcopy(model).to_standard_module()
    copied(*Bags(REPEATED).inputs)
    assert not found
    model(*Bags(REPEATED).inputs)
    assert len(found) == 1
    assert not model.to_standard_module().layer._forward_hooks
