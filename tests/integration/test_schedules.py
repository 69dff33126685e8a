import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from opacus_pi.integration import PrivacyEngine, schedules
from tests.private_training import NUM_EXAMPLES, Training, data

DATA = TensorDataset(torch.zeros(12, 2))
KNOWN = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "last left out": {"shuffle": True, "drop_last": True},
    "a part of it": {"sampler": RandomSampler(DATA, num_samples=6)},
    "given indices": {"sampler": SubsetRandomSampler([1, 5, 7])},
    "one rank": {"sampler": DistributedSampler(DATA, num_replicas=2, rank=0)},
    "no batches": {"batch_size": None},
    "a batch sampler of torch": {
        "batch_sampler": BatchSampler(SequentialSampler(DATA), 5, False)
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_schedules_that_draw_each_example_once_an_epoch(name):
    assert schedules.unknown_schedule(DataLoader(DATA, **KNOWN[name])) is None


def seedable(module="accelerate.data_loader", **options):
    """A sampler like the one that Accelerate gives to a Trainer."""
    kind = type("SeedableRandomSampler", (RandomSampler,), {"__module__": module})
    return DataLoader(DATA, batch_size=5, sampler=kind(DATA, **options))


def test_the_sampler_of_accelerate_is_known():
    assert schedules.unknown_schedule(seedable()) is None
    again = schedules.unknown_schedule(seedable(num_samples=24))
    assert "SeedableRandomSampler draws 24 samples" in again
    for other in (seedable(replacement=True), seedable("my_project.samplers")):
        reason = schedules.unknown_schedule(other)
        assert "How often SeedableRandomSampler draws" in reason


def Custom():
    class Custom(SequentialSampler):
        pass

    return Custom(DATA)


UNKNOWN = {
    "RandomSampler": {"sampler": RandomSampler(DATA, replacement=True)},
    "WeightedRandomSampler": {"sampler": WeightedRandomSampler(torch.ones(12), 12)},
    "Custom": {"sampler": Custom()},
    "list": {"batch_sampler": [[0, 1], [1, 2]]},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_schedules_that_are_not_known(name):
    reason = schedules.unknown_schedule(DataLoader(DATA, **UNKNOWN[name]))
    assert f"How often {name} draws" in reason and "poisson_sampling=True" in reason


LOST = {**UNKNOWN, "SubsetRandomSampler": KNOWN["given indices"]}
del LOST["RandomSampler"], LOST["Custom"]  # a class of torch's, and one derived from it


class Own(Sampler):
    def __iter__(self):
        return iter([3, 1] * 6)

    def __len__(self):
        return 12


@pytest.mark.parametrize("name", [*LOST, "Own"])
def test_poisson_sampling_says_that_it_replaces_a_sampler(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    options = {"sampler": Own()} if name == "Own" else LOST[name]
    with pytest.warns(UserWarning, match=f"replaces {name}, as Opacus does: all 12"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(DATA, **options),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


@pytest.mark.parametrize(
    "options",
    [
        *({**KNOWN, "given indices": {}}.values()),
        {"sampler": SubsetRandomSampler(range(12))},
        {"batch_sampler": UniformWithReplacementSampler(num_samples=12, sample_rate=1)},
    ],
)
def test_samplers_that_draw_all_alike_lose_nothing(options):
    assert schedules.replaced_sampler(DataLoader(DATA, **options)) is None


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12, None])
@pytest.mark.parametrize("num_samples", [12, 24, 30])
def test_several_rounds_without_replacement(num_samples, batch_size):
    sampler = RandomSampler(DATA, num_samples=num_samples)
    loader = DataLoader(DATA, sampler=sampler, batch_size=batch_size)
    assert schedules.unknown_schedule(loader) is None


@pytest.mark.parametrize("batch_size", [5, 8, 24])
def test_a_batch_of_two_rounds_may_have_an_example_twice(batch_size):
    sampler = RandomSampler(DATA, num_samples=24)
    loader = DataLoader(DATA, sampler=sampler, batch_size=batch_size)
    reason = schedules.unknown_schedule(loader)
    assert f"A batch of {batch_size} samples may be drawn from two" in reason


@pytest.mark.parametrize("num_samples", [48, 36])
def test_participations_of_several_rounds_are_counted(num_samples):
    sampler = RandomSampler(data(), num_samples=num_samples)
    loader = DataLoader(sampler.data_source, batch_size=6, sampler=sampler)
    ledger = Training(loader=loader, poisson_sampling=False).train(1).engine.ledger
    counts = ledger.participations.sum(axis=0)
    assert counts.sum() == num_samples and counts.min() == num_samples // NUM_EXAMPLES
    assert ledger.mechanism.max_participations == counts.max() == 2


def test_a_poisson_loader_that_is_kept_is_poisson():
    training = Training()
    assert schedules.is_poisson(training.loader)
    kept = Training(loader=training.loader, poisson_sampling=False).train(1)
    assert kept.loader is training.loader
    mechanism = kept.engine.ledger.mechanism
    assert mechanism.sampling == "poisson" and mechanism.sample_rate == 0.25


def test_a_poisson_loader_that_is_longer_than_its_rate_says():
    sampler = UniformWithReplacementSampler(num_samples=12, sample_rate=0.5, steps=20)
    reason = schedules.unknown_schedule(DataLoader(DATA, batch_sampler=sampler))
    assert "rate 0.5" in reason and "1/20" in reason


def test_opacus_collate_fn_is_unwrapped():
    def collate(items):
        return items

    loader = DPDataLoader(DATA, sample_rate=0.5, collate_fn=collate)
    twice = DPDataLoader.from_data_loader(loader)
    assert schedules.user_collate_fn(twice) is collate
    assert schedules.user_collate_fn(DataLoader(DATA, collate_fn=collate)) is collate
