"""Readers of checkpoints: the recorder's key, and the filter's charges."""

import io
import random

import numpy as np
import torch

from opacus_pi.files.checksummed_state import verified_state
from opacus_pi.integration.filtering import prepared_charges
from opacus_pi.recording.run import RecordedRun
from opacus_pi.recording.saved_state import require_version
from tests.fuzz import originals
from tests.fuzz.targets.ledgers import N, ledger_check
from tests.fuzz.targets.states import state_edit
from tests.fuzz.targets.target import Refused, Target


def load_tensors(path):
    """A file of ``torch.save``; what torch itself cannot read is torch's affair."""
    try:
        return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    except Exception as error:
        raise Refused(f"Expected to be refused by torch: {error}") from error


def read_key(mode):
    def read(path):
        saved = load_tensors(path)
        require_version(saved)
        state = verified_state(saved)
        mine = originals.recorder(mode)
        mine.load_state_dict(state)
        run, *held = originals.run_state()
        names = [n for n in state if str(n).startswith("run_state.")]
        run.load_state_dict({n.removeprefix("run_state."): state[n] for n in names})
        del held
        drawn = torch.rand(2), np.random.rand(), random.random()
        return state, mine, drawn

    return read


def key_check(answer):
    state, mine, drawn = answer
    assert {type(v) for v in state.values()} <= {torch.Tensor, int, float, str}
    run = RecordedRun.from_state_dict(mine.state_dict())
    assert run.num_examples == N and run.data_set == "digits"
    assert len(run.rows) == len(run.steps) == len(run.intervals)
    assert all(0 <= value < 1 for value in (*drawn[0].tolist(), *drawn[1:]))
    try:
        ledger_check(mine.ledger)
    except (RuntimeError, ValueError):  # AccountingError: a refused run, or no rows
        pass


def same_states(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name])
        or (
            value.is_floating_point()
            and torch.equal(value.nan_to_num(-1), other[name].nan_to_num(-1))
        )
        if isinstance(value, torch.Tensor)
        else value == other[name] or value != value and other[name] != other[name]
        for name, value in one.items()
    )


def key_equal(mode):
    wanted = verified_state(originals.checkpoint_key(mode))
    return lambda answer: same_states(answer[0], wanted)


def read_filter(path):
    charges = load_tensors(path)
    mine = originals.renyi_filter()
    mine._spent = None
    if charges is None:
        raise Refused("Expected charges")
    prepared_charges(mine, charges, 5)()
    return mine


def filter_check(mine):
    assert mine.spent.dtype == np.float64 and mine.spent.ndim == 1
    assert (mine.spent >= 0).all() and np.isfinite(mine.spent).all()
    mine.admit([0], [0.1])


def filter_equal(mine):
    return np.array_equal(mine.spent, originals.renyi_filter().spent)


def checkpoint_targets():
    """The recorder's key in both modes, and the filter's."""
    found = {
        f"checkpoint {mode}": Target(
            originals.as_file(originals.checkpoint_key(mode)),
            read_key(mode),
            key_check,
            key_equal(mode),
            state_edit,
        )
        for mode in ("observed", "swept")
    }
    found["filter"] = Target(
        originals.as_file(originals.filter_key()),
        read_filter,
        filter_check,
        filter_equal,
        state_edit,
    )
    return found
