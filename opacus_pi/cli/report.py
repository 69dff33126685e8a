"""``opacus-pi report``: one page and one JSON file about a run."""

import argparse
from pathlib import Path
from typing import Any

from opacus_pi.cli.arguments import (
    add_ledgers,
    add_output,
    add_scoring,
    ledgers,
    new_name,
)
from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.evaluate import FORMAT
from opacus_pi.cli.output import answer
from opacus_pi.cli.run_files import EVALUATION, load_run, read_json
from opacus_pi.report import Barriers, write_report

HELP = "one self-contained page (and JSON) about a run"
DESCRIPTION = """\
ε and loss distributions, the hardest examples (ids only), strata, the run beside
retrained models, and the guarantee with everything it rests on, as one HTML file that
loads nothing, and the same facts as JSON beside it (report.json).

RUN_DIR is what 'opacus-pi unlearn --out' wrote; put there what 'opacus-pi evaluate
--out' wrote as evaluation.json, or name it by --evaluation. Without RUN_DIR the report
is about the training alone. A report is made anew each time: a page and JSON of the
same name are overwritten."""
EXAMPLES = """\
examples:
  opacus-pi report --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors \\
      --evaluation forgotten/evaluation.json --out report.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", nargs="?", help="an unlearning run's directory"
    )
    add_ledgers(parser, "--ledger", required=True)
    parser.add_argument(
        "--evaluation",
        metavar="FILE.json",
        help="what evaluate wrote (default RUN_DIR/evaluation.json if it is there)",
    )
    add_scoring(parser, top=20)
    parser.add_argument(
        "--title", default="Privacy and unlearning report", help="heading of the page"
    )
    parser.add_argument(
        "--out", metavar="FILE.html", required=True, help="the page's name; overwritten"
    )
    add_output(parser, file=False)


def run(options: argparse.Namespace) -> int:
    """Write the page."""
    page = Path(new_name("--out", options.out))
    if page.suffix != ".html":
        raise BadInput(f"--out: {page} is no page. Name it report.html.")
    runs = ledgers(options.ledger, options.noise_std, "--ledger")
    result = None if options.run_dir is None else load_run(options.run_dir)
    oracle, barriers = _evaluation(options)
    facts = write_report(
        page,
        ledger=runs,
        result=result,
        oracle=oracle,
        barriers=barriers,
        order=options.order,
        delta=options.delta,
        top=options.top,
        tolerance=options.tolerance,
        title=options.title,
    )
    written = [str(page), str(page.with_suffix(".json"))]
    told = {"format": "opacus_pi.cli.report.v1", "written": written, "report": facts}
    answer(options, told, f"Wrote {written[0]} and {written[1]}.\n{facts['sensitive']}")
    return 0


def _evaluation(
    options: argparse.Namespace,
) -> tuple[dict[str, Any] | None, Barriers | None]:
    """Metrics of retrained models and barriers to them, where they were taken."""
    path = options.evaluation
    if path is None and options.run_dir is not None:
        usual = Path(options.run_dir, EVALUATION)
        path = usual if usual.exists() else None
    if path is None:
        return None, None
    if options.run_dir is None:
        raise BadInput("--evaluation: there is no run to show it with. Name RUN_DIR.")
    found = read_json(f"--evaluation {path}", path)
    try:
        if found.get("format") != FORMAT:
            raise ValueError("another format")
        barriers = found["barriers"] and Barriers.from_json(found["barriers"])
        oracle = found["oracle"] and {
            str(name): [float(value) for value in values]
            for name, values in found["oracle"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"--evaluation: {path} is damaged or something else. "
            "Name what 'opacus-pi evaluate --out' wrote."
        ) from error
    return oracle, barriers
