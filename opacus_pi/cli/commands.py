"""The commands with their arguments and help texts, declared in one table.

``COMMANDS`` is the only description of the command line: the parser, the help, the
names in error messages and the tests are made from it. Nothing here imports torch,
opacus or matplotlib, so that ``--help`` answers at once.
"""

from dataclasses import replace

from opacus_pi.cli.arguments import (
    BATCH_SIZE,
    CHECKPOINTS,
    COLLATE,
    CRITERION,
    CSV,
    DATA,
    DELTA,
    DEVICE,
    FORGET,
    FORGET_PERSON,
    JSON,
    JSON_FILE,
    LEDGERS,
    LEDGERS_BY_FLAG,
    LOG,
    METHOD,
    MODEL,
    ONLY,
    ORDER,
    OWNERS,
    PENDING,
    POLICY,
    REQUEST_ID,
    SEED,
    SETTING,
    SIGMA,
    TEST,
    TOLERANCE,
    TOP,
    WEIGHTS,
)
from opacus_pi.cli.declarations import (
    Command,
    hash_word,
    new_directory_name,
    number_of_examples,
    option,
    switch,
    whole_number,
    writable_file,
)
from opacus_pi.cli.log_commands import LOG_COMMAND
from opacus_pi.cli.no_effect import (
    OF_EVALUATE,
    OF_PLAN,
    OF_REPORT,
    OF_SCORE,
    OF_UNLEARN,
)

