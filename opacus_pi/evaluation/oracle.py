"""Oracles: models retrained without the forget set, with which unlearning is compared.

Each oracle costs a whole training run. It is therefore stored on disk under a key of
everything that determines it, and trained only if no file has this key.

The name of a file is a hash of the recipe's key, the labels of the data set and the
forget set, with the seed after it. The same facts are in the file and are compared when
it is read. A wrong file is thus trained again, with a warning, and never used.

*What breaks it.* The code of the recipe is not part of the key. If the code changes,
change the key or name another directory.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, require
from opacus_pi.difficulty.forget_sets import retain_indices
from opacus_pi.files.arrays_file import (
    check_file,
    named_kind,
    read_arrays,
    write_arrays,
)
from opacus_pi.files.kinds import ORACLE
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.same_data import difference, same_transforms
from opacus_pi.models.copies import unwrap
from opacus_pi.models.no_trace import random_state_untouched

_INPUTS = "data_set_with_inputs"

State = Mapping[str, Tensor]
Recipe = Callable[[NDArray[np.int64], int], nn.Module | State]


class OracleCache:
    """A directory of retrained models, each of which is trained once.

    Args:
        directory: Where the weights are stored. It is created with the first model. The
            files are as sensitive as the models.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def train(
        self,
        recipe: Recipe,
        *,
        key: Mapping[str, Any],
        data_set: Any,
        forget_indices: ArrayLike,
        seeds: Sequence[int],
        model_factory: Callable[[], nn.Module],
        progress: bool | None = None,
    ) -> list[nn.Module]:
        """Retrain on the retain set with several seeds, or load models that are stored.

        Each model is stored as soon as it is trained, so an interrupted call continues
        where it stopped. A file that is damaged or has another key is never loaded: its
        model is trained again, with a warning. The random states of the caller do not
        change, whether models are trained or loaded.

        Args:
            recipe: ``recipe(retain_indices, seed)`` trains a model exactly as the
                original model was trained, but on these examples and with this seed. It
                returns the model (wrapped by Opacus or not) or its state dict, and must
                set the seed itself.
            key: Everything else that determines the recipe (architecture, epochs,
                learning rate, noise ...), as JSON. Recipes with equal keys are treated
                as the same recipe.
            data_set: The whole training set. Its labels are part of the key. If its
                inputs changed in a way that ``fingerprint`` detects, the oracle is
                trained again.
            forget_indices: Indices of the examples to leave out, shape ``(m,)``.
            seeds: One model is trained for each; do not use the original model's seed.
            model_factory: Returns a new model into which the weights are loaded.
            progress: Whether to show a progress bar; ``None`` shows it on a terminal.

        Returns:
            One model for each seed, in evaluation mode, on the device of the factory.

        Raises:
            ValueError: If the forget set is empty, out of range or the whole data set,
                if there is no seed or a repeated seed, or if the key is not JSON.
        """
        forget = distinct_indices("forget_indices", forget_indices, len(data_set))
        retain = retain_indices(len(data_set), forget)
        seeds = [int(seed) for seed in seeds]
        expect(
            bool(seeds) and len(set(seeds)) == len(seeds),
            "seeds",
            seeds,
            "must be distinct numbers, at least one",
            "Pass a seed for each oracle to train, all different.",
        )
        facts = _facts(key, data_set, forget)
        inputs = fingerprint(data_set)
        bar = tqdm(
            seeds, desc="oracles", disable=None if progress is None else not progress
        )
        with random_state_untouched():
            return [
                self._oracle(recipe, retain, seed, facts, inputs, model_factory())
                for seed in bar
            ]

    def path(
        self,
        *,
        key: Mapping[str, Any],
        data_set: Any,
        forget_indices: ArrayLike,
        seed: int,
    ) -> Path:
        """Return the path of the oracle with this key and seed; it may not exist yet.

        Args:
            key: As in ``train``.
            data_set: As in ``train``.
            forget_indices: As in ``train``.
            seed: One of the seeds.

        Returns:
            The path of the file.
        """
        forget = distinct_indices("forget_indices", forget_indices, len(data_set))
        return self._path(_facts(key, data_set, forget), int(seed))

    def _path(self, facts: Mapping[str, str], seed: int) -> Path:
        """Return the file of one oracle.

        Args:
            facts: What determines the oracle except its seed.
            seed: Its seed.
        """
        content = json.dumps(facts, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        return self.directory / f"oracle-{digest[:32]}-seed{seed}.safetensors"

    def _oracle(
        self,
        recipe: Recipe,
        retain: NDArray[np.int64],
        seed: int,
        facts: Mapping[str, str],
        inputs: str,
        model: nn.Module,
    ) -> nn.Module:
        """Load one retrained model, or train and store it.

        Args:
            recipe: As in ``train``.
            retain: The examples to train on.
            seed: The seed.
            facts: What determines the oracle except its seed, which the file's name is
                made of.
            inputs: Fingerprint of the data set with its inputs. It is stored in the
                file but is not part of its name, because files of early releases lack
                it.
            model: A new model, into which the weights are loaded.

        Returns:
            The model, in evaluation mode.
        """
        path = self._path(facts, seed)
        facts = {**facts, "seed": str(seed), _INPUTS: inputs}
        if _load(path, facts, model):
            return model.eval()
        trained = recipe(retain.copy(), seed)
        if isinstance(trained, nn.Module):
            trained = unwrap(trained).state_dict()
        model.load_state_dict(trained)  # before it is stored, so that it surely fits
        self.directory.mkdir(parents=True, exist_ok=True)
        arrays = {name: _array(tensor) for name, tensor in trained.items()}
        write_arrays(path, ORACLE, arrays, facts)
        return model.eval()


def _facts(
    key: Mapping[str, Any], data_set: Any, forget: NDArray[np.int64]
) -> dict[str, str]:
    """Return everything that determines an oracle except its seed, as text.

    Args:
        key: The caller's key. Its entries are sorted, so their order does not matter.
        data_set: The training set; its length and labels count.
        forget: Sorted positions of the forget set.

    Raises:
        ValueError: If the key is not JSON.
    """
    try:
        text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"key must be JSON, got {key!r} ({error}). "
            "Pass numbers, strings, lists and mappings that describe the recipe."
        ) from error
    name = fingerprint(data_set, inputs=False)
    return {"key": text, "data_set": name, "forget_indices": _name_of(forget)}


