"""A small project of a user's: digits, a model trained privately, its ledger."""

import json
import sys

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader

from opacus_pi import GradNormLedger, PrivacyEngine
from opacus_pi.cli import main
from opacus_pi.ledger import fingerprint

SOURCE = """
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16).float(), torch.tensor(labels)
test_set = TensorDataset(images[120:200], labels[120:200])
number = 7


def train_set():
    return TensorDataset(images[:120], labels[:120])


def without_erased():
    # The training set after the examples 3 and 4 were erased.
    kept = [i for i in range(120) if i not in (3, 4)]
    return TensorDataset(images[kept], labels[kept])


def with_blanks():
    # The same with nothing in their places.
    left = TensorDataset(images[:120].clone(), labels[:120].clone())
    left.tensors[0][3:5] = 0
    return left


def other_set():
    return TensorDataset(images[:120], labels[1:121])


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    )


def build_wider():
    return torch.nn.Sequential(torch.nn.Linear(64, 10))


class Broken(torch.nn.Sequential):
    def forward(self, x):
        raise RuntimeError("two\\nlines of trouble")


def build_broken():
    return Broken(*build())


def needs_argument(x):
    return x


one_model = build()
"""


def train(project):
    """Train privately for two epochs; leave weights in both formats and a ledger."""
    sys.path.insert(0, str(project))
    import cli_project

    torch.manual_seed(0)
    model = cli_project.build()
    loader = DataLoader(cli_project.train_set(), batch_size=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=6.0,
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    engine.ledger.save(project / "ledger.safetensors")
    plain = model._module.state_dict()
    safetensors.torch.save_file(plain, project / "model.safetensors")
    torch.save(model.state_dict(), project / "wrapped.pt")
    torch.manual_seed(5)
    other = {
        name: value + 0.1 * torch.randn_like(value) for name, value in plain.items()
    }
    torch.save(other, project / "retrained.pt")
    order = torch.randperm(16)
    permuted = {
        "0.weight": plain["0.weight"][order],
        "0.bias": plain["0.bias"][order],
        "2.weight": plain["2.weight"][:, order],
        "2.bias": plain["2.bias"],
    }
    torch.save(permuted, project / "permuted.pt")


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("project")
    (directory / "cli_project.py").write_text(SOURCE)
    path = [*sys.path]
    train(directory)
    sys.path[:] = path
    return directory


@pytest.fixture
def ledger(project):
    return GradNormLedger.load(project / "ledger.safetensors")


@pytest.fixture
def run(project, monkeypatch, capsys):
    """Run a command in the project: exit code, output, error stream."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def go(*words):
        code = main([str(word) for word in words])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return go


@pytest.fixture
def answer(run):
    """Run a command that succeeds; its JSON."""

    def go(*words):
        code, out, err = run(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return go


def owners_file(path, owners):
    """Write a file of persons that names the data set of the project."""
    import cli_project

    named = {"data_set": fingerprint(cli_project.train_set()), **owners}
    path.write_text(json.dumps(named))
    return path


MODEL = ("--model", "cli_project:build", "--weights", "model.safetensors")
LOG = ("--without-ledger", "--log")
DATA = ("--data", "cli_project:train_set", "--test", "cli_project:test_set")
