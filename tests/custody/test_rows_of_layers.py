"""Layers whose rows are not the examples, although they are as many."""

import warnings

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
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


def nearly_equal_nodes(spread):
    """Return a graph whose nodes have equal features, up to a spread."""
    graph = Graph()
    graph.x = torch.ones(NUM, 5) + spread * torch.rand(NUM, 5)
    return graph


class Queries(nn.Module):
    """Every example gets the same learned vectors, through a layer.

    Args:
        spread: How the vectors differ, as by the rounding of a kernel.
    """

    def __init__(self, spread=0.0):
        super().__init__()
        self.spread, self.query = spread, nn.Linear(5, 4)
        self.register_buffer("start", torch.ones(5))
        self.head = nn.Linear(8, 3)
        self.x = nn.Embedding(NUM, 4)

    def forward(self, nodes):
        start = self.start.expand(len(nodes), 5)
        places = self.spread * torch.arange(len(nodes)).unsqueeze(1)
        query = self.query(start + places)
        return self.head(torch.cat([self.x(nodes), query], dim=1))


class Noisy(nn.Module):
    """A layer is given random numbers of each example."""

    def __init__(self):
        super().__init__()
        self.noise, self.x = nn.Linear(5, 3), nn.Embedding(NUM, 3)

    def forward(self, nodes):
        return self.x(nodes) + self.noise(torch.randn(len(nodes), 5))


class Chunk(nn.Module):
    """A part of sequences, after a state in the layout of recurrent layers."""

    def __init__(self, kind=DPLSTM):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)
        if kind is None:
            self.new, self.old = nn.Linear(5, 4), nn.Linear(4, 4)
        else:
            self.cell = kind(5, 4, batch_first=True)

    def forward(self, x, state=None):
        if self.kind is not None:
            hidden, state = self.cell(x, state)
            return self.head(hidden[:, -1])
        h = torch.zeros(1, len(x), 4) if state is None else state
        for step in x.unbind(1):
            h = torch.tanh(self.new(step) + self.old(h[0]))[None]
        return self.head(h[0])


class Neighbours(nn.Module):
    """As many nodes as examples, in the layout of a state."""

    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(4, 4), nn.Linear(9, 3)

    def forward(self, x, nodes):
        found = torch.tanh(self.node(nodes[0])).roll(1, 0)
        return self.head(torch.cat([x[:, 0], found], dim=1))


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


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
@pytest.mark.filterwarnings("ignore:The library assumes")
def test_nodes_that_look_alike_are_not_taken_for_examples(spread):
    link = model_link(nearly_equal_nodes(spread))
    assert link.state == "unchecked"
    assert "'first' have as many rows as the batch has examples" in link.sentence


@pytest.mark.parametrize(("spread", "state"), [(1e-7, "checked"), (0.1, "unchecked")])
def test_equal_vectors_of_the_examples_are_fine_up_to_rounding(spread, state):
    nodes = torch.arange(NUM)
    found = probe_separability(Queries(spread), (nodes,), {}, rows_are_examples=True)
    assert found.state == state, found.sentence


@pytest.mark.parametrize(("value", "state"), [(7, "checked"), (None, "unchecked")])
def test_whole_numbers_are_compared_without_rounding(value, state):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.head = nn.Embedding(2**25, 1), nn.Linear(2, 1)

        def forward(self, x):
            numbers = torch.arange(len(x)) + 2**24 if value is None else value
            words = self.word(x.new_zeros(len(x), dtype=torch.long) + numbers)
            return self.head(torch.cat([x, words], 1))

    found = probe_separability(
        Words(), (torch.randn(9, 1),), {}, rows_are_examples=True
    )
    assert found.state == state, found.sentence


@pytest.mark.parametrize("size", range(25, 31))
def test_sequences_that_begin_with_the_same_token_are_fine(size):
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.letters = nn.Embedding(259, 64)
            self.cell = DPLSTM(64, 128, batch_first=True)
            self.head = nn.Linear(128, 4)

        def forward(self, x):
            return self.head(self.cell(self.letters(x))[0][:, -1])

    torch.manual_seed(0)
    x = torch.randint(97, 122, (size, 8))
    x[:, 0] = 256
    found = probe_separability(Names(), (x,), {}, rows_are_examples=True)
    assert found.state == "checked", found.sentence


@pytest.mark.parametrize("module", [Queries, Noisy])
def test_other_inputs_that_do_not_depend_on_examples_are_fine(module):
    assert model_link(module()).state == "checked"


def probed(module, *states):
    torch.manual_seed(0)
    x = torch.randn(NUM, 2, 5)
    return probe_separability(module, (x, *states), {}, rows_are_examples=True)


def drawn_state():
    return torch.randn(1, NUM, 4, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", [DPLSTM, DPGRU, DPRNN, None])
def test_a_state_that_the_loop_passes_has_rows_of_the_examples(kind):
    state = drawn_state()
    found = probed(Chunk(kind), (state, state.clone()) if kind is DPLSTM else state)
    assert found.state == "checked", found.sentence


def test_nodes_in_the_layout_of_a_state_are_not_taken_for_examples():
    found = probed(Neighbours(), drawn_state())
    assert found.state == "unchecked" and "'node' have as many rows" in found.sentence


def test_a_loop_that_carries_a_state_is_not_doubted():
    torch.manual_seed(0)
    engine, module = PrivacyEngine(), Chunk()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(
            TensorDataset(torch.randn(NUM, 4, 5), torch.arange(NUM) % 3), batch_size=10
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        state = None
        for part in x.split(2, dim=1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(part, state), y).backward()
            optimizer.step()
            with torch.no_grad():
                state = module.cell(part, state)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        links = engine.ledger.custody.links
    assert next(k for k in links if k.name == "model").state == "checked"


def test_the_probe_says_it_only_where_gradients_are_those_of_rows():
    nodes = torch.arange(NUM)
    assert probe_separability(Graph(), (nodes,), {}).state == "checked"
    found = probe_separability(Graph(), (nodes,), {}, rows_are_examples=True)
    assert found.state == "unchecked"
