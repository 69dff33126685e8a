"""The scales: what the paper states is what ``full`` runs; ``cpu`` has seeds enough."""

from dataclasses import replace

import pytest

from benchmarks.reproduce.scales import SCALES


def test_full_has_the_papers_images_model_and_schedule():
    full = SCALES["full"]
    recipe = full.sgd.recipe
    assert full.sgd.dataset == "cifar10"
    assert (full.sgd.num_train, full.sgd.num_test) == (0, 0)  # all images
    assert recipe.model == "resnet18-batch-norm"
    assert (recipe.num_epochs, recipe.milestones) == (150, (80, 120))
    assert (recipe.learning_rate, recipe.weight_decay) == (0.01, 5e-4)
    assert recipe.precision == "bfloat16" and recipe.channels_last


def test_full_has_the_papers_numbers_of_runs_and_sizes():
    full = SCALES["full"]
    assert full.sgd.num_seeds == full.sgd.num_oracles == 10
    assert full.sgd.num_checkpoints == 35 and full.sgd.unlearn_epochs == 25
    assert full.sgd.set_size == 1_000 and full.sgd.num_sets == 20
    assert full.hardest_sizes == (600, 1_000, 2_000)
    # the paper's 5,000 and 10,000 leave no room for sets without common examples
    assert full.set_sizes == (100, 1_000, 2_500)
    assert max(full.set_sizes) * full.sgd.num_sets <= 50_000
    assert full.poison_std**2 == pytest.approx(0.062)
    assert full.grouped.recipe == replace(full.sgd.recipe, noise_std=0.1)
    assert all(one.noise_std == 0.1 and one.order == 8 for one in full.groups)
    others = [(one.dataset, one.recipe.model) for one in full.others]
    assert others == [("svhn", "resnet18-batch-norm"), ("cifar10", "vit")]
    assert all(one.recipe.noise_std > 0 for one in full.sgld) and len(full.sgld) > 1


def test_cpu_has_five_seeds_everywhere():
    cpu = SCALES["cpu"]
    for one in (cpu.sgd, *cpu.sgld, *cpu.private, *cpu.others):
        assert one.num_seeds >= 5 and one.num_oracles >= 3
    assert len(cpu.groups) >= 5
    assert {one.dataset for one in (cpu.sgd, *cpu.others)} >= {
        "cifar10",
        "fashion-mnist",
    }
