"""Whose weights a directory holds, and whether those of every row are there.

Each file says after how many updates its weights were saved, on which data set, and has
the hash of the gradient norms of the ledger's row that was written with them. So the
weights of a run can be told from those of another, whatever the files are called.

*Guarantee.* A run writes no weights over those of another run, and a Gram ledger uses
the weights of all rows of its ledger, and no others. *What breaks it:* files of early
releases have no hash, and a ledger of some examples cannot be hashed; then a warning
says what was not compared.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

from opacus_pi._validate import expect, require
from opacus_pi.files.arrays_file import opened
from opacus_pi.files.kinds import RECORDED_WEIGHTS
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.ledger.run_identity import row_hash
from opacus_pi.recording.weights import saved_weights

__all__ = ["claim_directory", "weights_of"]

_ONE_EACH = "Use a separate directory for every run."
_RESUME = (
    "Resume with the directory of the saved run, or leave out weights_dir: the weights "
    "of every row are needed."
)


def claim_directory(
    directory: Path, row_hashes: Mapping[int, str], num_steps: int
) -> None:
    """Refuse a directory that does not hold exactly the weights of a run's rows.

    If the run was resumed, files of later updates are deleted: it writes them again.

    Args:
        directory: Where the run is about to write weights; it need not exist.
        row_hashes: Of the rows that the run has written, by number of updates; empty
            for a new run.
        num_steps: Updates that the run has made.

    Raises:
        ValueError: If the directory holds weights of another run, or lacks some of this
            one. Nothing is changed then.
    """
    files = saved_weights(directory)
    own = {step: path for step, path in files.items() if step in row_hashes}
    is_new = not num_steps or not own
    require(
        files.keys() == own.keys() or not is_new,
        f"weights_dir: {directory} holds {len(files)} weights of another run.",
        _ONE_EACH,
    )
    missing = sorted(set(row_hashes) - set(own))
    require(
        not missing,
        f"weights_dir: {directory} has no weights after {missing[:3]} updates of the "
        "run that is resumed.",
        _RESUME,
    )
    for step, path in own.items():
        _require_row(path, row_hashes[step])
    foreign = [step for step in files if step <= num_steps and step not in own]
    require(
        not foreign,
        f"weights_dir: {directory} holds weights after {foreign[:3]} updates, which "
        "the run that is resumed has not saved.",
        _RESUME,
    )
    for step in files.keys() - own.keys():
        files[step].unlink()


def weights_of(directory: Path, ledger: GradNormLedger) -> dict[int, Path]:
    """Return the weights files of a ledger's rows, after checking whose they are.

    The last row may have none: training may have ended between two rows.

    Args:
        directory: Where ``Recorder(weights_dir=...)`` has saved them.
        ledger: The ledger of the run.

    Returns:
        The files by number of updates, increasing.

    Raises:
        ValueError: If there are none, weights of a row are missing, or a file is of
            another run.
    """
    files, steps = saved_weights(directory), ledger.steps.tolist()
    expect(
        bool(files),
        "weights_dir",
        directory,
        "must contain weights-*.safetensors",
        "Train with Recorder(weights_dir=...).",
    )
    foreign = sorted(set(files) - set(steps))
    expect(
        not foreign,
        "weights_dir",
        f"weights after {foreign[:3]} updates in {directory}",
        "must contain only weights that were saved at the ledger's rows",
        _ONE_EACH,
    )
    missing = sorted(set(steps[:-1]) - set(files))
    expect(
        not missing,
        "weights_dir",
        f"none after {missing[:3]} updates in {directory}",
        "must contain the weights of every row of the ledger",
        "Restore the missing files from a copy, or train again.",
    )
    _compare_rows(files, ledger)
    if steps[-1] not in files:
        warnings.warn(
            f"{directory} has no weights after {steps[-1]} updates, the last row of "
            "the ledger: training ended between two rows, or the file was removed. The "
            "gradients of the row before stand for the last updates, too.",
            stacklevel=3,
        )
    return files


def _compare_rows(files: Mapping[int, Path], ledger: GradNormLedger) -> None:
    """Refuse files of another run than the ledger's, and say what is not compared."""
    unknown = ""
    if ledger.example_ids is not None:
        unknown = "the ledger has only some of the examples"
    else:
        norms = dict(zip(ledger.steps.tolist(), ledger.grad_norms, strict=True))
        compared = [_require_row(p, row_hash(norms[n])) for n, p in files.items()]
        if not all(compared):
            unknown = "an earlier release of opacus_pi wrote them"
    if unknown:
        warnings.warn(
            "Whether the weights are those of the ledger's run was not compared, only "
            f"their updates and data set: {unknown}.",
            stacklevel=4,
        )


def _require_row(path: Path, expected: str) -> bool:
    """Refuse a file that was saved at another row.

    Args:
        path: A file of weights.
        expected: Hash of the row's norms.

    Returns:
        Whether the file has a hash.

    Raises:
        ValueError: If it has another one.
    """
    with opened(path, RECORDED_WEIGHTS) as (_, header):
        found = header.get("row", "")
    require(
        found in ("", expected),
        f"weights_dir: {path.name} is of another run: the gradient norms that were "
        "recorded with these weights are not those of this run.",
        _ONE_EACH,
    )
    return bool(found)
