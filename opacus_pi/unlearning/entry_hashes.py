"""The two hashes that tie the entries of a deletion log together.

An entry's hash covers its own facts and the hash of the entry before. What the entry
says is covered by a salted commitment, so it can be shown to one reader and withheld
from another, or redacted, while the chain stays whole.
"""

import hashlib
import json

__all__ = ["commitment_of", "entry_hash"]


def entry_hash(
    number: int, time: str, kind: str, commitment: str, previous: str
) -> str:
    """Return the SHA-256 of an entry without its hash, hexadecimal.

    Args:
        number: Position in the log, from 0.
        time: When it was appended, as written in the log.
        kind: What happened.
        commitment: ``commitment_of`` what it says.
        previous: Hash of the entry before.
    """
    content = json.dumps([number, time, kind, commitment, previous])
    return hashlib.sha256(content.encode()).hexdigest()


def commitment_of(salt: bytes, name: str | None, body: str) -> str:
    """Return the SHA-256 of a salted payload, hexadecimal.

    Without the salt a redacted payload could be guessed: a log has few users and few
    examples, so all possible payloads could be hashed and compared.

    Args:
        salt: 32 random bytes.
        name: The entry's name as JSON text, or None.
        body: The payload as JSON text.
    """
    return hashlib.sha256(salt + json.dumps([name, body]).encode()).hexdigest()
