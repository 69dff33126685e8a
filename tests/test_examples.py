"""The examples in the documentation run as they stand, and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NEEDS = {
    "hugging_face": ["transformers"],
    "lora": ["transformers", "peft"],
    "lightning_module": ["lightning"],
    "trainer": ["transformers", "accelerate"],
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / f"{name}.py"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    accuracy = float(re.search(r"training accuracy ([\d.]+)", ran.stdout)[1])
    low, high = re.search(r"estimated: ([\d.]+) to ([\d.]+)", ran.stdout).groups()
    assert accuracy > 0.7 and float(low) < float(high)
    rest = "'by_content': 0, 'by_latest': 0, 'unattributed': 0"
    assert re.search(r"'by_storage': [1-9]\d*, " + rest, ran.stdout)
    assert "Examples to forget: 10," in ran.stdout and "guarantee for" in ran.stdout
