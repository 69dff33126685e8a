"""Read which examples belong to which person, and what a request is about.

A file of persons lists positions, and a position means nothing without its data set. If
files were erased and the file of persons was made again from those that remain, its
positions count other examples: the photos of another person would be forgotten. So the
file must name its data set by the fingerprint, which is compared with the one at hand.

*Guarantee.* No position is taken from a file that does not name the data set at hand.
*What breaks it.* A ledger or log that does not name its data set: then a warning says
that nothing was compared. And what no fingerprint reads, as ``ledger.same_data`` says.
"""

import argparse
import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opacus_pi._printable import in_one_line
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.inputs import read_indices, text_of
from opacus_pi.files.regular_file import require_readable_once
from opacus_pi.ledger.same_data import difference

IF_ERASED = (
    "If only files of forgotten examples were erased, add --log with the deletion log "
    "that names them."
)
OWNERS_OF = "data_set"  # in a file of persons: the fingerprint of its data set
Owned = Mapping[str, NDArray[np.int64]]


def read_request(
    options: argparse.Namespace, data_set: Callable[[], str | None]
) -> tuple[NDArray[np.int64], Owned]:
    """Return the examples that ``--forget`` or ``--forget-person`` asks to forget.

    Whether they are in the training set is checked where its length is known. Messages
    about positions that come from ``--owners`` name that argument from here on.

    An example may be of several persons, such as a photo of two. It is forgotten when
    one of them asks for it, and the others are named in ``options.also_of``.

    Args:
        options: With ``forget_indices``, ``forget_person``, ``owners`` and ``only``.
            The parser ensures which of them are given; ``flags`` is replaced, and
            ``also_of`` is set: the other persons of each example that has some.
        data_set: As in ``read_owners``.

    Returns:
        All positions, and those of each person that is named, in the order of the
        command line.

    Raises:
        BadInput: If a file cannot be used, a person is not in it or has no examples, a
            person is named twice, or ``--only`` names examples of others.
    """
    persons: list[str] = options.forget_person
    options.also_of = {}
    if not persons:
        return read_indices(options.forget_indices, or_persons=True), {}
    if len(set(persons)) < len(persons):
        raise BadInput("--forget-person: a person is named twice. Name each once.")
    owners = read_owners(options.owners, data_set, _if_erased(options))
    owned = {
        person: np.sort(_examples_of(person, owners, options.owners))
        for person in persons
    }
    if options.only is not None:
        owned = {persons[0]: _only(options, owned)}
    options.flags = {
        name: f"--owners {options.owners} ({', '.join(persons)})"
        if flag == "--forget"
        else flag
        for name, flag in options.flags.items()
    }
    forget = np.unique(np.concatenate([*owned.values()]))
    options.also_of = _other_owners(forget, owners, persons)
    return forget, owned


def _other_owners(
    forget: NDArray[np.int64], owners: Mapping[str, list[int]], persons: list[str]
) -> dict[int, list[str]]:
    """Return the persons who did not ask, by example that is theirs, too.

    Args:
        forget: The examples to forget.
        owners: The positions of every person.
        persons: Those who ask.
    """
    found: dict[int, list[str]] = {}
    for person in owners.keys() - set(persons):
        for example in set(owners[person]).intersection(forget.tolist()):
            found.setdefault(example, []).append(person)
    return {example: sorted(found[example]) for example in sorted(found)}


def shared_text(also_of: Mapping[int, list[str]]) -> str:
    """Return the sentence about examples that are of other persons, too, or nothing.

    Args:
        also_of: As ``read_request`` sets it.
    """
    if not also_of:
        return ""
    others = sorted({person for persons in also_of.values() for person in persons})
    examples = ", ".join(map(str, also_of))
    return (
        f"Also of other persons ({in_one_line(', '.join(others))}): example"
        f"{'s' * (len(also_of) > 1)} {examples}. Forgotten means forgotten for all of "
        "them. Their other examples stay until they ask."
    )


def _only(options: argparse.Namespace, owned: Owned) -> NDArray[np.int64]:
    """Return the examples of ``--only``, which must be the person's.

    Args:
        options: With ``only`` and ``owners``.
        owned: The examples of each person that is named.

    Raises:
        BadInput: If several persons are named, or an example is not the person's.
    """
    if len(owned) > 1:
        raise BadInput(
            "--only: it chooses among the examples of one person, but several are "
            "named. Enter one request for each."
        )
    ((person, examples),) = owned.items()
    chosen = np.unique(read_indices(options.only, "--only"))
    others = chosen[~np.isin(chosen, examples)]
    if len(others) or not len(chosen):
        which = f"example {others[0]} is not of {person}" if len(others) else "no id"
        raise BadInput(
            f"--only: {which}, whose positions in {options.owners} are "
            f"{', '.join(map(str, examples[:20]))}{', ...' * (len(examples) > 20)}. "
            "Name some of these."
        )
    return chosen.astype(np.int64)


