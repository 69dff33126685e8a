import random

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.evaluation.metrics import evaluate, summarise
from opacus_pi.models.predictions import Predictions, predict


def net(seed=0, dropout=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6), nn.ReLU()] + [nn.Dropout(0.5)] * dropout
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 3))


def data(n=23, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (n,), generator=generator))


def one_by_one(model, examples):
    """Losses, confidences, margins, correctness of one example at a time, by hand."""
    model.eval()
    rows = []
    for x, y in examples:
        logits = model(x[None]).detach().double()[0]
        p = (logits - logits.max()).exp()
        p = (p / p.sum()).numpy()
        rows.append((-np.log(p[y]), p[y], np.log(p[y] / (1 - p[y])), p[y] == p.max()))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch_size", [1, 7, 23, 256])
def test_predictions_equal_a_loop_over_examples(reduction, batch_size):
    model, examples = net(), data()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    got = predict(model, examples, criterion, batch_size=batch_size)
    losses, confidences, margins, correct = one_by_one(net(), examples)
    np.testing.assert_allclose(got.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(got.confidences, confidences, rtol=1e-5)
    np.testing.assert_allclose(got.margins, margins, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.correct, correct)
    assert len(got) == 23
    assert criterion.reduction == reduction


def test_a_loader_is_read_in_its_own_order():
    model, examples = net(), data()
    whole = predict(model, examples, nn.CrossEntropyLoss())
    turned = DataLoader(examples, sampler=list(range(22, -1, -1)), batch_size=5)
    got = predict(model, turned, nn.CrossEntropyLoss())
    np.testing.assert_allclose(got.losses, whole.losses[::-1], rtol=1e-6)


def test_margins_do_not_cancel_where_confidences_round_to_one():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], torch.zeros(len(x))], dim=1)

    examples = TensorDataset(
        torch.tensor([[80.0], [90.0]]), torch.zeros(2, dtype=torch.long)
    )
    got = predict(Sure(), examples, nn.CrossEntropyLoss())
    assert got.confidences.tolist() == [1.0, 1.0]
    np.testing.assert_allclose(got.margins, [80.0, 90.0])


def test_no_trace_on_modes_buffers_gradients_and_random_states():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    model = net(dropout=True).train()
    model[1].eval()  # a frozen BatchNorm inside a training model
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    examples = Augmented(*data().tensors)
    loader = DataLoader(examples, batch_size=4, shuffle=True)
    for source in (examples, loader):
        predict(model, source, nn.CrossEntropyLoss())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_modes_come_back_after_an_error():
    model = net().train()
    with pytest.raises(RuntimeError):
        predict(model, [(torch.zeros(2, 9), torch.zeros(2).long())], nn.MSELoss())
    assert model.training


def test_a_model_wrapped_by_opacus_says_the_same():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    want = predict(plain, data(), nn.CrossEntropyLoss())
    wrapped = GradSampleModule(plain).train()
    got = predict(wrapped, data(), nn.CrossEntropyLoss())
    np.testing.assert_array_equal(got.losses, want.losses)
    assert all(p.grad_sample is None for p in plain.parameters())


@pytest.mark.parametrize(
    ("batches", "criterion", "message"),
    [
        (
            [],
            nn.CrossEntropyLoss(),
            r"data must contain at least one example, got \[\]",
        ),
        (
            [(torch.zeros(2, 4), torch.zeros(2).long())],
            lambda outputs, labels: outputs.sum(),
            'reduction="none"',
        ),
        (
            [(torch.zeros(2, 4), torch.zeros(2, 3))],
            nn.MSELoss(),
            r"class scores \(b, num_classes\)",
        ),
        (
            [(torch.zeros(4), torch.tensor(0))] * 2,
            nn.CrossEntropyLoss(),
            "data must .*Pass a list of single examples in",
        ),
    ],
)
def test_bad_input_is_one_clear_error(batches, criterion, message):
    with pytest.raises(ValueError, match=message):
        predict(net(), batches, criterion)


def test_evaluate_names_every_metric():
    sets = {name: data(30, seed) for seed, name in enumerate(["forget", "retain"])}
    got = evaluate(net(), nn.CrossEntropyLoss(), test=data(30, 9), **sets)
    forget = one_by_one(net(), sets["forget"])
    assert got["unlearning_accuracy"] == pytest.approx(1 - forget[3].mean())
    assert got["forget_loss"] == pytest.approx(forget[0].mean(), rel=1e-5)
    assert got["forget_confidence"] == pytest.approx(forget[1].mean(), rel=1e-5)
    right = one_by_one(net(), sets["retain"])[3].mean()
    assert got["retain_accuracy"] == pytest.approx(right)
    assert got["test_accuracy"] == pytest.approx(
        one_by_one(net(), data(30, 9))[3].mean()
    )
    assert 0 <= got["membership_inference"] <= 1
    assert 0.5 <= got["attacker_accuracy"] <= 1


def test_summary_of_a_model_that_memorised():
    def sure(confidence, n=50):
        p = np.full(n, confidence) + np.linspace(0, 0.01, n)
        return Predictions(-np.log(p), p, np.log(p / (1 - p)), p > 0.5)

    got = summarise(forget=sure(0.95), retain=sure(0.95), test=sure(0.3))
    assert got["unlearning_accuracy"] == 0
    assert got["retain_accuracy"] == 1
    assert got["test_accuracy"] == 0
    assert got["membership_inference"] == 0
    assert got["attacker_accuracy"] == 1


def test_data_sets_of_other_packages_are_read_as_data_sets():
    datasets = pytest.importorskip("datasets")
    x, y = torch.randn(9, 2), torch.arange(9) % 3
    columns = {"input": x.tolist(), "labels": y.tolist()}
    rows = datasets.Dataset.from_dict(columns).with_format("torch")
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    found = predict(model, rows, nn.CrossEntropyLoss())
    expected = predict(model, TensorDataset(x, y), nn.CrossEntropyLoss())
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
