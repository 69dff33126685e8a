"""The probe finds models that mix examples, and none that does not.

Which models mix is checked by autograd: an output that depends on other examples has a
gradient by their inputs.
"""

import copy
import gc
import random
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opacus_pi.custody.model_probe import ModelProbe, probe_separability
from opacus_pi.custody.separable_layers import separable_by_construction
from tests.custody.probed_models import (
    HONEST,
    MIXING,
    SIZE,
    Calls,
    Counting,
    sequences,
    vectors,
)


def made(table, name):
    torch.manual_seed(1)
    model, inputs = table[name]()
    return model.train(), inputs


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name):
    model, inputs = made(HONEST, name)
    finding = probe_separability(model, inputs, {})
    assert finding.state == "checked", finding.sentence


@pytest.mark.parametrize("name", MIXING)
def test_mixing_models_are_found(name):
    model, inputs = made(MIXING, name)
    finding = probe_separability(model, inputs, {})
    assert finding.state == "broken", finding.sentence
    assert "no gradient belongs to one example" in finding.sentence


def depends_on_others(model, inputs):
    """Whether outputs of an example have a gradient by another example's input."""
    x, place = inputs[0].clone().requires_grad_(), SIZE // 2
    largest = torch.zeros(())
    for _ in range(8):  # dropout may hide a dependence
        output = model(x, *inputs[1:])
        while not isinstance(output, torch.Tensor):
            output = list(output.values() if isinstance(output, dict) else output)[-1]
        (gradient,) = torch.autograd.grad(output[place].square().sum(), x)
        gradient[place] = 0
        largest = torch.maximum(largest, gradient.abs().max())
    return bool(largest > 0)


@pytest.mark.parametrize(
    "name", [n for n in HONEST if made(HONEST, n)[1][0].is_floating_point()]
)
def test_the_honest_models_are_honest(name):
    model, inputs = made(HONEST, name)
    if name in ("plain lstm with states", "nested outputs"):
        model = Calls(
            lambda m, x: m.inner(x)[0] if name[0] == "p" else m.inner(x)["logits"],
            inner=model,
        )
    assert not depends_on_others(model, inputs)


@pytest.mark.parametrize("name", [n for n in MIXING if n != "largest of the batch"])
def test_the_mixing_models_mix(name):
    assert depends_on_others(*made(MIXING, name))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm", "lstm", "dropout"])
def test_reduced_precision_is_no_dependence(name, kind):
    model, inputs = made(HONEST, name)
    autocast = ("cpu", kind)
    assert probe_separability(model, inputs, {}, autocast=autocast).state == "checked"
    model, inputs = model.to(kind), tuple(x.to(kind) for x in inputs)
    assert probe_separability(model, inputs, {}).state == "checked"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["standardised", "time-first encoder"])
def test_mixing_is_found_in_reduced_precision(name, kind):
    model, inputs = made(MIXING, name)
    autocast = ("cpu", kind)
    assert probe_separability(model, inputs, {}, autocast=autocast).state == "broken"


def test_rounding_that_depends_on_the_neighbours_is_no_dependence():
    """Sums over the batch that cancel leave a rounding error of the others."""
    layer = nn.Linear(5, 3)
    model = Calls(lambda m, x: m.a(x + 1e3 * x.sum() - 1e3 * x.sum()), a=layer)
    assert not torch.equal(model(vectors()), layer(vectors()))
    assert probe_separability(model, (vectors(),), {}).state == "checked"


@pytest.mark.parametrize("size", [2, 3, 4, 7, 64])
@pytest.mark.parametrize("name", ["standardised", "previous example", "those after"])
def test_batches_of_any_size(name, size):
    model, _ = made(MIXING, name)
    assert probe_separability(model, (vectors(size),), {}).state == "broken"
    model, _ = made(HONEST, "mlp")
    assert probe_separability(model, (vectors(size),), {}).state == "checked"


def test_examples_along_the_second_dimension():
    model, x = nn.LSTM(4, 5), sequences(length=9).transpose(0, 1)
    assert probe_separability(model, (x,), {}, batch_dim=1).state == "checked"
    confused = nn.LSTM(4, 5, batch_first=True)
    square = sequences().transpose(0, 1)
    finding = probe_separability(confused, (square,), {}, batch_dim=1)
    assert finding.state == "broken" and "batch_first=False" in finding.sentence


