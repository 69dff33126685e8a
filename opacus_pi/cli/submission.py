"""Enter the requests that a command line names in a deletion log.

``unlearn --log`` and ``log submit`` take the same arguments, so that a request which
one command entered is the one that the other carries out: the same examples, or the
same person, get the same name.
"""

import argparse
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.owners import Owned
from opacus_pi.unlearning.requests import DeletionRequests, withdraw_first

_OF_POSITIONS = "ids-"  # begins the name of a request that was given none
_PENDING = (
    "{log} has the request already, and it is pending ({names}). Repeat the command "
    "without the error to carry it out, or take it back with 'opacus-pi log withdraw'."
)


def require_loggable(persons: list[str], request_id: str | None) -> None:
    """Refuse a name that the log could not store for the request of each person.

    Args:
        persons: The persons of ``--forget-person``; empty if ids are given.
        request_id: The name of the request, which the log stores as it is.

    Raises:
        BadInput: If there is one name for several persons, or it is a person's.
    """
    if request_id is not None and len(persons) > 1:
        raise BadInput(
            "--request-id: it names one request, but each of the "
            f"{len(persons)} persons gets a request. Leave it out: then each request "
            "has a random name, which is printed. To choose the names, call 'opacus-pi "
            "log submit' with --request-id once for each person, and then 'opacus-pi "
            "unlearn --pending'."
        )
    if request_id in persons:
        raise BadInput(
            "--request-id: it is the person's id, and the log would store it in plain "
            "text. Use another name, or leave it out."
        )


def submit(
    requests: DeletionRequests,
    forget: NDArray[np.int64],
    owned: Owned,
    request_id: str | None,
) -> list[str]:
    """Enter one request, or one for each person.

    Args:
        requests: The requests of the log, which know the persons' examples.
        forget: The examples that the command names.
        owned: Those of each person; empty if positions are named.
        request_id: The name of the request; None: choose one.

    Returns:
        The names of the requests.

    Raises:
        BadInput: If the name belongs to a request that is not this person's.
        ValueError: If the log refuses a request.
    """
    if owned:
        return [
            _submit_for(requests, person, examples, request_id)
            for person, examples in owned.items()
        ]
    name = request_id or _earlier(requests, forget) or _random_name(_OF_POSITIONS)
    requests.submit(name, indices=forget)
    return [name]


def _earlier(requests: DeletionRequests, forget: NDArray[np.int64]) -> str | None:
    """Return the name of an earlier request that was given none, for these examples.

    A request that was withdrawn does not count.

    So the same command, repeated after a crash, does not enter a second request. The
    name itself is random: anyone could guess the examples of a hash, and try it.

    Args:
        requests: The requests of the log.
        forget: The examples that the command names.
    """
    examples = tuple(sorted(forget.tolist()))
    known = (request for request in requests.submitted if request.indices == examples)
    names = (request.request_id for request in known)
    return next((name for name in names if name.startswith(_OF_POSITIONS)), None)


def _random_name(start: str) -> str:
    """Return a name that says nothing of the examples or the person."""
    return f"{start}{secrets.token_hex(8)}"


@contextmanager
def said_if_pending(
    options: argparse.Namespace, requests: DeletionRequests, names: list[str]
) -> Iterator[None]:
    """Have an error say that requests were entered, and wait to be carried out.

    Args:
        options: The parsed arguments; ``after_error`` is printed after the error.
        requests: The requests of the log.
        names: Those of this command.
    """
    waiting = [r.request_id for r in requests.pending if r.request_id in names]
    if waiting:
        options.after_error = _PENDING.format(
            names=", ".join(waiting), log=requests.log.path
        )
    yield
    options.after_error = ""


def _submit_for(
    requests: DeletionRequests,
    person: str,
    forget: NDArray[np.int64],
    request_id: str | None,
) -> str:
    """Enter a person's request, under a keyed hash of the person's id.

    If no name is given, an earlier request of the person for the same examples is used
    again, so that a command can be repeated after a crash. Otherwise the name is
    random: two persons may own the same examples.

    Args:
        requests: The requests of the log, which know the person's examples.
        person: The person's id.
        forget: The person's examples, sorted.
        request_id: The name of the request; None: choose one.

    Returns:
        The request's name.

    Raises:
        BadInput: If the name belongs to a request that is not this person's.
        ValueError: If the log refuses the request.
    """
    examples = tuple(forget.tolist())
    earlier = [r for r in requests.submitted_by(person) if r.indices == examples]
    if request_id is None and earlier:
        return earlier[0].request_id
    name = request_id or _random_name("person-")
    request = requests.submit(name, user=person)
    if request not in requests.submitted_by(person):
        raise BadInput(
            f"--request-id: {name} was submitted before, but not for this person. Use "
            f"another name.{withdraw_first(requests, name)}"
        )
    return name
