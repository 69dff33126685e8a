"""Load what the arguments name: ledgers, ids, models with weights, data sets.

Every function raises ``BadInput`` with the argument's name and a remedy. Files are read
without running code from them: weights are safetensors, or ``torch.save`` files that
are loaded with ``weights_only=True``.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opacus_pi._errors import AccountingError
from opacus_pi.cli.errors import BadInput, about, one_line
from opacus_pi.cli.imports import (
    COLLATE,
    CRITERION,
    DATA_SET,
    MODEL,
    import_object,
)
from opacus_pi.files.arrays_file import named_kind
from opacus_pi.files.kinds import KINDS, ORACLE, RECORDED_WEIGHTS, UNLEARNED_WEIGHTS
from opacus_pi.files.regular_file import require_readable_once, require_regular
from opacus_pi.files.state_dict_file import tensors_of
from opacus_pi.files.torch_file import read_torch_file
from opacus_pi.files.weights_file import read_plain_weights
from opacus_pi.integration.checkpoints import ledger_in_checkpoint
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.models.stored_names import with_names_of
from opacus_pi.unlearning.erased_data import known_data_set
from opacus_pi.unlearning.requests import remaining_by_log

_LEDGER_REMEDY = (
    "Write one with engine.ledger.save(path), or name a checkpoint of "
    "engine.save_checkpoint."
)
_WEIGHTS_REMEDY = (
    "Save the weights with safetensors.torch.save_file(model.state_dict(), path)."
)


def load_ledgers(
    paths: Sequence[str], noise_std: float | None, flag: str = "LEDGER"
) -> list[GradNormLedger]:
    """Load the ledgers of independent runs.

    Args:
        paths: Their files.
        noise_std: Assumed standard deviation of the noise on the sum of gradients;
            None: the ledgers' own.
        flag: The argument that names them.

    Raises:
        BadInput: If a file is not a ledger, or a link of its chain of custody is
            broken, or training added no noise and none is assumed. Every number that
            the commands print would be infinite then.
    """
    runs = read_ledgers(paths, flag)
    for path, run in zip(paths, runs, strict=True):
        try:
            run.require_intact()
        except AccountingError as error:
            raise BadInput(f"{flag} {path}: {one_line(error)}") from error
    if noise_std is not None:
        return [run.with_noise_std(noise_std) for run in runs]
    silent = [bool((np.asarray(r.mechanism.noise_std) == 0).any()) for r in runs]
    if any(silent):
        raise BadInput(
            f"{flag} {paths[silent.index(True)]}: training added no noise, so no loss "
            "is finite. Assume a noise for a ranking without a guarantee: --sigma 1."
        )
    return runs


def read_ledgers(paths: Sequence[str], flag: str) -> list[GradNormLedger]:
    """Load the ledgers of independent runs, of training without noise too.

    Args:
        paths: Their files.
        flag: The argument that names them.

    Raises:
        BadInput: If a file is not a ledger, or two have the same norms: they are of one
            run, or of runs with the same random seed.
    """
    runs: list[GradNormLedger] = []
    for path in paths:
        with about(f"{flag} {path}", _LEDGER_REMEDY):
            run = _load_ledger(Path(path))
        for before, other in zip(paths, runs, strict=False):
            if _have_equal_norms(run, other):
                raise BadInput(
                    f"{flag} {path} has the same norms as {before}, so the runs are "
                    "not independent. Name each run once, and train each with a seed "
                    "of its own."
                )
        runs.append(run)
    return runs


def _have_equal_norms(one: GradNormLedger, other: GradNormLedger) -> bool:
    """Return whether two ledgers of one data set have the same norms, not all 0."""
    norms, others = one.grad_norms, other.grad_norms
    return (
        one.data_set == other.data_set
        and norms.shape == others.shape
        and np.array_equal(norms, others, equal_nan=True)
        and bool((norms > 0).any())
    )


def _load_ledger(path: Path) -> GradNormLedger:
    """Load a ledger from its own file, or from a checkpoint of its run."""
    require_regular(path)
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    return ledger_in_checkpoint(path) if is_archive else GradNormLedger.load(path)


# Of numbers that are no positions: below 0, with a fraction, or a range.
_NUMBERS = re.compile(r"(?=.*\d)[\d\s,;:.+-]*[;:.+-][\d\s,;:.+-]*")


def read_indices(
    text: str, flag: str = "--forget", *, or_persons: bool = False
) -> NDArray[np.int64]:
    """Return the ids that an argument lists, or those in the file that it names.

    The ids are not checked here: whether they are in the training set, and each once,
    is checked where its length is known. A file is tried only if the text is not a list
    of numbers, so a file named ``17`` must be written ``./17``.

    >>> read_indices("3,17 25")
    array([ 3, 17, 25])

    Args:
        text: Whole numbers separated by commas or spaces, or a file: ``.npy``, or text
            with one id per line, or a JSON list. Text may come from a pipe of the
            shell: ``<(command)`` or ``/dev/stdin``.
        flag: The argument.
        or_persons: Whether the command takes names of persons, too.

    Raises:
        BadInput: If the file cannot be read or does not hold whole numbers.
    """
    remedy = "List ids as 3,17,25, or name a file of them"
    if or_persons:
        remedy += "; persons are named with --forget-person ID --owners FILE.json"
    remedy += ". Ids are positions in the training set, from 0."
    if not text.strip():
        raise BadInput(f"{flag}: nothing is listed. {remedy}")
    if _NUMBERS.fullmatch(text) and not os.path.exists(text):
        raise BadInput(
            f"{flag}: {text} is not a list of positions: whole numbers, at least 0, "
            f"each of them written out (3,4,5 for a range). {remedy}"
        )
    with about(flag, remedy):
        listed = re.fullmatch(r"[\d\s,]+", text) is not None
        if not listed:
            require_readable_once(text)
        if Path(text).suffix == ".npy":
            return _array_in(text)
        content = text if listed else text_of(Path(text).read_bytes(), text)
    cause: Exception | None = None
    words = [word for word in re.split(r"[\s,]+", content) if word]
    try:
        if not listed and content.lstrip().startswith("["):
            return _exact(json.loads(content))
        if words and all(re.fullmatch("-?[0-9]+", word) for word in words):
            return _exact([int(word) for word in words])
    except (ValueError, RecursionError) as error:
        cause = error
    raise BadInput(
        f"{flag}: {text} does not hold whole numbers. "
        "Write positions in the training set, one per line or as a JSON list."
    ) from cause


def _exact(values: Any) -> NDArray[Any]:
    """Return values as an array; whole numbers beyond int64 as they are, not rounded.

    Args:
        values: What a text lists.
    """
    array = np.array(values)
    is_rounded = array.dtype.kind == "f" and len(array)
    is_rounded = is_rounded and all(type(x) is int for x in values)
    return np.array(values, dtype=object) if is_rounded else array


def _array_in(path: str) -> NDArray[Any]:
    """Return the array in a file of ``numpy.save``.

    Raises:
        ValueError: If it is none, is damaged, or holds objects.
    """
    with contextlib.suppress(ValueError, EOFError, zipfile.BadZipFile):
        found: Any = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
    raise ValueError(
        f"{path} is not a whole .npy file of numbers. Write it with numpy.save."
    )


def text_of(content: bytes, path: str) -> str:
    """Return a text in UTF-8, UTF-16 or UTF-32, without the mark at its beginning.

    Args:
        content: The bytes of a file.
        path: The file, for the message.

    Raises:
        ValueError: If they are no text.
    """
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text in UTF-8, UTF-16 or UTF-32: it is damaged, or "
            "another kind of file. Save it as a text in UTF-8."
        ) from error
    return text.removeprefix("\ufeff")


def import_data_set(flag: str, path: str) -> Any:
    """Import a data set by its import path.

    Args:
        flag: ``--data`` or ``--test``.
        path: ``package.module:name``.

    Raises:
        BadInput: If it cannot be imported or is not a data set with
            positions. Data that can only be iterated have no positions that an id could
            mean.
    """
    return import_object(flag, path, DATA_SET)


def import_train_set(
    options: argparse.Namespace, *, must_exist: bool = True
) -> tuple[Any, NDArray[np.int64]]:
    """Import the training set, whether or not forgotten examples were erased from it.

    Args:
        options: The parsed arguments.
        must_exist: Whether a log that is named must exist.

    Returns:
        The training set, and the positions that were forgotten before by the log.

    Raises:
        BadInput: If it cannot be imported, or with a log: if anything but exactly the
            examples that the log says were forgotten is missing or changed.
    """
    found = import_data_set("--data", options.train_set)
    if not options.log or not (must_exist or os.path.exists(options.log)):
        return found, np.empty(0, dtype=np.int64)
    with about("--log", "Name what 'opacus-pi unlearn --log' wrote."):
        states = remaining_by_log(options.log)
    with about("--data", "Restore its files from a copy."):
        found = known_data_set(states, found)
    return found, states[0].forgotten if states else np.empty(0, dtype=np.int64)


def import_criterion(options: argparse.Namespace) -> Any:
    """Import the loss that ``--criterion`` names."""
    return import_object("--criterion", options.criterion, CRITERION)


def import_collate(options: argparse.Namespace) -> Any:
    """Import what ``--collate`` names; None, for torch's own, if it is not given."""
    path = options.collate_fn
    return None if path is None else import_object("--collate", path, COLLATE)


