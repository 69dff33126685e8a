"""Weights are loaded from every file that holds them, under the names it gives them."""

import argparse
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.inputs import (
    load_ledgers,
    load_weights,
    read_forget_set,
    read_indices,
)
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import read_plain_weights, write_weights
from tests.private_training import Training


class Tied(nn.Module):
    """A model that uses one matrix twice, and a buffer under two names."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("same_scale", self.scale)
        self.other = nn.Linear(6, 7, bias=False)  # equal in shape, but a tensor itself


def assert_same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prefix", ["", "_module."])
def test_tied_weights_may_have_one_of_their_names(tmp_path, prefix):
    source, path = Tied(0), tmp_path / "net.safetensors"
    holder = nn.Module()
    holder.add_module("_module", source)
    safetensors.torch.save_model(holder if prefix else source, str(path))
    kept = safetensors.torch.load_file(path)
    assert len(kept) == len(source.state_dict()) - 2
    assert_same(load_weights("--weights", str(path), Tied(1)), source)


def test_a_weight_that_is_missing_and_not_tied_is_an_error(tmp_path):
    path = tmp_path / "net.safetensors"
    state = {k: v.clone() for k, v in Tied(0).state_dict().items() if "other" not in k}
    safetensors.torch.save_file(state, path)
    with pytest.raises(BadInput, match=r"Missing key.*other\.weight"):
        load_weights("--weights", str(path), Tied(1))


def test_weights_of_a_checkpoint(tmp_path):
    training, path = Training().train(1), tmp_path / "checkpoint.pt"
    training.engine.save_checkpoint(
        path=path, module=training.model, optimizer=training.optimizer
    )
    plain = training.model._module
    again = load_weights("--weights", str(path), type(plain)())
    assert_same(again, plain)
    torch.save({"module_state_dict": {"w": 3}}, path)
    with pytest.raises(BadInput, match="more than a state dict"):
        load_weights("--weights", str(path), nn.Linear(1, 1))


# --------------------------------------------------------------------- pipes of a shell
@pytest.fixture
def pipe():
    """Returns the name of an open pipe that holds a text."""
    opened = []

    def holding(text):
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        opened.append(reader)
        return f"/dev/fd/{reader}"

    yield holding
    for reader in opened:
        os.close(reader)


@pytest.mark.parametrize("text", ["3\n17\n25\n", "[3, 17, 25]", "3,17 25"])
def test_ids_may_come_from_a_pipe(pipe, text):
    assert read_indices(pipe(text)).tolist() == [3, 17, 25]


def test_owners_may_come_from_a_pipe(pipe):
    options = argparse.Namespace(
        forget_person=["p03"], owners=pipe('{"p03": [17, 3]}'), flags={}
    )
    assert read_forget_set(options).tolist() == [3, 17]


def test_a_ledger_is_read_twice_and_may_not_come_from_a_pipe(pipe):
    with pytest.raises(BadInput, match="must name a regular file, not a pipe"):
        load_ledgers([pipe("PK")], noise_std=None)


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "ids")
    with pytest.raises(BadInput, match="must name a regular file, not a pipe"):
        read_indices(str(tmp_path / "ids"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("ids", ["<(printf '3\\n17\\n')", "/dev/stdin"])
def test_process_substitution_and_standard_input(ids):
    code = (
        "import sys; from opacus_pi.cli.inputs import read_indices; "
        "print(read_indices(sys.argv[1]).tolist())"
    )
    script = f"printf '3\\n17\\n' | '{sys.executable}' -c '{code}' {ids}"
    command = ["bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[3, 17]\n", done.stderr


def test_weights_of_a_run_are_checked_when_they_are_used(tmp_path):
    state = nn.Linear(16, 64).state_dict()
    write_weights(tmp_path / "whole.safetensors", UNLEARNED_WEIGHTS, state, {})
    content = bytearray((tmp_path / "whole.safetensors").read_bytes())
    assert len(read_plain_weights(tmp_path / "whole.safetensors")) == 2
    model = nn.Linear(16, 64)
    for place in (len(content) - 9, content.index(b"UnlearnedWeights")):
        content[place] ^= 1
        (tmp_path / "flipped.safetensors").write_bytes(content)
        content[place] ^= 1
        with pytest.raises(BadInput, match="--weights: .*(checksum|unknown kind)"):
            load_weights("--weights", str(tmp_path / "flipped.safetensors"), model)
