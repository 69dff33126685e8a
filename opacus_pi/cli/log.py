"""``opacus-pi log``: keep the deletion log of a model, without carrying anything out.

Each action is a call of the library: ``DeletionRequests.submit``, ``withdraw`` and
``redact``, ``list_requests`` and ``export_log``. No action prints a key, and only
``submit`` makes a log that does not exist.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opacus_pi._validate import distinct_indices
from opacus_pi.accounting.guarantee import rounded_up
from opacus_pi.cli.errors import DONE, BadInput, about, one_line
from opacus_pi.cli.inputs import import_train_set
from opacus_pi.cli.output import answer, table
from opacus_pi.cli.owners import read_request, shared_text
from opacus_pi.cli.submission import require_loggable, submit
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.unlearning.deletion_log import DeletionLog, read_entries, verify
from opacus_pi.unlearning.history import runs_in_words
from opacus_pi.unlearning.honouring_weights import stored_weights, weights_path_of
from opacus_pi.unlearning.listed_requests import (
    ANY_NUMBER,
    ListedRequest,
    list_requests,
)
from opacus_pi.unlearning.log_export import (
    export_log,
    is_for_owner_only,
    verify_export,
)
from opacus_pi.unlearning.request_entries import training_set_in
from opacus_pi.unlearning.requests import DeletionRequests

FORMAT = "opacus_pi.cli.log.v1"
_WRITTEN_BY = "Name what 'opacus-pi log submit' or 'opacus-pi unlearn --log' wrote."
_NO_RUN = {
    "forgotten by earlier runs": "nothing was run, because earlier runs had forgotten "
    "all of its examples",
    "in the stored weights": "the run was interrupted before the log described it. Its "
    "weights are those beside the log; what holds for them is not in the log",
}
_KEEP_HEAD = (
    "Keep the head of the log elsewhere: with it, 'opacus-pi verify' finds out whether "
    "this entry or an earlier one is removed."
)


def run(options: argparse.Namespace) -> int:
    """Run one action on a deletion log, and print its answer.

    Args:
        options: The parsed arguments of ``log``, with ``action``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file or an argument cannot be used.
        ValueError: If the library refuses a value; the program names the flag.
    """
    _ACTIONS[options.action](options)
    return DONE


def _submit(options: argparse.Namespace) -> None:
    """Enter a request, or one for each person, in the log."""
    before = _opened(options)[1] if os.path.exists(options.log) else []
    known = {row.request_id for row in before}
    size, data_set = _training_set(options)
    forget, owned = read_request(options, lambda: data_set)
    require_loggable([*owned], options.request_id)
    distinct_indices("indices", forget, size)  # before a new log is made
    try:
        requests = DeletionRequests(options.log, size, owned, data_set=data_set)
    except ValueError as error:  # the log is whole, but of another training set
        raise BadInput(f"--data: {one_line(error)}") from error
    names = submit(requests, forget, owned, options.request_id)
    rows = {row.request_id: row for row in _listed(options)}
    weights = weights_path_of(requests.log.path)
    gone = set(stored_weights(weights, size).forgotten)
    facts = {
        "submitted": [
            {
                **_facts_of(rows[name]),
                "person": person,
                "entered_before": name in known,
                "num_forgotten_before": len(
                    gone.intersection(rows[name].indices or ())
                ),
            }
            for name, person in zip(names, owned or [None], strict=True)
        ],
        "also_of": options.also_of,
        "head": requests.log.head,
    }
    key = f"{requests.log.path}.key" if owned else ""
    _answer(options, facts, _submitted_text(options, facts, key))


def _training_set(options: argparse.Namespace) -> tuple[int, str | None]:
    """Return the length and the fingerprint of the training set.

    Args:
        options: With ``train_set``, an import path; None: the log says what it is.

    Raises:
        BadInput: If neither says how long it is, or it is not that of the log.
    """
    if options.train_set is not None:
        train_set, _ = import_train_set(options, must_exist=False)
        return len(train_set), fingerprint(train_set)
    size, data_set = None, None
    if os.path.exists(options.log):
        size, data_set = training_set_in(read_entries(options.log))
    if size is None:
        raise BadInput(
            f"--data: no request in {options.log} says how many examples the training "
            "set has. Name the training set: --data my_project:train_set."
        )
    return size, data_set


def _submitted_text(
    options: argparse.Namespace, facts: Mapping[str, Any], key: str
) -> str:
    """Return what was entered as text, and how it is carried out.

    Args:
        options: The parsed arguments.
        facts: The answer for programs.
        key: The file with the key of the persons' hashes; empty if no person is named.
    """
    lines = []
    for row in facts["submitted"]:
        start = "Entered before" if row["entered_before"] else "Entered"
        size = _examples(len(row["indices"]))
        lines.append(
            f"{start} in {options.log} as {row['request_id']}"
            f"{_for_person(facts, row)}: {size}, {_state(row)}."
        )
        if row["state"] == "pending" and row["num_forgotten_before"]:
            lines.append(_overlap(row))
    if facts["also_of"]:
        lines.append(shared_text(facts["also_of"]))
    if any(row["state"] == "pending" for row in facts["submitted"]):
        lines.append(
            f"To carry out what is pending, call 'opacus-pi unlearn --pending --log "
            f"{options.log} --ledger LEDGER --model M:NAME --weights FILE --data "
            f"{options.train_set or 'M:NAME'} --out DIR'. Name the ledger of the "
            "training: without it, no bound can be claimed."
        )
    if key:
        lines.append(
            f"The key of the persons' hashes is in {key}: keep a copy of it apart from "
            "the log."
        )
    return "\n".join([*lines, _KEEP_HEAD, facts["head"]])


def _for_person(facts: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return for whom a request is, if one command entered several.

    Args:
        facts: The answer for programs.
        row: One of the requests. The log has only a hash of the person's name.
    """
    return f" for {row['person']}" if len(facts["submitted"]) > 1 else ""