def import_model(options: argparse.Namespace) -> nn.Module:
    """Import the model's architecture.

    Returns:
        A copy, because the import path may name one object that is imported again.
    """
    network: nn.Module = import_object("--model", options.model, MODEL)
    return copy.deepcopy(network)


def load_model(
    options: argparse.Namespace, weights: str | None, flag: str = "--weights"
) -> nn.Module:
    """Return the model with weights from a file, on the device of the options.

    Args:
        options: With ``model`` and ``device``.
        weights: The file; None: the model as it is built.
        flag: The argument that names it.

    Raises:
        BadInput: If the model, the weights or the device cannot be used. Running out of
            memory is not an error in an argument and stays as it is.
    """
    network = import_model(options)
    try:
        device = torch.device(options.device)
        if weights is not None:
            load_weights(flag, weights, network)
        return network.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # torch raises both for a device
        raise BadInput(
            f"--device: {options.device} cannot be used here. Try --device cpu."
        ) from error


def load_weights(flag: str, path: str, model: nn.Module) -> nn.Module:
    """Load a state dict from a file into a model.

    Args:
        flag: The argument that names the file.
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file. The names may be those of a
            model that Opacus wrapped.
        model: Changed in place.

    Returns:
        The model.

    Raises:
        BadInput: If the file cannot be read or its weights do not fit the model.
    """
    with about(flag, _WEIGHTS_REMEDY):
        state = _read_state(flag, path)
        _require_no_other_kind(flag, path)
    state = with_names_of(model, state)
    _require_numbers_of(model, state, f"{flag}: {path}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(
            f"{flag}: {path} does not fit the model: {one_line(error)[:300]} "
            "Name the architecture that the weights were trained with."
        ) from error
    return model


