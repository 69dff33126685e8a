"""A killed run that is resumed equals the uninterrupted one, bit for bit."""

import copy
import io
import itertools
import multiprocessing
import os
import pickle
import random
import time

import numpy as np
import opacus
import pytest
import torch
from opacus.schedulers import ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, dataloader

from opacus_pi.accounting import RenyiFilter
from opacus_pi.files.atomic_file import replacing
from opacus_pi.files.checksummed_state import with_checksum
from opacus_pi.integration.checkpoints import CHECKPOINT_KEY, FILTER_KEY
from opacus_pi.recording import Recorder
from opacus_pi.recording.random_states import RandomStates
from tests.integration.killed_training import (
    Jittered,
    assert_same,
    child,
    outcome,
    prepared,
    train,
    update,
)
from tests.private_training import ADAPTIVE

pytestmark = [
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]


class Interrupted(Exception):
    pass


def interrupted(folder, at, *args, **options):
    """Train up to an update, leaving the last checkpoint."""

    def stop(step):
        if step == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(folder, *args, report=stop, **options)


def saved(engine, model, optimizer, **options):
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer, **options)
    file.seek(0)
    return file


# --------------------------------------------------------------- killed, really


@pytest.mark.parametrize(("kind", "save_every"), [("private", None), ("monitored", 3)])
def test_killed_three_times_and_resumed(tmp_path, kind, save_every):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.integration.killed_training"])
    chance = random.Random(f"{kind}{save_every}")
    for at in [*sorted(chance.sample(range(1, 40), 3)), None]:
        here, there = processes.Pipe()
        process = processes.Process(
            target=child, args=(tmp_path, kind, save_every, there)
        )
        process.start()
        there.close()
        while (step := here.recv()) != "done":
            here.send("go on")
            if at is not None and step >= at:
                break
        if at is not None:
            assert step in (at, at + 1), f"at update {step}, to be killed at {at}"
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
        process.join()
        assert process.exitcode == (0 if at is None else -9)
    resumed = torch.load(tmp_path / "outcome.pt", weights_only=False)
    whole = outcome(*train(tmp_path / "none", kind, save_every=10**9))
    assert_same(whole, resumed)
    assert whole["mechanism"].num_steps == 40
    assert len([p for p in os.listdir(tmp_path) if p.endswith(".pt")]) == 2


def test_a_process_killed_while_saving_leaves_the_file_before(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")
    if (child_id := os.fork()) == 0:
        with replacing(path) as file:
            file.write(b"half of the ne")
            os.kill(os.getpid(), 9)
    os.waitpid(child_id, 0)
    assert path.read_text() == "old"
    with pytest.raises(Interrupted), replacing(path) as file:
        file.write(b"half of the ne")
        raise Interrupted
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]  # the part of the killed process is gone


def test_a_checkpoint_that_fails_to_be_saved_leaves_the_one_before(tmp_path):
    engine, model, optimizer, _ = prepared("private")
    path = tmp_path / "checkpoint.pt"
    engine.save_checkpoint(path=path, module=model)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        own = {"mine": lambda: None}
        engine.save_checkpoint(path=str(path), module=model, checkpoint_dict=own)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    engine.save_checkpoint(path=link, module=model, optimizer=optimizer)
    assert link.is_symlink() and path.read_bytes() != before


# --------------------------------------------------------------- from every moment


WORKERS = {"num_workers": 1, "own_generators": True}
BY_LAYER = {"clipping": "per_layer", "max_grad_norm": [0.5] * 4}


