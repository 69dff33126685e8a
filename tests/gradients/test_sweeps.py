import sys

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from opacus_pi.gradients import norm_sweep, per_example_grad_norms, sweep

from .cases import make
from .oracle import loop_norms

CRITERION = nn.CrossEntropyLoss()
LOSSES = nn.CrossEntropyLoss(reduction="none")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sweep_in_the_order_of_the_data_set(batch_size):
    model, x, y = make("conv-mixed")
    found = sweep(model, CRITERION, TensorDataset(x, y), batch_size=batch_size)
    with torch.no_grad():
        probabilities = model.eval()(x).double().softmax(1)
    one_hot = nn.functional.one_hot(y, 5)
    errors = (probabilities - one_hot).norm(dim=1)
    correct = probabilities.argmax(1) == y
    close = torch.testing.assert_close
    close(found.confidences, probabilities[range(len(y)), y], rtol=1e-5, atol=0)
    close(found.errors, errors, rtol=1e-5, atol=0)
    assert torch.equal(found.correct, correct)
    close(found.grad_norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0)


def test_workers_keep_the_order_and_leave_no_trace():
    model, x, y = make("mlp")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = sweep(model, CRITERION, TensorDataset(x, y), batch_size=2, num_workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    alone = sweep(model, CRITERION, TensorDataset(x, y), batch_size=2)
    assert torch.equal(found.grad_norms, alone.grad_norms)
    assert torch.equal(found.confidences, alone.confidences)
    with pytest.raises(ValueError, match="num_workers must be"):
        sweep(model, CRITERION, TensorDataset(x, y), num_workers=-1)
    torch.testing.assert_close(
        found.grad_norms, loop_norms(model, LOSSES, x, y), rtol=1e-5, atol=0
    )


def test_norm_sweep_is_the_sweeps_norms():
    model, x, y = make("mlp")
    data_set = TensorDataset(x, y)
    swept = norm_sweep(model, CRITERION, data_set, batch_size=3)
    assert torch.equal(
        swept, sweep(model, CRITERION, data_set, batch_size=3).grad_norms
    )


def test_no_confidences_without_labels():
    model = nn.Linear(3, 2)
    data = [(torch.randn(3), torch.randn(2)) for _ in range(4)]
    found = sweep(model, nn.MSELoss(), data)
    assert found.confidences is found.errors is found.correct is None
    x, y = (torch.stack(column) for column in zip(*data, strict=True))
    expected = loop_norms(model, lambda o, t: (o - t).square().mean(1), x, y.double())
    torch.testing.assert_close(found.grad_norms, expected, rtol=1e-5, atol=0)


def test_errors_do_not_cancel_for_confident_examples():
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
    margins = [12.0, 60.0]
    found = sweep(model, CRITERION, [(torch.tensor([m]), 0) for m in margins])
    tails = torch.tensor(margins).neg().double().exp()
    tails = tails / (1 + tails)
    torch.testing.assert_close(found.errors, tails * 2**0.5, rtol=1e-12, atol=0)
    expected = (tails * 2**0.5 * torch.tensor(margins))[0]
    torch.testing.assert_close(found.grad_norms[0], expected, rtol=1e-6, atol=0)


def test_collate_fn_and_dict_inputs():
    model, x, y = make("dict")
    items = [
        {"a": a, "b": b, "label": t} for a, b, t in zip(x["a"], x["b"], y, strict=True)
    ]

    def collate(batch):
        columns = torch.utils.data.default_collate(batch)
        return {"a": columns["a"], "b": columns["b"]}, columns["label"]

    found = norm_sweep(model, CRITERION, items, collate_fn=collate, batch_size=3)
    expected = per_example_grad_norms(model, CRITERION, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_empty_data_set():
    assert len(norm_sweep(nn.Linear(2, 2), CRITERION, [])) == 0


def test_data_set_without_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.randn(2), 0

    with pytest.raises(
        ValueError,
        match="data_set must be a map-style data set with __len__ and __getitem__, "
        "got Stream",
    ):
        norm_sweep(nn.Linear(2, 2), CRITERION, Stream())


def test_batches_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"a pair \(x, y\).*collate_fn"):
        norm_sweep(nn.Linear(2, 2), CRITERION, [torch.randn(2)])


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size must be above 0, got 0.0"):
        norm_sweep(nn.Linear(2, 2), CRITERION, [], batch_size=0)


def test_progress_bar_only_for_long_sweeps_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    data = [(torch.randn(2), 0) for _ in range(4)]
    norm_sweep(nn.Linear(2, 2), CRITERION, data)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("opacus_pi.gradients.sweeps._SECONDS_BEFORE_BAR", 0.0)
    norm_sweep(nn.Linear(2, 2), CRITERION, data)
    assert "gradient norms" in capsys.readouterr().err
    norm_sweep(nn.Linear(2, 2), CRITERION, data, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    norm_sweep(nn.Linear(2, 2), CRITERION, data)
    assert capsys.readouterr().err == ""
