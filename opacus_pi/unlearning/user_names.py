"""Keyed hashes by which a deletion log refers to users.

A plain hash of a name can be guessed by hashing a list of names. An HMAC cannot without
the key, so the log and the key must not be kept together where others can read. The key
is an argument, or a file beside the log that only its owner can read; it is never in
the log. Anyone with the key can still ask for the requests of a user by name.

A payload with a hash also has the *check value* of its key, the HMAC of a fixed text.
With another key no name would match, and a user who had submitted requests would seem
to have none. The check value shows this, so such a key is refused.

*What breaks it.* A lost key cannot be made again: the hashes stay in the log, but
no one can find a user's requests by name any more.
"""

import hmac
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from opacus_pi._validate import expect
from opacus_pi.files.atomic_file import put_new_file, restrict_to_owner
from opacus_pi.files.regular_file import require_regular
from opacus_pi.unlearning.deletion_log import Entry, read_entries

__all__ = ["UserNames", "hashed_name"]

_KEY_BYTES = 32
_SHORTEST_KEY = 16
_CHECKED_TEXT = b"\xffkey of a deletion log"  # no name: it is not valid UTF-8
_IF_LOST = (
    "If the key is lost for good, no one can find these requests by name: enter new "
    "ones by positions (indices=, or --forget on the command line)."
)


class UserNames:
    """The user names in the payloads of one log, as keyed hashes.

    Args:
        path: The log. Its key file has the same name with ``.key`` added.
        key: The key, at least 16 bytes; None: that of the key file, which is made when
            it is first needed.
        store_names: Whether to store the names themselves.

    Raises:
        ValueError: If the key is too short.
    """

    def __init__(
        self, path: Path, key: bytes | None = None, store_names: bool = False
    ) -> None:
        self.path = path
        self.key_path = Path(f"{path}.key")
        self.store_names = store_names
        if key is not None:
            hashed_name("", key)
        self._key = key
        self._source_of_key = f"that of {self.key_path}" if key is None else "in key="
        self._is_checked = False  # whether the log's hashes were made with this key

    def facts(self, user: str) -> dict[str, str]:
        """Return what a payload is to say about a user.

        Args:
            user: The name.

        Raises:
            ValueError: If the key file is damaged, is missing and was used before, or
                if the names in the log were hashed with another key.
            OSError: If it could not be made.
        """
        if self.store_names:
            return {"user": user}
        if not self._is_checked and self.path.exists():
            for entry in read_entries(self.path):
                if "user_hash" in (entry.payload or {}):
                    self._require_key_of(entry)
        self._key = self._key or _read_key(self.key_path) or _make_key(self.key_path)
        self._is_checked = True
        return {
            "user_hash": hashed_name(user, self._key),
            "user_key": _check_value(self._key),
        }

    def entries_of(self, user: str, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the entries that are about a user and were not redacted.

        Entries of an earlier release have no check value. A warning says so if none of
        them matches, because this may be due to another key.

        Args:
            user: The name.
            entries: Of this log, oldest first.

        Raises:
            ValueError: If a name was hashed, and its key is missing, damaged or
                another one.
        """
        num_unchecked, matches = 0, False
        for entry in entries:
            payload = entry.payload or {}
            if "user_hash" in payload:
                key = self._require_key_of(entry)
                is_of_user = payload["user_hash"] == hashed_name(user, key)
                if "user_key" not in payload:
                    num_unchecked, matches = num_unchecked + 1, matches or is_of_user
            else:
                is_of_user = payload.get("user") == user
            if is_of_user:
                yield entry
        if num_unchecked and not matches:
            warnings.warn(
                f"{self.path}: {num_unchecked} names were hashed by an earlier "
                "release, which did not store which key it used. With the right key "
                "this answer is complete: none of these names is the user's. With "
                "another key, requests of the user may be missing from it. Make sure "
                "that the key belongs to this log.",
                stacklevel=4,
            )

    def _require_key_of(self, entry: Entry) -> bytes:
        """Return the key, after checking that the name in an entry was hashed with it.

        Args:
            entry: With a hashed name.

        Raises:
            ValueError: If the key file is missing or damaged, or the key is another.
        """
        key = self._key or _read_key(self.key_path)
        expect(
            key is not None,
            "the key file",
            self.key_path,
            "must exist, because the log has names that were hashed with its key",
            f"Restore the file from a copy, or pass key= in Python. {_IF_LOST}",
        )
        value = _check_value(cast(bytes, key))
        expect(
            (entry.payload or {}).get("user_key", value) == value,
            "key",
            f"another one, {self._source_of_key}",
            f"must be the key with which the user's name in entry {entry.number} of "
            f"{self.path} was hashed",
            "Restore the key file of this log from a copy, or pass its key as key= in "
            f"Python. {_IF_LOST}",
        )
        self._key = cast(bytes, key)
        return self._key


def hashed_name(name: str, key: bytes) -> str:
    """Return the HMAC-SHA256 of a user's name, hexadecimal.

    Args:
        name: The user's name.
        key: The key, at least 16 bytes.

    Raises:
        ValueError: If the key is too short.
    """
    expect(
        isinstance(key, bytes) and len(key) >= _SHORTEST_KEY,
        "key",
        f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__,
        f"must be at least {_SHORTEST_KEY} bytes",
        "Use secrets.token_bytes(32).",
    )
    return hmac.new(key, name.encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def _check_value(key: bytes) -> str:
    """Return the value by which a payload says which key its hash was made with."""
    return hmac.new(key, _CHECKED_TEXT, "sha256").hexdigest()


def _read_key(path: Path) -> bytes | None:
    """Read a key file; None if there is none.

    Args:
        path: The file.

    Raises:
        ValueError: If it holds anything but a key.
    """
    try:
        require_regular(path)
        restrict_to_owner(path)
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:  # a UnicodeDecodeError is one, too
        key = b""
    expect(
        len(key) == _KEY_BYTES,
        "the key file",
        path,
        f"must contain {_KEY_BYTES} bytes in hexadecimal digits",
        "Restore the file from a copy, or pass key= in Python.",
    )
    return key


def _make_key(path: Path) -> bytes:
    """Make a key file that only its owner can read, and return the key.

    The file appears under its name only when it is complete, and replaces none: of two
    processes that make one at once, both use the first.

    Args:
        path: The file.
    """

    def write(hidden: Path) -> None:
        with open(hidden, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES).hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    put_new_file(path, write)
    key = _read_key(path)
    if key is None:
        raise FileNotFoundError(
            f"{path}: another process removed the key file while it was being made. "
            "Call again, or pass key= in Python."
        )
    return key