def _require_no_other_kind(flag: str, path: str) -> None:
    """Refuse a file that says it is something else of this library, as a ledger."""
    kind = KINDS.get(named_kind(path) or "")
    if kind not in (None, RECORDED_WEIGHTS, UNLEARNED_WEIGHTS, ORACLE):
        raise BadInput(f"{flag}: {path} is {kind.words}. {_WEIGHTS_REMEDY}")


def _require_numbers_of(
    model: nn.Module, state: Mapping[str, Tensor], where: str
) -> None:
    """Refuse weights that torch would load, but that are not those of a trained model.

    Args:
        model: The model, whose types are compared: torch converts whole numbers.
        state: The weights of the file.
        where: The argument and the file, for the message.

    Raises:
        BadInput: If a weight is NaN, or is of whole numbers where the model's is not.
    """
    own = model.state_dict()
    for name, value in state.items():
        expected = own.get(name)
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        if not value.is_floating_point():
            raise BadInput(
                f"{where}: {name} has the type {value.dtype}, but the model's is "
                f"{expected.dtype}. Save the weights as they were trained."
            )
        if value.layout == torch.strided and bool(value.isnan().any()):
            raise BadInput(
                f"{where}: {name} contains NaN, so the training has diverged, or an "
                "item of the data set contains NaN. Name weights from before that."
            )


def _read_state(flag: str, path: str) -> dict[str, Tensor]:
    """Read the tensors of a file by name.

    The suffix decides how the file is read, so that a file of another format is refused
    with a message that names the formats. Pickled files are read with ``weights_only``:
    they cannot run code.

    Args:
        flag: The argument, for the message.
        path: The file.

    Raises:
        BadInput: If it is none of the formats, damaged, or holds more than tensors.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise BadInput(
            f"{flag}: {path} is not .safetensors, .pt or .pth. {_WEIGHTS_REMEDY}"
        )
    if Path(path).is_dir():
        raise BadInput(f"{flag}: {path} is a directory. {_WEIGHTS_REMEDY}")
    try:
        if suffix == ".safetensors":
            return read_plain_weights(path)
        state = tensors_of(read_torch_file(path, map_location="cpu"))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, UnpicklingError, RuntimeError, EOFError) as error:
        first = one_line(error).split(". ")[0]
        raise BadInput(
            f"{flag}: {path} is not a readable file of tensors ({first[:160]}). "
            f"{_WEIGHTS_REMEDY}"
        ) from error
    if state is None:
        raise BadInput(
            f"{flag}: {path} holds more than a state dict. "
            "Save model.state_dict(), not a checkpoint of everything."
        )
    return state