def _overlap(row: Mapping[str, Any]) -> str:
    """Return a sentence about examples that earlier requests have forgotten.

    Args:
        row: A request with such examples.
    """
    number, size = row["num_forgotten_before"], len(row["indices"])
    if number < size:
        verb = "was" if number == 1 else "were"
        return f"{number} of its examples {verb} forgotten before, by earlier requests."
    return (
        "All of its examples were forgotten before, by earlier requests: 'opacus-pi "
        "unlearn' will train nothing for it, and log that it was carried out."
    )


def _list(options: argparse.Namespace) -> None:
    """List the requests of the log."""
    rows = _listed(options, options.person)
    if options.request_id is not None:
        rows = [row for row in rows if row.request_id == options.request_id]
        if not rows:
            raise BadInput(
                f"--request-id: {options.request_id} is not the name of a request of "
                "this log, or it was redacted. Without --request-id all are listed."
            )
    counts = {
        f"num_{name}": sum(row.state == state for row in rows)
        for name, state in (
            ("pending", "pending"),
            ("carried_out", "carried out"),
            ("withdrawn", "withdrawn"),
            ("redacted", "redacted"),
        )
    }
    shown = [r for r in rows if r.state == "pending" or not options.pending]
    facts = {**counts, "requests": [_facts_of(row) for row in shown]}
    if options.request_id is not None:
        facts["guarantees"] = _guarantees(options.log, rows[0])
    facts["head"] = verify(options.log).head
    _answer(options, facts, _list_text(options, facts, len(rows)))


def _list_text(
    options: argparse.Namespace, facts: Mapping[str, Any], num_known: int
) -> str:
    """Return the requests as a table, under a line that counts them.

    Args:
        options: The parsed arguments.
        facts: The answer for programs.
        num_known: How many requests the log has, or the person.
    """
    of = "" if options.person is None else f" of {options.person}"
    of += "" if options.request_id is None else f" named {options.request_id}"
    first = (
        f"Requests{of} in {options.log}: {facts['num_pending']} pending, "
        f"{facts['num_carried_out']} carried out, {facts['num_redacted']} redacted"
        + f", {facts['num_withdrawn']} withdrawn" * bool(facts["num_withdrawn"])
        + "."
    )
    rows = [
        [
            row["request_id"] or "(redacted)",
            row["entry"],
            row["time"],
            None if row["indices"] is None else len(row["indices"]),
            _state(row),
        ]
        for row in facts["requests"]
    ]
    header = ("request", "entry", "submitted", "examples", "state")
    parts = [first, table(header, rows)] if rows else [first]
    if options.person is not None and not num_known:
        parts.append(
            f"The log has no request of {options.person}. Names are stored as keyed "
            "hashes, so only exactly this spelling was looked for. Requests that named "
            "positions (--forget), or were redacted, are of no person. An example of "
            "several persons may have been forgotten by a request of another one."
        )
    parts += map(_guaranteed, facts.get("guarantees", []))
    return "\n\n".join([*parts, f"Head of the log: {facts['head']}"])


