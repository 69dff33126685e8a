"""Requests go on after the data of forgotten examples were erased."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.ledger import fingerprint
from opacus_pi.ledger.erased_examples import ErasedExamples, not_erased
from opacus_pi.ledger.fingerprint import fingerprint_of_some
from opacus_pi.unlearning import FineTune, Unlearner
from opacus_pi.unlearning import requests as requests_module
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from opacus_pi.unlearning.requests import DeletionRequests
from opacus_pi.unlearning.rivals import NegGradPlus
from tests.integration.rewinding import SIZE as TRAINED_SIZE
from tests.integration.rewinding import Saved

SIZE = 12
_PLAIN = FineTune()


class Photos(Dataset):
    """Files in a folder for each person, as a scan of the folder finds them."""

    def __init__(self, root, transform=None):
        self.paths = sorted(str(path) for path in root.rglob("*.bin"))
        self.targets = [int(path[-5]) % 2 for path in self.paths]
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            values = np.frombuffer(file.read(), dtype=np.float32)
        return torch.tensor(values), self.targets[index]


class Listed(Photos):
    """The same files, as a list that was made before some of them were erased."""

    def __init__(self, paths, targets):
        self.paths, self.targets, self.transform = paths, targets, None


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(SIZE):
        path = tmp_path / "photos" / f"p{i // 4}" / f"{i:02}{i % 10}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.normal(size=4).astype(np.float32).tobytes())
    return tmp_path / "photos"


def unlearner(data_set=None, method=_PLAIN):
    torch.manual_seed(0)
    mechanism = NoisySGD(10, sample_rate=0.2, noise_std=1.0, max_grad_norm=1.0)
    norms = [np.linspace(0.1, 0.5, SIZE)]
    name = None if data_set is None else fingerprint(data_set)
    return Unlearner(
        nn.Linear(4, 2),
        criterion=nn.CrossEntropyLoss(),
        method=method,
        ledger=GradNormLedger(mechanism, [10], norms, data_set=name),
        generator=torch.Generator().manual_seed(2),
    )


def requests(tmp_path):
    return DeletionRequests(tmp_path / "deletions.db", SIZE)


def carried_out(tmp_path, data_set, *groups, worker=None):
    """Requests that were carried out on the whole data set, one after another."""
    mine = requests(tmp_path)
    for i, rows in enumerate(groups):
        mine.submit(f"r{i}", indices=rows)
    mine.process(worker or unlearner(data_set), data_set, num_epochs=1)
    return mine


def erase(folder, person):
    for path in (folder / person).iterdir():
        path.unlink()


@pytest.mark.parametrize("person", ["p0", "p1", "p2"])
def test_a_later_request_after_the_files_were_erased(tmp_path, folder, person):
    whole = Photos(folder)
    start = 4 * int(person[1])
    later = (start + 5) % SIZE
    mine = carried_out(tmp_path, whole, range(start, start + 4))
    worker = unlearner(whole)
    erase(folder, person)
    mine.submit("later", indices=[later])
    with pytest.raises(ValueError, match=r"12 examples.*DeletionRequests\.erased"):
        mine.process(unlearner(whole), Photos(folder), num_epochs=1)
    left = mine.erased(Photos(folder))
    (result,) = mine.process(worker, left, num_epochs=1)
    assert result.record["forget_indices"] == [later]
    assert worker.forgotten.tolist() == sorted([*range(start, start + 4), later])
    (same,) = (a for a in result.guarantee.assumptions if "its order" in a.statement)
    assert same.statement.endswith(
        "except for 4 examples that were forgotten before and may have been erased"
    )
    assert "the content of the files of all examples" in same.evidence
    assert "by means of the deletion log" in same.evidence
    verify(mine.log.path)


def test_positions_stay_and_erased_ones_cannot_be_read(tmp_path, folder):
    whole = Photos(folder)
    expected = [whole[i] for i in range(SIZE)]
    mine = carried_out(tmp_path, whole, range(4, 8))
    erase(folder, "p1")
    left = mine.erased(Photos(folder))
    assert len(left) == SIZE and left.erased.tolist() == [4, 5, 6, 7]
    for i in (0, 3, 8, 11, -1):
        assert torch.equal(left[i][0], expected[i][0]) and left[i][1] == expected[i][1]
    with pytest.raises(ValueError, match="position must not be .* erased.*got 5"):
        left[5]
    with pytest.raises(IndexError):
        left[SIZE]
    assert not_erased(left, [3, 5, 9]).tolist() == [3, 9]
    assert not_erased(whole, [3, 5, 9]).tolist() == [3, 5, 9]
    assert mine.erased(left) is left


def test_missing_files_that_are_still_listed(tmp_path, folder):
    found = Photos(folder)
    whole = Listed(found.paths, found.targets)
    mine, worker = carried_out(tmp_path, whole, range(4)), unlearner(whole)
    erase(folder, "p0")
    mine.submit("later", indices=[9])
    for paths in (whole.paths, [None] * 4 + whole.paths[4:]):
        targets = [None] * 4 + whole.targets[4:]
        left = mine.erased(Listed(paths, targets))
        assert torch.equal(left[9][0], whole[9][0])
    (result,) = mine.process(worker, left, num_epochs=1)
    assert result.record["forgotten_before"] == [0, 1, 2, 3]


def tensors():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(SIZE, 4), torch.arange(SIZE) % 2)


def blank(rows):
    left = tensors()
    left.tensors[0][rows], left.tensors[1][rows] = 0, 0
    return left


def kept(*gone):
    return [i for i in range(SIZE) if i not in gone]


def shorter(*gone):
    return TensorDataset(*(t[kept(*gone)] for t in tensors().tensors))


@pytest.mark.parametrize(
    "left",
    [blank([2, 5]), shorter(2, 5), Subset(tensors(), kept(2, 5)), blank([2])],
)
def test_blank_or_shorter(tmp_path, left):
    mine = carried_out(tmp_path, tensors(), [5, 2])
    found = mine.erased(left)
    assert all(torch.equal(found[i][0], tensors()[i][0]) for i in kept(2, 5))
    assert found.name.startswith(fingerprint(tensors()))
    mine.submit("later", indices=[0])
    mine.process(unlearner(tensors()), found, num_epochs=1)
    assert mine.pending == []


def test_the_run_is_the_same_as_with_the_whole_set(tmp_path):
    weights = []
    for name, erased in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        mine = carried_out(tmp_path / name, tensors(), [5, 2])
        mine.submit("later", indices=[0])
        left = mine.erased(shorter(2, 5)) if erased else tensors()
        worker = unlearner(tensors())
        mine.process(worker, left, num_epochs=2)
        weights.append(worker.model.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def changed(data_set, row):
    found = copy.deepcopy(data_set)
    found.tensors[0][row] += 1
    return found


@pytest.mark.parametrize(
    "left",
    [
        changed(blank([2, 5]), 7),
        changed(shorter(2, 5), 6),
        blank([2, 5, 6]),
        shorter(2, 5, 6),
        shorter(2, 6),
        shorter(5),
        Subset(tensors(), kept(2, 5)[::-1]),
        shorter(*range(1, SIZE)),
    ],
)
def test_anything_else_is_refused(tmp_path, left):
    mine = carried_out(tmp_path, tensors(), [5, 2])
    before = mine.log.head
    with pytest.raises(ValueError, match="without exactly the examples that were"):
        mine.erased(left)
    assert mine.log.head == before


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ([0] * (SIZE + 2), "These are 2 too many: leave out what was added since"),
        (kept(2, 5, 7), "1 of those that must remain are missing"),
        (kept(2), "no file was added, 1 of the 2 forgotten examples are still"),
    ],
)
def test_the_number_of_examples_says_what_is_wrong(tmp_path, left, words):
    mine = carried_out(tmp_path, tensors(), [5, 2])
    with pytest.raises(ValueError, match=words):
        mine.erased(Subset(tensors(), left))


def test_a_changed_photo_is_refused(tmp_path, folder):
    mine = carried_out(tmp_path, Photos(folder), range(4))
    erase(folder, "p0")
    path = next((folder / "p2").iterdir())
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(
        ValueError, match="8 that remain after 4 were forgotten differ in .*file"
    ):
        mine.erased(Photos(folder))


def test_data_that_cannot_be_read_are_refused(tmp_path):
    class Remote(Dataset):
        def __init__(self, rows):
            self.rows = {f"{row}": None for row in rows}

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return torch.full((4,), float([*self.rows][index])), 0

    whole = Remote(range(SIZE))
    mine = carried_out(tmp_path, whole, [5, 2])
    with pytest.raises(ValueError, match="cannot be compared without loading"):
        mine.erased(Remote(kept(2, 5)))
    mine.submit("later", indices=[0])
    mine.process(unlearner(whole), whole, num_epochs=1)


def test_each_state_of_the_log_may_be_at_hand(tmp_path):
    mine = carried_out(tmp_path, tensors(), [5], [2], [7])
    for gone in ([5], [2, 5], [2, 5, 7]):
        assert mine.erased(shorter(*gone)).erased.tolist() == gone
    with pytest.raises(
        ValueError, match="11 that remain after 1 were forgotten differ"
    ):
        mine.erased(shorter(2))
    with pytest.raises(
        ValueError, match="7 examples.* has 12, of which 11, 10 or 9 remain"
    ):
        mine.erased(shorter(2, 3, 4, 5, 7))


def test_erasing_after_each_request(tmp_path):
    mine = carried_out(tmp_path, tensors(), [5])
    mine.submit("b", indices=[2])
    mine.process(unlearner(tensors()), mine.erased(shorter(5)), num_epochs=1)
    mine.submit("c", indices=[7])
    left = requests(tmp_path).erased(shorter(2, 5))
    (result,) = mine.process(unlearner(tensors()), left, num_epochs=1)
    assert result.record["forgotten_before"] == [2, 5]
    assert requests(tmp_path).erased(shorter(2, 5, 7)).erased.tolist() == [2, 5, 7]
    # what is there still may be given, too
    assert fingerprint(left).startswith(fingerprint(tensors()))
    mine.submit("d", indices=[8])
    mine.process(unlearner(tensors()), tensors(), num_epochs=1)


def test_redacted_requests(tmp_path):
    mine = carried_out(tmp_path, tensors(), [5], [2])
    mine.redact("r0")
    mine.redact("r1")
    assert requests(tmp_path).erased(shorter(2, 5)).erased.tolist() == [2, 5]
    with pytest.raises(ValueError, match="without exactly the examples that were"):
        mine.erased(shorter(2, 6))
    mine.submit("later", indices=[7])
    mine.process(unlearner(tensors()), mine.erased(blank([2, 5])), num_epochs=1)
    assert mine.erased(shorter(2, 5, 7)).erased.tolist() == [2, 5, 7]


@pytest.mark.parametrize(
    ("redacted", "known"),
    [
        ("0", [[5], [2, 5], [2, 5, 7]]),
        ("1", [[5], [2, 5], [2, 5, 7]]),
        ("2", [[5], [2, 5], [2, 5, 7]]),
        ("01", [[2, 5], [2, 5, 7]]),  # 2 and 5 cannot be told apart
        ("12", [[5], [2, 5, 7]]),
        ("02", [[2, 5, 7]]),
    ],
)
def test_data_erased_before_a_redaction(tmp_path, redacted, known):
    mine = carried_out(tmp_path, tensors(), [5], [2], [7])
    for number in redacted:
        mine.redact(f"r{number}")
    for gone in ([5], [2, 5], [2, 5, 7]):
        if gone in known:
            assert mine.erased(shorter(*gone)).erased.tolist() == gone
            continue
        with pytest.raises(ValueError, match=r"requests were redacted.* of all of"):
            mine.erased(shorter(*gone))
    mine.submit("later", indices=[8])
    mine.process(unlearner(tensors()), mine.erased(shorter(*known[0])), num_epochs=1)
    assert mine.erased(shorter(*known[0])).erased.tolist() == known[0]


def test_a_redacted_request_that_shared_an_example(tmp_path):
    mine = carried_out(tmp_path, tensors(), [2, 5], [5, 7])
    mine.redact("r0")
    with pytest.raises(ValueError, match="10 examples, .*, of which 9 remain"):
        mine.erased(shorter(2, 5))
    assert mine.erased(shorter(2, 5, 7)).erased.tolist() == [2, 5, 7]


def test_a_log_of_an_earlier_release_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(requests_module, "what_remains", lambda *_: {})
        mine = carried_out(tmp_path, tensors(), [5])
    with pytest.raises(ValueError, match="does not say which examples remain"):
        mine.erased(shorter(5))
    mine.submit("later", indices=[2])
    mine.process(unlearner(tensors()), tensors(), num_epochs=1)
    assert mine.erased(shorter(2, 5)).erased.tolist() == [2, 5]


def test_earlier_releases_stored_what_remains_with_the_run(tmp_path, monkeypatch):
    append = DeletionLog.append

    def as_before(log, kind, payload, **options):
        if kind == "remaining":
            return kept.append(payload)
        if kind == "done":
            payload = {**payload, "remaining": kept.pop()}
        return append(log, kind, payload, **options)

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(DeletionLog, "append", as_before)
        mine = carried_out(tmp_path, tensors(), [5])
    assert [e.kind for e in mine.log.entries()] == ["request", "done"]
    assert mine.erased(shorter(5)).erased.tolist() == [5]
    mine.submit("later", indices=[2])
    mine.process(unlearner(tensors()), mine.erased(shorter(5)), num_epochs=1)
    assert mine.erased(shorter(2, 5)).erased.tolist() == [2, 5]
    verify(mine.log.path)


def test_before_any_request_nothing_may_be_missing(tmp_path):
    mine = requests(tmp_path)
    mine.submit("a", indices=[5])
    with pytest.raises(ValueError, match="no request was carried out"):
        mine.erased(shorter(5))


def test_a_killed_process_still_says_what_remains(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    mine = requests(tmp_path)
    mine.submit("a", indices=[5])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(requests_module, "sha256_of", dies)
        mine.process(unlearner(tensors()), tensors(), num_epochs=1)
    (result,) = mine.process(unlearner(tensors()), tensors(), num_epochs=1)
    assert result.record["forget_indices"] == [5] and not mine.pending
    assert mine.erased(shorter(5)).erased.tolist() == [5]


def test_a_method_that_uses_the_forget_set_reads_what_is_left(tmp_path):
    mine = carried_out(tmp_path, tensors(), [5, 2])
    left = mine.erased(shorter(2, 5))
    mine.submit("later", indices=[2, 7])
    method = NegGradPlus()
    mine.process(unlearner(tensors(), method), left, num_epochs=1)
    worker = unlearner(tensors(), method)
    with pytest.raises(ValueError, match="have an example that can be read"):
        worker.unlearn(left, [2, 5], 1)


def test_rewinds(tmp_path):
    saved = Saved(tmp_path / "states")
    path = tmp_path / "deletions.db"
    mine = DeletionRequests(path, TRAINED_SIZE)
    mine.submit("a", indices=[3, 11])
    options = {"checkpoints": saved.states}
    mine.process(saved.unlearner(), saved.data, **options)
    rest = [i for i in range(TRAINED_SIZE) if i not in (3, 11)]
    left = mine.erased(TensorDataset(*(t[rest] for t in saved.data.tensors)))
    mine.submit("b", indices=[0])
    worker = saved.unlearner()
    (result,) = mine.process(worker, left, **options)
    assert (
        worker.forgotten.tolist() == [0, 3, 11] and result.guarantee.epsilon(1e-9) == 0
    )
    statements = [a.statement for a in result.guarantee.assumptions]
    assert any("2 examples that were forgotten before" in one for one in statements)


def test_a_rewind_still_compares_transforms(tmp_path, folder):
    mine = carried_out(tmp_path, Photos(folder, transform=nn.ReLU()), range(4))
    whole = fingerprint(Photos(folder, transform=nn.ReLU()))
    erase(folder, "p0")
    same = mine.erased(Photos(folder, transform=nn.ReLU())).name
    other = mine.erased(Photos(folder, transform=nn.Tanh())).name
    parts = [
        [p for p in name.split(":") if p[0] == "t"] for name in (whole, same, other)
    ]
    assert parts[0] == parts[1] != parts[2]


class Ordered(Dataset):
    """Examples in an order of their own."""

    def __init__(self, rows, order):
        self.rows, self.order = rows, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        return self.rows[self.order[index]], 0


def test_an_order_inside_the_data_set_is_no_evidence():
    """Its rows are not those of the positions, so others may have been compared."""
    rows = torch.randn(SIZE, 4)
    plain, places = Ordered(rows, np.arange(SIZE)), np.array(kept(2, 5))
    whole = fingerprint_of_some(plain, places)
    left = Ordered(rows[places.tolist()], np.arange(SIZE - 2))
    assert fingerprint_of_some(left, np.arange(SIZE - 2)) == whole and ":e" in whole
    shuffled = fingerprint_of_some(Ordered(rows, np.arange(SIZE)[::-1].copy()), places)
    assert ":e" not in shuffled and ":s" in shuffled


def test_an_object_made_by_hand_has_the_name_that_it_was_given():
    made = ErasedExamples(tensors(), np.arange(SIZE), "Photos:12:" + "0" * 16)
    assert fingerprint(made, inputs=False) == "Photos:12:" + "0" * 16
