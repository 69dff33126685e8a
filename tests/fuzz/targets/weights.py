"""Readers of weights: an oracle's, and those kept at a row."""

import warnings

import torch

from opacus_pi.recording.weights import load_weights_
from tests.fuzz import originals
from tests.fuzz.targets.target import (
    NUMPY_TYPES,
    TORCH_TYPES,
    Refused,
    Target,
    safetensors_edit,
)


def read_oracle(path):
    def recipe(retain, seed):
        raise Refused("Expected to be trained again")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return originals.oracle_of(recipe, path.parent)[0].state_dict()


def read_weights_of(path):
    model = originals.net()
    load_weights_(model, path, "digits")
    return model.state_dict()


def state_check(state):
    wanted = originals.net().state_dict()
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {
        n: (v.shape, v.dtype) for n, v in wanted.items()
    }


def state_equal(wanted):
    return lambda state: all(
        torch.equal(wanted[name], value) for name, value in state.items()
    )


def weights_targets():
    """An oracle's weights, and those of a row."""
    net = originals.net().state_dict()
    return {
        "oracle": Target(
            originals.content_of(originals.oracle),
            read_oracle,
            state_check,
            state_equal(net),
            safetensors_edit(NUMPY_TYPES),
            originals.oracle_of(None, "").name,
        ),
        "weights": Target(
            originals.content_of(originals.weights),
            read_weights_of,
            state_check,
            state_equal(net),
            safetensors_edit(TORCH_TYPES),
            "weights-00000020.safetensors",
        ),
    }
