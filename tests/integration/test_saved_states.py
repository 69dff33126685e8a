"""States that a recorder saves: same training, files, budget, participations."""

import os
import shutil
import stat

import numpy as np
import pytest
import torch

from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.recording import Checkpoints
from opacus_pi.recording.checkpoints import thinned
from tests.integration.rewinding import SIZE, Saved, net, weights
from tests.private_training import Log

KINDS = [
    {"private": True, "poisson": True},
    {"private": True, "poisson": False},
    {"private": False, "noise": 0.0, "norm": True, "poisson": False},
    {"private": False, "noise": 0.1},
]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit(kind, tmp_path):
    plain = Saved(**kind)
    after_plain = torch.rand(3), np.random.rand()
    saved = Saved(tmp_path / "states", every=2, **kind)
    after_saved = torch.rand(3), np.random.rand()
    assert torch.equal(weights(plain.net), weights(saved.net))
    assert torch.equal(after_plain[0], after_saved[0])
    a, b = plain.engine.ledger, saved.engine.ledger
    np.testing.assert_array_equal(a.grad_norms, b.grad_norms)
    assert a.weights == b.weights


@pytest.mark.parametrize("kind", KINDS)
def test_states_hold_what_the_updates_left(kind, tmp_path):
    saved = Saved(tmp_path / "states", every=5, **kind)
    torch.manual_seed(0)
    first = net(kind.get("norm", False)).state_dict()
    assert saved.states.steps == (0, 5, 10, 15)
    for name, value in first.items():
        assert torch.equal(saved.states.load(0)["model"][name], value), name
    last = saved.states.load(15)
    for name, value in saved.net.state_dict().items():
        assert torch.equal(last["model"][name], value), name
    momentum = last["optimizer"]["state"][0]["momentum_buffer"]
    now = saved.plain.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, now)
    assert last["parameters"] == [[n for n, _ in saved.net.named_parameters()]]


@pytest.mark.parametrize("poisson", [True, False])
def test_every_participation_is_recorded_with_its_norm(poisson, tmp_path):
    """The record holds what the optimizer reported, update by update."""
    saved = Saved(tmp_path / "states", every=4, poisson=poisson, recorder=Log)
    log, record = saved.engine.recorder, saved.states.record
    found = zip(record.indices.tolist(), record.norms.tolist(), strict=True)
    assert sorted(found) == sorted(log.observed)
    assert record.num_steps == len(log.updates) == 15
    assert record.noise_std.tolist() == [u["noise_std"] for u in log.updates]
    assert len(record.steps) == sum(len(record.batch(t)) for t in range(1, 16))
    np.testing.assert_allclose(record.learning_rates[::5, 0], [0.1, 0.05, 0.025])


def test_participations_of_monitored_training_are_recorded_without_norms(tmp_path):
    saved = Saved(tmp_path / "s", private=False, poisson=False, noise=0.0, every=4)
    record = saved.states.record
    for epoch in range(3):
        drawn = [record.batch(5 * epoch + t) for t in range(1, 6)]
        assert np.sort(np.concatenate(drawn)).tolist() == list(range(SIZE))
    assert np.isnan(record.norms).all()


def test_reading_the_record_again_adds_nothing(tmp_path):
    saved = Saved(tmp_path / "states", every=4)
    first, again = saved.states.record, Checkpoints(tmp_path / "states").record
    np.testing.assert_array_equal(first.steps, again.steps)
    saved.train(1)
    assert saved.states.record.num_steps == 20
    assert Checkpoints(tmp_path / "states").record.num_steps == 20


def test_files_are_the_owners_and_run_no_code(tmp_path):
    Saved(tmp_path / "states", every=5)
    for path in (tmp_path / "states").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert not path.name.endswith(".tmp")
    state = tmp_path / "states" / "state-00000005.pt"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"state": Evil()}, state)
    with pytest.raises(ValueError, match="without running code"):
        Checkpoints(tmp_path / "states").load(5)
    assert not (tmp_path / "was-run").exists()


def test_damaged_and_foreign_states_are_refused(tmp_path):
    saved = Saved(tmp_path / "a", every=5)
    Saved(tmp_path / "b", every=5)
    path = tmp_path / "a" / "state-00000005.pt"
    whole = path.read_bytes()
    changed = torch.load(path, weights_only=True)
    changed["state"]["model"]["0.weight"][0, 0] += 1
    torch.save(changed, path)
    with pytest.raises(ValueError, match="match its checksum"):
        saved.states.load(5)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="state-00000005"):
        saved.states.load(5)
    path.write_bytes((tmp_path / "b" / path.name).read_bytes())
    with pytest.raises(ValueError, match="one directory for each run"):
        saved.states.load(5)
    path.write_bytes((tmp_path / "a" / "state-00000010.pt").read_bytes())
    with pytest.raises(ValueError, match="must hold update 5"):
        saved.states.load(5)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        saved.states.load(5)


