"""Weights are loaded from every file that holds them, under the names it gives them."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.inputs import (
    load_ledgers,
    load_weights,
    read_indices,
)
from opacus_pi.cli.owners import read_owners
from opacus_pi.cli.run_files import new_directory
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


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "ledger.safetensors"
    Training().train(1).engine.ledger.save(path)
    with pytest.raises(BadInput, match="is a ledger of gradient norms. Save the weigh"):
        load_weights("--weights", str(path), Tied(0))


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


@pytest.mark.parametrize("text", ["-1", "3-5", "1.5", "3;4", "3,-4", "3:5", "3, 4.0"])
def test_numbers_that_are_no_positions_are_not_files(text, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="is not a list of positions"):
        read_indices(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).write_text("3")  # unless there is such a file
    assert read_indices(text).tolist() == [3]


def test_owners_may_come_from_a_pipe(pipe):
    path = pipe('{"p03": [17, 3], "data_set": "A:20"}')
    assert read_owners(path, lambda: "A:20") == {"p03": [17, 3]}


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_may_begin_with_a_mark_of_their_encoding(tmp_path, encoding):
    text = '{"pé": [17, 3], "data_set": "A:20"}'
    (tmp_path / "owners").write_text(text, encoding=encoding)
    assert read_owners(str(tmp_path / "owners"), lambda: "A:20") == {"pé": [17, 3]}
    for text in ("3\n17\n", "[3, 17]"):
        (tmp_path / "ids").write_text(text, encoding=encoding)
        assert read_indices(str(tmp_path / "ids")).tolist() == [3, 17]


@pytest.mark.parametrize("word", ["1_0", "+3", "3.0", "0x1", "٣", "1e1"])
def test_whole_numbers_are_written_in_digits(tmp_path, word):
    (tmp_path / "ids").write_text(f"{word}\n")
    with pytest.raises(BadInput, match="does not hold whole numbers"):
        read_indices(str(tmp_path / "ids"))


@pytest.mark.parametrize(
    "content", [b"3\x0017\n", b"\x80\x81", b"\xff\xfe3", b"\x1f\x8b3"]
)
def test_a_file_that_is_no_text_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "ids"
    path.write_bytes(content)
    with pytest.raises(BadInput) as raised:
        read_indices(str(path))
    assert str(raised.value).startswith(f"--forget: {path} is not a text in UTF-8")
    assert "Save it as a text in UTF-8" in str(raised.value)


def test_a_result_is_kept_if_its_name_was_taken_meanwhile(tmp_path):
    with (
        pytest.raises(BadInput, match="Nothing is lost") as raised,
        new_directory(str(tmp_path / "run")) as part,
    ):
        (part / "weights").write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "weights").write_text("theirs")
    (kept,) = tmp_path.glob("run-*")
    assert (kept / "weights").read_text() == "mine" and str(kept) in str(raised.value)
    assert (tmp_path / "run" / "weights").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.fill_(float("nan")), "weight contains NaN"),
        (lambda w: w.to(torch.int8), "weight has the type torch.int8"),
    ],
)
def test_weights_that_are_no_trained_ones_are_refused(tmp_path, change, message):
    model = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = nn.Linear(3, 2).state_dict()
    torch.save(state | {"weight": change(state["weight"])}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=f"--weights: .*w.pt: {message}"):
        load_weights("--weights", str(tmp_path / "w.pt"), model)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    torch.save({n: v.double() for n, v in before.items()}, tmp_path / "d.pt")
    load_weights("--weights", str(tmp_path / "d.pt"), model)


def test_an_array_file_that_cannot_be_read_says_so(tmp_path):
    np.save(tmp_path / "whole.npy", np.array([17, 3]))
    assert read_indices(str(tmp_path / "whole.npy")).tolist() == [17, 3]
    content = (tmp_path / "whole.npy").read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(content[:-4])
    (tmp_path / "short.npy").write_bytes(content[:50])
    (tmp_path / "text.npy").write_text("3")
    for name in ("objects", "cut", "short", "text"):
        with pytest.raises(BadInput, match=f"{name}.npy is not a whole .npy file"):
            read_indices(str(tmp_path / f"{name}.npy"))
