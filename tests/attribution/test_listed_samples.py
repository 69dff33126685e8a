"""Batches that are lists of single samples, as ``tuple(zip(*items))`` returns them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.attribution.collate_identity import follow
from opacus_pi.attribution.item_fingerprints import fingerprint_items

N = 24
SHAPES = {
    "gray": (1, 6, 6),
    "rgb": (3, 6, 6),
    "as many channels as samples": (12, 6, 6),
    "as high as the batch": (1, 12, 6),
    "sound": (1, 40),
    "many entries": (1, 40, 40),
    "rows": (8,),
}


class Images(Dataset):
    def __init__(self, shape):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(N, *shape, generator=generator)
        self.y = torch.randint(0, 3, (N,), generator=generator)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.x[i], {"label": self.y[i], "image_id": i}


def zipped(items):
    return tuple(zip(*items, strict=True))


def in_lists(items):
    return [list(part) for part in zipped(items)]


def in_a_dict(items):
    images, targets = zipped(items)
    return {"images": list(images), "targets": targets}


def sorted_by_sum(items):
    return zipped(sorted(items, key=lambda item: float(item[0].sum())))


def as_they_are(items):
    return items


def halves_left_out(items):
    return zipped(items[: len(items) // 2])


COLLATES = [zipped, in_lists, in_a_dict, sorted_by_sum, as_they_are, halves_left_out]


def parts(batch):
    if isinstance(batch, dict):
        return batch["images"], batch["targets"]
    return zipped(batch) if isinstance(batch[0][-1], dict) else batch


def train(shape, collate_fn, *, batch_size=12, moves=False, loop=None):
    """Train; return the engine and the true norms of each update."""
    torch.manual_seed(1)
    data = Images(shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(data.x[0].numel(), 3))
    engine = PrivacyEngine(recorder=Recorder(every=list(range(1, N + 1))))
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(
            data, batch_size=batch_size, shuffle=True, collate_fn=collate_fn
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    true = []
    for batch in loader:
        images, targets = parts(batch)
        x = torch.stack(list(images))
        y = torch.stack([target["label"] for target in targets])
        order = torch.arange(len(x)).flip(0) if moves else torch.arange(len(x))
        true.append({})
        for k, target in enumerate(targets):
            loss = F.cross_entropy(net(x[k : k + 1]), y[k : k + 1])
            own = torch.autograd.grad(loss, list(net.parameters()))
            norm = torch.cat([g.flatten() for g in own]).norm().item()
            true[-1][target["image_id"]] = norm
        for p in net.parameters():
            p.grad_sample = None
        optimizer.zero_grad()
        if loop is None:
            F.cross_entropy(model(x[order]), y[order]).backward()
        else:
            loop(model, images, y)
        optimizer.step()
    return engine, true


def agree(engine, true):
    norms = engine.ledger.grad_norms
    return all(
        norms[update, i] == pytest.approx(norm, rel=1e-5)
        for update, row in enumerate(true)
        for i, norm in row.items()
    )


def states(engine):
    return {link.name: link.state for link in engine.ledger.custody.links}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_samples_of_every_shape_are_recognised(kind, moves):
    engine, true = train(SHAPES[kind], zipped, moves=moves)
    assert agree(engine, true)
    assert engine.attribution["by_content"] == N
    assert {states(engine)[name] for name in ("identity", "rows")} == {"checked"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gray", "rgb"])
@pytest.mark.parametrize("batch_size", [2, 3, 12])
@pytest.mark.parametrize("collate_fn", COLLATES)
def test_samples_of_every_collation_are_recognised(collate_fn, batch_size, kind):
    engine, true = train(SHAPES[kind], collate_fn, batch_size=batch_size)
    assert agree(engine, true)
    assert engine.attribution["unattributed"] == 0
    assert engine.attribution["by_latest"] == 0


def each_alone(model, images, y):
    loss = sum(
        F.cross_entropy(model(x[None]), t[None]) for x, t in zip(images, y, strict=True)
    )
    (loss / len(y)).backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gray", "rgb"])
def test_a_call_for_each_sample_is_refused_for_its_own_reason(kind):
    engine, _ = train(SHAPES[kind], zipped, loop=each_alone)
    with pytest.raises(AccountingError) as error:
        _ = engine.ledger
    assert "mixup" not in str(error.value)
    assert "latest batch" not in str(error.value)


def made(number, *shapes):
    torch.manual_seed(number)
    return [tuple(torch.rand(shape) for shape in shapes) for _ in range(number)]


def followed(items, batch):
    identity = follow(fingerprint_items(items), batch, 0)
    chosen = identity.items
    order = list(range(len(items))) if chosen is None else chosen.tolist()
    return order, bool(identity.notes), identity.has_more


def test_lists_of_different_shapes_are_followed():
    items = [(torch.rand(1, 4 + k, 6), torch.rand(k + 1, 4)) for k in range(4)]
    whole = [0, 1, 2, 3], False, False
    assert followed(items, zipped(items)) == whole
    order = [2, 0, 3, 1]
    moved = zipped([items[k] for k in order])
    assert followed(items, moved) == (order, False, False)


@pytest.mark.parametrize("number", [2, 3])
def test_squares_of_lists_are_told_apart_by_content(number):
    items = made(number, *[(number, 5)] * number)
    usual = list(range(number)), False, False
    assert followed(items, zipped(items)) == usual
    assert followed(items, items) == usual
    assert followed(items, zipped(items[::-1]))[0] == usual[0][::-1]


def test_stacked_tensors_are_no_list_of_samples():
    items = made(2, (2, 5), (2, 5))
    stacked = [torch.stack(part) for part in zipped(items)]
    identity = follow(fingerprint_items(items), stacked, 0)
    assert not identity.lists and identity.items is None


def unchanged(x, y):
    return x, y


def mixed_up(x, y):
    mixed = [0.7 * a + 0.3 * b for a, b in zip(x, x[::-1], strict=True)]
    return mixed, [0.7 * a + 0.3 * b for a, b in zip(y, y[::-1], strict=True)]


def moved(x, y):
    return x[::-1], y[::-1]


def exchanged(x, y):
    return x[::-1], y


def replaced(x, y):
    return [*x[1:2], *x[1:]], [*y[1:2], *y[1:]]


def scaled(x, y):
    return [2 * one for one in x], y


@pytest.mark.parametrize("width", [5, 30])
@pytest.mark.parametrize(
    "change", [unchanged, mixed_up, moved, exchanged, replaced, scaled]
)
def test_a_list_is_followed_as_its_stack_is(change, width):
    items = made(6, (1, width, width), (3,))
    x, y = change(*zipped(items))
    assert followed(items, (x, y)) == followed(
        items, (torch.stack(list(x)), torch.stack(list(y)))
    )
