"""What was checked before a run was saved or copied does not cover later updates."""

import copy
import pickle

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.files.checksummed_state import with_checksum

CROSS_ENTROPY = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore")


def coupled(outputs, targets):
    return CROSS_ENTROPY(outputs - outputs.mean(0), targets)


class Part:
    """A part of a run: an engine that trains one epoch, perhaps audited."""

    def __init__(self, engine=None, data=None, **recorder):
        torch.manual_seed(0)
        x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        self.module = nn.Linear(6, 3)
        self.engine = engine or PrivacyEngine(recorder=Recorder(**recorder))
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=self.module,
            optimizer=torch.optim.SGD(self.module.parameters(), lr=0.1),
            data_loader=DataLoader(
                data or TensorDataset(x, torch.arange(24) % 3), batch_size=6
            ),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )

    def audit(self):
        assert self.engine.audit(CROSS_ENTROPY).passed
        return self

    def train(self, loss=CROSS_ENTROPY):
        torch.manual_seed(self.engine.recorder.num_steps)  # other noise after a resume
        for x, y in self.loader:
            self.optimizer.zero_grad()
            loss(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def save(self, path):
        self.engine.save_checkpoint(
            path=path, module=self.model, optimizer=self.optimizer
        )
        return self

    def load(self, path):
        self.engine.load_checkpoint(
            path=path, module=self.model, optimizer=self.optimizer
        )
        return self

    def link(self, name="loss"):
        links = self.engine.ledger.custody.links
        return next(link for link in links if link.name == name)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint"


def test_a_part_without_an_audit_is_unchecked(path):
    first = Part().audit().train().save(path)
    assert first.link().state == "checked"
    loaded = Part().load(path)
    assert loaded.link() == first.link()
    later = loaded.train(coupled)
    assert later.link().state == "unchecked"
    assert (
        "before the run was resumed, and not for those since" in later.link().sentence
    )
    assert [k.name for k in later.engine.ledger.custody.unchecked] == ["loss"]


def test_it_stays_so_in_a_third_part(path):
    Part().audit().train().save(path)
    Part().load(path).train(coupled).save(path)
    third = Part().load(path).audit().train()
    assert third.link().state == "unchecked"


@pytest.mark.parametrize("audits_first", [False, True])
def test_two_audited_parts_are_checked(path, audits_first):
    Part().audit().train().save(path)
    part = Part()
    if audits_first:
        part.audit().load(path)
    else:
        part.load(path).audit()
    assert part.train().link().state == "checked"


@pytest.mark.parametrize("audits_first", [False, True])
def test_a_later_audit_does_not_cover_an_earlier_part(path, audits_first):
    Part().train(coupled).save(path)
    part = Part()
    if audits_first:
        part.audit().load(path)
    else:
        part.load(path).audit()
    link = part.train().link()
    assert link.state == "unchecked"
    assert "not for those before" in link.sentence or "first 4 update" in link.sentence


def test_a_checkpoint_without_updates_leaves_nothing_unchecked(path):
    Part().save(path)
    assert Part().load(path).audit().train().link().state == "checked"
    Part().audit().save(path)
    assert Part().load(path).audit().train().link().state == "checked"


def test_a_wrong_part_is_refused_after_a_right_one(path):
    Part().audit().train().save(path)
    part = Part().load(path).audit().train(coupled)
    assert "In an update" in part.engine.recorder.refusal


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_a_copy_of_an_audited_engine_is_not_audited(copied):
    first = Part().audit().train()
    engine = copied(first.engine)
    (link,) = [x for x in engine.ledger.custody.links if x.name == "loss"]
    assert link.state == "checked"
    again = Part(engine).train(coupled)
    assert again.link().state == "unchecked"
    assert first.link().state == "checked"


def test_other_links_are_checked_again_too(path):
    first = Part().audit().train().save(path)
    assert first.link("model").state == "checked"
    part = Part(probe_model=False).load(path).train()
    assert part.link("model").state == "unchecked"


def swapped(path, other, *names):
    """Put entries of another checkpoint into one."""
    mine, theirs = (torch.load(p, weights_only=False) for p in (path, other))
    torch.save({**mine, **{name: theirs[name] for name in names}}, path)


def test_weights_of_another_run_are_refused(path, tmp_path):
    Part().audit().train().save(path)
    torch.manual_seed(9)
    Part().train(coupled).save(tmp_path / "other")
    swapped(path, tmp_path / "other", "module_state_dict")
    part = Part().load(path)
    with pytest.raises(AccountingError, match="weights in the checkpoint are not"):
        part.link()
    with pytest.raises(AccountingError, match="weights in the checkpoint are not"):
        part.train().link()


def test_weights_in_another_precision_are_those_of_the_run(path):
    Part().audit().train().save(path)
    part = Part()
    part.module.double()
    assert part.load(path).link().state == "checked"


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_file_that_was_cut_is_named(path, size):
    Part().train().save(path)
    path.write_bytes(path.read_bytes()[:size])
    before = Part()
    with pytest.raises(ValueError, match="complete file of torch.save.*from a copy"):
        before.load(path)
    before.train()
    assert before.engine.ledger.mechanism.num_steps == 4


class InOrder(Dataset):
    """Examples in an order of the data set's own, perhaps augmented."""

    def __init__(self, order, noise):
        self.held = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        self.held, self.noise, self.order = [self.held], noise, [order]
        self.rng = np.random.default_rng()

    def __len__(self):
        return 24

    def __getitem__(self, i):
        k = self.order[0][i]
        return self.held[0][k] + self.noise * self.rng.random(6, np.float32), k % 3


@pytest.mark.parametrize("is_loaded_first", [False, True])
@pytest.mark.parametrize(
    ("noise", "reason"), [(0.0, "another index before"), (0.1, "another label")]
)
def test_a_data_set_in_another_order_than_before_a_resume(
    path, noise, reason, is_loaded_first
):
    Part(data=InOrder(range(24), noise)).train().save(path)
    same = Part(data=InOrder(range(24), noise)).load(path).train()
    assert same.link("identity").state == ("unchecked" if noise else "checked")
    data, engine = InOrder(range(23, -1, -1), noise), PrivacyEngine()
    if is_loaded_first:
        engine.load_checkpoint(path=path, module=GradSampleModule(nn.Linear(6, 3)))
        other = Part(engine, data=data)
    else:
        other = Part(engine, data=data).load(path)
    other.train()
    with pytest.raises(AccountingError, match=reason):
        _ = other.engine.ledger


def test_a_checkpoint_with_damaged_contents_is_not_continued(path):
    Part().train().save(path)
    content = torch.load(path, weights_only=True)
    entry = {k: v for k, v in content["opacus_pi"].items() if k != "checksum"}
    entry["item_contents.sums"] = entry["item_contents.sums"][1:]
    torch.save(content | {"opacus_pi": with_checksum(entry)}, path)
    with pytest.raises(AccountingError, match="saved contents are incomplete"):
        _ = Part().load(path).engine.ledger
