"""Keyed hashes by which a deletion log refers to users.

A plain hash of a name can be guessed by hashing a list of names. An HMAC cannot without
the key, so the log and the key must not be kept together where others can read. The key
is an argument, or a file beside the log that only its owner can read; it is never in
the log. Anyone with the key can still ask for the requests of a user by name.

*What breaks it.* A lost key cannot be made again: the hashes stay in the log, but
no one can find a user's requests by name any more.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opacus_pi._validate import expect
from opacus_pi.files.atomic_file import put_new_file, restrict_to_owner
from opacus_pi.files.regular_file import require_regular
from opacus_pi.unlearning.deletion_log import read_entries

__all__ = ["UserNames", "hashed_name"]

_KEY_BYTES = 32
_SHORTEST_KEY = 16


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

    def facts(self, user: str) -> dict[str, str]:
        """Return what a payload is to say about a user.

        Args:
            user: The name.

        Raises:
            ValueError: If the key file is damaged, or is missing and was used before.
            OSError: If it could not be made.
        """
        if self.store_names:
            return {"user": user}
        key = self._key or _read_key(self.key_path)
        if key is None:
            expect(
                not self._is_used(),
                "the key file",
                self.key_path,
                "must exist, because the log has names that were hashed with its key",
                "Restore the file from a copy, or pass key=.",
            )
            key = _make_key(self.key_path)
        self._key = key
        return {"user_hash": hashed_name(user, key)}

    def match(self, payload: Mapping[str, Any] | None, user: str) -> bool:
        """Return whether a payload is about a user.

        Args:
            payload: Of an entry; None if it was redacted.
            user: The name.
        """
        if payload is None:
            return False
        if "user" in payload:
            return bool(payload["user"] == user)
        if "user_hash" not in payload:
            return False
        self._key = self._key or _read_key(self.key_path)
        return self._key is not None and payload["user_hash"] == hashed_name(
            user, self._key
        )

    def _is_used(self) -> bool:
        """Return whether the log has a name that was hashed."""
        if not self.path.exists():
            return False
        entries = read_entries(self.path)
        return any("user_hash" in (entry.payload or {}) for entry in entries)


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
        "Restore the file from a copy, or pass key=.",
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
            "Call again, or pass key=."
        )
    return key
