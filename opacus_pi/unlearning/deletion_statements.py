"""What may be shown about a deletion: which requests, when, which weights, what holds.

A guarantee is about numbers. Whoever asked for a deletion, an auditor or a lawyer also
asks which request it answers, when that was, and which model it is about. The statement
joins these facts with the guarantee, without the estimate that only the owner of the
data may see.

*Guarantee.* ``from_json`` accepts a text only as it was written, and every number is
computed again from the guarantee in it. *What breaks it:* the checksum finds accidental
changes and careless edits, not a forger. That the requests were received and carried
out is shown by the deletion log.

>>> from opacus_pi.accounting.guarantee import Assumption
>>> clipped = Assumption("Every gradient was clipped", True, "max_grad_norm=1")
>>> claim = Guarantee("Langevin", (clipped,), orders=(2.0,), divergences=(0.5,))
>>> statement = DeletionStatement(claim, 1e-5, ("2026-001",), num_forgotten=1)
>>> print(str(statement).splitlines()[0])
Statement about the deletion request 2026-001.
>>> DeletionStatement.from_json(statement.to_json()) == statement
True
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opacus_pi._printable import in_one_line
from opacus_pi._shown import Shown
from opacus_pi._validate import expect
from opacus_pi.accounting.conversion import check_delta
from opacus_pi.accounting.guarantee import Guarantee, rounded_up
from opacus_pi.files.checksummed_json import require_unedited, with_json_checksum
from opacus_pi.files.kinds import DELETION_STATEMENT
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.regular_file import require_regular
from opacus_pi.files.strict_json import json_text
from opacus_pi.unlearning.history import runs_in_words
from opacus_pi.unlearning.released_weights import require_weights_of
from opacus_pi.unlearning.unlearner import UnlearningResult

__all__ = ["DeletionStatement", "deletion_statement"]

_FORMAT = f"{DELETION_STATEMENT.name}.v{DELETION_STATEMENT.version}"
_UNEDITED = "Ask for the file that opacus_pi wrote."
_LIMITS = (
    "This statement is about the model with these weights. It does not cover copies, "
    "backups and earlier releases of the model, nor what somebody has learned from "
    "them. It says what its author claims; that the requests were received and carried "
    "out is shown by the deletion log."
)


@dataclass(frozen=True, repr=False)
class DeletionStatement(Shown):
    """What may be shown to others about one run of unlearning.

    Args:
        guarantee: What is claimed, with its assumptions. It has no estimate.
        delta: δ in (0, 1) at which ε is stated.
        requests: Names of the requests that the run carried out; empty if there was no
            deletion log.
        finished: When the run ended, ISO 8601 in UTC; empty if that is not known.
        num_forgotten: Number of examples that the guarantee covers, those of other
            requests included.
        weights: SHA-256 of the weights by name and value, as
            ``record["unlearned_weights"]`` and the deletion log name them.
        weights_file: SHA-256 of the file of the weights; empty if no file is named.
        earlier_runs: The runs that the model went through before this one, as
            ``record["earlier_runs"]`` names them: what was run, and how many times in a
            row. Empty if there were none that count, or they are not known.
        num_forgotten_exactly: If there were, how many of the examples a rewind forgot
            exactly and no run has used since.
        num_requested: Number of examples that the requests of this run name; 0 if that
            is not known.

    Raises:
        ValueError: If δ is outside (0, 1), or the guarantee has an estimate.
    """

    guarantee: Guarantee
    delta: float
    requests: tuple[str, ...] = ()
    finished: str = ""
    num_forgotten: int = 0
    weights: str = ""
    weights_file: str = ""
    earlier_runs: tuple[tuple[str, int], ...] = ()
    num_forgotten_exactly: int = 0
    num_requested: int = 0

    def __post_init__(self) -> None:
        check_delta(self.delta)
        expect(
            self.guarantee == self.guarantee.without_estimates(),
            "guarantee",
            "one with an estimate",
            "must have no estimate, which only the owner of the data may see",
            "Pass guarantee.without_estimates().",
        )

    def _shown(self) -> dict[str, Any]:
        facts = {"requests": list(self.requests), "finished": self.finished}
        return {**facts, "kind": self.guarantee.kind}

    def for_request(self, name: str) -> "DeletionStatement":
        """Return the statement for the person of one request: it names no other one.

        What is claimed stays the same: it holds for all examples together, and so for
        those of each request.

        Args:
            name: The request.

        Raises:
            ValueError: If the statement names no such request.
        """
        expect(
            name in self.requests,
            "name",
            name,
            f"must be one of the requests of the statement, {list(self.requests)}",
            "For an earlier request, make the statement of requests.last_result(model, "
            "[name]).",
        )
        return replace(self, requests=(name,), num_requested=0)

    def facts(self) -> dict[str, Any]:
        """Return the statement as JSON facts; how-to/regulator.md lists the keys."""
        sequence: dict[str, Any] = {}
        if self.earlier_runs:
            sequence = {
                "earlier_runs": [list(run) for run in self.earlier_runs],
                "num_forgotten_exactly": self.num_forgotten_exactly,
            }
        least = self.guarantee.least_order(self.delta)
        order, divergence = (None, None) if least is None else least
        own = {"num_requested": self.num_requested} if self.num_requested else {}
        return {
            "format": _FORMAT,
            "requests": list(self.requests),
            "finished": self.finished,
            "num_forgotten": self.num_forgotten,
            **own,
            **sequence,
            "weights": self.weights,
            "weights_file": self.weights_file,
            "kind": self.guarantee.kind,
            "exact": self.guarantee.is_exact,
            "too_large": self.guarantee.is_too_large(self.delta),
            "epsilon": self.guarantee.epsilon(self.delta),
            "reverse_epsilon": self.guarantee.reverse_epsilon(self.delta),
            "delta": self.delta,
            "order": order,
            "divergence": divergence,
            "in_words": self.guarantee.in_words(self.delta),
            "guarantee": json.loads(self.guarantee.to_json()),
        }

    def to_json(self) -> str:
        """Return the statement as JSON text, with a checksum."""
        return json_text(with_json_checksum(self.facts()))

    @classmethod
    def from_json(cls, text: str) -> "DeletionStatement":
        """Read the text that ``to_json`` wrote.

        Args:
            text: The JSON text.

        Raises:
            ValueError: If the text is something else, or was edited.
        """
        try:
            content = dict(plain_json(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise _unreadable(error) from error
        if content.get("format") == _FORMAT:
            require_unedited(content, "The text", _UNEDITED)
        try:
            found = cls(
                Guarantee.from_json(json.dumps(content["guarantee"])),
                float(content["delta"]),
                tuple(map(str, content["requests"])),
                str(content["finished"]),
                int(content["num_forgotten"]),
                str(content["weights"]),
                str(content["weights_file"]),
                tuple((str(a), int(b)) for a, b in content.get("earlier_runs", ())),
                int(content.get("num_forgotten_exactly", 0)),
                int(content.get("num_requested", 0)),
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _unreadable(error) from error
        require_unedited(content, "The text", _UNEDITED)
        expect(
            with_json_checksum(found.facts()) == content,
            "text",
            "other numbers or words",
            "must say what follows from the guarantee in it",
            f"It was edited. {_UNEDITED}",
        )
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DeletionStatement":
        """Read a file with the text that ``to_json`` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: As ``from_json``.
        """
        require_regular(path)
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        parts = [self._of_request(), self._claim(), _LIMITS]
        parts.append(f"In full:\n{self.guarantee.text(self.delta)}")
        return "\n\n".join(parts)

    def _of_request(self) -> str:
        """Return which requests, when, and which model."""
        names = ", ".join(map(in_one_line, self.requests))
        about = f"request{'s' * (len(self.requests) > 1)} {names}"
        ended = f"The run ended at {in_one_line(self.finished)}. " * bool(self.finished)
        size = _examples(self.num_forgotten)
        about_these = ""
        if names and self.num_requested:
            several = len(self.requests) > 1
            start = "These requests together ask" if several else "This request asks"
            about_these = f"{start} to forget {_examples(self.num_requested)}. "
        lines = [
            f"Statement about the deletion {about}."
            if names
            else "Statement about a deletion that is in no deletion log.",
            f"{about_these}{ended}The model was to forget {size}, those of other "
            "requests included.",
            *self._of_earlier_runs(),
        ]
        for what, digest in (("file", self.weights_file), ("weights", self.weights)):
            if digest:
                lines.append(f"SHA-256 of the model's {what}: {in_one_line(digest)}")
        return "\n".join(lines)

    def _of_earlier_runs(self) -> list[str]:
        """Return which runs came before, and what still holds of a rewind."""
        if not self.earlier_runs:
            return []
        runs = in_one_line(runs_in_words(self.earlier_runs))
        number = self.num_forgotten_exactly
        exact = (
            f" {number} of the examples {'was' if number == 1 else 'were'} forgotten "
            "exactly by the rewind, and no run has used them since: for these alone "
            "ε = 0, on the conditions in the statement about that rewind."
        )
        return [f"Earlier runs of this model: {runs}.{exact * bool(number)}"]

    def _claim(self) -> str:
        """Return what is claimed, in words and numbers, and on what it rests."""
        claim, delta = self.guarantee, self.delta
        if not claim.in_words(delta):
            return (
                "No bound is claimed. Judge the model only by comparison with models "
                "that were retrained without the examples."
            )
        weak = ", but the bound is too large to be of practical use"
        standing = (
            "Certified, if the declarations hold"
            if claim.declarations
            else ("Certified")
        )
        number = (
            "ε = 0" if claim.is_exact else f"ε ≤ {rounded_up(claim.epsilon(delta))}"
        )
        lines = [
            f"{standing}{weak * claim.is_too_large(delta)}: {number} at δ = {delta:g}.",
            claim.in_words(delta),
            *self._for_each(),
            f"This rests on {len(claim.assumptions)} conditions. "
            f"{len(claim.declarations)} of them are declared by the author and were "
            "not checked by the program; the others were observed or follow from what "
            "was observed.",
        ]
        return "\n".join(lines)

    def _for_each(self) -> list[str]:
        """Return that a bound for several examples is one for each request, too."""
        if self.num_forgotten < 2 or self.guarantee.is_exact:
            return []
        each = "each request" if len(self.requests) > 1 else "each of them"
        return [
            f"This number is for the {_examples(self.num_forgotten)} together: it "
            "compares with a model that was trained without all of them. So it holds "
            f"for {each}, too."
        ]


def _unreadable(error: Exception) -> ValueError:
    """Return the error for a text that is no statement."""
    return ValueError(
        f"text must be JSON in the format {_FORMAT}, got something else "
        f"({in_one_line(str(error))[:200]}). {_UNEDITED}"
    )


def _examples(number: int) -> str:
    """Return a number of examples in words."""
    return f"{number} example{'s' * (number != 1)}"


def deletion_statement(
    result: UnlearningResult,
    delta: float,
    *,
    weights_path: str | os.PathLike[str] | None = None,
) -> DeletionStatement:
    """Return what may be shown to others about a run of unlearning.

    Args:
        result: The run. ``DeletionRequests.process`` adds the names of the requests to
            its record.
        delta: δ in (0, 1); choose it below 1 / (data set size).
        weights_path: The file of the weights that is released, of safetensors or
            ``torch.save``, to name it by its SHA-256. Its tensors are compared with
            the weights that the run left. None: only the weights themselves are named.

    Returns:
        The statement. It has no estimate and lists no examples.

    Raises:
        FileNotFoundError: If there is no file of that name.
        ValueError: If δ is outside (0, 1), or the file does not hold the weights that
            the run left.
    """
    digest = "" if weights_path is None else require_weights_of(weights_path, result)
    return statement_of(result, delta, digest)


def statement_of(
    result: UnlearningResult | Any, delta: float, weights_file: str
) -> DeletionStatement:
    """Return the statement about a run whose file of weights is known to be its own.

    Args:
        result: The run.
        delta: δ in (0, 1).
        weights_file: SHA-256 of the file of its weights; empty: no file is named.
    """
    record = result.record
    examples: Iterable[int] = (
        *record.get("forget_indices", ()),
        *record.get("forgotten_before", ()),
    )
    runs = tuple((what, number) for what, number in record.get("earlier_runs") or ())
    return DeletionStatement(
        result.guarantee.without_estimates(),
        delta,
        tuple(record.get("requests", ())),
        record.get("finished", ""),
        len(set(examples)),
        record.get("unlearned_weights", ""),
        weights_file,
        runs,
        len(record.get("forgotten_exactly", ())) if runs else 0,
        len(set(record.get("forget_indices", ()))) if record.get("requests") else 0,
    )
