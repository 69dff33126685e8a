"""Five sizes of the whole study: smoke, cpu, cpu-cifar10, gpu and full.

The paper does not give batch size and momentum; 128 and 0.9 are used here. Images are
not augmented at any scale, so that an epoch has one norm per example. The paper's
forget sets of 5,000 and 10,000 of 50,000 images leave no room for eight without common
examples, which a test needs; the largest ones here have 2,500.
"""

from dataclasses import dataclass, replace

from benchmarks import group_bound
from benchmarks.common.facts import later
from benchmarks.common.training import PrivateRecipe, Recipe
from benchmarks.reproduce.experiment import Experiment


@dataclass(frozen=True)
class Scale:
    """The experiments and forget sets of every figure at one size.

    Attributes:
        sgd: The main experiment, without noise.
        sgld: The same with noise on the mean gradient, one for each level.
        private: The same by DP-SGD, one for each clip norm.
        others: Other data sets and models.
        hardest_sizes: Sizes of the sets with the highest scores, for several scores.
        set_sizes: Sizes of the forget sets in the figure that varies them.
        rates: Learning rates of fine-tuning in the figure that varies them.
        poison_std: Standard deviation of the noise on the inputs for the Gaussian
            unlearning score; 0: without this score.
        groups: Studies of the group bound, one for each seed.
        grouped: The training with noise of these studies; None: a small one on digits.
        methods: Names of the methods in the figure of all methods; empty: every one.
        own_methods: ``MODULE:NAME`` of further methods in that figure.
        attacked: Examples in the forget set of the figure of attacks; 0: without it.
        shadows: Models on each side of these attacks.
    """

    sgd: Experiment
    sgld: tuple[Experiment, ...]
    private: tuple[Experiment, ...]
    others: tuple[Experiment, ...]
    hardest_sizes: tuple[int, ...]
    set_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    poison_std: float
    groups: tuple[group_bound.Settings, ...]
    grouped: Experiment | None = later(None)
    methods: tuple[str, ...] = ()
    own_methods: tuple[str, ...] = later(())
    attacked: int = later(0)
    shadows: int = later(0)


def _cpu(dataset: str, model: str = "strided-cnn") -> Experiment:
    recipe = Recipe(model, 40, 128, 0.05, momentum=0.9)
    return Experiment(dataset, 10_000, 2_000, recipe, unlearn_epochs=10)


SMOKE = Experiment(
    "digits",
    400,
    200,
    Recipe("mlp", 12, 32, 0.1, momentum=0.9),
    num_seeds=2,
    num_oracles=2,
    set_size=20,
    num_sets=8,
    unlearn_epochs=3,
    num_checkpoints=6,
    num_trials=2,
    num_probe=100,
)
FULL = Experiment(
    "cifar10",
    0,
    0,
    Recipe(
        "resnet18-batch-norm",
        150,
        128,
        0.01,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(80, 120),
        precision="bfloat16",
        channels_last=True,
    ),
    num_seeds=10,
    num_oracles=10,
    set_size=1_000,
    num_trials=30,
    num_probe=10_000,
)
# The main study on two cores, in pieces: see PLAN.md
CIFAR10 = Experiment(
    "cifar10",
    20_000,
    5_000,
    Recipe(
        "resnet18-batch-norm-w16",
        12,
        128,
        0.1,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(7, 10),
        precision="bfloat16",
        channels_last=True,
    ),
    unlearn_epochs=8,
    num_checkpoints=8,
    num_probe=1_000,
)
# Sized for figure 1 in less than an hour on one large GPU (estimated, not measured)
GPU = replace(
    FULL,
    num_train=20_000,
    num_test=10_000,
    recipe=replace(FULL.recipe, num_epochs=20, milestones=(11, 16)),
    num_seeds=5,
    num_oracles=3,
    set_size=400,
    unlearn_epochs=8,
    num_checkpoints=10,
    num_trials=25,
    num_probe=2_000,
)


def _private(experiment: Experiment, num_epochs: int) -> tuple[Experiment, ...]:
    """Return two DP-SGD experiments: strong noise and clipping, and weak ones."""
    model, batch_size = experiment.recipe.model, experiment.recipe.batch_size
    recipes = (
        PrivateRecipe(model, num_epochs, batch_size, 0.5),
        PrivateRecipe(
            model,
            num_epochs,
            batch_size,
            0.05,
            noise_multiplier=0.1,
            max_grad_norm=40.0,
        ),
    )
    return tuple(replace(experiment, recipe=recipe) for recipe in recipes)


