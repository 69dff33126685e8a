"""Files that the first release of the formats wrote are read, and mean the same.

``files/`` holds small ledgers, written by the code as it was before ledgers moved to
their own package.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opacus_pi.ledger import GradNormLedger, GramLedger

FILES = Path(__file__).parent / "files"
NORMS = np.array([[0.5, np.nan, 3.0, 0.25], [0.25, 1.5, 2.0, np.nan]], dtype=np.float32)


def test_a_ledger_of_norms_is_read():
    run = GradNormLedger.load(FILES / "norms_format_1.safetensors")
    np.testing.assert_array_equal(run.grad_norms, NORMS)
    np.testing.assert_array_equal(run.confidences, NORMS / 4)
    np.testing.assert_array_equal(run.errors, NORMS / 3)
    np.testing.assert_array_equal(run.correct, [[1, 0, 1, 1], [0, 1, 1, 1]])
    assert run.steps.tolist() == [10, 20] and run.source == "observed"
    assert run.example_ids.tolist() == [7, 3, 5, 1] and run.data_set == "digits"
    assert run.weights == "sha256:" + "0123456789abcdef" * 4
    mechanism = run.mechanism
    assert (mechanism.num_steps, mechanism.sample_rate) == (20, 0.25)
    assert mechanism.noise_std == 2.0 and mechanism.sampling == "poisson"
    assert mechanism.max_grad_norm.tolist() == [1.0, 2.0]


def test_a_ledger_of_gram_matrices_is_read():
    run = GramLedger.load(FILES / "grams_format_1.safetensors")
    assert run.grams.tolist() == [
        [[4.0, 0.5], [0.5, 0.25]],
        [[1.0, -0.25], [-0.25, 0.5]],
    ]
    assert run.example_ids.tolist() == [3, 7] and run.kind == "forget"
    assert run.data_set == "digits" and run.steps.tolist() == [10, 20]


def parts(path):
    """The header without what depends on the version, and the arrays' bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    facts = header["__metadata__"]
    version = facts.pop("version")
    assert facts.pop("checksum")
    return version, header, content[end:]


def test_a_ledger_with_a_chain_of_custody_is_read():
    run = GradNormLedger.load(FILES / "norms_format_2.safetensors")
    np.testing.assert_array_equal(run.grad_norms, NORMS)
    assert run.participations.tolist() == [[2, 0, 3, 1], [1, 3, 2, 0]]
    assert [link.name for link in run.custody.links] == ["draw", "loss"]
    assert run.mechanism.max_participations == 5
    assert run.noise_generator is None


@pytest.mark.parametrize(
    "kind, name, before, after",
    [
        (GradNormLedger, "norms", "1", "3"),
        (GradNormLedger, "norms", "2", "3"),
        (GramLedger, "grams", "1", "2"),
    ],
)
def test_only_the_version_is_written_anew(tmp_path, kind, name, before, after):
    old, new = FILES / f"{name}_format_{before}.safetensors", tmp_path / "again"
    kind.load(old).save(new)
    assert parts(old)[0] == before and parts(new)[0] == after
    assert parts(new)[1:] == parts(old)[1:]


@pytest.mark.parametrize(
    "read", [GradNormLedger.load, lambda path: next(GradNormLedger.load_chunks(path))]
)
def test_norms_that_only_rank_are_refused(read):
    with pytest.raises(ValueError, match="norms must be exact.*bfloat16.*run again"):
        read(FILES / "norms_for_ranking.safetensors")


def test_ledgers_are_read_without_torch():
    code = (
        "import sys\n"
        "from opacus_pi import GradNormLedger\n"
        "import opacus_pi.ledger\n"
        "GradNormLedger.load(sys.argv[1]).ratios()\n"
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    )
    path = str(FILES / "norms_format_1.safetensors")
    subprocess.run([sys.executable, "-c", code, path], check=True)