def _if_erased(options: argparse.Namespace) -> str:
    """Return the remedy for a data set from which forgotten examples were erased.

    Args:
        options: The parsed arguments. The log says what remains, if it is named; a
            command without ``--data`` reads no data set.
    """
    if options.log or getattr(options, "train_set", None) is None:
        return ""
    return f" {IF_ERASED}"


def read_owners(
    path: str, data_set: Callable[[], str | None], remedy: str = ""
) -> dict[str, list[int]]:
    """Read which examples belong to which person, in the data set at hand.

    Args:
        path: A JSON file: an object from each person's id to a list of positions, and
            from ``"data_set"`` to what ``fingerprint`` returns. It is read once, so it
            may be a pipe.
        data_set: Returns the fingerprint of the data set in which positions are meant;
            None if it is not known, of which a warning is given.
        remedy: One more remedy for another data set, after a space.

    Raises:
        BadInput: If the file cannot be read, holds anything else, or names no data set
            or another one.
    """
    owners, named = _owners_in(path)
    if named is None:
        raise BadInput(
            f"--owners: {path} does not name the data set that its positions count, so "
            "they may be those of other persons. Where the file is made, add the entry "
            f'"{OWNERS_OF}": opacus_pi.accounting.fingerprint(data_set). If files were '
            "erased since, use the file that was made before: one that is made from "
            "those that remain counts other positions."
        )
    at_hand = data_set()
    if at_hand is None:
        warnings.warn(
            f"--owners: whether {path} is of this data set is not known, because "
            "neither the ledger nor the log names its data set. Its positions may be "
            "those of other persons.",
            stacklevel=2,
        )
    elif differs := difference(named, at_hand):
        raise BadInput(
            f"--owners: {path} was made for another data set, which differs from this "
            f"one in {differs}. Its positions may be those of other persons. Use the "
            "file that was made for this data set. If files were erased since, do not "
            "make it again from those that remain. If files were added since, leave "
            f"them out.{remedy}"
        )
    return owners


def _owners_in(path: str) -> tuple[dict[str, list[int]], str | None]:
    """Return the positions by person in a file, and the data set that it names.

    No person may have the id ``data_set``: a list there would be a data set's name that
    was written wrongly, and the file would not be compared with the data set.

    Args:
        path: The JSON file.

    Raises:
        BadInput: If the file cannot be read or holds anything else.
    """
    remedy = (
        "Write a JSON object of positions by person, and the name of their data set: "
        f'{{"p03": [3, 17], "{OWNERS_OF}": "..."}}.'
    )
    with about("--owners", remedy):
        require_readable_once(path)
        stored = Path(path).read_bytes()
    try:
        content = text_of(stored, path)
        pairs = json.loads(content, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--owners: {path} is not JSON. {remedy}") from error
    is_object = content.lstrip().startswith("{")
    named = dict(pairs).get(OWNERS_OF) if is_object else None
    if named is not None and not isinstance(named, str):
        raise BadInput(
            f'--owners: {path} has a "{OWNERS_OF}" that is not a text. It names the '
            "data set: write what opacus_pi.accounting.fingerprint returns. A person "
            "cannot have this id."
        )
    data_set: str | None = named
    if not is_object or not all(
        isinstance(positions, list) and all(type(x) is int for x in positions)
        for person, positions in pairs
        if data_set is None or person != OWNERS_OF
    ):
        raise BadInput(
            f"--owners: {path} does not map persons to lists of whole numbers. {remedy}"
        )
    if len(dict(pairs)) < len(pairs):
        raise BadInput(
            f"--owners: {path} lists a person twice. Put all positions of a person "
            "into one list."
        )
    owners = dict(pairs)
    if data_set is not None:
        del owners[OWNERS_OF]
    return owners, data_set


def _examples_of(
    person: str, owners: Mapping[str, list[int]], path: str
) -> NDArray[np.int64]:
    """Return the positions of one person's examples.

    Args:
        person: The id.
        owners: The positions of every person.
        path: The file that they are from, for the message.

    Raises:
        BadInput: If the person is unknown, has no examples, or a position twice.
    """
    if person not in owners:
        near = difflib.get_close_matches(person.casefold(), owners, n=1, cutoff=0.75)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise BadInput(
            f"--forget-person: {person} is not one of the {len(owners)} persons in "
            f"{path}.{meant} Write one person as the file does, and repeat "
            "--forget-person for several; positions of examples are "
            "named with --forget."
        )
    positions = owners[person]
    if not positions:
        raise BadInput(
            f"--forget-person: {person} has no examples in {path}, so there is nothing "
            "to forget. Add the positions to the file."
        )
    if len(set(positions)) < len(positions):
        raise BadInput(
            f"--owners: {path} lists a position of {person} twice. List each once."
        )
    if not all(0 <= x <= np.iinfo(np.int64).max for x in positions):
        raise BadInput(
            f"--owners: {path} has a position of {person} that is out of range. "
            "Positions count the training set's examples from 0."
        )
    return np.array(positions, dtype=np.int64)