SCALES = {
    "smoke": Scale(
        sgd=SMOKE,
        sgld=(SMOKE.with_noise(0.1),),
        private=_private(SMOKE, 6),
        others=(),
        hardest_sizes=(10,),
        set_sizes=(10, 20),
        rates=(0.2,),
        poison_std=0.32**0.5,
        groups=tuple(
            group_bound.Settings(
                seed, estimates=2, checkpoints=3, stratum_size=20, num_sets=8
            )
            for seed in range(2)
        ),
        methods=("fine-tune", "Langevin", "L1-sparse"),
        attacked=60,
        shadows=6,
    ),
    "cpu": Scale(
        sgd=_cpu("fashion-mnist"),
        sgld=tuple(_cpu("fashion-mnist").with_noise(z) for z in (0.005, 0.01)),
        private=_private(_cpu("fashion-mnist"), 20),
        others=(_cpu("svhn"), _cpu("cifar10"), _cpu("fashion-mnist", model="mlp")),
        hardest_sizes=(200,),
        set_sizes=(50, 200),
        # lower ones unlearn too little in these runs, higher ones move retained images
        rates=(0.06, 0.07, 0.08),
        poison_std=0.32**0.5,
        groups=tuple(group_bound.Settings(seed, num_sets=20) for seed in range(5)),
        attacked=400,
        shadows=32,
    ),
    "cpu-cifar10": Scale(
        sgd=CIFAR10,
        sgld=(CIFAR10.with_noise(0.001),),
        private=(),
        others=(),
        hardest_sizes=(200,),
        set_sizes=(50, 200),
        rates=(),
        poison_std=0.0,
        groups=tuple(group_bound.Settings(seed, num_sets=20) for seed in range(5)),
        methods=("fine-tune", "Langevin", "L1-sparse"),
    ),
    "gpu": Scale(
        sgd=GPU,
        sgld=(GPU.with_noise(0.01),),
        private=_private(
            replace(GPU, recipe=replace(GPU.recipe, model="resnet18")), 20
        ),
        others=(),
        hardest_sizes=(400,),
        set_sizes=(40, 400),
        rates=(0.003, 0.01, 0.03, 0.1),
        poison_std=0.32**0.5,
        groups=tuple(group_bound.Settings(seed, num_sets=20) for seed in range(5)),
    ),
    "full": Scale(
        sgd=FULL,
        sgld=tuple(FULL.with_noise(z) for z in (0.001, 0.01, 0.1)),
        private=_private(
            replace(FULL, recipe=replace(FULL.recipe, model="resnet18")), 150
        ),
        others=(
            replace(FULL, dataset="svhn"),
            replace(FULL, recipe=replace(FULL.recipe, model="vit")),
        ),
        hardest_sizes=(600, 1_000, 2_000),
        set_sizes=(100, 1_000, 2_500),
        rates=(0.003, 0.01, 0.03, 0.1),
        poison_std=0.062**0.5,
        groups=tuple(
            group_bound.Settings(seed, checkpoints=35, stratum_size=1_000, num_sets=20)
            for seed in range(5)
        ),
        grouped=FULL.with_noise(0.1),
    ),
}


def adapted(
    scale: Scale,
    *,
    dataset: str | None = None,
    model: str | None = None,
    methods: tuple[str, ...] = (),
    seeds: int | None = None,
    oracles: int | None = None,
    epochs: int | None = None,
    without_gus: bool = False,
) -> Scale:
    """Return a scale with another main data set, model, or number of runs.

    Figures of other data sets and models keep theirs.

    Args:
        scale: The scale.
        dataset: Name of the main data set; None: as it is. So are the others.
        model: Name of the main model.
        methods: ``MODULE:NAME`` of methods to add to the figure of all methods.
        seeds: Trainings of each experiment.
        oracles: Retrained models of each forget set.
        epochs: Epochs of training; the learning rate falls at the same fractions.
        without_gus: Leave out the Gaussian unlearning score.
    """

    def of(experiment: Experiment, main: bool = True) -> Experiment:
        recipe = experiment.recipe
        if main and model:
            recipe = replace(recipe, model=model)
        if epochs:
            falls = [round(m * epochs / recipe.num_epochs) for m in recipe.milestones]
            recipe = replace(recipe, num_epochs=epochs, milestones=tuple(falls))
        return replace(
            experiment,
            recipe=recipe,
            dataset=(main and dataset) or experiment.dataset,
            num_seeds=seeds or experiment.num_seeds,
            num_oracles=oracles or experiment.num_oracles,
        )

    return replace(
        scale,
        sgd=of(scale.sgd),
        sgld=tuple(map(of, scale.sgld)),
        private=tuple(map(of, scale.private)),
        own_methods=methods,
        others=tuple(of(one, main=False) for one in scale.others),
        poison_std=0.0 if without_gus else scale.poison_std,
    )
