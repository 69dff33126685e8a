"""The unlearner: loops, refuses, records."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.accounting import fingerprint
from opacus_pi.unlearning import FineTune, Langevin, Unlearner
from tests.unlearning.unlearners import (
    CRITERION,
    data,
    ledger_of,
    net,
    state_bytes,
    unlearner,
)


def test_run_hands_back_control_after_each_update():
    mine = unlearner()
    weights = [mine.model[0].weight.detach().clone()]
    for step in mine.run(DataLoader(data(), 10), 5):
        assert mine.model.training
        mine.model.eval()  # looking in between does no harm
        weights.append(mine.model[0].weight.detach().clone())
        assert len(weights) == step + 1
        assert not torch.equal(weights[-1], weights[-2])
    assert step == 5


def test_the_caller_may_stop():
    mine = unlearner()
    for step in mine.run(DataLoader(data(), 10), 1000):
        if step == 2:
            break
    assert step == 2


def test_zero_steps_change_nothing():
    mine = unlearner()
    before = state_bytes(mine.model)
    assert list(mine.run(DataLoader(data(), 10), 0)) == []
    assert state_bytes(mine.model) == before


def test_the_callers_model_is_untouched_bit_for_bit():
    model = net().train()
    CRITERION(model(data().tensors[0]), data().tensors[1]).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = state_bytes(model)
    list(unlearner(model, method=Langevin(0.5)).run(DataLoader(data(), 10), 4))
    unlearner(model).unlearn(data(), [1, 2], num_epochs=1)
    assert state_bytes(model) == before
    assert model.training
    assert all(
        torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True)
    )


def test_frozen_weights_stay():
    model = net()
    model[0].requires_grad_(False)
    mine = unlearner(model, method=Langevin(0.5))
    list(mine.run(DataLoader(data(), 10), 3))
    assert torch.equal(mine.model[0].weight, model[0].weight)
    assert not torch.equal(mine.model[2].weight, model[2].weight)


def test_the_scheduler_steps_after_each_pass():
    rates = []

    def optimizer(params):
        rates.append(torch.optim.SGD(params, lr=1.0))
        return rates[-1]

    mine = unlearner(
        optimizer=optimizer,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1),
    )
    seen = [
        rates[-1].param_groups[0]["lr"] for _ in mine.run(DataLoader(data(), 10), 7)
    ]
    np.testing.assert_allclose(seen, [1.0] * 3 + [0.1] * 3 + [0.01])


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="retain_loader"):
        next(unlearner().run([], 3))


def test_a_scalar_criterion_is_refused():
    mine = Unlearner(net(), criterion=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match='reduction="none"'):
        next(mine.run(DataLoader(data(), 10), 3))


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps must .*got -1"):
        unlearner().run(DataLoader(data(), 10), -1)


# --- unlearn ---
def test_unlearn_never_shows_the_forget_set():
    train_set = data()
    seen = set()

    class Watched(torch.utils.data.Dataset):
        tensors = train_set.tensors

        def __len__(self):
            return len(train_set)

        def __getitem__(self, i):
            seen.add(int(i))
            return train_set[i]

    mine = unlearner(method=Langevin(0.01))
    mine.unlearn(Watched(), [3, 7, 9], num_epochs=2, batch_size=4)
    assert seen == set(range(30)) - {3, 7, 9}
    mine.unlearn(Watched(), [5], num_epochs=0)
    np.testing.assert_array_equal(mine.forgotten, [3, 5, 7, 9])


def test_a_second_request_leaves_out_the_first():
    seen = []

    class Watched(TensorDataset):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    train_set = Watched(*data().tensors)
    mine = unlearner()
    first = mine.unlearn(train_set, [0, 1], num_epochs=1)
    kept = state_bytes(first.model)
    seen.clear()
    second = mine.unlearn(train_set, [2], num_epochs=1)
    assert sorted(seen) == list(range(3, 30))
    assert state_bytes(first.model) == kept != state_bytes(second.model)
    assert second.record["forgotten_before"] == [0, 1]


def test_the_trace_looks_before_and_after_each_epoch():
    calls = []

    def evaluate(model):
        assert not model.training
        calls.append(state_bytes(model))
        return {"number": float(len(calls))}

    model = net()
    result = unlearner(model).unlearn(data(), [0], 3, evaluate, batch_size=10)
    assert result.trace.times == [0, 1, 2, 3]
    np.testing.assert_array_equal(result.trace["number"], [1, 2, 3, 4])
    assert calls[0] == state_bytes(model) and calls[3] == state_bytes(result.model)
    assert result.record["num_steps"] == 9
    assert not result.model.training
    assert all(p.grad is None for p in result.model.parameters())


def test_evaluating_does_not_change_the_run():
    quiet = unlearner(seed=3, method=Langevin(0.1)).unlearn(data(), [0], 2)
    loud = unlearner(seed=3, method=Langevin(0.1)).unlearn(
        data(), [0], 2, evaluate=lambda m: {"sum": m(torch.ones(1, 5)).sum().item()}
    )
    assert state_bytes(quiet.model) == state_bytes(loud.model)


def test_every_method_sees_the_data_in_the_same_order():
    def order(method):
        seen = []

        class Watched(TensorDataset):
            def __getitem__(self, i):
                seen.append(i)
                return super().__getitem__(i)

        unlearner(seed=3, method=method).unlearn(Watched(*data().tensors), [0], 2)
        return seen

    assert order(FineTune()) == order(Langevin(0.5))


def test_an_interrupted_run_leaves_its_trace_and_model():
    def evaluate(model):
        if len(mine.trace) == 2:
            raise KeyboardInterrupt
        return {"one": 1.0}

    mine = unlearner()
    with pytest.raises(KeyboardInterrupt):
        mine.unlearn(data(), [4], 5, evaluate, batch_size=10)
    assert mine.trace.times == [0, 1]
    assert np.array_equal(mine.forgotten, [4])
    assert not torch.equal(mine.model[0].weight, net()[0].weight)


def test_the_record_is_json_and_says_what_was_run():
    result = unlearner(seed=9, method=Langevin(0.1)).unlearn(data(), [2, 1], 1)
    record = json.loads(json.dumps(result.record))
    assert record["forget_indices"] == [1, 2]
    assert record["method"] == str(Langevin(0.1))
    assert record["optimizer"]["name"] == "SGD" and record["optimizer"]["lr"] == 0.01
    assert record["seed"] == 9 and record["batch_size"] == 64
    assert record["data_set"] == fingerprint(data())
    assert record["seconds"] > 0


def test_the_default_generator_follows_torch():
    def run():
        torch.manual_seed(8)
        mine = Unlearner(net(), criterion=CRITERION, method=Langevin(0.1))
        return state_bytes(mine.unlearn(data(), [0], 1).model)

    torch.manual_seed(8)
    first = run()
    assert run() == first


@pytest.mark.parametrize(
    "indices, message",
    [
        ([], "at least one index"),
        ([1, 1], "duplicates"),
        ([30], r"in \[0, 30\)"),
        ([-1], r"in \[0, 30\)"),
        (list(range(30)), "at least one example to keep"),
        (np.ones(30, dtype=bool), "flatnonzero"),
        (7, r"^forget_indices must be a flat list, got 7. Write \[7\]."),
        ("p08", r"list of positions .*got 'p08'. A person is .*owners\['p08'\]"),
        ([3, "p08"], r"got 'p08'. A person is"),
        ("3", r"got '3'. Convert text to whole numbers, as in \[3\]"),
        (np.array([3, "p08"], dtype=object), r"owners\['p08'\]"),
        ({"p08": [3]}, "got a dict. Pass the list of one person"),
        ({3, 4}, r"got a set. Pass sorted\(...\)"),
    ],
)
def test_bad_forget_sets_are_refused_and_nothing_happens(indices, message):
    mine = unlearner(ledger=ledger_of(data()))
    before = state_bytes(mine.model)
    with pytest.raises(ValueError, match=message):
        mine.unlearn(data(), indices, 1)
    with pytest.raises(ValueError, match=message):
        mine.plan(indices)
    assert state_bytes(mine.model) == before and mine.forgotten.size == 0


def test_a_ledger_of_other_data_is_refused():
    other = TensorDataset(torch.randn(30, 5), torch.zeros(30))
    with pytest.raises(ValueError, match="data_set"):
        unlearner(ledger=ledger_of(other)).unlearn(data(), [0], 1)


@pytest.mark.parametrize("method", ["langevin", Langevin, None])
def test_a_method_is_an_object(method):
    remedy = r"FineTune\(\) or Langevin\(noise_std=0.02\)"
    with pytest.raises(ValueError, match=f"^method must .*{remedy}"):
        unlearner(method=method)


@pytest.mark.parametrize("number", [-1, 1.5, "2", None])
def test_a_number_of_epochs_is_whole_and_not_negative(number):
    mine = unlearner()
    with pytest.raises(ValueError, match="^num_epochs must be a whole number, at le"):
        mine.unlearn(data(), [1], number)
    assert mine.forgotten.size == 0


def test_no_epoch_is_said_to_change_nothing():
    mine = unlearner(ledger=ledger_of(data()))
    with pytest.warns(UserWarning, match="num_epochs=0 makes no update: the model kee"):
        result = mine.unlearn(data(), [1], np.int64(0))
    assert state_bytes(result.model) == state_bytes(net())


@pytest.mark.parametrize("evaluate", [0.5, {"a": 1}])
def test_an_evaluation_is_a_function(evaluate):
    mine = unlearner()
    with pytest.raises(ValueError, match="^evaluate must be a function of the model"):
        mine.unlearn(data(), [1], 1, evaluate=evaluate)
    assert mine.forgotten.size == 0


def test_texts_of_different_lengths_are_collated_by_the_users_function():
    generator = torch.Generator().manual_seed(0)
    texts = [
        (torch.randint(1, 9, (2 + i % 4,), generator=generator), i % 2)
        for i in range(12)
    ]

    def padded(items):
        rows = [text for text, _ in items]
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return x, torch.tensor([label for _, label in items])

    torch.manual_seed(0)
    words = nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0)
    model = nn.Sequential(words, nn.Linear(4, 2))

    def unlearned(data_set, **options):
        seeded = torch.Generator().manual_seed(1)
        mine = Unlearner(model, criterion=CRITERION, generator=seeded)
        return mine.unlearn(data_set, [3], num_epochs=1, batch_size=4, **options)

    with pytest.raises(ValueError, match="No collate_fn was given.*stack expects"):
        unlearned(texts)
    found = unlearned(texts, collate_fn=padded)
    x, y = padded(texts)  # one length for all, so that torch can collate them
    expected = unlearned(TensorDataset(x, y))
    pairs = zip(found.model.parameters(), expected.model.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"ledger": "ledger.safetensors"}, r"got a str\. .*GradNormLedger\.load"),
        ({"ledger": [1]}, "ledger must be a GradNormLedger"),
        ({"optimizer": 0.1}, "optimizer must be a function that makes the optimizer"),
        ({"scheduler": "cosine"}, "scheduler must be a function"),
    ],
)
def test_arguments_of_another_type_are_refused_at_once(argument, match):
    with pytest.raises(ValueError, match=match):
        Unlearner(nn.Linear(2, 2), criterion=nn.CrossEntropyLoss(), **argument)
