"""The unlearner: copies, loops, refuses, records."""

import copy
import json

import numpy as np
import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.accounting import GradNormLedger, NoisySGD, fingerprint, privacy_losses
from opacus_pi.unlearning import FineTune, Langevin, Unlearner

CRITERION = nn.CrossEntropyLoss()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n=30):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 5), torch.arange(n) % 3)


def ledger_of(train_set, noise_std=2.0, clip=1.0, seed=0, **facts):
    norms = np.random.default_rng(seed).gamma(2.0, 0.2, size=(3, len(train_set)))
    mechanism = NoisySGD(30, 0.1, noise_std, clip)
    facts = {"data_set": fingerprint(train_set)} | facts
    return GradNormLedger(mechanism, [10, 20, 30], norms, **facts)


def unlearner(model=None, seed=0, **options):
    return Unlearner(
        net() if model is None else model,
        criterion=CRITERION,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def state_bytes(model):
    return {k: v.numpy().tobytes() for k, v in model.state_dict().items()}


# --- run ---


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
    with pytest.raises(ValueError, match="num_steps=-1"):
        unlearner().run(DataLoader(data(), 10), -1)


# --- where the model comes from ---


def dp_trained():
    train_set, engine = data(), PrivacyEngine()
    model = net()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(train_set, 10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        if len(y):
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    return model, train_set


def test_an_opacus_model_is_copied_bare():
    model, train_set = dp_trained()
    model.train()
    model(train_set.tensors[0])  # leaves activations behind, as a stray forward does
    calls = []
    model._module[1].register_forward_hook(lambda *_: calls.append(1))
    hooks_before = sum(len(m._forward_hooks) for m in model._module.modules())
    mine = unlearner(model)
    twin = mine.model
    assert type(twin) is nn.Sequential and twin is not model._module
    assert state_bytes(twin) == state_bytes(model._module)
    for module in twin.modules():
        assert not module._backward_hooks
        assert not hasattr(module, "activations")
        assert not hasattr(module, "autograd_grad_sample_hooks")
    assert sum(len(m._forward_hooks) for m in twin.modules()) == 1  # the user's own
    list(mine.run(DataLoader(train_set, 10), 2))
    assert calls
    for p in twin.parameters():
        assert not hasattr(p, "grad_sample") and not hasattr(p, "_forward_counter")
    assert sum(len(m._forward_hooks) for m in model._module.modules()) == hooks_before
    assert isinstance(model, GradSampleModule)


def test_a_child_that_happens_to_be_called_module_is_no_wrapper():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self._module = self.module = net()

        def forward(self, x):
            return 2 * self._module(x)

    assert type(unlearner(Doubled()).model) is Doubled


def test_a_model_that_keeps_its_last_output_can_be_copied():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            self.last = self.layer(x)
            return self.last

    model = Keeping()
    model(torch.ones(2, 5))
    assert torch.equal(unlearner(model).model.last, model.last)


def test_inputs_may_be_tuples():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    batch = (torch.ones(4, 5), torch.ones(4, 5)), torch.arange(4) % 3
    assert list(unlearner(Sum()).run([batch], 2)) == [1, 2]


def test_data_parallel_and_compiled_wrappers_are_taken_off():
    assert type(unlearner(nn.DataParallel(net())).model) is nn.Sequential
    compiled = torch.compile(net(), backend="eager")
    assert type(unlearner(compiled).model) is nn.Sequential


def test_straight_from_an_engine():
    model, train_set = dp_trained()

    class Engine:
        module, ledger = model, ledger_of(train_set)

    mine = Unlearner(Engine(), criterion=CRITERION)
    assert type(mine.model) is nn.Sequential
    assert mine.ledger is Engine.ledger
    other = ledger_of(train_set, seed=1)
    assert Unlearner(Engine(), criterion=CRITERION, ledger=other).ledger is other


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="model=dict"):
        Unlearner({}, criterion=CRITERION)


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
        (list(range(30)), "something to keep"),
        (np.ones(30, dtype=bool), "flatnonzero"),
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


# --- plan and guarantee ---


def test_plan_says_difficulty_and_cost():
    record = ledger_of(data())
    losses = privacy_losses(record, 4.0)
    hardest = np.argsort(losses)[-3:]
    plan = unlearner(ledger=record).plan(hardest, order=4.0, batch_size=10)
    assert plan.mean_loss == pytest.approx(losses[hardest].mean())
    below = (losses < plan.mean_loss).mean() * 100
    assert plan.percentile == pytest.approx(below)
    assert plan.num_retain == 27 and plan.steps_per_epoch == 3
    assert plan.predicted_epochs is None and "past runs" in plan.prediction
    assert not plan.ranking_only
    assert "percentile" in str(plan) and "unknown" in str(plan)


def test_plan_predicts_from_past_runs():
    record = ledger_of(data())
    losses = privacy_losses(record, 8.0)
    order = np.argsort(losses)
    easy, hard = order[:3], order[-3:]
    logs = np.log([losses[easy].mean(), losses[hard].mean()])
    middle = order[14:17]
    plan = unlearner(ledger=record).plan(middle, past_runs=[(easy, 2.0), (hard, 10.0)])
    slope = 8.0 / (logs[1] - logs[0])
    expected = 2.0 + slope * (np.log(losses[middle].mean()) - logs[0])
    assert plan.predicted_epochs == pytest.approx(expected)
    assert plan.predicted_steps == np.ceil(expected * plan.steps_per_epoch)
    assert plan.predicted_examples == np.ceil(expected * plan.num_retain)


def test_plan_without_noise_is_a_ranking():
    mine = unlearner(ledger=ledger_of(data(), noise_std=0.0))
    with pytest.raises(ValueError, match="assumed_noise_std"):
        mine.plan([0])
    plan = mine.plan([0], assumed_noise_std=1.0)
    assert plan.ranking_only and plan.guarantee.kind == "empirical"
    assert "a ranking only" in str(plan)


def test_an_assumed_noise_never_looks_real():
    record = ledger_of(data()).with_noise_std(2.0)
    mine = unlearner(ledger=record)
    plan = mine.plan([6])
    assert plan.ranking_only and plan.mean_loss == privacy_losses(record, 8.0)[6]
    for claim in (plan.guarantee, mine.unlearn(data(), [6], 0).guarantee):
        assert claim.kind == "empirical" and claim.divergences == ()
        assert "assumed noise_std=2 on the sum" in str(claim)


def test_plan_needs_a_ledger():
    with pytest.raises(ValueError, match="ledger=None"):
        unlearner().plan([0])


def test_plan_finds_the_columns_of_a_partial_ledger():
    full = ledger_of(data())
    some = full.subset([20, 4, 11])
    plan = unlearner(ledger=some).plan([11])
    assert plan.mean_loss == pytest.approx(privacy_losses(full, 8.0)[11])
    with pytest.raises(ValueError, match="examples of the ledger"):
        unlearner(ledger=some).plan([5])


def test_one_example_of_a_noisy_run_gives_an_estimate():
    record = ledger_of(data())
    claim = unlearner(ledger=record, method=Langevin(0.1)).unlearn(data(), [6], 1)
    claim = claim.guarantee
    assert claim.kind == "estimate"
    for order, divergence in zip(claim.orders, claim.divergences, strict=True):
        assert divergence == pytest.approx(privacy_losses(record, order)[6])
    assert 0 < claim.epsilon(1e-5) < np.inf
    assert any("upper bound" in a.statement for a in claim.unmet)


def batch_norm_net():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "options, indices, unmet",
    [
        ({}, [1, 2], "the forget set is one example"),
        ({"noise_std": 0.0}, [1], "training added noise"),
        ({"model": batch_norm_net()}, [1], "its own gradient only"),
        ({"ledger": None}, [1], "training added noise"),
    ],
)
def test_otherwise_nothing_finite_is_claimed(options, indices, unmet):
    record = ledger_of(data(), noise_std=options.pop("noise_std", 2.0))
    mine = unlearner(**({"ledger": record} | options))
    claim = mine.unlearn(data(), indices, 0).guarantee
    assert claim.kind == "empirical" and claim.divergences == ()
    assert any(unmet in a.statement for a in claim.unmet)


def test_a_second_request_is_judged_with_the_first():
    mine = unlearner(ledger=ledger_of(data()))
    assert mine.unlearn(data(), [1], 0).guarantee.kind == "estimate"
    assert mine.unlearn(data(), [1], 0).guarantee.kind == "estimate"
    assert mine.unlearn(data(), [2], 0).guarantee.kind == "empirical"


def test_several_runs_of_one_training():
    runs = [ledger_of(data(), seed=s) for s in (0, 1)]
    mine = unlearner(ledger=runs)
    claim = mine.unlearn(data(), [6], 0).guarantee
    for order, found in zip(claim.orders[::9], claim.divergences[::9], strict=True):
        assert found == pytest.approx(privacy_losses(runs, order)[6])
    assert copy.deepcopy(mine.plan([6])).guarantee.kind == "estimate"