COMMANDS = {
    "audit": Command(
        summary="check before training that norms are recorded correctly",
        usage="--model M:NAME --data M:NAME [options]",
        description="""\
Compare what private training would record for a batch with the gradients of its
examples one by one. Also tested: whether the loss is the mean of the examples'
own losses, and whether an output depends on its own example only. Nothing is
trained. Exit code 1: a comparison failed; its line says what to do.""",
        examples="""\
  opacus-pi audit --model my_project:build --data my_project:train_set \\
      --mode fast --examples 32""",
        arguments=(
            MODEL,
            WEIGHTS.but(
                required=False,
                help="state dict (default: as the model is built)",
            ),
            DATA,
            CRITERION,
            COLLATE,
            option(
                "--mode",
                "NAME",
                "hooks, fast, functorch or ghost",
                default="hooks",
                choices=("hooks", "fast", "functorch", "ghost"),
            ),
            option(
                "--examples",
                "N",
                "examples to compare, from 2 to 32",
                number_of_examples,
                16,
                dest="num_examples",
            ),
            DEVICE,
            JSON,
            JSON_FILE,
        ),
    ),
    "score": Command(
        summary="privacy losses and epsilons of all examples, the hardest by id",
        usage="LEDGER [LEDGER ...] [options]",
        description="""\
Compute the Rényi privacy loss and (ε, δ) of every example from the ledger of a
training. Values of single examples are estimates; only the worst case is a
bound. A higher loss: expected to be harder to forget. If training added no
noise, assume one (--sigma): this ranks, and gives no ε. The output is
sensitive: it reveals which examples are unusual.""",
        examples="""\
  opacus-pi score run1.safetensors run2.safetensors --delta 1e-5
  opacus-pi score ledger.safetensors --owners owners.json
  opacus-pi score plain_sgd.safetensors --sigma 1 --top 50 --csv scores.csv""",
        arguments=(
            LEDGERS,
            ORDER,
            SIGMA,
            DELTA,
            TOLERANCE,
            TOP(10),
            OWNERS.but(help="rank and name persons: positions by person"),
            JSON,
            JSON_FILE,
            CSV,
        ),
        no_effect=OF_SCORE,
    ),
    "plan": Command(
        summary="difficulty, steps and kind of guarantee of a forget set",
        usage="LEDGER [LEDGER ...] --forget IDS|FILE [options]",
        description="""\
Predict what forgetting a set will take; nothing is trained. The plan gives the
set's mean privacy loss as a percentile, the steps that past runs predict, and
with --model what may be claimed afterwards. With --checkpoints it says how far
a rewind goes back, what it costs and proves. --log adds earlier requests.""",
        examples="""\
  opacus-pi plan ledger.safetensors --forget 5 --past 200=0.5 --past 232=12
  opacus-pi plan ledger.safetensors --forget 17 --model my_project:build \\
      --checkpoints states --policy
  opacus-pi plan ledger.safetensors --forget-person p03 --owners owners.json""",
        arguments=(
            LEDGERS,
            FORGET,
            FORGET_PERSON,
            OWNERS,
            ONLY,
            ORDER,
            SIGMA,
            DELTA,
            MODEL.but(required=False),
            METHOD,
            SETTING,
            option(
                "--past",
                "IDS=EPOCHS",
                "an earlier run; 25+ if 25 epochs were not enough",
                default=[],
                action="append",
            ),
            CHECKPOINTS.but(help="saved states of the training, for a rewind"),
            POLICY,
            LOG.but(help="deletion log of earlier requests; it is only read"),
            BATCH_SIZE,
            JSON,
            JSON_FILE,
        ),
        no_effect=OF_PLAN,
    ),
    "unlearn": Command(
        summary="forget a set of training examples",
        usage="--model M --weights F --data M --forget IDS --out DIR",
        description="""\
Fine-tune a model on the other examples, or with --checkpoints go back to a
saved state and repeat the training without the forget set. --log enters the
request in a tamper-evident log first: after a crash, repeat the command.""",
        examples="""\
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten""",
        arguments=(
            MODEL,
            WEIGHTS,
            DATA,
            FORGET,
            FORGET_PERSON,
            PENDING,
            OWNERS,
            ONLY,
            option(
                "--out",
                "DIR",
                "new directory: weights, record, trace, guarantee",
                new_directory_name,
                required=True,
            ),
            TEST,
            CRITERION,
            COLLATE,
            DEVICE,
            SEED,
            METHOD,
            SETTING,
            option(
                "--epochs",
                "N",
                "passes over the retain set",
                whole_number,
                25,
                dest="num_epochs",
            ),
            BATCH_SIZE,
            option("--learning-rate", "X", "learning rate of SGD", float, 0.01),
            option("--momentum", "X", "momentum of SGD", float, 0.9),
            LEDGERS_BY_FLAG,
            switch(
                "--without-ledger",
                "carry out requests of --log without a bound",
            ),
            CHECKPOINTS,
            POLICY,
            DELTA,
            LOG,
            REQUEST_ID,
            JSON,
        ),
        no_effect=OF_UNLEARN,
    ),
    "evaluate": Command(
        summary="metrics of a model, compared with retrained models",
        usage="--model M --weights F --data M --test M --forget IDS",
        description="""\
Compute a model's accuracy, loss, confidence and membership inference on forget
set, retain set (a part as large as the test set) and test set. The values to
reach are those of models retrained without the forget set: name their weights
(--oracle) to see them beside the model's, and the loss barriers to them.""",
        examples="""\
  opacus-pi evaluate --model my_project:build --data my_project:train_set \\
      --weights forgotten/weights.safetensors --forget ids.txt \\
      --test my_project:test_set --oracle retrained1.pt --match""",
        arguments=(
            MODEL,
            WEIGHTS,
            DATA,
            TEST.but(required=True),
            FORGET,
            FORGET_PERSON,
            OWNERS,
            ONLY,
            LOG.but(help="deletion log: its examples are not in the retain set"),
            option(
                "--oracle",
                "WEIGHTS",
                "weights of models retrained without the forget set",
                default=[],
                nargs="+",
                action="extend",
            ),
            switch(
                "--match",
                "match hidden units before measuring loss barriers",
            ),
            CRITERION,
            COLLATE,
            DEVICE,
            SEED.but(
                help="seed of the draw from the retain set (default 0)", default=0
            ),
            JSON,
            JSON_FILE,
        ),
        no_effect=OF_EVALUATE,
    ),
    "report": Command(
        summary="one self-contained HTML page, and JSON, about a run",
        usage="[RUN_DIR] --ledger LEDGER ... --out FILE.html [options]",
        description="""\
Write the distributions of ε and loss, the hardest examples (ids only), the
unlearning run beside retrained models, and the guarantee with its assumptions
as one HTML file, and the same facts as JSON beside it. Existing files of these
names are overwritten. Without RUN_DIR the report covers the training alone.""",
        examples="""\
  opacus-pi report --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html""",
        arguments=(
            option("run_dir", "RUN_DIR", "directory of an unlearning run", nargs="?"),
            LEDGERS_BY_FLAG.but(required=True),
            option(
                "--out", "FILE.html", "name of the page", writable_file, required=True
            ),
            option(
                "--evaluation",
                "FILE.json",
                "what evaluate wrote (default: that in RUN_DIR)",
            ),
            ORDER,
            SIGMA,
            DELTA,
            TOLERANCE,
            TOP(20),
            option(
                "--title", "TEXT", "heading", default="Privacy and unlearning report"
            ),
            JSON,
        ),
        no_effect=OF_REPORT,
    ),
    "heads": Command(
        summary="accuracy and cost of heads that forget with a certificate",
        usage="--model M:NAME --data M:NAME --classes N [options]",
        description="""\
Train a linear head with noise on the features of a frozen model. Say how
accurate it is, and how many noisy steps it takes until an example or a set is
forgotten with a certificate. The model must not have been trained on examples
that you may have to forget. Nothing is written.""",
        examples="""\
  opacus-pi heads --model my_project:features --data my_project:train_set \\
      --classes 10 --head softmax --forget 3,17""",
        arguments=(
            MODEL.but(help="import path of the frozen model, which returns features"),
            WEIGHTS.but(
                required=False,
                help="state dict (default: as the model is built)",
            ),
            DATA,
            TEST.but(help="import path of the test set, for the accuracy"),
            option(
                "--classes",
                "N",
                "number of classes",
                whole_number,
                dest="num_classes",
                required=True,
            ),
            option(
                "--head",
                "NAME",
                "ridge or softmax",
                default="ridge",
                choices=("ridge", "softmax"),
            ),
            option(
                "--noise-std",
                "X",
                "noise std of a step (ridge 0.001, softmax 0.02)",
                float,
            ),
            option(
                "--steps",
                "N",
                "training steps (ridge 1000, softmax 300)",
                whole_number,
                dest="num_steps",
            ),
            option(
                "--regularisation",
                "X",
                "λ of the penalty (λ/2)‖w‖² (ridge 0.01, softmax 0.003)",
                float,
            ),
            option(
                "--epsilon",
                "X",
                "ε to reach, in both directions",
                float,
                1.0,
            ),
            DELTA,
            replace(FORGET, is_choice=False).but(
                help="a set to forget together: 3,17,25 or a file"
            ),
            TOP(10),
            COLLATE,
            SEED,
            DEVICE,
            JSON,
            JSON_FILE,
        ),
    ),
    "log": LOG_COMMAND,
    "verify": Command(
        summary="check a file for damage and edits",
        usage="FILE [HEAD] [options]",
        description="""\
Recognise the kind of a file from its content, and check that it is complete and
unedited: a deletion log by its chain of hashes, other files of opacus_pi by a
checksum (reports and answers have none). The chain cannot show that the last
entries were removed: keep the hash of the last entry (the head) elsewhere, and
pass it as HEAD. A checksum finds damage and careless edits; it is no signature.

Exit code 0: verified. 1: damaged or edited. 2: bad arguments, or no such file.
3: not checked: no file of opacus_pi, without a checksum, or too large.""",
        examples="""\
  opacus-pi verify ledger.safetensors
  opacus-pi verify deletions.db
  opacus-pi verify deletions.db \\
      c764744d4eabe121b8deb04cf6bb12fedac3d7c971c638417f57fb4953093651""",
        arguments=(
            option("file", "FILE", "file to check"),
            option(
                "head",
                "HEAD",
                "hash that an entry of the deletion log must have",
                hash_word,
                nargs="?",
            ),
            JSON,
        ),
    ),
}