@pytest.mark.parametrize(
    ("save_every", "options"),
    [
        (None, {}),
        (3, {}),
        (8, {}),  # right after the last batch of an epoch
        (3, {"own_generators": True}),
        (None, {"poisson_sampling": False}),
        (3, {"poisson_sampling": False}),
        (3, {"poisson_sampling": False, "own_generators": True}),
        (None, WORKERS),
        (3, WORKERS),
        (3, {"num_workers": 1, "poisson_sampling": False}),
        (3, {"grad_sample_mode": "functorch", **BY_LAYER}),
        (3, {"clipping": "adaptive", **ADAPTIVE}),
    ],
    ids=str,
)
def test_a_private_run_resumes(tmp_path, save_every, options):
    options = {**options, "num_epochs": 2}
    whole = outcome(*train(tmp_path / "none", "private", 10**9, **options))
    interrupted(
        tmp_path, 14 if save_every == 8 else 11, "private", save_every, **options
    )
    assert_same(whole, outcome(*train(tmp_path, "private", save_every, **options)))


@pytest.mark.parametrize(
    ("save_every", "options"),
    [
        (None, {"noise_std": 0.0, "poisson_sampling": False}),
        (3, {"noise_std": 0.0, "poisson_sampling": False}),
        (3, {"noise_std": 0.1, "own_generators": True}),
    ],
    ids=str,
)
def test_a_monitored_run_resumes(tmp_path, save_every, options):
    options = {**options, "num_epochs": 2}
    whole = outcome(*train(tmp_path / "none", "monitored", 10**9, **options))
    interrupted(tmp_path, 11, "monitored", save_every, **options)
    assert_same(whole, outcome(*train(tmp_path, "monitored", save_every, **options)))


def test_without_restoring_the_generators_stay_as_they_are(tmp_path):
    whole = outcome(*train(tmp_path, "private", None, num_epochs=1))
    engine, model, optimizer, _ = prepared("private")
    before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    engine.load_checkpoint(
        path=tmp_path / "checkpoint.pt", module=model, optimizer=optimizer
    )
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    now = outcome(engine, model)
    assert now.pop("next") != whole.pop("next")
    assert_same(whole, now)


def test_schedules_of_noise_go_on():
    def scheduled():
        run = prepared("private")
        return run, ExponentialNoise(run[2], gamma=0.9)

    def epoch(run, schedule):
        _, model, optimizer, loader = run
        for x, y in loader:
            update(model, optimizer, x, y)
        schedule.step()

    whole, schedule = scheduled()
    epoch(whole, schedule)
    file = saved(*whole[:3], noise_scheduler=schedule)
    epoch(whole, schedule)
    wanted = outcome(*whole[:2])
    resumed, again = scheduled()
    engine, model, optimizer, _ = resumed
    engine.load_checkpoint(
        path=file,
        module=model,
        optimizer=optimizer,
        noise_scheduler=again,
        restore_rng=True,
    )
    epoch(resumed, again)
    assert_same(wanted, outcome(*resumed[:2]))
    assert whole[0].ledger.mechanism.noise_std[-1] == pytest.approx(0.9)


def test_a_pass_that_was_left_is_over():
    def first_batches(run, num):
        _, model, optimizer, loader = run
        for number, (x, y) in enumerate(loader):
            if number == num:
                break
            update(model, optimizer, x, y)

    whole = prepared("private", recorder=Recorder())
    first_batches(whole, 4)
    file = saved(*whole[:3])
    first_batches(whole, 9)
    wanted = outcome(*whole[:2])
    resumed = prepared("private", recorder=Recorder())
    engine, model, optimizer, _ = resumed
    engine.load_checkpoint(
        path=file, module=model, optimizer=optimizer, restore_rng=True
    )
    first_batches(resumed, 9)
    assert_same(wanted, outcome(*resumed[:2]))


# --------------------------------------------------------------- what cannot be


def restored(file, run):
    engine, model, optimizer, _ = run
    return engine.load_checkpoint(
        path=file, module=model, optimizer=optimizer, restore_rng=True
    )


def test_nothing_prepared_nothing_loaded():
    run = prepared("private")
    file = saved(*run[:3])
    fresh = type(run[0])(accountant="rdp")
    with pytest.raises(ValueError, match="restore_rng.*make_private"):
        fresh.load_checkpoint(path=file, module=run[1], restore_rng=True)
    assert file.tell() == 0


