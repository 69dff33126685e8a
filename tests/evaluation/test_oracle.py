import warnings

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.evaluation.oracle import OracleCache
from opacus_pi.files.arrays_file import read_arrays, write_arrays
from opacus_pi.files.kinds import ORACLE

DATA = TensorDataset(torch.zeros(10, 2), torch.arange(10) % 3)
FORGET = [7, 1, 4]


def factory():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Recipe:
    """Weights that say which examples and seed they were made from."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, retain, seed):
        if seed == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((retain.tolist(), seed))
        torch.manual_seed(seed)
        model = factory()
        with torch.no_grad():
            model[0].bias.fill_(float(retain.sum() + seed))
        return model


def train(directory, recipe, **changes):
    arguments = {
        "key": {"epochs": 3, "lr": 0.1},
        "data_set": DATA,
        "forget_indices": FORGET,
        "seeds": [1, 2],
        "model_factory": factory,
    } | changes
    return OracleCache(directory).train(recipe, **arguments)


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_trained_on_the_retain_set_once_and_loaded_afterwards(tmp_path):
    first = Recipe()
    trained = train(tmp_path / "new", first)
    assert first.calls == [([0, 2, 3, 5, 6, 8, 9], 1), ([0, 2, 3, 5, 6, 8, 9], 2)]
    again = Recipe()
    loaded = train(tmp_path / "new", again)
    assert again.calls == []
    for seed, a, b in zip([1, 2], trained, loaded, strict=True):
        assert states_equal(a.state_dict(), Recipe()(np.array([33]), seed).state_dict())
        assert states_equal(a.state_dict(), b.state_dict())
        assert not b.training


def test_the_order_of_indices_and_keys_does_not_matter(tmp_path):
    train(tmp_path, Recipe())
    again = Recipe()
    train(
        tmp_path,
        again,
        forget_indices=np.sort(FORGET),
        key={"lr": 0.1, "epochs": 3},
        seeds=[2],
    )
    assert again.calls == []


@pytest.mark.parametrize(
    "change",
    [
        {"key": {"epochs": 4, "lr": 0.1}},
        {"forget_indices": [7, 1]},
        {"data_set": TensorDataset(torch.zeros(10, 2), torch.arange(10) % 2)},
        {"seeds": [3, 4]},
    ],
)
def test_whatever_determines_an_oracle_is_in_its_key(tmp_path, change):
    train(tmp_path, Recipe())
    again = Recipe()
    train(tmp_path, again, **change)
    assert len(again.calls) == 2


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Recipe(fail_at=2))
    again = Recipe()
    train(tmp_path, again)
    assert [seed for _, seed in again.calls] == [2]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def swap(path):
    """The whole oracle of another seed under this name."""
    (other,) = set(path.parent.glob("*.safetensors")) - {path}
    path.write_bytes(other.read_bytes())


def misfit(path):
    """Right facts, wrong weights."""
    _, facts = read_arrays(path, ORACLE)
    kept = {k: v for k, v in facts.items() if k not in ("kind", "version")}
    write_arrays(path, ORACLE, {"w": np.zeros(3)}, kept)


def rewritten_without(path, name):
    """The file as it was before it held a fact."""
    arrays, facts = read_arrays(path, ORACLE)
    kept = {k: v for k, v in facts.items() if k not in ("kind", "version", name)}
    assert len(kept) == len(facts) - 3
    write_arrays(path, ORACLE, arrays, kept)


def test_oracles_of_other_inputs_are_trained_again(tmp_path):
    train(tmp_path, Recipe())
    x, y = DATA.tensors
    other, again = TensorDataset(x + 1, y), Recipe()
    with pytest.warns(UserWarning, match="other values of data_set_with_inputs"):
        train(tmp_path, again, data_set=other)
    assert [seed for _, seed in again.calls] == [1, 2]


def test_oracles_of_before_inputs_were_named_are_taken(tmp_path):
    train(tmp_path, Recipe())
    for path in tmp_path.glob("*.safetensors"):
        rewritten_without(path, "data_set_with_inputs")
    again = Recipe()
    train(tmp_path, again)
    assert again.calls == []


@pytest.mark.parametrize("damage", [truncate, flip, swap, misfit])
def test_a_damaged_or_wrong_file_is_retrained_and_never_loaded(tmp_path, damage):
    (want, _) = train(tmp_path, Recipe())
    path = OracleCache(tmp_path).path(
        key={"epochs": 3, "lr": 0.1}, data_set=DATA, forget_indices=FORGET, seed=1
    )
    damage(path)
    again = Recipe()
    with pytest.warns(UserWarning, match="Retraining an oracle"):
        (got,) = train(tmp_path, again, seeds=[1])
    assert [seed for _, seed in again.calls] == [1]
    assert states_equal(got.state_dict(), want.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, Recipe())


def test_random_states_are_the_same_trained_or_loaded(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in range(2):
        train(tmp_path, Recipe())
        assert torch.equal(torch.get_rng_state(), before)


def test_state_dicts_and_half_precision(tmp_path):
    def half():
        return nn.Linear(2, 2).bfloat16()

    def recipe(retain, seed):
        return {k: v + 0.1 for k, v in half().state_dict().items()}

    (trained,) = train(tmp_path, recipe, seeds=[1], model_factory=half)
    (loaded,) = train(tmp_path, None, seeds=[1], model_factory=half)
    assert loaded.weight.dtype == torch.bfloat16
    assert states_equal(trained.state_dict(), loaded.state_dict())


def test_a_recipe_may_return_a_model_wrapped_by_opacus(tmp_path):
    def private(retain, seed):
        torch.manual_seed(seed)
        return GradSampleModule(nn.Linear(2, 2))

    kind = {"seeds": [1], "model_factory": lambda: nn.Linear(2, 2)}
    (trained,) = train(tmp_path, private, **kind)
    (loaded,) = train(tmp_path, None, **kind)
    assert states_equal(trained.state_dict(), loaded.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_indices": []}, r"forget_indices must .*got \[\]"),
        ({"forget_indices": range(10)}, "all 10 examples"),
        ({"seeds": []}, r"seeds must be distinct numbers, at least one, got \[\]"),
        (
            {"seeds": [1, 1]},
            r"seeds must be distinct numbers, at least one, got \[1, 1\]",
        ),
        ({"key": {"model": factory}}, "key must be JSON"),
        ({"key": {"lr": float("nan")}}, "key must be JSON"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(tmp_path, change, message):
    recipe = Recipe()
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "none", recipe, **change)
    assert recipe.calls == []
    assert not (tmp_path / "none").exists()


def test_a_recipe_of_another_architecture_is_not_stored(tmp_path):
    with pytest.raises(RuntimeError, match="Missing key"):
        train(tmp_path, lambda retain, seed: nn.Linear(9, 9))
    assert not list(tmp_path.iterdir())