def test_inputs_by_keyword_and_shared_inputs():
    model = Calls(lambda m, x, scale: m.a(x) * scale.mean(), a=nn.Linear(5, 3))
    inputs = {"x": vectors(), "scale": torch.rand(9)}
    assert probe_separability(model, (), inputs).state == "checked"
    finding = probe_separability(model, (), inputs | {"scale": torch.rand(SIZE)})
    assert (
        finding.state == "unchecked" and "second or a later input" in finding.sentence
    )


class Unbatched(nn.Module):
    def forward(self, x):
        return x.mean()


class Locked(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class Failing(nn.Linear):
    def forward(self, x):
        assert not self.training, "only in evaluation"
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Counting, "other outputs when it is run again"),
        (Unbatched, "has one row for each of the 6 examples"),
        (lambda: Locked(5, 3), "could not be run a second time.*cannot be copied"),
        (lambda: Failing(5, 3), "only in evaluation"),
    ],
)
def test_what_cannot_be_probed_is_said(model, message):
    finding = probe_separability(model(), (vectors(),), {})
    assert finding.state == "unchecked"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(finding.sentence)
    assert "probe_model=False" in finding.sentence


def test_packed_sequences_are_said():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    finding = probe_separability(nn.LSTM(4, 5), (packed,), {})
    assert finding.state == "unchecked" and "packed sequence" in finding.sentence


def state_of(model):
    return [
        copy.deepcopy(model.state_dict()),
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        str(np.random.get_state()),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("name", [*HONEST, *MIXING])
def test_it_leaves_no_trace(name):
    model, inputs = made(HONEST | MIXING, name)
    before, inputs_before = state_of(model), copy.deepcopy(inputs)
    probe_separability(model, inputs, {})
    after = state_of(model)
    for one, other in zip(before[0].values(), after[0].values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before[5], after[5])
    assert before[1:5] == after[1:5] and before[6:] == after[6:]
    assert all(map(torch.equal, inputs_before, inputs))


def watching(model):
    """A probe of a model, with a function that shows it a batch."""
    probe = ModelProbe(weakref.ref(model))

    def show(*inputs):
        probe.saw(inputs, {})
        finding = probe.run()
        assert probe.run() is None
        return finding

    return show


def test_it_is_repeated_for_new_shapes_and_modes_only():
    model = Calls(lambda m, x: m.a(x).mean(1), a=nn.Linear(4, 3), d=nn.Dropout())
    show = watching(model)
    sizes = ((0, 5), (1, 5), (2, 5), (7, 5), (3, 9), (2, 9))
    found = [show(sequences(*size)) for size in sizes]
    # of lengths 5 and 9, at the first batch of two examples or more
    assert [finding is not None for finding in found] == [0, 0, 1, 0, 1, 0]
    model.d.eval()
    assert show(sequences(2, 9)).state == "checked"
    found = [show(sequences(2, length)) for length in range(10, 60)]
    assert sum(finding is not None for finding in found) == 1
    # as many examples as steps: four more
    found = [show(sequences(length, length)) for length in range(10, 60)]
    assert sum(finding is not None for finding in found) == 4


def test_a_batch_as_long_as_its_sequences_is_probed_although_the_shape_is_known():
    model = Calls(lambda m, x: m.r(x)[0], r=nn.LSTM(4, 5))
    show = watching(model)
    model.function = lambda m, x: m.r(x.transpose(0, 1))[0].transpose(0, 1)
    assert show(sequences(4, 6)).state == "checked"
    model.function = lambda m, x: m.r(x)[0]
    finding = show(sequences(6, 6))
    assert finding.state == "broken" and "batch_first=False" in finding.sentence


def test_chains_of_known_layers_are_not_run():
    model, inputs = made(HONEST, "cnn")
    with mock.patch.object(nn.Conv2d, "forward", side_effect=AssertionError):
        finding = watching(model)(*inputs)
    assert finding.sentence == "Every layer treats each example alone."


def test_a_model_that_was_deleted_is_not_probed():
    model = nn.LSTM(4, 5)
    show = watching(model)
    del model
    gc.collect()
    assert show(sequences()) is None


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(0)],
        [nn.Unflatten(1, (5, 1)), nn.LSTM(1, 2)],
        [nn.Softmax(0)],
        [nn.LayerNorm((6, 5))],
        [nn.Linear(5, 4), nn.Conv1d(6, 6, 3)],  # two dimensions: channels, positions
        [nn.BatchNorm1d(5)],
        [Calls(lambda m, x: x.cumsum(0))],
    ],
)
def test_other_chains_are_not_known(layers):
    assert not separable_by_construction(nn.Sequential(*layers), (vectors(),), {})