def test_a_checkpoint_of_opacus_has_no_random_states():
    run = prepared("private")
    theirs, file = opacus.PrivacyEngine(accountant="rdp"), io.BytesIO()
    theirs.save_checkpoint(path=file, module=run[1], optimizer=run[2])
    file.seek(0)
    with pytest.raises(ValueError, match="no random states"):
        restored(file, run)


def test_other_generators():
    file = saved(*prepared("private", own_generators=True)[:3])
    before = torch.get_rng_state()
    run = prepared("private")
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="own generators.*batch_sampler"):
        restored(file, run)
    assert torch.equal(before, torch.get_rng_state())


# --------------------------------------------------------------- refused as a whole


def everything(engine, model, optimizer, loader):
    """Return all that loading a checkpoint may change."""
    own = loader.batch_sampler.generator
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "settings": (optimizer.noise_multiplier, optimizer.max_grad_norm),
        "history": list(engine.accountant.history),
        "recorded": engine.recorder.state_dict(),
        "refused": engine.recorder.refusal,
        "charges": engine.renyi_filter.state_dict(),
        "random": RandomStates({} if own is None else {"own": own}).collect(),
        "weights link": engine.recorder.chain.custody().to_json(),
    }


def edited(content, key, **changes):
    """Return a checkpoint with other entries under a key of ours, as if saved so."""
    state = {k: v for k, v in content[key].items() if k != "checksum"} | changes
    return {**content, key: with_checksum(state)}


