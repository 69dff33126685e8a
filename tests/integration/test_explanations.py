"""A layer that is given one row for the whole batch is named, with what to do."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from opacus_pi import PrivacyEngine
from opacus_pi.accounting import RenyiFilter, privacy_losses

LENGTH = 5


class Tagger(nn.Module):
    """Words and positions; like models of Hugging Face it makes its position ids."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.words, self.position = nn.Embedding(10, 4), nn.Embedding(LENGTH, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(LENGTH)[None]
        return self.out((self.words(ids) + self.position(position_ids)).mean(1))


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randint(10, (12, LENGTH), generator=generator), torch.arange(12) % 2
    )


def trained(mode="hooks", *, model=None, expanded=False, engine=None, **options):
    engine, module = engine or PrivacyEngine(), model or Tagger()
    torch.manual_seed(2)
    hooks, optimizer, *criterion, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=4),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        **{"max_grad_norm": 1.0, "poisson_sampling": False, **options},
        grad_sample_mode=mode,
    )
    model = hooks if isinstance(hooks, nn.Module) else module
    for ids, labels in loader:
        own = (torch.arange(LENGTH).expand(len(ids), -1),) if expanded else ()
        optimizer.zero_grad()
        loss = criterion[0] if criterion else nn.functional.cross_entropy
        loss(model(ids, *own), labels).backward()
        optimizer.step()
    return engine


def note_of(run):
    with pytest.raises(RuntimeError, match="stack expects each tensor") as error:
        run()
    return " ".join([*error.value.args, *getattr(error.value, "__notes__", [])])


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("hooks", {}),
        ("functorch", {}),
        ("ghost", {}),
        ("ghost", {"wrap_model": False}),
        ("hooks", {"wrap_model": False}),
        ("hooks", {"clipping": "per_layer", "max_grad_norm": [1.0] * 4}),
        ("hooks", {"engine": "filter", "poisson_sampling": True}),
    ],
)
def test_the_parameter_and_the_remedies_are_named(mode, options):
    if options.get("engine"):
        options = {**options, "engine": PrivacyEngine(renyi_filter=RenyiFilter(3.0))}
    note = note_of(lambda: trained(mode, **options))
    assert note.count("Every parameter needs one gradient per example") == 1
    assert "another number of gradients: 'position.weight' (1)." in note
    assert "position_ids" in note and "requires_grad_(False)" in note
    assert 'try grad_sample_mode="fast", which works if' in note


class Graph(nn.Module):
    """A graph convolution over all nodes, and a layer for some of them or for all."""

    def __init__(self, *, is_last):
        super().__init__()
        self.convolved, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("nodes", torch.randn(30, 4))
        self.register_buffer("adjacency", torch.softmax(torch.randn(30, 30), 1))
        self.is_last = is_last

    def forward(self, chosen):
        nodes = self.adjacency @ self.convolved(self.nodes)
        if self.is_last:
            return self.head(nodes)[chosen]
        return self.head(nodes[chosen])


@pytest.mark.parametrize(
    ("mode", "is_last"),
    [("hooks", False), ("functorch", False), ("ghost", False), ("ghost", True)],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_given_all_nodes_of_a_graph_are_explained(mode, is_last):
    criterion, model = nn.CrossEntropyLoss(), Graph(is_last=is_last)
    model, optimizer, *ghost, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.arange(30)), batch_size=6),
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    (chosen,) = next(iter(loader))
    with pytest.raises(RuntimeError) as error:
        (ghost or [criterion])[0](model(chosen), chosen % 3).backward()
        optimizer.step()
    (note,) = getattr(error.value, "__notes__", error.value.args[1:])
    assert "all nodes of a graph" in note and "position" not in note
    if is_last:
        assert note.count("30 for") == 1 and "6 losses of the criterion" in note
    else:
        assert "6 for 'head.weight', 'head.bias'; 30 for 'convolved.weight'" in note


class Typed(Tagger):
    """Token types that are one row spread over the batch, as BERT makes them."""

    def forward(self, ids, position_ids=None):
        types = torch.zeros(1, LENGTH, dtype=torch.long).expand(len(ids), LENGTH)
        return self.out((self.words(ids) + self.position(types)).mean(1))