def _guarantees(path: str, row: ListedRequest) -> list[dict[str, Any]]:
    """Return what the log says about the run of a request, and about the last run.

    Args:
        path: The log.
        row: A request that was not redacted.
    """
    if row.done_entry is None:
        return []
    done = [
        (e.number, e.payload)
        for e in read_entries(path)
        if e.kind == "done" and e.payload is not None
    ]
    own = [one for one in done if one[0] == row.done_entry]
    runs = [one for one in done if "guarantee" in one[1]]
    chosen = dict([*own, *runs[-1:], *done[-1:]])
    rewinds = [number for number, facts in runs if _is_exact_rewind(facts)]
    covers = bool(rewinds) and row.done_entry <= rewinds[-1]
    names = ("guarantee", "epsilon", "reverse_epsilon", "delta", "found")
    return [
        {
            "entry": number,
            "method": _run_of(facts).get("method"),
            "num_updates": _run_of(facts).get("num_steps"),
            "earlier_runs": _run_of(facts).get("earlier_runs"),
            "num_runs_between": sum(row.done_entry < n < number for n, _ in runs),
            "stays_exact": covers and bool(_run_of(facts).get("num_forgotten_exactly")),
            **{name: facts.get(name) for name in names},
        }
        for number, facts in sorted(chosen.items())
    ]


