"""The last run for a deletion log, stored with the weights that it left.

A process may be killed after the weights were stored and before the log or the caller
got the result. So the file of the weights also has what the run returned: its record,
guarantee and trace. From them the result is made again, as the run would have returned
it.

Which examples each request named is in the log alone, where it can be redacted. Here
the lists of examples are left out; they are filled in from the log and from what the
weights have forgotten in all.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.unlearning.unlearner import UnlearningResult

__all__ = ["StoredRun", "run_from_json"]

_LISTS = ("forget_indices", "forgotten_before", "forgotten_exactly")


@dataclass(frozen=True)
class StoredRun:
    """What a run for a deletion log returned, without examples and names.

    Args:
        record: Of the result, with None in place of each list of examples.
        guarantee: Of the result.
        trace: The fields of its trace.
        requests: Hashes of the entries of the requests that it carried out.
        again: Examples of these requests that were forgotten before; sorted.
    """

    record: dict[str, Any]
    guarantee: Guarantee
    trace: dict[str, Any]
    requests: frozenset[str]
    again: tuple[int, ...] = ()

    @classmethod
    def of(cls, result: UnlearningResult, requests: Iterable[str]) -> "StoredRun":
        """Return what is stored of a result.

        Args:
            result: Of the run.
            requests: Hashes of the entries of the requests that it carried out.
        """
        record = result.record
        before = set(record["forgotten_before"])
        return cls(
            {k: None if v and k in _LISTS else v for k, v in record.items()},
            result.guarantee,
            asdict(result.trace),
            frozenset(requests),
            tuple(i for i in record["forget_indices"] if i in before),
        )

    def to_json(self) -> str:
        """Return the text that ``run_from_json`` reads."""
        facts = {
            "record": self.record,
            "guarantee": self.guarantee.to_json(),
            "trace": self.trace,
            "requests": sorted(self.requests),
            "again": self.again,
        }
        return json.dumps(facts)

    def result(
        self,
        model: nn.Module,
        examples: Iterable[int],
        names: Iterable[str],
        *,
        forgotten: Collection[int],
        exactly: Collection[int],
    ) -> UnlearningResult:
        """Return the result of the run again.

        Args:
            model: Has the stored weights, or gets them.
            examples: Those of the requests that the result is about.
            names: The names of these requests.
            forgotten: All examples that the weights have forgotten.
            exactly: Those that a rewind forgot exactly.
        """
        forget = sorted(set(examples))
        before = (set(forgotten) - set(forget)) | set(self.again)
        lists = (forget, sorted(before), sorted(exactly))
        record = self.record | {
            name: examples
            for name, examples in zip(_LISTS, lists, strict=True)
            if name in self.record and self.record[name] is None
        }
        return UnlearningResult(
            model,
            UnlearningTrace(**self.trace),
            self.guarantee,
            {**record, "requests": [*names]},
        )


def run_from_json(text: str) -> StoredRun | None:
    """Read what ``StoredRun.to_json`` wrote; None if it is something else.

    Args:
        text: JSON text.
    """
    try:
        facts = json.loads(text)
        UnlearningTrace(**facts["trace"])
        found = StoredRun(
            dict(facts["record"]),
            Guarantee.from_json(facts["guarantee"]),
            dict(facts["trace"]),
            frozenset(map(str, facts["requests"])),
            tuple(map(int, facts["again"])),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found
