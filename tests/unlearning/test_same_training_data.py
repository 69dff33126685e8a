"""A run that gets other data than the training is refused, or says so."""

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from opacus_pi import Unlearner
from opacus_pi.ledger import fingerprint
from opacus_pi.recording.run import RecordedRun
from opacus_pi.unlearning import Callback, Method
from opacus_pi.unlearning.same_training_data import (
    require_same_preparation,
    same_data,
    same_preparation,
)

LABELS = torch.arange(12) % 3
STATEMENT = "the data set and its order are those of the recorded training"


class Photos(Dataset):
    """A data set that reads on demand, with names, labels and a transform."""

    def __init__(self, names, transform=None):
        self.names, self.transform, self.targets = names, transform, LABELS.tolist()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        torch.manual_seed(int(self.names[index][1:]))
        return torch.randn(4), self.targets[index]


NAMES = [f"p{i:02}" for i in range(12)]


class Own(Method):
    def __init__(self, limit):
        self.limit = limit


def unlearner(**options):
    torch.manual_seed(0)
    loss = torch.nn.CrossEntropyLoss()
    return Unlearner(torch.nn.Linear(4, 3), criterion=loss, **options)


def test_a_later_run_on_the_retain_set_is_refused():
    photos, forgetting = Photos(NAMES), unlearner()
    forgetting.unlearn(photos, [1], 1)
    with pytest.raises(ValueError, match="earlier runs.*Pass the whole training set"):
        forgetting.unlearn(Subset(photos, range(2, 12)), [3], 1)
    renamed = Photos([NAMES[1], NAMES[0], *NAMES[2:]])
    with pytest.raises(ValueError, match="differs in at least one file name or text"):
        forgetting.unlearn(renamed, [3], 1)
    forgetting.unlearn(photos, [3], 1)


def test_without_a_ledger_the_data_set_is_declared():
    guarantee = unlearner().unlearn(Photos(NAMES), [1], 1).guarantee
    (found,) = [a for a in guarantee.assumptions if a.statement == STATEMENT]
    assert found.is_declared and "no ledger to compare" in found.evidence


def test_who_established_it_depends_on_what_was_compared():
    held = fingerprint(TensorDataset(torch.zeros(12, 4), LABELS))
    named = fingerprint(Photos(NAMES))
    assert same_data([held], held).standing == "observed"
    assert same_data([named], named).standing == "declared"
    assert "names of files" in same_data([named], named).evidence
    assert same_data([held, None], held).standing == "declared"
    assert same_data([held], None).standing == "declared"


def test_a_rewind_needs_the_transforms_of_training():
    plain, augmented = (fingerprint(Photos(NAMES, t)) for t in (None, torch.nn.ReLU()))
    with pytest.raises(ValueError, match="augmentation included"):
        require_same_preparation(augmented, plain)
    require_same_preparation(plain, plain)
    require_same_preparation("an old name", plain)
    assert same_preparation(plain, plain).standing == "observed"
    assert same_preparation("an old name", plain).standing == "declared"


def test_a_run_that_resumes_with_other_transforms_says_so():
    plain, augmented = (fingerprint(Photos(NAMES, t)) for t in (None, torch.nn.ReLU()))
    saved = RecordedRun("swept", 12, 0.5, "fixed", augmented)
    saved.require_same(RecordedRun("swept", 12, 0.5, "fixed", augmented))
    assert saved.data_set == augmented
    with pytest.warns(UserWarning, match="other transforms than when the saved run"):
        saved.require_same(RecordedRun("swept", 12, 0.5, "fixed", plain))
    assert same_preparation(saved.data_set, augmented).standing == "declared"


def test_own_methods_are_recorded_without_an_address(tmp_path):
    names = [unlearner(method=Own(2.0))._settings()["method"] for _ in range(2)]
    assert names == ["Own(limit=2.0)"] * 2
    result = unlearner(method=Own(2.0)).unlearn(Photos(NAMES), [1], 1)
    assert result.guarantee.method.startswith("Own(limit=2.0) (compared")


class Interrupt(Callback):
    def __init__(self, after):
        self.after = after

    def on_start(self, unlearner, metrics):
        pass

    def on_epoch_end(self, unlearner, epoch, metrics):
        if epoch == self.after:
            raise KeyboardInterrupt

    def on_end(self, unlearner):
        pass


def test_a_run_of_an_own_method_continues_after_an_interrupt(tmp_path):
    run = {"train_set": Photos(NAMES), "forget_indices": [1], "num_epochs": 3}
    run["checkpoint"] = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        unlearner(method=Own(2.0)).unlearn(**run, callbacks=[Interrupt(2)])
    assert run["checkpoint"].exists()
    with pytest.raises(ValueError, match=r"Own\(limit=2.0\)"):
        unlearner(method=Own(3.0)).unlearn(**run)
    assert unlearner(method=Own(2.0)).unlearn(**run).record["num_steps"] == 3
