"""The actions of ``opacus-pi log`` with their arguments and help texts.

Nothing here imports torch: see ``commands``.
"""

from opacus_pi.cli.arguments import (
    DATA,
    FORGET,
    FORGET_PERSON,
    JSON,
    JSON_FILE,
    LOG,
    ONLY,
    OWNERS,
    REQUEST_ID,
)
from opacus_pi.cli.declarations import (
    Argument,
    Command,
    option,
    switch,
    writable_file,
)
from opacus_pi.cli.no_effect import OF_PERSONS

_FILE = Argument(("log",), {"metavar": "LOG", "help": "deletion log of the model"})

SUBMIT = Command(
    summary="enter a request, to be carried out later",
    usage="LOG --forget IDS|FILE [options]",
    description="""\
Enter a request in the deletion log of a model. It is on the disk when the
command ends, and pending until 'opacus-pi unlearn --log' carries it out. The
first request of a log needs --data. A person is stored as a keyed hash; keep a
copy of the key file LOG.key. To submit a request again changes nothing.""",
    examples="""\
  opacus-pi log submit deletions.db --data my_project:train_set --forget 25 \\
      --request-id 2026-002
  opacus-pi log submit deletions.db --forget-person p04 --owners owners.json""",
    arguments=(
        _FILE.but(help=LOG.options["help"], type=writable_file),
        FORGET,
        FORGET_PERSON,
        OWNERS,
        ONLY,
        REQUEST_ID.but(help="name of the request, in plain text: no person's name"),
        DATA.but(
            required=False,
            help="import path of the training set, for a new log",
        ),
        JSON,
    ),
    no_effect=OF_PERSONS,
)
LIST = Command(
    summary="list the requests: what is pending, and what was done when",
    usage="LOG [options]",
    description="""\
Check a deletion log and list its requests, oldest first: name, number of the
entry, time, number of examples, and whether the request is pending, was carried
out, or was redacted. --person needs the key file LOG.key, and exactly the
spelling of the request. An empty list is an answer, too: exit code 0.""",
    examples="""\
  opacus-pi log list deletions.db
  opacus-pi log list deletions.db --request-id 2026-001
  opacus-pi log list deletions.db --person p04""",
    arguments=(
        _FILE,
        switch("--pending", "list only what was not carried out yet"),
        option("--person", "ID", "list only the requests of this person"),
        REQUEST_ID.but(help="list only this request, and what is guaranteed for it"),
        JSON,
        JSON_FILE,
    ),
)
EXPORT = Command(
    summary="write the log for an auditor, who sees only what is disclosed",
    usage="LOG --out FILE.json [options]",
    description="""\
Write the whole chain of a deletion log to a file that an auditor can check: the
time, kind and hashes of every entry. What an entry says (name, person,
examples) is in the file only if it is disclosed. --disclose NAME discloses a
request and the entry about the run that carried it out, with the settings of
the run. Seeds of runs and what could tell which other examples were forgotten
are never disclosed. The auditor runs 'opacus-pi verify FILE.json HEAD', with a
head that was noted before.""",
    examples="""\
  opacus-pi log export deletions.db --out for_auditor.json
  opacus-pi log export deletions.db --disclose 2026-001 --out one_request.json""",
    arguments=(
        _FILE,
        option(
            "--out",
            "FILE.json",
            "file to write",
            writable_file,
            required=True,
            dest="export_file",
        ),
        option(
            "--disclose",
            "NAME",
            "name of a request whose content the auditor may read; repeatable",
            default=[],
            action="append",
        ),
        switch("--last-run", "disclose the last run, too, on which the model rests"),
        JSON,
    ),
)
WITHDRAW = Command(
    summary="withdraw a pending request, such as one that was a mistake",
    usage="LOG --request-id NAME [options]",
    description="""\
Withdraw a request that is pending: no run will carry it out. The log keeps the
request, and gets an entry that says that it was withdrawn, when and why. Its
name cannot be used again. What was carried out cannot be withdrawn.""",
    examples="""\
  opacus-pi log withdraw deletions.db --request-id 2026-002 \\
      --reason "wrong positions\"""",
    arguments=(
        _FILE,
        REQUEST_ID.but(help="name of the request", required=True),
        option(
            "--reason",
            "TEXT",
            "why, to be stored in the log: no person's name",
            default="",
        ),
        JSON,
    ),
)
REDACT = Command(
    summary="remove what the log says about a request that is not pending",
    usage="LOG --request-id NAME [options]",
    description="""\
Remove the name, the person and the examples of a request from the log, for
good. The request must have been carried out or withdrawn. That there was one,
and when that was, stays in the log. Copies and exports of the log and the
records of runs are not changed: remove them yourself. This cannot be undone.

Once two requests are redacted, the log cannot tell their examples apart: from
then on, erase the files of all redacted requests, or of none of them. If a
redacted request shares examples with a later one, erase the files of both.""",
    examples="""\
  opacus-pi log redact deletions.db --request-id 2026-001 \\
      --reason "retention is over\"""",
    arguments=(
        _FILE,
        REQUEST_ID.but(help="name of the request", required=True),
        option("--reason", "TEXT", "why, to be stored in the log", default=""),
        JSON,
    ),
)
LOG_COMMAND = Command(
    summary="enter, list, withdraw, export and redact deletion requests",
    usage="ACTION LOG [options]",
    description="""\
Keep the deletion log of a model without carrying anything out. 'opacus-pi
unlearn --log' carries requests out, and 'opacus-pi verify' checks a log.""",
    examples="""\
  opacus-pi log list deletions.db""",
    actions={
        "submit": SUBMIT,
        "list": LIST,
        "withdraw": WITHDRAW,
        "export": EXPORT,
        "redact": REDACT,
    },
)