REFUSED = {
    "generators": (
        lambda c: c,
        {"own_generators": False, "num_epochs": 0},
        "own gener",
    ),
    "setting": (
        lambda c: edited(
            c, CHECKPOINT_KEY, **{"run_state.setting.noise_multiplier": -1}
        ),
        {},
        "noise_multiplier",
    ),
    "python": (
        lambda c: edited(c, CHECKPOINT_KEY, **{"run_state.random.python": 0}),
        {},
        "saved random states",
    ),
    "position": (
        lambda c: edited(c, CHECKPOINT_KEY, **{"run_state.position.num_delivered": -7}),
        {},
        "saved position",
    ),
    "damaged": (
        lambda c: {**c, CHECKPOINT_KEY: {**c[CHECKPOINT_KEY], "num_steps": 3}},
        {},
        "checksum",
    ),
    "no charges": (
        lambda c: {k: v for k, v in c.items() if k != FILTER_KEY},
        {},
        "without a RenyiFilter",
    ),
    "other budgets": (
        lambda c: edited(c, FILTER_KEY, budget=torch.tensor(9.0)),
        {},
        "saved budget",
    ),
    "optimizer": (
        lambda c: {**c, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        {},
        "parameter groups",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_checkpoint_changes_nothing(name):
    edit, options, words = REFUSED[name]

    def run(num_epochs=1, **options):
        budgets = RenyiFilter(1e6, 4.0)
        options = {"own_generators": True, "renyi_filter": budgets, **options}
        _, model, optimizer, loader = parts = prepared("private", **options)
        for x, y in itertools.chain(*[loader] * num_epochs):
            update(model, optimizer, x, y)
        return parts

    content = torch.load(saved(*run(2)[:3]), weights_only=True)
    file = io.BytesIO()
    torch.save(edit(content), file)
    file.seek(0)
    parts = run(**options)
    scheduler = ExponentialNoise(parts[2], gamma=0.9)
    before = copy.deepcopy([everything(*parts), scheduler.state_dict()])
    with pytest.raises(ValueError, match=words):
        parts[0].load_checkpoint(
            path=file,
            module=parts[1],
            optimizer=parts[2],
            noise_scheduler=scheduler,
            restore_rng=True,
        )
    assert_same_nested(before, [everything(*parts), scheduler.state_dict()])
    assert not parts[0].recorder.refusal


def assert_same_nested(one, other):
    """Compare tensors in any nesting, to the bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same_nested(*pair)
    elif isinstance(one, torch.Tensor | np.ndarray):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize("parts", [1, 2])
def test_within_an_epoch_of_the_memory_manager(parts):
    engine, model, optimizer, loader = prepared("private", poisson_sampling=False)
    managed = BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
    )
    with managed as physical:
        for number, (x, y) in enumerate(physical, start=1):
            update(model, optimizer, x, y)
            if number == parts:
                within = saved(engine, model, optimizer)
        between = saved(engine, model, optimizer)
    reason = {1: "two parts of one batch", 2: "epoch of BatchMemoryManager"}[parts]
    with pytest.raises(ValueError, match=reason):
        restored(within, prepared("private", poisson_sampling=False))
    restored(between, prepared("private", poisson_sampling=False))


def test_the_memory_manager_cannot_go_on_within_an_epoch():
    engine, model, optimizer, loader = prepared("private")
    x, y = next(passing := iter(loader))
    update(model, optimizer, x, y)
    file = saved(engine, model, optimizer)
    del passing
    run = prepared("private")
    restored(file, run)
    managed = BatchMemoryManager(
        data_loader=run[3], max_physical_batch_size=3, optimizer=run[2]
    )
    with managed as physical, pytest.raises(ValueError, match="between epochs"):
        next(iter(physical))


def test_workers_that_draw_ahead_from_the_global_generator():
    engine, model, optimizer, loader = prepared("private", num_workers=1)
    for x, y in loader:
        update(model, optimizer, x, y)
        file = saved(engine, model, optimizer)
        break
    with pytest.raises(ValueError, match="later batches from torch's global"):
        restored(file, prepared("private", num_workers=1))


def test_random_states_inside_persistent_workers_are_said_to_be_lost():
    def persistent():
        data = Jittered()
        loader = DataLoader(data, batch_size=6, num_workers=1, persistent_workers=True)
        return prepared("private", data_loader=loader)

    file = saved(*persistent()[:3])
    with pytest.warns(UserWarning, match="Persistent workers.*persistent_workers=Fal"):
        restored(file, persistent())


def test_another_bit_generator_of_numpy(monkeypatch):
    run = prepared("private")
    other = {"bit_generator": "PCG64"}
    monkeypatch.setattr(np.random, "get_state", lambda legacy: other)
    file = saved(*run[:3])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="MT19937"):
        restored(file, run)


# --------------------------------------------------------------- left as it was


def test_everything_saved_is_a_tensor_a_number_or_a_string():
    engine, model, optimizer, loader = prepared(
        "private", own_generators=True, clipping="adaptive", **ADAPTIVE
    )
    for x, y in loader:
        update(model, optimizer, x, y)
        file = saved(engine, model, optimizer)
    state = torch.load(file, weights_only=False)[CHECKPOINT_KEY]
    assert {type(v) for v in state.values()} <= {torch.Tensor, int, float, str}
    names = {name.split(".")[1] for name in state if name.startswith("run_state.")}
    assert names == {"obstacle", "random", "position", "setting"}
    fresh = {k: v for k, v in state.items() if k.startswith("run_state.")}
    file = io.BytesIO()
    torch.save(fresh, file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_a_loader_pickles_to_a_plain_one():
    *_, loader = prepared("monitored", noise_std=0.0, poisson_sampling=False)
    copy = pickle.loads(pickle.dumps(loader))
    assert type(copy) is dataloader.DataLoader and len(list(copy)) == 8
    assert not [name for name in vars(copy) if name.startswith("_pi_")]


def test_the_private_names_of_torch():
    assert callable(dataloader._BaseDataLoaderIter._next_index)
    loader = dataloader.DataLoader(range(4))
    assert iter(loader)._num_workers == 0
