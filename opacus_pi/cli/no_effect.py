"""Which options would change nothing in which command lines, and are refused there.

An option that is ignored silently misleads: the user expects its effect. Nothing here
imports torch: see ``commands``.
"""

from dataclasses import replace

from opacus_pi.cli.declarations import NoEffect

OF_PERSONS = (
    NoEffect(
        ("--owners",),
        "no person is named. Add --forget-person ID in place of --forget.",
        without="--forget-person",
    ),
    NoEffect(
        ("--forget-person",),
        "no file lists the examples. Add --owners FILE.json.",
        without="--owners",
    ),
    NoEffect(
        ("--only",),
        "it chooses among the examples of a person, and none is named. Add "
        "--forget-person ID, or name the examples with --forget alone.",
        without="--forget-person",
    ),
)
_ASSUMED_NOISE = NoEffect(
    ("--delta",),
    "with an assumed noise (--sigma) there is no ε, and so no δ. Leave out --delta or "
    "--sigma.",
    beside="--sigma",
)
_METHOD = NoEffect(
    ("--set",),
    "the default method, finetune, has no settings. Name the method: --method NAME.",
    without="--method",
)
_POLICY = NoEffect(
    ("--policy",),
    "a deletion policy needs the saved states of the training. Add --checkpoints DIR.",
    without="--checkpoints",
)
OF_SCORE = (_ASSUMED_NOISE,)
OF_PLAN = (
    *OF_PERSONS,
    NoEffect(
        ("--method",),
        "its guarantee depends on the model. Name the architecture too: "
        "--model my_project:build.",
        without="--model",
    ),
    NoEffect(
        ("--checkpoints",),
        "the guarantee of a rewind depends on the model. Name the architecture "
        "too: --model my_project:build.",
        without="--model",
    ),
    NoEffect(
        ("--delta",),
        "without a model there is no ε, and so no δ. Name the architecture: "
        "--model my_project:build.",
        without="--model",
    ),
    replace(_ASSUMED_NOISE, without="--checkpoints"),
    _METHOD,
    _POLICY,
)
OF_UNLEARN = (
    *OF_PERSONS,
    NoEffect(
        ("--pending",),
        "the requests are those of a deletion log. Add --log LOG.",
        without="--log",
    ),
    NoEffect(
        ("--request-id",),
        "--pending enters no request. Leave it out.",
        beside="--pending",
    ),
    NoEffect(
        ("--method", "--set"),
        "a rewind repeats the training, and uses no unlearning method. Leave "
        "it or --checkpoints out.",
        beside="--checkpoints",
    ),
    NoEffect(
        ("--epochs", "--batch-size", "--learning-rate", "--momentum"),
        "a rewind repeats the recorded training, with its own number of "
        "updates, batches and settings. Leave it or --checkpoints out.",
        beside="--checkpoints",
    ),
    NoEffect(
        ("--epochs", "--learning-rate", "--momentum"),
        "ssd scales the weights in one update, without an optimizer. Leave it "
        "out, or choose another method.",
        beside="--method ssd",
    ),
    _METHOD,
    _POLICY,
    NoEffect(
        ("--checkpoints",),
        "a rewind needs the ledger of the training. Add --ledger LEDGER.",
        without="--ledger",
    ),
    NoEffect(
        ("--delta",),
        "without a ledger no ε can be claimed, and so no δ. Add --ledger LEDGER.",
        without="--ledger",
    ),
    NoEffect(
        ("--without-ledger",),
        "a ledger is named. Leave out --without-ledger, or --ledger.",
        beside="--ledger",
    ),
    NoEffect(
        ("--without-ledger",),
        "without a log it suffices to leave out --ledger. Leave out both.",
        without="--log",
    ),
    NoEffect(
        ("--request-id",),
        "there is no log. Add --log FILE.db.",
        without="--log",
    ),
)
OF_EVALUATE = (
    *OF_PERSONS,
    NoEffect(
        ("--match",),
        "it matches hidden units with those of retrained models, and none are "
        "named. Add --oracle WEIGHTS.",
        without="--oracle",
    ),
)
OF_REPORT = (
    NoEffect(
        ("--evaluation",),
        "an evaluation is shown with its unlearning run, but no run was named. "
        "Name RUN_DIR.",
        without="RUN_DIR",
    ),
    replace(_ASSUMED_NOISE, without="RUN_DIR"),
)
