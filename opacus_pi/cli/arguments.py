"""The arguments that several sub-commands share, and what they stand for."""

import argparse
import copy
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from opacus_pi.accounting import GradNormLedger
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.imports import CRITERION, DATA_SET, MODEL, import_object
from opacus_pi.cli.weights import load_weights

_LEDGER_REMEDY = "Write one with engine.ledger.save(path)."


def count(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text) if text.strip().isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def share(text: str) -> float:
    """A number between 0 and 1, both excluded, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def add_ledgers(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """The record of training."""
    parser.add_argument(
        *names,
        nargs="+",
        metavar="LEDGER",
        help="what engine.ledger.save wrote; several files: independent runs of one "
        "training, over which is averaged",
        **options,
    )


def add_accounting(parser: argparse.ArgumentParser) -> None:
    """Order and assumed noise."""
    parser.add_argument(
        "--order", type=float, default=8.0, help="Rényi order, above 1 (default 8)"
    )
    parser.add_argument(
        "--sigma",
        dest="noise_std",
        type=float,
        help="assume this standard deviation of the noise on the SUM of gradients: a "
        "ranking of examples, no guarantee; needed where training added none",
    )


def add_delta(parser: argparse.ArgumentParser) -> None:
    """The δ that every ε of the answer comes with."""
    parser.add_argument(
        "--delta",
        type=share,
        default=1e-5,
        help="δ of every ε in the answer; usual: below 1 / (number of examples) "
        "(default 1e-5)",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Of unlearning."""
    parser.add_argument(
        "--batch-size", type=count, default=64, help="examples per batch (default 64)"
    )


def add_scoring(parser: argparse.ArgumentParser, *, top: int) -> None:
    """What all examples are scored by, and how many are named."""
    add_accounting(parser)
    add_delta(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="let losses be at most this much too large, relatively: with 30,000 "
        "examples or more 1e-3 is many times faster (default 0: exact)",
    )
    parser.add_argument(
        "--top", type=count, default=top, help=f"how many of the hardest ({top})"
    )


def add_forget(parser: argparse.ArgumentParser) -> None:
    """Whom to forget."""
    parser.add_argument(
        "--forget",
        dest="forget_indices",
        metavar="IDS|FILE",
        required=True,
        help="positions in the training set: 3,17,25, or a file of them (text or "
        "JSON list, or .npy)",
    )


def add_model(parser: argparse.ArgumentParser, *, weights: bool) -> None:
    """The architecture and, if wanted, its weights."""
    parser.add_argument(
        "--model",
        metavar="M:NAME",
        required=weights,
        help="import path of the model, or of a function that builds it",
    )
    if weights:
        parser.add_argument(
            "--weights",
            metavar="FILE",
            required=True,
            help="its state dict, .safetensors or .pt (read with weights_only=True)",
        )
        parser.add_argument(
            "--device", default="cpu", help="cpu (default), cuda, cuda:1, ..."
        )


def add_data(parser: argparse.ArgumentParser, *, test_is_required: bool) -> None:
    """Training set, test set and criterion."""
    parser.add_argument(
        "--data",
        dest="train_set",
        metavar="M:NAME",
        required=True,
        help="import path of the training set, or of a function that makes it",
    )
    parser.add_argument(
        "--test",
        dest="test_set",
        metavar="M:NAME",
        required=test_is_required,
        help="import path of the test set, for the metrics",
    )
    parser.add_argument(
        "--criterion",
        metavar="M:NAME",
        default="torch.nn:CrossEntropyLoss",
        help="import path of the loss, one per example (default cross entropy)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")


def add_output(parser: argparse.ArgumentParser, *, file: bool = True) -> None:
    """How the answer is written."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of text"
    )
    if file:
        parser.add_argument(
            "--out",
            dest="json_file",
            metavar="FILE.json",
            help="write the JSON here as well",
        )


def ledgers(
    paths: Sequence[str], noise_std: float | None, flag: str = "LEDGER"
) -> list[GradNormLedger]:
    """The runs, with an assumed noise if one is given."""
    runs = []
    for path in paths:
        with about(f"{flag} {path}", _LEDGER_REMEDY):
            if Path(path).is_dir():
                raise IsADirectoryError("is a directory")
            runs.append(GradNormLedger.load(path))
    if noise_std is not None:
        return [run.with_noise_std(noise_std) for run in runs]
    silent = [bool((np.asarray(r.mechanism.noise_std) == 0).any()) for r in runs]
    if any(silent):
        raise BadInput(
            f"{flag} {paths[silent.index(True)]}: training added no noise, so no loss "
            "is finite. Assume a noise for a ranking without a guarantee: --sigma 1."
        )
    return runs


def indices(text: str, flag: str = "--forget") -> NDArray[np.int64]:
    """The ids that an argument lists, or the file that it names."""
    with about(flag, "List ids as 3,17,25, or name a file of them."):
        if Path(text).suffix == ".npy":
            return np.asarray(np.load(text, allow_pickle=False))
        listed = re.fullmatch(r"[\d\s,]+", text) is not None
        content = text if listed else Path(text).read_text(encoding="utf-8")
    try:
        if not listed and content.lstrip().startswith("["):
            return np.array(json.loads(content))
        return np.array([int(word) for word in re.split(r"[\s,]+", content) if word])
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{flag}: {text} does not hold whole numbers. "
            "Write positions in the training set, one a line or as a JSON list."
        ) from error


def model(
    options: argparse.Namespace, weights: str | None, flag: str = "--weights"
) -> nn.Module:
    """A model of its own, with weights from a file, on its device."""
    given = import_object("--model", options.model, MODEL)
    found: nn.Module = copy.deepcopy(given)  # the import path may name one object
    if weights is None:
        return found
    try:
        device = torch.device(options.device)
        return load_weights(flag, weights, found).to(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"--device: {options.device} cannot be used here. Try --device cpu."
        ) from error


def data_set(flag: str, path: str) -> Any:
    """A data set."""
    return import_object(flag, path, DATA_SET)


def criterion(options: argparse.Namespace) -> Any:
    """The loss."""
    return import_object("--criterion", options.criterion, CRITERION)


def checked_output(options: argparse.Namespace) -> None:
    """Refuse a name that the JSON cannot be written to, before anything is run."""
    if getattr(options, "json_file", None):
        new_name("--out", options.json_file)


def new_name(flag: str, path: str) -> str:
    """A file's name in a directory that is there."""
    directory = Path(os.path.abspath(path)).parent
    if not directory.is_dir() or Path(path).is_dir():
        raise BadInput(
            f"{flag}: {path} cannot be written: "
            f"{'it is' if Path(path).is_dir() else f'{directory} is not'} a directory. "
            "Name a file in a directory that exists."
        )
    return path
