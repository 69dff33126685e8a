"""The commands with their arguments and help texts, declared in one table.

``COMMANDS`` is the only description of the command line: the parser, the help, the
names in error messages and the tests are made from it. Nothing here imports torch,
opacus or matplotlib, so that ``--help`` answers at once.
"""

from dataclasses import replace

from opacus_pi.cli.arguments import (
    BATCH_SIZE,
    CHECKPOINTS,
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
    ORDER,
    OWNERS,
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
    new_directory_name,
    option,
    switch,
    whole_number,
    writable_file,
)
from opacus_pi.cli.log_commands import LOG_COMMAND

COMMANDS = {
    "audit": Command(
        summary="check before training that norms are recorded correctly",
        usage="--model M:NAME --data M:NAME [options]",
        description="""\
Compare what private training would record for a batch with the gradients of its
examples one by one. Also tested: whether the loss is the mean of the examples' own
losses, and whether an output depends on its own example only. Nothing is trained.

Exit code 0: no comparison failed. 1: one failed; its line says what to do.""",
        examples="""\
  opacus-pi audit --model my_project:build --data my_project:train_set
  opacus-pi audit --model my_project:build --data my_project:train_set \\
      --criterion torch.nn:CrossEntropyLoss --mode fast --examples 32""",
        arguments=(
            MODEL,
            WEIGHTS.but(
                required=False,
                help="state dict (default: the weights that the model is built with)",
            ),
            DATA,
            CRITERION,
            option(
                "--mode",
                "NAME",
                "grad_sample_mode of make_private: hooks, fast, functorch or ghost",
                default="hooks",
                choices=("hooks", "fast", "functorch", "ghost"),
            ),
            option(
                "--examples",
                "N",
                "examples to compare, at most 32",
                whole_number,
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
training. The values of single examples are estimates; only the worst case is a bound.
An example with a higher loss changed the model more and is expected to be harder to
forget. If training added no noise, assume one (--sigma): this ranks the examples and
gives no ε. The output reveals which examples are unusual: protect it like the data.""",
        examples="""\
  opacus-pi score ledger.safetensors
  opacus-pi score run1.safetensors run2.safetensors --order 8 --delta 1e-5
  opacus-pi score ledger.safetensors --owners owners.json
  opacus-pi score plain_sgd.safetensors --sigma 1 --top 50 --csv scores.csv""",
        arguments=(
            LEDGERS,
            ORDER,
            SIGMA,
            DELTA,
            TOLERANCE,
            TOP(10),
            OWNERS.but(help='rank persons, too; positions by person: {"p03": [3, 17]}'),
            JSON,
            JSON_FILE,
            CSV,
        ),
    ),
    "plan": Command(
        summary="difficulty, steps and kind of guarantee of a forget set",
        usage="LEDGER [LEDGER ...] --forget IDS|FILE [options]",
        description="""\
Predict what forgetting a set will take; nothing is trained. The plan gives the
percentile of the set's mean privacy loss among all examples, the number of steps that
past runs predict (--past), and, if the architecture is named (--model), what may be
claimed afterwards. With the saved states of the training (--checkpoints) it also says
how far a rewind goes back, what it costs, and what it proves. If there were deletion
requests before, name their log (--log): the guarantee then covers all requests.""",
        examples="""\
  opacus-pi plan ledger.safetensors --forget 17
  opacus-pi plan ledger.safetensors --forget 5 --past 200=0.5 --past 232=12
  opacus-pi plan ledger.safetensors --forget 17 --model my_project:build \\
      --checkpoints states --policy
  opacus-pi plan ledger.safetensors --forget-person p03 --owners owners.json""",
        arguments=(
            LEDGERS,
            FORGET,
            FORGET_PERSON,
            OWNERS,
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
    ),
    "unlearn": Command(
        summary="forget a set of training examples",
        usage="--model M --weights FILE --data M --forget IDS --out DIR [options]",
        description="""\
Fine-tune a model on the other examples by a method, or with --checkpoints go back to a
saved state and repeat the training without the forget set. DIR gets weights, record,
trace (needs --test) and guarantee (stronger with --ledger). --log enters the request in
a tamper-evident log first: after a crash, repeat the command.""",
        examples="""\
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten""",
        arguments=(
            MODEL,
            WEIGHTS,
            DATA,
            FORGET,
            FORGET_PERSON,
            OWNERS,
            option(
                "--out",
                "DIR",
                "new directory to write",
                new_directory_name,
                required=True,
            ),
            TEST,
            CRITERION.but(help="import path of the loss (default cross-entropy)"),
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
            CHECKPOINTS,
            POLICY,
            DELTA,
            LOG,
            REQUEST_ID,
            JSON,
        ),
    ),
    "evaluate": Command(
        summary="metrics of a model, compared with retrained models",
        usage="--model M:NAME --weights FILE --data M:NAME --test M:NAME\n"
        "                          --forget IDS|FILE [options]",
        description="""\
Compute a model's accuracy, loss, confidence and membership inference on the forget set,
the retain set and the test set. Of the retain set, a part is used that is at most as
large as the test set. The values to reach are those of models that were retrained
without the forget set: name their weights (--oracle) to see them beside the model's,
and the loss barriers to them.""",
        examples="""\
  opacus-pi evaluate --model my_project:build --weights forgotten/weights.safetensors \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt
  opacus-pi evaluate --model my_project:build --weights forgotten/weights.safetensors \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt \\
      --oracle retrained1.pt retrained2.pt --match --out forgotten/evaluation.json""",
        arguments=(
            MODEL,
            WEIGHTS,
            DATA,
            TEST.but(required=True),
            FORGET,
            FORGET_PERSON,
            OWNERS,
            LOG.but(
                help="deletion log of the model; examples of earlier requests are not "
                "in the retain set, and may have been erased from --data"
            ),
            option(
                "--oracle",
                "WEIGHTS",
                "state dicts of models retrained without the forget set; repeatable",
                default=[],
                nargs="+",
                action="extend",
            ),
            switch(
                "--match",
                "with --oracle: match hidden units before measuring loss barriers",
            ),
            CRITERION,
            DEVICE,
            SEED.but(
                help="seed of the draw from the retain set (default 0)", default=0
            ),
            JSON,
            JSON_FILE,
        ),
    ),
    "report": Command(
        summary="one self-contained HTML page, and JSON, about a run",
        usage="[RUN_DIR] --ledger LEDGER [LEDGER ...] --out FILE.html [options]",
        description="""\
Write the distributions of ε and loss, the hardest examples (ids only), the strata, the
unlearning run beside retrained models, and the guarantee with its assumptions as one
HTML file without links to other files, and the same facts as JSON beside it. Existing
files of these names are overwritten. RUN_DIR is the directory that 'opacus-pi unlearn
--out' wrote; without it the report covers the training alone.""",
        examples="""\
  opacus-pi report --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors \\
      --evaluation forgotten/evaluation.json --out report.html""",
        arguments=(
            option("run_dir", "RUN_DIR", "directory of an unlearning run", nargs="?"),
            LEDGERS_BY_FLAG.but(required=True),
            option(
                "--out", "FILE.html", "name of the page", writable_file, required=True
            ),
            option(
                "--evaluation",
                "FILE.json",
                "output of 'opacus-pi evaluate --out' (default "
                "RUN_DIR/evaluation.json if it exists)",
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
    ),
    "heads": Command(
        summary="accuracy and cost of heads that forget with a certificate",
        usage="--model M:NAME --data M:NAME --classes N [options]",
        description="""\
Train a linear head with noise on the features of a frozen model, and say how accurate
it is and how many more noisy steps it takes until an example or a set is forgotten with
a certificate. The model must not have been trained on examples that you may have to
forget. Nothing is written: to train a head that you release, see
'Heads that forget with a certificate' in the documentation.""",
        examples="""\
  opacus-pi heads --model my_project:features --data my_project:train_set --classes 10
  opacus-pi heads --model my_project:features --data my_project:train_set \\
      --test my_project:test_set --classes 10 --head softmax --forget 3,17""",
        arguments=(
            MODEL.but(help="import path of the frozen model, which returns features"),
            WEIGHTS.but(
                required=False,
                help="state dict (default: the weights that the model is built with)",
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
                "ridge (exact ε) or softmax (upper bounds)",
                default="ridge",
                choices=("ridge", "softmax"),
            ),
            option(
                "--noise-std",
                "X",
                "noise std of a step, on every weight (ridge 0.001, softmax 0.02)",
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
                "ε to reach, in both directions between unlearned and retrained",
                float,
                1.0,
            ),
            DELTA,
            replace(FORGET, is_choice=False).but(
                help="a set to forget together: 3,17,25 or a file"
            ),
            TOP(10),
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
unedited. In a deletion log, every entry's hash and its link to the entry before are
checked. The links cannot show that the last entries were removed: keep the hash of the
last entry (the head) elsewhere and pass it as HEAD. Ledgers, Gram ledgers, oracles,
traces, guarantees, records of runs, recorded or unlearned weights and the ledger in a
checkpoint have a checksum. Reports and answers have none: make them again and compare.
A checksum finds damage and careless edits; it is not a signature.

Exit code 0: verified. 1: damaged or edited. 2: bad arguments, or no such file. 3: not
checked: it is not an opacus_pi file, has no checksum or is too large.""",
        examples="""\
  opacus-pi verify ledger.safetensors
  opacus-pi verify deletions.db
  opacus-pi verify deletions.db 5f0c...e1""",
        arguments=(
            option("file", "FILE", "file to check"),
            option(
                "head",
                "HEAD",
                "hash that an entry of the deletion log must have",
                nargs="?",
            ),
            JSON,
        ),
    ),
}