def test_a_hook_may_change_what_a_known_layer_computes():
    model = nn.Sequential(nn.Linear(5, 3))
    assert separable_by_construction(model, (vectors(),), {})
    model[0].register_forward_hook(lambda module, args, out: out.cumsum(0))
    assert not separable_by_construction(model, (vectors(),), {})


def test_functional_dropout_hides_nothing():
    model = Calls(lambda m, x: F.dropout(m.a(x), 0.9), a=nn.Linear(5, 3))
    assert probe_separability(model, (vectors(),), {}).state == "checked"


class Remembers(nn.Module):
    """Keeps a running mean of what a function returns for the batch."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(5, 3), function
        self.register_buffer("kept", torch.zeros(5))

    def forward(self, x):
        if self.training:
            self.kept = 0.9 * self.kept + self.function(x.detach())
        return self.linear(x - self.kept.clone().detach() * 0)


@pytest.mark.parametrize(
    "function, state",
    [
        (lambda x: x.mean(0), "broken"),
        (lambda x: 1e-3 * x[0], "broken"),
        (lambda x: torch.full((5,), 0.1), "checked"),
    ],
)
def test_buffers_that_keep_something_of_the_examples(function, state):
    finding = probe_separability(Remembers(function), (vectors(),), {})
    assert finding.state == state
    assert ("computes a buffer from the examples" in finding.sentence) == (
        state == "broken"
    )


class Carries(nn.Module):
    """Keeps its hidden layer, and may use it for the next batch."""

    def __init__(self, uses_it):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.uses_it, self.hidden = uses_it, None

    def forward(self, x):
        hidden = self.first(x)
        if self.uses_it and self.hidden is not None:
            hidden = hidden + self.hidden
        self.hidden = hidden.detach()
        return self.last(hidden.tanh())


@pytest.mark.parametrize("seen_before", [True, False])
@pytest.mark.parametrize("uses_it, state", [(True, "broken"), (False, "checked")])
def test_a_state_that_is_carried_to_the_next_batch(uses_it, state, seen_before):
    model = Carries(uses_it)
    if seen_before:
        model(vectors())
    finding = probe_separability(model, (vectors(),), {})
    assert finding.state == state
    assert ("outputs for the next batch depend" in finding.sentence) == uses_it


class OnlyWithGradients(nn.Module):
    """Does something else in evaluations, which often run without gradients only."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(5, 3), how
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        z = self.layer(x)
        if not torch.is_grad_enabled():
            return z
        if self.how == "mixes":
            return z + z.flip(0)
        if self.how == "keeps":
            self.mean = 0.5 * self.mean + 0.5 * z.mean(0)
        return z - self.mean


@pytest.mark.parametrize(
    ("how", "state", "text"),
    [
        ("mixes", "broken", "The model mixes the examples of a batch"),
        ("keeps", "broken", "computes a buffer from the examples"),
        ("neither", "checked", "did not change the model's outputs"),
    ],
)
def test_what_a_model_does_only_with_gradients_is_found(how, state, text):
    model = OnlyWithGradients(how)
    with torch.no_grad():
        finding = probe_separability(model, (vectors(),), {})
    assert finding.state == state and text in finding.sentence
    assert model.layer.weight.grad is None and not model.mean.any()


def test_without_memory_for_gradients_the_probe_runs_without_them():
    class Large(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    assert probe_separability(Large(5, 3), (vectors(),), {}).state == "checked"