def _name_of(forget: NDArray[np.int64]) -> str:
    """Return the hash of sorted positions."""
    return hashlib.sha256(forget.astype("<i8").tobytes()).hexdigest()


def retrained_without(
    path: str | os.PathLike[str], data_set: Any, forget_indices: ArrayLike
) -> bool | None:
    """Return whether a file of the cache holds a model that never saw a forget set.

    Args:
        path: A file of weights.
        data_set: The whole training set.
        forget_indices: The examples that must have been left out, shape ``(m,)``.

    Returns:
        Whether exactly these examples of this data set were left out; None for a file
        that ``OracleCache`` did not write: it does not say what was left out.

    Raises:
        ValueError: If the positions are bad, or the file is damaged.
    """
    if named_kind(path) != ORACLE.name:
        return None
    forget = distinct_indices("forget_indices", forget_indices, len(data_set))
    facts = check_file(path, ORACLE)[1]
    name = facts.get(_INPUTS, facts.get("data_set", ""))
    same = not difference(name, fingerprint(data_set, inputs=_INPUTS in facts))
    return same and facts.get("forget_indices") == _name_of(np.sort(forget))


def _load(path: Path, facts: Mapping[str, str], model: nn.Module) -> bool:
    """Load an oracle into the model; return False if no trustworthy file exists.

    A file that cannot be trusted costs time but must not stop the caller, so it leads
    to a warning, and the model is trained again.

    Args:
        path: The file.
        facts: What it must say about itself.
        model: Changed in place; if the answer is False, its weights must not be used.
    """
    if not path.exists():
        return False
    try:
        arrays, found = read_arrays(path, ORACLE)
        known = {_INPUTS: facts[_INPUTS], **found}  # old files do not name the inputs
        differing = [
            name
            for name, value in facts.items()
            if name != _INPUTS and known.get(name) != value
        ]
        stored = known[_INPUTS]
        if difference(stored, facts[_INPUTS]):
            differing.append(_INPUTS)
        if same_transforms(stored, facts[_INPUTS]) is False:
            differing.append("transforms of the data set")
        require(
            not differing,
            f"The model in {path} was trained with other values of "
            f"{', '.join(differing)}.",
            "It is not used.",
        )
        _check_types(path, arrays, model)
        model.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"Retraining an oracle: {error}", stacklevel=2)
        return False
    return True


def _check_types(
    path: Path, arrays: Mapping[str, NDArray[Any]], model: nn.Module
) -> None:
    """Raise if arrays and model differ in type: loading would convert silently.

    Rounding to fewer digits would give a model that is close to the oracle, but not it.

    Args:
        path: The file, for the message.
        arrays: Its arrays by name.
        model: The model that they are to be loaded into.

    Raises:
        ValueError: If a type differs.
    """
    state = model.state_dict()
    known = {name: array for name, array in arrays.items() if name in state}
    wanted = {name: _array(state[name]).dtype for name in known}
    differing = [
        f"{array.dtype} instead of {wanted[name]} for {name}"
        for name, array in known.items()
        if array.dtype != wanted[name]
    ]
    require(
        not differing,
        f"The model in {path} has tensors of other dtypes: {', '.join(differing[:3])}.",
        "It was saved for another model, so it is not used.",
    )


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array; bfloat16, which NumPy lacks, becomes float32.

    Every bfloat16 number is also a float32 number, so nothing is lost, and loading into
    a bfloat16 model gives the same weights again.
    """
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
