"""The arguments that several commands share, so that each means the same everywhere."""

from dataclasses import replace
from functools import partial

from opacus_pi.cli.declarations import (
    Argument,
    option,
    probability,
    switch,
    whole_number,
    writable_file,
)
from opacus_pi.cli.methods import METHODS

LEDGERS = option(
    "ledger",
    "LEDGER",
    "saved ledger; independent runs are averaged",
    nargs="+",
)
LEDGERS_BY_FLAG = Argument(("--ledger",), {**LEDGERS.options, "default": []})
FORGET = replace(
    option(
        "--forget",
        "IDS|FILE",
        "positions in the training set: 3,17,25 or a file",
        dest="forget_indices",
    ),
    is_choice=True,
)
PENDING = replace(
    switch("--pending", "in place of --forget: what is pending in --log"),
    is_choice=True,
)
FORGET_PERSON = replace(
    option(
        "--forget-person",
        "ID",
        "in place of --forget: a person in --owners; repeatable",
        default=[],
        action="append",
    ),
    is_choice=True,
)
OWNERS = option("--owners", "FILE.json", "positions by person, of a named data set")
ONLY = option("--only", "IDS|FILE", "of the person's examples only these")
ORDER = option("--order", "X", "Rényi order, above 1", float, 8.0)
SIGMA = option(
    "--sigma",
    "X",
    "noise std to assume on the SUM of gradients, to rank",
    float,
    dest="noise_std",
)
DELTA = option("--delta", "X", "δ of every ε", probability, 1e-5)
TOLERANCE = option(
    "--tolerance",
    "X",
    "round up by at most this relative error (default: 1e-3 of large runs)",
    float,
)
TOP = partial(option, "--top", "N", "number of hardest examples to list", whole_number)
BATCH_SIZE = option("--batch-size", "N", "examples in a batch", whole_number, 64)
MODEL = option(
    "--model",
    "M:NAME",
    "import path of the model, or its function",
    required=True,
)
WEIGHTS = option("--weights", "FILE", "state dict, .safetensors or .pt", required=True)
DEVICE = option("--device", "NAME", "cpu, cuda, cuda:1, ...", default="cpu")
DATA = option(
    "--data",
    "M:NAME",
    "import path of the training set, or its function",
    dest="train_set",
    required=True,
)
COLLATE = option(
    "--collate",
    "M:NAME",
    "import path of the collate_fn of the training",
    dest="collate_fn",
)
TEST = option(
    "--test", "M:NAME", "import path of the test set, for metrics", dest="test_set"
)
CRITERION = option(
    "--criterion",
    "M:NAME",
    "import path of the loss (default cross-entropy)",
).but(
    default="torch.nn:CrossEntropyLoss",
)
SEED = option(
    "--seed",
    "N",
    "seed of all noise, a secret (default: random)",
    int,
)
METHOD = option(
    "--method",
    "NAME",
    f"{', '.join(METHODS)} (default finetune; bounds: the first 3)",
    choices=METHODS,
)
SETTING = option(
    "--set",
    "NAME=VALUE",
    "setting of the method; a wrong NAME shows the list",
    dest="settings",
    default=[],
    action="append",
)
CHECKPOINTS = option(
    "--checkpoints",
    "DIR",
    "saved states of the training: go back to one of them",
)
POLICY = switch(
    "--policy",
    "go back only as far as the deletion policy demands",
).but(dest="use_policy")
LOG = option(
    "--log",
    "FILE.db",
    "deletion log of the model; made if there is none",
)
REQUEST_ID = option(
    "--request-id", "NAME", "name of the request (default: a random one)"
)
JSON = switch("--json", "print JSON instead of text")
JSON_FILE = option(
    "--out", "FILE.json", "write the JSON here, too", writable_file, dest="json_file"
)
CSV = option(
    "--csv",
    "FILE.csv",
    "write the values of every example here",
    writable_file,
)
TRACEBACK = switch("--traceback", "show where an error occurred")
