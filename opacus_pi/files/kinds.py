"""The kinds of files that opacus_pi writes: their names, versions and readers.

This table is the only place that lists them. (A checkpoint is a file of ``torch.save``,
and a deletion log has a format of its own; neither contains a kind.) The kind is stored
in the file, so that a renamed file is still recognised: a safetensors file has it in
the header's metadata, a JSON file in its entry ``"kind"`` or ``"format"``. ``kind_in``
finds it there.

>>> kind_in(b'{"kind": "opacus_pi.UnlearningTrace", "version": 1').words
'the trace of an unlearning run'
>>> kind_in(b"buy milk") is None
True
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = [
    "ANSWER",
    "DELETION_STATEMENT",
    "GRAD_NORM_LEDGER",
    "GRAM_LEDGER",
    "GUARANTEE",
    "KINDS",
    "LOG_EXPORT",
    "ORACLE",
    "PARTICIPATIONS",
    "PRIVACY_STATEMENT",
    "RECORDED_WEIGHTS",
    "REPORT",
    "TRACE",
    "UNLEARNED_WEIGHTS",
    "FileKind",
    "kind_in",
]


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Args:
        name: The name that is stored in the file, e.g. ``"opacus_pi.GradNormLedger"``.
        words: The kind as words of a sentence, e.g. ``"a ledger of gradient norms"``.
        version: The format version that this release writes.
        reader: The function that reads the file and checks it, as
            ``"module:attribute"``; empty if nothing in the file can be checked. It is a
            string because readers are defined in packages that import this one, and
            because a look-up must not import torch.
        earlier_versions: The format versions of earlier releases that are read too.
        from_archive: How to read one from a file of ``torch.save``; empty if no such
            file has one.
    """

    name: str
    words: str
    version: int = 1
    reader: str = ""
    earlier_versions: tuple[int, ...] = ()
    from_archive: str = ""

    @property
    def readable_versions(self) -> tuple[int, ...]:
        """The format versions that this release reads; it writes the last one."""
        return (*self.earlier_versions, self.version)

    def read(self, path: Path) -> Any:
        """Read the file and check it.

        Args:
            path: A file of this kind, which has a reader.

        Returns:
            What the reader returns.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, edited or of another version.
        """
        module, _, attributes = self.reader.partition(":")
        reader: Any = import_module(module)
        for attribute in attributes.split("."):
            reader = getattr(reader, attribute)
        function: Callable[..., Any] = reader
        if module.startswith("opacus_pi.files."):  # one reader for several kinds
            return function(path, self)
        return function(path)


_ARRAYS = "opacus_pi.files.arrays_file:check_file"
_WEIGHTS = "opacus_pi.files.weights_file:read_weights"

GRAD_NORM_LEDGER = FileKind(
    "opacus_pi.GradNormLedger",
    "a ledger of gradient norms",
    # since 2: the chain of custody, and counts of participations
    version=3,  # since 3: the kind of generator that the noise was drawn from
    earlier_versions=(1, 2),
    reader="opacus_pi.ledger.grad_norm_ledger:GradNormLedger.load",
    from_archive="If PrivacyEngine.save_checkpoint wrote it, as a Trainer's callback "
    "does, opacus_pi.integration.checkpoints.ledger_in_checkpoint(path) reads its "
    "ledger.",
)
GRAM_LEDGER = FileKind(
    "opacus_pi.GramLedger",
    "a ledger of Gram matrices",
    version=2,  # since 2: counts of participations
    earlier_versions=(1,),
    reader="opacus_pi.ledger.gram_ledger:GramLedger.load",
)
ORACLE = FileKind("opacus_pi.Oracle", "a retrained model", reader=_ARRAYS)
PARTICIPATIONS = FileKind(
    "opacus_pi.Participations", "participations of one training run", reader=_ARRAYS
)
RECORDED_WEIGHTS = FileKind(
    "opacus_pi.RecordedWeights", "weights of one row of a ledger", reader=_WEIGHTS
)
UNLEARNED_WEIGHTS = FileKind(
    "opacus_pi.UnlearnedWeights", "weights after unlearning", reader=_WEIGHTS
)
TRACE = FileKind(
    "opacus_pi.UnlearningTrace",
    "the trace of an unlearning run",
    reader="opacus_pi.evaluation.trace:UnlearningTrace.load",
)
LOG_EXPORT = FileKind(
    "opacus_pi.DeletionLogExport",
    "a deletion log for an auditor",
    reader="opacus_pi.unlearning.log_export:verify_export",
)
GUARANTEE = FileKind(
    "opacus_pi.Guarantee",
    "a guarantee",
    version=2,  # since 2: who established each assumption, both directions
    earlier_versions=(1,),
)
PRIVACY_STATEMENT = FileKind(
    "opacus_pi.PrivacyStatement",
    "a privacy statement",
    version=2,  # since 2: the kind, and who established each assumption
    earlier_versions=(1,),
)
DELETION_STATEMENT = FileKind(
    "opacus_pi.DeletionStatement",
    "a statement about a deletion",
    reader="opacus_pi.unlearning.deletion_statements:DeletionStatement.load",
)
REPORT = FileKind("opacus_pi.Report", "the JSON of a report")
ANSWER = FileKind("opacus_pi.cli", "an answer of opacus-pi")

KINDS = {
    kind.name: kind
    for kind in (
        GRAD_NORM_LEDGER,
        GRAM_LEDGER,
        ORACLE,
        PARTICIPATIONS,
        RECORDED_WEIGHTS,
        UNLEARNED_WEIGHTS,
        TRACE,
        LOG_EXPORT,
        GUARANTEE,
        PRIVACY_STATEMENT,
        DELETION_STATEMENT,
        REPORT,
        ANSWER,
    )
}

# "kind": "opacus_pi.Oracle", or with a version: "format": "opacus_pi.Report.v1"
_NAMED = re.compile(
    rb'"(?:kind|format)" ?: ?"(opacus_pi\.[A-Za-z]+)(?:\.v?[0-9]+|\.[a-z]+)*"'
)


def kind_in(start: bytes) -> FileKind | None:
    """Return the kind that a file names in its header.

    Args:
        start: The first bytes of the file, header included.

    Returns:
        The kind; None if no known kind is named.
    """
    for found in _NAMED.finditer(start):
        if kind := KINDS.get(found[1].decode()):
            return kind
    return None
