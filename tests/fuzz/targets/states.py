"""Edits of state dicts."""

import copy
import io

import torch

from opacus_pi.files.checksummed_state import with_checksum
from tests.fuzz import originals
from tests.fuzz.mutations import (
    NUMBERS,
    SIZES,
    TEXTS,
)
from tests.fuzz.targets.ledgers import N


def state_edit(content, chance, *, seal):
    """A state dict that says something else."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    seal_of_before = state.pop("checksum")
    for _ in range(chance.choice([1, 1, 2])):
        _edit_entry(state, chance)
    state = with_checksum(state) if seal else {**state, "checksum": seal_of_before}
    return originals.as_file(state)


def _edit_entry(state, chance):
    name = chance.choice([*state])
    kind = chance.random()
    if kind < 0.1:
        del state[name]
    elif kind < 0.2:
        other = chance.choice(
            [*state, "rows.errors", "rows.x", "run_state.setting.step"]
        )
        state[other] = copy.deepcopy(state[name])
    elif kind < 0.7 and isinstance(state[name], torch.Tensor):
        state[name] = _other_tensor(state[name].clone(), chance)
    else:
        others = (*NUMBERS, *SIZES, *TEXTS, True, None, [1.0], {"a": 1}, b"x")
        state[name] = chance.choice([*others, torch.tensor(chance.random())])


def _other_tensor(tensor, chance):
    kind = chance.choice(
        ("entry", "entry", "entry", "type", "shape", "shorter", "none")
    )
    if kind == "entry" and tensor.numel():
        flat = tensor.reshape(-1)
        numbers = NUMBERS if tensor.is_floating_point() else [0, 1, 2, 255, 2**62, -5]
        value = chance.choice(range(256) if tensor.dtype == torch.uint8 else numbers)
        if tensor.is_floating_point():
            value = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
        flat[chance.randrange(len(flat))] = value
        return flat.reshape(tensor.shape)
    if kind == "type":
        return tensor.to(chance.choice([torch.float32, torch.int64, torch.float16]))
    if kind == "shape":
        return tensor.reshape(
            chance.choice([(-1,), (1, -1), (-1, 1)]) if tensor.numel() else (0, 0)
        )
    if kind == "shorter" and tensor.dim():
        return tensor[: chance.randrange(len(tensor) + 1)].clone()
    return torch.zeros(chance.choice([(), (0,), (3,), (N,), (2, N), (625,)]))
