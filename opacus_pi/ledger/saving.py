"""Write a ledger to a file, and read it again.

Both classes of ledgers hold three kinds of things: the facts of the run (``NoisySGD``),
arrays, and strings. ``SavedLedger`` turns them into one safetensors file and back. A
ledger class declares in a ``LedgerFile`` which of its fields are arrays, which are
strings, and what the file calls the strings.

Files of earlier releases can be read; ``files.kinds`` lists the versions.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from numpy.typing import NDArray
from typing_extensions import Self

from opacus_pi._shown import Shown
from opacus_pi.files.arrays_file import Layout, read_arrays, write_arrays
from opacus_pi.files.kinds import FileKind
from opacus_pi.ledger.mechanism import (
    MECHANISM_ARRAYS,
    MECHANISM_FACTS,
    MECHANISM_MORE_FACTS,
    NoisySGD,
)


@dataclass(frozen=True)
class LedgerFile:
    """The fields of a ledger that its file holds.

    Args:
        kind: The kind of file, an entry of the table in ``files.kinds``.
        arrays: Type of each array that every file holds, by field, e.g. ``"<f4"``.
        texts: Name in the file of each text that every file holds, by field.
        more_arrays: Type of each array that a file may hold, by field.
        more_texts: Name in the file of each text that a file may hold, by field.
        objects: Type of each field that a file may hold as a JSON text of its own, by
            field. The type has ``to_json`` and ``from_json``.
        retired: Names of strings that only files of earlier releases hold.
    """

    kind: FileKind
    arrays: Mapping[str, str]
    texts: Mapping[str, str]
    more_arrays: Mapping[str, str] = field(default_factory=dict)
    more_texts: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    retired: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The layout of the file, with the facts of the run."""
        return Layout(
            arrays={**MECHANISM_ARRAYS, **self.arrays},
            facts=(*MECHANISM_FACTS, *self.texts.values()),
            more_arrays=self.more_arrays,
            more_facts=(
                *MECHANISM_MORE_FACTS,
                *self.more_texts.values(),
                *self.objects,
                *self.retired,
            ),
        )


class SavedLedger(Shown):
    """A ledger that can be saved and loaded; the base of both ledger classes."""

    _FILE: ClassVar[LedgerFile]
    mechanism: NoisySGD

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger to one safetensors file, atomically and with a checksum.

        Args:
            path: The file's name. The file is as sensitive as the ledger.
        """
        file = self._FILE
        arrays, facts = self.mechanism.to_arrays()
        for name in (*file.arrays, *file.more_arrays):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        for name, in_file in {**file.texts, **file.more_texts}.items():
            if getattr(self, name) is not None:
                facts[in_file] = getattr(self, name)
        for name in file.objects:
            if getattr(self, name) is not None:
                facts[name] = getattr(self, name).to_json()
        write_arrays(path, file.kind, arrays, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ledger that ``save`` wrote.

        Args:
            path: The file's name.

        Returns:
            The ledger.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, edited, of another version, or not
                of this kind.
        """
        return cls._from_file(*read_arrays(path, cls._FILE.kind, cls._FILE.layout))

    @classmethod
    def _from_file(cls, arrays: dict[str, NDArray[Any]], facts: dict[str, str]) -> Self:
        """Return the ledger that a file's arrays and strings describe."""
        mechanism = NoisySGD.from_arrays(arrays, facts)
        texts = {
            name: facts[in_file]
            for name, in_file in {**cls._FILE.texts, **cls._FILE.more_texts}.items()
            if in_file in facts
        }
        objects = {
            name: kind.from_json(facts[name])
            for name, kind in cls._FILE.objects.items()
            if name in facts
        }
        return cast(Self, cast(Any, cls)(mechanism, **texts, **objects, **arrays))
