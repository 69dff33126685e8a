"""Data whose items torch cannot put into a batch: every command takes a function."""

import json

import pytest
import safetensors.torch
import torch

from opacus_pi.cli import unlearn
from tests.cli.conftest import LOG

SOURCE = """
import torch
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)


class Digits(torch.utils.data.Dataset):
    def __init__(self, first, last):
        self.places = range(first, last)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        place = self.places[i]
        row = torch.tensor(images[place, : 40 + place % 24]).float()
        return {"x": row, "label": int(labels[place])}


train_set, test_set = Digits(0, 60), Digits(60, 90)


def pad(found):
    rows = torch.zeros(len(found), 64)
    for row, item in zip(rows, found):
        row[: len(item["x"])] = item["x"]
    return {"x": rows, "labels": torch.tensor([item["label"] for item in found])}


class Padding:
    def __call__(self, features):
        return pad(features)


def make_padding():
    return Padding()


def unlabelled(found):
    return {"x": pad(found)["x"]}


def broken(found):
    raise KeyError("y")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x)


class Features(Net):
    def forward(self, x):
        return x
"""
MODEL = ("--model", "padded_project:Net")
DATA = ("--data", "padded_project:train_set")
TEST = ("--test", "padded_project:test_set")
PAD = ("--collate", "padded_project:pad")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project of this page, in place of that of the other tests."""
    folder = tmp_path_factory.mktemp("padded")
    (folder / "padded_project.py").write_text(SOURCE)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 10)
    state = {f"layer.{name}": x for name, x in layer.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    other = {name: x + 0.1 for name, x in state.items()}
    safetensors.torch.save_file(other, folder / "other.safetensors")
    return folder


WEIGHTS = ("--weights", "model.safetensors")
COMMANDS = {
    "audit": (*MODEL, *DATA, "--examples", 8),
    "heads": ("--model", "padded_project:Features", *DATA, *TEST, "--classes", 10),
    "evaluate": (*MODEL, *WEIGHTS, *DATA, *TEST, "--forget", 3)
    + ("--oracle", "other.safetensors"),
    "unlearn": (*MODEL, *WEIGHTS, *DATA, *TEST, "--forget", 3, "--epochs", 1),
}


def arguments(name, folder):
    out = ("--out", folder / "result", *LOG, folder / "log.db")
    return (name, *COMMANDS[name], *(out if name == "unlearn" else ()))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_makes_the_batches(run, tmp_path, name):
    code, out, err = run(*arguments(name, tmp_path), *PAD)
    assert (code, err) == (0, "") and out


@pytest.mark.parametrize("built", ["Padding", "make_padding"])
def test_the_function_may_be_built(run, built):
    words = (*COMMANDS["audit"], "--collate", f"padded_project:{built}")
    assert run("audit", *words)[0] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_without_it_the_message_names_the_option(run, tmp_path, name):
    code, out, err = run(*arguments(name, tmp_path))
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "No --collate was given" in err and "Pass --collate M:NAME" in err
    assert "collate_fn" not in err and not (tmp_path / "log.db").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_that_fails_is_named(run, tmp_path, name):
    words = (*arguments(name, tmp_path), "--collate", "padded_project:broken")
    code, out, err = run(*words)
    assert (code, out) == (2, "") and "--collate cannot make a batch" in err
    assert not (tmp_path / "log.db").exists()


def test_a_batch_without_labels_names_the_option(run):
    words = (*COMMANDS["evaluate"], "--collate", "padded_project:unlabelled")
    code, _, err = run("evaluate", *words)
    assert code == 2 and "Pass --collate M:NAME, a function that returns (inp" in err


def test_what_is_no_function_is_refused(run):
    words = (*COMMANDS["audit"], "--collate", "padded_project:train_set")
    code, _, err = run("audit", *words)
    assert code == 2 and "not a function that makes a batch" in err
    assert "padded_project has:" in err and "pad" in err


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_an_error_says_that_the_request_is_pending(run, tmp_path, monkeypatch, error):
    def fails(*args, **options):
        raise error

    words = (*arguments("unlearn", tmp_path), *PAD, "--request-id", "A1")
    with monkeypatch.context() as patch:
        patch.setattr(unlearn.Unlearner, "unlearn", fails)
        code, out, err = run(*words)
    assert out == "" and "it is pending (A1). Repeat the command" in err
    assert len(err.splitlines()) == 1
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "") and json.loads(out)["request_id"] == "A1"


def test_an_error_before_the_entry_says_nothing_of_it(run, tmp_path):
    words = (*arguments("unlearn", tmp_path), *PAD, "--device", "none")
    code, _, err = run(*words)
    assert code == 2 and "pending" not in err
