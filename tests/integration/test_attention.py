"""``make_compatible`` returns a model that computes the same function.

Every layer that it says to keep is compared with the original, in training and in
evaluation mode, with all arguments; then per-example gradients with autograd.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.integration.attention import Attention
from opacus_pi.integration.compatible import make_compatible

SIZE, STEPS, WIDTH = 4, 5, 8
CAUSAL = torch.triu(torch.ones(STEPS, STEPS, dtype=torch.bool), 1)
PADDING = torch.arange(STEPS) >= torch.arange(2, 2 + SIZE)[:, None]
NUMBERS = nn.Transformer.generate_square_subsequent_mask(STEPS)


def as_numbers(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


class Attending(nn.Module):
    """Attention within a model, which takes the batch first or second."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)

    def forward(self, *inputs, **options):
        return self.attention(*inputs, **options)


MASKS = {
    "none": {},
    "causal": {"attn_mask": CAUSAL},
    "numbers": {"attn_mask": as_numbers(CAUSAL)},
    "biases": {"attn_mask": torch.randn(STEPS, STEPS)},
    "bytes": {"attn_mask": CAUSAL.to(torch.uint8)},
    "each head": {"attn_mask": CAUSAL.expand(2 * SIZE, STEPS, STEPS)},
    "each head, biases": {"attn_mask": torch.randn(2 * SIZE, STEPS, STEPS)},
    "padding": {"key_padding_mask": PADDING},
    "padding, numbers": {"key_padding_mask": as_numbers(PADDING)},
    "both": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "is_causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "no weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "sizes": {"kdim": 3, "vdim": 6},
}


def inputs(batch_first, *, kdim=WIDTH, vdim=WIDTH, steps=STEPS, **_):
    made = [
        torch.randn(SIZE, STEPS, WIDTH),
        torch.randn(SIZE, steps, kdim),
        torch.randn(SIZE, steps, vdim),
    ]
    return made if batch_first else [x.transpose(0, 1) for x in made]


def require_equal(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            require_equal(one, other)
    elif expected is not None:
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def require_same_function(model, *given, **options):
    """Compare a model and its copy, in both modes, with gradients and without them."""
    made = make_compatible(model.train())
    assert [m.training for m in made.modules()].count(False) == 0
    for training in (True, False):
        for module in (model, made):
            module.train(training)
        require_equal(made(*given, **options), model(*given, **options))
    return made


# ---------------------------------------------------------------------------- attention
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore:Converting mask", "ignore:Support for mismatched")
def test_attention_is_the_same_function(batch_first, name, mask):
    torch.manual_seed(0)
    model = Attending(batch_first=batch_first, **OPTIONS[name])
    for parameter in model.parameters():  # torch starts biases at 0
        nn.init.normal_(parameter)
    given = inputs(batch_first, **OPTIONS[name])
    if mask == "bytes":
        expected = model(*given, attn_mask=CAUSAL)
        require_equal(make_compatible(model)(*given, **MASKS[mask]), expected)
        return
    made = require_same_function(model, *given, **MASKS[mask])
    assert type(made.attention) is Attention


@pytest.mark.parametrize("batch_first", [True, False])
def test_queries_and_keys_of_other_lengths(batch_first):
    model = Attending(batch_first=batch_first, add_bias_kv=True)
    require_same_function(model, *inputs(batch_first, steps=7))


def test_dropout_acts_in_training_only():
    model = Attending(batch_first=True, dropout=0.5)
    given, made = inputs(True), make_compatible(model)
    mean = torch.stack([made(*given)[0] for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, model.eval()(*given)[0], rtol=0, atol=0.05)
    require_equal(made.eval()(*given), model(*given))
    model.train()
    model.attention.eval()
    require_equal(make_compatible(model)(*given), model(*given))


def test_attention_in_double_precision_and_as_the_whole_model():
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()
    made, given = make_compatible(attention), [x.double() for x in inputs(True)]
    torch.testing.assert_close(
        made(*given)[0], attention(*given)[0], rtol=1e-12, atol=1e-12
    )


def test_frozen_weights_and_shared_layers_stay_so():
    model = nn.ModuleDict({"a": Attending(batch_first=True, kdim=3)})
    model["b"] = model["a"]
    model["a"].attention.k_proj_weight.requires_grad_(False)
    model["a"].attention.out_proj.bias.requires_grad_(False)
    made = make_compatible(model)
    frozen = [n for n, p in made["a"].named_parameters() if not p.requires_grad]
    assert frozen == ["attention.klinear.weight", "attention.out_proj.bias"]
    assert made["a"].attention is made["b"].attention
    shared = nn.Sequential(nn.LSTM(3, 3), nn.Linear(3, 3))
    model = nn.ModuleDict({"a": shared[0], "b": shared[0]})
    made = make_compatible(model)
    assert made["a"] is made["b"] and type(made["a"]).__name__ == "DPLSTM"


def test_attention_says_what_it_cannot_do():
    made = make_compatible(Attending(batch_first=True))
    with pytest.raises(ValueError, match="needs? a\\s?batch dimension|batch dimension"):
        made(*[x[0] for x in inputs(True)])
    with pytest.raises(ValueError, match="Pass the mask"):
        made(*inputs(True), is_causal=True)


def test_copies_and_pickles_compute_the_same():
    model = make_compatible(Attending(batch_first=True))
    given = inputs(True)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made.attention) is Attention
        require_equal(made(*given), model(*given))


# ----------------------------------------------------------------- torch's transformers
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "numbers", "padding", "hint"])
def test_transformer_layers_are_the_same_function(batch_first, norm_first, mask):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    x, memory, _ = inputs(batch_first)
    encoder = {
        "none": {},
        "causal": {"src_mask": CAUSAL},
        "numbers": {"src_mask": NUMBERS},
        "padding": {"src_key_padding_mask": PADDING},
        "hint": {"src_mask": NUMBERS, "is_causal": True},
    }[mask]
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, **options)
    require_same_function(layer, x, **encoder)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = {"mask" if k == "src_mask" else k: v for k, v in encoder.items()}
    require_same_function(layers, x, **model)
    decoder = {
        "none": {},
        "causal": {"tgt_mask": CAUSAL},
        "numbers": {"tgt_mask": NUMBERS, "memory_mask": NUMBERS},
        "padding": {
            "tgt_key_padding_mask": PADDING,
            "memory_key_padding_mask": PADDING,
        },
        "hint": {"tgt_mask": NUMBERS, "tgt_is_causal": True},
    }[mask]
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, **options)
    require_same_function(layer, x, memory, **decoder)
    require_same_function(nn.TransformerDecoder(layer, 2), x, memory, **decoder)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_whole_transformer_is_the_same_function(batch_first):
    model = nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0, batch_first=batch_first)
    x, memory, _ = inputs(batch_first)
    require_same_function(model, x, memory, tgt_mask=NUMBERS)


