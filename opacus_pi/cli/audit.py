"""``opacus-pi audit``: whether the norms of a model can be recorded correctly.

Before a training, a few examples are differentiated one by one, and compared with what
private training would record for them as one batch. The exit code is 1 if a comparison
fails, so that a script can stop before it trains.
"""

import argparse
from typing import Any

from opacus_pi.cli.errors import DONE, FAILED, BadInput
from opacus_pi.cli.inputs import (
    import_collate,
    import_criterion,
    import_data_set,
    load_model,
)
from opacus_pi.cli.output import answer
from opacus_pi.integration.audited_run import Examples
from opacus_pi.integration.engine import audit
from opacus_pi.models.collating import Collating

FORMAT = "opacus_pi.cli.audit.v1"


def run(options: argparse.Namespace) -> int:
    """Audit a model on examples of a data set, and print the comparisons.

    Args:
        options: The parsed arguments of ``audit``.

    Returns:
        The exit code: 1 if a comparison failed.

    Raises:
        BadInput: If a file or an object cannot be used, or there are fewer than two
            examples.
        ValueError: If Opacus does not accept the model.
    """
    data_set = import_data_set("--data", options.train_set)
    criterion = import_criterion(options)
    model = load_model(options, options.weights)
    collate = Collating(import_collate(options))
    examples = Examples(data_set, collate, options.num_examples)
    batch = next(examples.batches(1), None)
    if batch is None:
        raise BadInput(
            "--data: an audit compares the examples of a batch, but the data set has "
            "fewer than two. Name a data set with more."
        )
    found = audit(model, criterion, batch, grad_sample_mode=options.mode)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "mode": found.mode,
        "num_examples": found.num_examples,
        "passed": found.passed,
        "comparisons": [
            {"name": row.name, "passed": row.passed, "sentence": row.sentence}
            for row in found.rows
        ],
    }
    answer(options, facts, str(found))
    return DONE if found.passed else FAILED
