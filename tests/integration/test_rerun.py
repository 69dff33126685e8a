"""Updates that are made again, compared with updates written out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pi.integration.rerun import Rerun, require_repeatable
from opacus_pi.models.own_losses import per_example_criterion
from tests.integration.rewinding import CRITERION, Saved, net, weights


def rerun(saved, start, forget=(), **options):
    return Rerun(
        model=net(),
        criterion=per_example_criterion(CRITERION),
        record=saved.states.record,
        state=saved.states.load(start),
        forget=np.array(forget, dtype=np.int64),
        generator=torch.Generator().manual_seed(7),
        **{"train_set": saved.data, **options},
    )


def finished(run):
    assert list(run.run())[-1] == run.record.num_steps
    return run.model


@pytest.mark.parametrize("start", [0, 7])
def test_without_noise_the_same_batches_give_the_same_model(start, tmp_path):
    """Plain training on the recorded batches is repeated, momentum and schedule too."""
    saved = Saved(tmp_path / "s", private=False, noise=0.0, poisson=False, every=7)
    again = finished(rerun(saved, start))
    torch.testing.assert_close(weights(again), weights(saved.net), rtol=0, atol=1e-6)


def test_items_may_be_dicts_as_in_hugging_face(tmp_path):
    saved = Saved(tmp_path / "s", private=False, noise=0.0, poisson=False, every=7)
    dicts = [{"input": x, "labels": y} for x, y in saved.data]
    again = finished(rerun(saved, 7, train_set=dicts))
    torch.testing.assert_close(weights(again), weights(saved.net), rtol=0, atol=1e-6)


def test_private_updates_are_clipped_sums_over_the_expected_batch_size(tmp_path):
    """With next to no noise; the reference clips one gradient after another."""
    saved = Saved(tmp_path / "s", noise=1e-9, poisson=False, every=7)
    forget = [3, 11]
    again = finished(rerun(saved, 7, forget))
    record, state = saved.states.record, saved.states.load(7)
    model = net()
    model.load_state_dict(state["model"])
    buffers = [
        state["optimizer"]["state"][i]["momentum_buffer"].clone() for i in range(4)
    ]
    for step in range(8, 16):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for i in record.batch(step):
            if i in forget:
                continue
            x, y = saved.data[int(i)]
            loss = CRITERION(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            for total, g in zip(sums, grads, strict=True):
                total += g * min(1.0, 1.0 / float(norm + 1e-6))
        rate = record.learning_rates[step - 1, 0]
        size = state["settings"]["expected_batch_size"]
        with torch.no_grad():
            for p, total, b in zip(model.parameters(), sums, buffers, strict=True):
                b.mul_(0.9).add_(total / size)
                p -= rate * b
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=1e-5)


def test_large_batches_are_clipped_in_parts(tmp_path):
    saved = Saved(tmp_path / "s", noise=1e-9, poisson=False, every=7)
    whole = finished(rerun(saved, 7))
    parts = finished(rerun(saved, 7, max_batch_size=3))
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-6)


def test_fresh_noise_has_the_recorded_size(tmp_path):
    """Two updates without examples: noise only, over the expected batch size."""
    saved = Saved(tmp_path / "s", noise=2.0, every=14)
    moves = []
    for seed in range(60):
        run = rerun(saved, 14, range(39))
        run.forget = np.arange(40)
        run.generator = torch.Generator().manual_seed(seed)
        before = saved.states.load(14)
        after = finished(run)
        moved = [
            (p - before["model"][n]).flatten() for n, p in after.named_parameters()
        ]
        momentum = [
            before["optimizer"]["state"][i]["momentum_buffer"].flatten()
            for i in range(4)
        ]
        rate = run.record.learning_rates[14, 0]
        moves.append(torch.cat(moved) / -rate - 0.9 * torch.cat(momentum))
    noise = torch.stack(moves).detach().double() * 8
    assert float(noise.std()) == pytest.approx(2.0, rel=0.03)
    assert abs(float(noise.mean())) < 0.05


def test_poisson_batches_are_drawn_anew_from_the_rest(tmp_path):
    saved = Saved(tmp_path / "s", every=5)
    run = rerun(saved, 5, [0, 1, 2])
    drawn = [run._drawn(6) for _ in range(2000)]
    counts = np.bincount(np.concatenate(drawn), minlength=40)
    assert not counts[:3].any()
    assert counts[3:].mean() / 2000 == pytest.approx(0.2, abs=0.005)
    assert any(len(a) != len(b) for a, b in zip(drawn, drawn[1:], strict=False))


def test_the_global_generator_is_left_alone_and_the_seed_decides(tmp_path):
    saved = Saved(tmp_path / "s", every=5, dropout=True)
    torch.manual_seed(3)
    expected = torch.rand(1)
    results = []
    for _ in range(2):
        run = rerun(saved, 5, [1])
        run.model = net(dropout=True)
        torch.manual_seed(3)
        results.append(weights(finished(run)))
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(*results)


def test_the_model_is_plain_afterwards(tmp_path):
    model = finished(rerun(Saved(tmp_path / "s", every=5), 10))
    assert not any(
        hasattr(p, "grad_sample") or p.grad is not None for p in model.parameters()
    )
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_a_users_own_update_is_called_with_prepared_objects(tmp_path):
    saved = Saved(tmp_path / "s", noise=1e-9, poisson=False, every=7)
    calls = []

    def update(model, optimizer, batch):
        calls.append(len(batch[0]))
        CRITERION(model(batch[0]), batch[1]).backward()
        optimizer.step()

    own = finished(rerun(saved, 7, [3], update=update))
    torch.testing.assert_close(
        weights(own), weights(finished(rerun(saved, 7, [3]))), rtol=0, atol=1e-6
    )
    assert len(calls) == 8


def test_the_class_of_the_optimizer_is_that_of_the_training(tmp_path):
    saved = Saved(
        tmp_path / "s",
        private=False,
        noise=0.0,
        poisson=False,
        make_optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        every=7,
    )
    again = finished(rerun(saved, 7))
    torch.testing.assert_close(weights(again), weights(saved.net), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="AdamW"):
        finished(rerun(saved, 7, make_optimizer=lambda p: torch.optim.SGD(p, lr=1.0)))
    same = rerun(saved, 7, make_optimizer=lambda p: torch.optim.AdamW(p, lr=3.0))
    torch.testing.assert_close(weights(finished(same)), weights(again))


class OwnSGD(torch.optim.SGD):
    pass


def test_an_optimizer_that_is_not_torchs_must_be_given(tmp_path):
    def make(params):
        return OwnSGD(params, lr=0.1)

    saved = Saved(tmp_path / "s", every=7, make_optimizer=make)
    with pytest.raises(ValueError, match="OwnSGD, which is not torch's"):
        finished(rerun(saved, 7))
    finished(rerun(saved, 7, make_optimizer=make))


def test_another_architecture_is_refused(tmp_path):
    run = rerun(Saved(tmp_path / "s", every=7), 7)
    run.model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="architecture that was trained"):
        finished(run)


def test_runs_that_cannot_be_repeated_are_refused(tmp_path):
    saved = Saved(tmp_path / "s", every=7, poisson=False)
    record, state = saved.states.record, saved.states.load(7)
    with pytest.raises(ValueError, match="must be the data set of the run"):
        require_repeatable(record, state, torch.utils.data.Subset(saved.data, [0, 1]))

    def changed(**facts):
        own = {n: getattr(record, n) for n in record.__dataclass_fields__}
        return type(record)(**{**own, **facts})

    counts = np.zeros(15)
    counts[9] = 2
    with pytest.raises(ValueError, match="could not be matched to examples"):
        require_repeatable(changed(num_unattributed=counts), state, saved.data)
    rates = record.sample_rates.copy()
    rates[9] *= 2
    with pytest.raises(ValueError, match="one batch for each update"):
        require_repeatable(changed(sample_rates=rates), state, saved.data)
    adaptive = {**state, "settings": {**state["settings"], "clipping": "AdaClip"}}
    with pytest.raises(ValueError, match="flat clipping"):
        require_repeatable(record, adaptive, saved.data)