# --------------------------------------------------------------------- recurrent layers
class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True, "bias": False, "num_layers": 3},
    ],
)
def test_recurrent_layers_are_the_same_function(cls, options):
    torch.manual_seed(0)
    layer = cls(WIDTH, 6, **options)
    x = torch.randn(SIZE, STEPS, WIDTH)
    require_same_function(Recurrent(layer), x)
    directions = 2 if layer.bidirectional else 1
    size = SIZE if layer.batch_first else STEPS
    state = torch.randn(layer.num_layers * directions, size, 6)
    state = (state, state.flip(0)) if cls is nn.LSTM else state
    require_same_function(Recurrent(layer), x, state)


def test_layers_that_cannot_be_replaced_are_named():
    model = nn.ModuleDict({"text": nn.LSTM(WIDTH, 6, proj_size=2)})
    with pytest.raises(ValueError, match="'text' is an LSTM with proj_size=2"):
        make_compatible(model)
    model.requires_grad_(False)
    model["out"] = nn.Linear(2, 2)
    assert type(make_compatible(model)["text"]) is nn.LSTM


def test_batch_norm_is_another_function_which_is_documented():
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), torch.randn(SIZE, 4)
    made = make_compatible(model)
    assert not torch.allclose(made(x), model(x))
    assert "A GroupNorm is not the" in make_compatible.__doc__


# ------------------------------------------------------------- gradients of one example
class Classifier(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x):
        attended = self.attention(x, x, x, need_weights=False)[0]
        return self.out(attended.mean(1))


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "sizes"])
@pytest.mark.parametrize("steps", [3, SIZE, SIZE - 1])
def test_per_example_gradients_are_those_of_autograd(name, steps):
    torch.manual_seed(0)
    net = make_compatible(Classifier(**OPTIONS[name]))
    x, y = torch.randn(SIZE, steps, WIDTH), torch.randint(3, (SIZE,))
    parameters = list(net.parameters())
    loss = nn.CrossEntropyLoss(reduction="sum")
    expected = [
        torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]), parameters)
        for i in range(SIZE)
    ]
    model = GradSampleModule(copy.deepcopy(net), loss_reduction="sum")
    loss(model(x), y).backward()
    for j, parameter in enumerate(model.parameters()):
        for i in range(SIZE):
            torch.testing.assert_close(
                parameter.grad_sample[i], expected[i][j], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_a_transformer_is_trained_and_recorded(mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    net = make_compatible(nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)))
    x, y = torch.randn(12, STEPS, WIDTH), torch.randint(3, (12,))
    norms = []
    for one, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(net(one[None]), label[None])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    engine = PrivacyEngine(accountant="rdp", recorder=Recorder(every=1))
    model, optimizer, *middle, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=4
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    criterion = middle[0] if middle else nn.functional.cross_entropy
    for a, b in loader:
        optimizer.zero_grad()
        criterion(model(a), b).backward()
        optimizer.step()
    np.testing.assert_allclose(engine.ledger.grad_norms[-1], norms, rtol=1e-3)
