"""``benchmarks.reproduce`` takes data sets, a model and a method of the user's code."""

import json

import pytest

from benchmarks.common import own
from benchmarks.common.data import load
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.methods import candidate
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.units import Search

PROJECT = """
import numpy as np
import torch
from torch.utils.data import Dataset

from opacus_pi.unlearning import Method


class Photos(Dataset):
    def __init__(self, number):
        rng = np.random.default_rng(number)
        self.images = rng.integers(0, 255, (number, 6, 6), dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 3


class Gentle(Method):
    pass  # fine-tuning under another name


def data_sets():
    return Photos(200), Photos(40)


def few():
    return Photos(20), Photos(5)


flat = [(torch.zeros(3), 0)], [(torch.zeros(3), 0)]


def build(image_shape, num_classes):
    channels, height, width = image_shape
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(channels * height * width, num_classes)
    )
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A file of the user's, and the name under which it is imported."""
    name = f"project_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def words(project, tmp_path, **parts):
    named = {
        option: f"{project}:{name}"
        for option, name in {
            "dataset": "data_sets",
            "model": "build",
            "method": "Gentle",
            **parts,
        }.items()
    }
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    found = ["methods", "--store", store, "--out", out, "--jobs", "1"]
    for option, name in named.items():
        found += [f"--{option}", name]
    return found


@pytest.fixture
def quick(monkeypatch):
    """The smoke scale with one built-in method, two sets and one seed."""
    from dataclasses import replace

    smoke = SCALES["smoke"]
    sgd = replace(
        smoke.sgd, num_train=0, num_sets=2, set_size=8, num_seeds=1, num_oracles=1
    )
    small = replace(smoke, sgd=sgd, methods=("fine-tune",))
    monkeypatch.setitem(SCALES, "smoke", small)


def test_own_parts_are_in_the_same_table_and_figure(project, tmp_path, quick, capsys):
    main(words(project, tmp_path))
    found = json.loads((tmp_path / "out" / "methods.json").read_text())
    own_method = f"{project}:Gentle"
    assert list(found["result"]["panels"]) == ["fine-tune", own_method]
    assert found["scale"]["own_methods"] == [own_method]
    assert found["scale"]["sgd"]["dataset"] == f"{project}:data_sets"
    said = capsys.readouterr().out
    written = [tmp_path / "out" / f"methods.{kind}" for kind in ("json", "png", "md")]
    assert f"written: {', '.join(map(str, written))}\n" in said
    assert all(file.exists() for file in written)
    assert f"| {own_method} |" in (tmp_path / "out" / "methods.md").read_text()
    # Gentle is fine-tuning under another name
    for numbers in ("panels", "settings"):
        of_name = found["result"][numbers]
        assert of_name["fine-tune"] == of_name[own_method]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"dataset": "flat"}, r"used. The training images must be .* shape \(1, 3\)"),
        ({"dataset": "few"}, "cannot be used. 8 disjoint sets of 20 need"),
        ({"dataset": "build"}, r"--dataset: .*build\(\) raised TypeError"),
        ({"dataset": "data_set"}, "does not exist. .* has: data_sets"),
        ({"model": "flat"}, "is of type tuple, not a function"),
        ({"method": "few"}, "is of type tuple, not an opacus_pi.unlearning.Method"),
    ],
)
def test_parts_that_cannot_be_used_are_refused_before_training(
    parts, message, project, tmp_path
):
    with pytest.raises(SystemExit, match=message):
        main(words(project, tmp_path, **parts))
    assert not (tmp_path / "store").exists()


def test_an_own_method_needs_the_figure_that_compares_methods(project, tmp_path):
    with pytest.raises(SystemExit, match="only the figure 'methods' compares methods"):
        main(["fig2", *words(project, tmp_path)[1:]])


def test_images_and_labels_are_those_of_the_data_sets(project):
    images = load(f"{project}:data_sets", num_train=7)
    data_set = own.own("--dataset", f"{project}:data_sets", own.DATA_SETS)[0]
    x, y = images.train.tensors
    assert x.shape == (7, 1, 6, 6) and images.num_classes == 3
    assert [round(float(v) * 255) for v in x[3].flatten()] == [
        int(v) for v in data_set[3][0].flatten()
    ]
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0] and len(images.test) == 40


def test_an_edited_method_is_another_method(project, tmp_path):
    search = Search(SCALES["smoke"].sgd, f"{project}:Gentle")
    before = search.facts()
    file = tmp_path / f"{project}.py"
    file.write_text(f"{file.read_text()}\n# edited\n")
    assert search.facts() != before
    assert "method source" not in Search(SCALES["smoke"].sgd, "fine-tune").facts()
    assert candidate(f"{project}:Gentle").ranges == candidate("fine-tune").ranges