def _run_of(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an entry about a run says of it; empty if nothing had to be run."""
    return facts.get("run") or {}


def _is_exact_rewind(facts: Mapping[str, Any]) -> bool:
    """Return whether the run of an entry forgot all examples until then exactly."""
    return _run_of(facts).get("method") == "exact rewind"


def _guaranteed(run: Mapping[str, Any]) -> str:
    """Return sentences about the guarantee of a run, as the log has it."""
    if run["method"] is None:
        return (
            f"Entry {run['entry']}: {_NO_RUN.get(run['found'], 'no run is described')}."
        )
    between = run["num_runs_between"]
    start = (
        f"Run of entry {run['entry']}"
        + f", after {between} other{'s' * (between > 1)} since" * bool(between)
        + f": {run['method']}, {run['num_updates']} updates"
        + (
            f", on weights of earlier runs ({runs_in_words(run['earlier_runs'])})"
            if run["earlier_runs"]
            else ""
        )
        + f". Guarantee: {run['guarantee']}"
    )
    if run["epsilon"] is None:
        exact = (
            " But the examples of this request stay exactly forgotten (for these "
            "alone ε = 0), by the rewind before."
        )
        return f"{start}; no ε is claimed.{exact * run['stays_exact']}"
    number = f"≤ {rounded_up(run['epsilon'])}" if run["epsilon"] else "= 0"
    return (
        f"{start}; ε {number} at δ = {run['delta']:g}, for all "
        "requests until then. Its assumptions are in the guarantee.json of the run."
    )


def _export(options: argparse.Namespace) -> None:
    """Write the log for an auditor."""
    log, rows = _opened(options)
    shown, kept = _entries_of(options, rows, log)
    with about("--out", "Name a file in a directory that can be written."):
        export_log(log, options.export_file, disclose=shown)
        found = verify_export(options.export_file)
    facts = {
        "written": options.export_file,
        "num_entries": found.num_entries,
        "disclosed": shown,
        "for_owner_only": kept,
        "head": found.head,
    }
    numbers = ", ".join(map(str, shown)) or "none"
    text = (
        f"Wrote {options.export_file}: {found.num_entries} entries, of which the "
        f"content of these is disclosed: {numbers}.\n{_kept_text(kept)}"
        f"The auditor checks it with 'opacus-pi verify {options.export_file} HEAD'. "
        f"The head is now:\n{found.head}"
    )
    _answer(options, facts, text)


def _kept_text(kept: Sequence[int]) -> str:
    """Return the sentence about entries that may not be disclosed, or nothing."""
    if not kept:
        return ""
    return (
        f"Not disclosed: {', '.join(map(str, kept))}. An earlier release wrote these "
        "entries, with the seed of a run, or a fingerprint of the training set or of "
        "the examples that remain. These are for the owner of the log only. The kind "
        "and the time of the entries are in the file.\n"
    )


def _entries_of(
    options: argparse.Namespace, rows: Sequence[ListedRequest], log: DeletionLog
) -> tuple[list[int], list[int]]:
    """Return the entries to disclose: requests, what was done, on demand the last run.

    Args:
        options: With the names of the requests, and whether to disclose the last run.
        rows: All requests of the log.
        log: The log.

    Returns:
        The numbers of the entries to disclose, and of those about runs that are for the
        owner of the log only.

    Raises:
        BadInput: If the log has no request of a name, or no run.
    """
    by_name = {row.request_id: row for row in rows if not row.redacted}
    shown: set[int] = set()
    for name in options.disclose:
        if name not in by_name:
            raise BadInput(
                f"--disclose: {name} is not the name of a request of this log, or it "
                "was redacted. 'opacus-pi log list' shows the names."
            )
        row = by_name[name]
        ends = row.done_entry, row.withdrawal_entry
        shown |= {row.entry, *(number for number in ends if number is not None)}
    entries = [*log.entries()]
    if options.last_run:
        done = [e for e in entries if e.kind == "done" and not e.redacted]
        if not done:
            raise BadInput(
                "--last-run: no request of this log was carried out yet. Leave it out."
            )
        runs = [e.number for e in done if "guarantee" in (e.payload or {})]
        shown |= {e.number for e in done if e.number >= (runs or [0])[-1]}
    kept = {e.number for e in entries if is_for_owner_only(e)} & shown
    return sorted(shown - kept), sorted(kept)


def _withdraw(options: argparse.Namespace) -> None:
    """Withdraw a request that is pending."""
    requests, rows = _requests(options)
    requests.withdraw(options.request_id, options.reason)
    (row,) = (r for r in _listed(options) if r.entry == rows[options.request_id].entry)
    facts = {"withdrawn": _facts_of(row), "head": requests.log.head}
    text = (
        f"Request {row.request_id} is withdrawn (entry {row.withdrawal_entry} of "
        f"{options.log}): no run will carry it out. The log keeps both entries; "
        "'opacus-pi log redact' removes its name, its person and its examples.\n"
        f"{_KEEP_HEAD}\n{facts['head']}"
    )
    _answer(options, facts, text)


def _redact(options: argparse.Namespace) -> None:
    """Remove what the log says about a request that was carried out or withdrawn."""
    requests, rows = _requests(options)
    requests.redact(options.request_id, options.reason)
    facts = {"redacted": rows[options.request_id].entry, "head": requests.log.head}
    text = (
        f"Removed the name, the person and the examples of entry {facts['redacted']} "
        f"from {options.log}. Other files are not changed, remove them yourself: "
        "copies and exports of the log; record.json, guarantee.json, "
        "guarantee_to_show.json and evaluation.json of the runs; reports.\n"
        f"{_KEEP_HEAD}\n{facts['head']}"
    )
    _answer(options, facts, text)


def _requests(
    options: argparse.Namespace,
) -> tuple[DeletionRequests, dict[str | None, ListedRequest]]:
    """Return the requests of an existing log, and what is listed of them by name.

    Raises:
        BadInput: As ``_listed``.
    """
    rows = {row.request_id: row for row in _opened(options)[1]}
    size, _ = training_set_in(read_entries(options.log))
    return DeletionRequests(options.log, size or ANY_NUMBER), rows


def _opened(options: argparse.Namespace) -> tuple[DeletionLog, list[ListedRequest]]:
    """Return an existing log and its requests, for an action that may write.

    Opening it takes back what a killed process left of a write.

    Raises:
        BadInput: As ``_listed``.
    """
    with about("LOG", _WRITTEN_BY):
        os.stat(options.log)  # else the log would be made
        log = DeletionLog(options.log)
    return log, _listed(options)


def _listed(
    options: argparse.Namespace, person: str | None = None
) -> list[ListedRequest]:
    """Return the requests of the log, or those of a person, after verifying it.

    Raises:
        BadInput: If there is no such log, it is damaged, or its key is missing.
    """
    with about("LOG", _WRITTEN_BY):
        verify(options.log)
        return list_requests(options.log, person)


def _facts_of(row: ListedRequest) -> dict[str, Any]:
    """Return a request as JSON facts."""
    return {**vars(row), "state": row.state}


def _state(row: Mapping[str, Any]) -> str:
    """Return the state of a request in words, with the time of the entry that says so.

    A request that was redacted was carried out or withdrawn before, by an entry of its
    own.
    """
    events = {"redacted": "redaction", "withdrawn": "withdrawal"}
    event = events.get(row["state"], "done")
    time, entry = row[f"{event}_time"], row[f"{event}_entry"]
    if time is None:
        return str(row["state"])
    return f"{row['state']}, {time} (entry {entry})"


def _examples(number: int) -> str:
    """Return a number of examples in words."""
    return "1 example" if number == 1 else f"{number} examples"


def _answer(options: argparse.Namespace, facts: Mapping[str, Any], text: str) -> None:
    """Print an answer that names the action and the log."""
    named = {"format": FORMAT, "action": options.action, "deletion_log": options.log}
    answer(options, {**named, **facts}, text)


_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "submit": _submit,
    "list": _list,
    "withdraw": _withdraw,
    "export": _export,
    "redact": _redact,
}