def test_the_disk_budget_keeps_the_first_state_and_spreads_the_others(tmp_path):
    largest = Saved(tmp_path / "one", every=5).states.size(10)
    saved = Saved(tmp_path / "states", every=1, max_bytes=6 * largest)
    steps = saved.states.steps
    assert steps[0] == 0 and 4 <= len(steps) <= 6
    assert sum(saved.states.size(step) for step in steps) <= 6 * largest
    assert saved.states.record.kept == steps
    with pytest.raises(ValueError, match="max_bytes must be at least the size"):
        Saved(tmp_path / "small", max_bytes=100)


def test_thinning_depends_on_numbers_only():
    assert thinned([0, 1], 5) == [0, 1]
    assert thinned(list(range(0, 90, 10)), 5) == [0, 20, 40, 60, 80]
    assert thinned([0, 10, 20], 1) == [0]


def test_a_directory_holds_one_run(tmp_path):
    Saved(tmp_path / "states", every=5)
    with pytest.raises(ValueError, match="files of an earlier run, and this is a new"):
        Saved(tmp_path / "states", every=5)


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": 0.5}, {"every": [3, 2]}, {"max_bytes": 0}]
)
def test_options_outside_their_domain_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        Checkpoints(tmp_path, **options)


def resumed(tmp_path, policy, *, before=2):
    """A run that is interrupted after some epochs, and one that goes on with it."""
    saved = Saved(tmp_path / "states", policy, every=4, train=False)
    saved.train(before)
    path = tmp_path / "checkpoint.pt"
    saved.engine.save_checkpoint(
        path=path, module=saved.model, optimizer=saved.optimizer
    )
    return saved, path


def test_a_resumed_run_goes_on_with_its_record(tmp_path):
    policy = DeletionPolicy(2.0, 1e-5)
    saved, path = resumed(tmp_path, policy)
    run = saved.states.record.run
    saved.train(1)  # these updates are lost
    again = Saved(tmp_path / "states", policy, every=4, train=False)
    again.engine.load_checkpoint(
        path=path, module=again.model, optimizer=again.optimizer, restore_rng=True
    )
    assert again.states.steps == (0, 4, 8)
    again.train(1)
    record = again.states.record
    assert (record.run, record.num_steps) == (run, 15)
    assert again.states.steps == (0, 4, 8, 12)
    whole = Saved(tmp_path / "whole", policy, every=4, train=False)
    whole.train(2)
    whole.train(1)
    expected = whole.states.record
    for name in ("steps", "indices", "norms", "noise_std"):
        np.testing.assert_array_equal(getattr(record, name), getattr(expected, name))


@pytest.mark.parametrize("other", [None, DeletionPolicy(1.0, 1e-5)])
def test_a_policy_cannot_be_changed_by_resuming(other, tmp_path):
    saved, path = resumed(tmp_path, DeletionPolicy(2.0, 1e-5))
    again = Saved(tmp_path / "states", other, every=4, train=False)
    with pytest.warns(UserWarning, match="made or changed during a run"):
        again.engine.load_checkpoint(
            path=path, module=again.model, optimizer=again.optimizer
        )


@pytest.mark.parametrize(
    ("is_other", "reason"),
    [(False, "no participations.* were deleted"), (True, "participations of another")],
)
def test_a_directory_without_the_files_of_the_run_is_said(tmp_path, is_other, reason):
    _, path = resumed(tmp_path, None)
    folder = tmp_path / "states"
    for block in folder.glob("participations-*"):
        block.unlink()
    if is_other:
        other = Saved(tmp_path / "other", every=4).states
        other.flush()
        for block in other.directory.glob("participations-*"):
            shutil.copy(block, folder)
    again = Saved(folder, every=4, train=False)
    with pytest.warns(UserWarning, match=reason):
        again.engine.load_checkpoint(
            path=path, module=again.model, optimizer=again.optimizer
        )


def test_what_was_not_written_before_a_crash_counts_as_unknown(tmp_path):
    """If blocks are missing, anybody may have been in the updates they covered."""
    saved, path = resumed(tmp_path, None)
    blocks = sorted((tmp_path / "states").glob("participations-*"))
    blocks[-1].unlink()
    again = Saved(tmp_path / "states", every=4, train=False)
    again.engine.load_checkpoint(
        path=path, module=again.model, optimizer=again.optimizer
    )
    record = again.states.record
    assert record.num_steps == 10
    assert record.num_unattributed[8:].tolist() == [SIZE, SIZE]
