"""Layers whose rows are not the examples, although they are as many."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine
from opacus_pi.custody.model_probe import probe_separability

NUM = 20


class Graph(nn.Module):
    """A convolution over a graph whose nodes are the examples."""

    def __init__(self, *, drops=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        links = (torch.rand(NUM, NUM, generator=generator) < 0.2).float()
        links = links + torch.eye(NUM)
        self.register_buffer("x", torch.randn(NUM, 5, generator=generator))
        self.register_buffer("links", links / links.sum(1, keepdim=True))
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5 if drops else 0.0)

    def forward(self, nodes):
        hidden = self.dropout(torch.tanh(self.links @ self.first(self.x)))
        return (self.links @ self.second(hidden))[nodes]


class Queries(nn.Module):
    """Every example gets the same learned vectors, through a layer."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(5, 4)
        self.register_buffer("start", torch.ones(5))
        self.head = nn.Linear(8, 3)
        self.x = nn.Embedding(NUM, 4)

    def forward(self, nodes):
        query = self.query(self.start.expand(len(nodes), 5))
        return self.head(torch.cat([self.x(nodes), query], dim=1))


class Noisy(nn.Module):
    """A layer is given random numbers of each example."""

    def __init__(self):
        super().__init__()
        self.noise, self.x = nn.Linear(5, 3), nn.Embedding(NUM, 3)

    def forward(self, nodes):
        return self.x(nodes) + self.noise(torch.randn(len(nodes), 5))


def model_link(module, mode="hooks"):
    torch.manual_seed(0)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(
            TensorDataset(torch.arange(NUM), torch.arange(NUM) % 3), batch_size=NUM
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    for nodes, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(nodes), y).backward()
        optimizer.step()
    return next(k for k in engine.ledger.custody.links if k.name == "model")


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.filterwarnings("ignore:The library assumes")
def test_nodes_of_a_graph_are_not_taken_for_examples(mode, drops):
    link = model_link(Graph(drops=drops), mode)
    assert link.state == "unchecked"
    assert "'first' have as many rows as the batch has examples" in link.sentence


def test_a_mode_that_does_not_rely_on_rows_is_not_doubted():
    assert model_link(Graph(), "fast").state == "checked"


@pytest.mark.parametrize("module", [Queries, Noisy])
def test_other_inputs_that_do_not_depend_on_examples_are_fine(module):
    assert model_link(module()).state == "checked"


def test_the_probe_says_it_only_where_gradients_are_those_of_rows():
    nodes = torch.arange(NUM)
    assert probe_separability(Graph(), (nodes,), {}).state == "checked"
    found = probe_separability(Graph(), (nodes,), {}, rows_are_examples=True)
    assert found.state == "unchecked"
