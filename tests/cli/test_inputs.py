"""Weights are loaded from every file that holds them, under the names it gives them."""

import pytest
import safetensors.torch
import torch
from torch import nn

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.inputs import load_weights
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