def test_indices_that_ghost_clipping_cannot_read_are_explained():
    with pytest.raises(RuntimeError, match="view size is not compatible") as error:
        trained("ghost", model=Typed())
    (note,) = getattr(error.value, "__notes__", error.value.args[1:])
    assert "token_type_ids=" in note and "requires_grad_(False)" in note


def test_other_errors_of_ghost_clipping_stay_as_they_are():
    model = Tagger()
    model.out.register_full_backward_hook(_fail)
    with pytest.raises(RuntimeError, match="mine") as error:
        trained("ghost", model=model, expanded=True)
    assert not getattr(error.value, "__notes__", error.value.args[1:])


def _fail(*_):
    raise RuntimeError("mine")


def losses(engine):
    return privacy_losses(engine.ledger, 8.0)


@pytest.mark.filterwarnings("ignore:There is no formula for .* position.weight")
def test_each_remedy_is_one():
    wanted = losses(trained(expanded=True))
    assert losses(trained("fast")) == pytest.approx(wanted, rel=1e-5)
    model = Tagger()
    model.position.requires_grad_(False)
    assert np.isfinite(losses(trained(model=model))).all()


def test_other_errors_stay_as_they_are(monkeypatch):
    def broken(norms):
        raise RuntimeError("stack expects each tensor to be on one device")

    monkeypatch.setattr("opacus_pi.integration.optimizers.joint_norms", broken)
    note = note_of(lambda: trained(expanded=True))
    assert note == "stack expects each tensor to be on one device"


class Heads(nn.Module):
    """Like attention, it computes the number of samples from that of the entries."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, shared=None):
        return self.layer(x).view(x.shape[0], -1, 2).sum(1)


@pytest.mark.parametrize("mode", ["hooks", "fast"])
@pytest.mark.parametrize(("size", "noted"), [(0, True), (3, False)])
def test_an_empty_batch_is_named_with_what_to_do(mode, size, noted):
    model = Heads()
    hooks, *_ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.zeros(8, 4)), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
        grad_sample_mode=mode,
    )
    width = 4 if size == 0 else 5  # another error
    with pytest.raises(RuntimeError) as caught:
        model(x=torch.zeros(size, width), shared=torch.zeros(1, 4))
    text = str([*caught.value.args, *getattr(caught.value, "__notes__", [])])
    assert ("poisson_sampling=False" in text) == noted


class Items(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.make(i)


def as_pair(i):
    return torch.zeros(4), i % 2


def as_dict(items):
    x, y = default_collate(items)
    return {"x": x, "y": y}


def batches_after_an_empty_one(make, collate):
    model = nn.Linear(4, 2)
    _, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(Items(make), batch_size=2, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    vars(loader)["batch_sampler"] = [[], [1, 2], []]
    return list(loader)


@pytest.mark.parametrize(("collate", "is_said"), [(as_dict, True), (None, False)])
def test_the_form_of_an_empty_first_batch_is_said_where_it_may_be_another(
    collate, is_said
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        empty, batch, later = batches_after_an_empty_one(as_pair, collate)
    texts = [str(w.message) for w in caught if "first batch" in str(w.message)]
    assert len(texts) == is_said and [len(t) for t in empty] == [0, 0]
    assert type(later) is type(batch)
    assert all("a list of 2 tensors with 0 samples" in text for text in texts)


@pytest.mark.parametrize(
    ("make", "collate"),
    [
        (lambda i: {"x": torch.zeros(4), "y": i}, None),
        (lambda i: ("text", i), lambda items: torch.zeros(len(items), 4)),
    ],
)
def test_an_empty_first_batch_that_has_no_form_is_explained(make, collate):
    with pytest.raises(TypeError) as caught:
        batches_after_an_empty_one(make, collate)
    text = str([*caught.value.args, *getattr(caught.value, "__notes__", [])])
    assert "The first batch is empty" in text and "poisson_sampling=False" in text
