"""One unlearning run and its evaluation, the same for every method and figure.

All methods start from the same trained models, use the same criterion, batch size and
probes, and are compared with the same oracles. Only method and settings differ.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.common.data import ImageData
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.methods import Autocast, Settings, candidate, optimizer_of
from benchmarks.reproduce.workspace import Workspace
from opacus_pi import GradNormLedger, Unlearner
from opacus_pi.evaluation.metrics import attack_on, predict, summarise
from opacus_pi.evaluation.trace import UnlearningTrace

CRITERION = nn.CrossEntropyLoss()
RETAINED_MIA = "retained_called_test"  # share of the retained images
Evaluator = Callable[[nn.Module], dict[str, float]]


def evaluator(
    workspace: Workspace, experiment: Experiment, forget_set: ForgetSet
) -> Evaluator:
    """Return a function that evaluates a model on forget, retain and test data.

    Beside the metrics of ``evaluate`` it returns ``RETAINED_MIA``, which shows how far
    the threshold of the attack moves on images that are not forgotten.
    """
    images = workspace.images(experiment)
    forget = forget_set.indices(workspace, experiment)
    kept = retained_sample(images, forget, experiment.num_probe)
    parts = (
        Subset(images.train, forget.tolist()),
        Subset(images.train, kept.tolist()),
        images.test,
    )

    def measure(model: nn.Module) -> dict[str, float]:
        found = [predict(model, part, CRITERION) for part in parts]
        _, retained, of_test = found
        attack = attack_on(retained, of_test, retained)
        return summarise(*found) | {RETAINED_MIA: attack.forget_called_test}

    return measure


def unlearn(
    workspace: Workspace,
    experiment: Experiment,
    forget_set: ForgetSet,
    method: str,
    settings: Settings,
    seed: int,
    evaluated: bool = True,
) -> tuple[nn.Module, UnlearningTrace]:
    """Unlearn a forget set from the trained model of a seed.

    Args:
        workspace: Where the trained model is stored.
        experiment: The training and the sizes of the study.
        forget_set: What is forgotten.
        method: A name of ``METHODS``, or ``MODULE:NAME``, an own one.
        settings: Its settings, as found by the search.
        seed: Of the trained model, and of the random numbers of the run.
        evaluated: Evaluate the model after every epoch.

    Returns:
        The unlearned model and the trace of its metrics.
    """
    model, ledger = workspace.trained(experiment, seed)
    unlearner = unlearner_of(experiment, model, ledger, method, settings, seed)
    result = unlearner.unlearn(
        workspace.images(experiment).train,
        forget_set.indices(workspace, experiment),
        num_epochs=experiment.unlearn_epochs,
        evaluate=evaluator(workspace, experiment, forget_set) if evaluated else None,
        batch_size=experiment.recipe.batch_size,
    )
    return result.model, result.trace


def unlearner_of(
    experiment: Experiment,
    model: nn.Module,
    ledger: GradNormLedger,
    method: str,
    settings: Settings,
    seed: int,
) -> Unlearner:
    """Return the unlearner that runs a method with these settings on a model."""
    recipe, device = experiment.recipe, next(model.parameters()).device
    return Unlearner(
        recipe.place(model, device),
        criterion=CRITERION,
        method=Autocast(candidate(method).build(settings, experiment), recipe),
        optimizer=optimizer_of(settings, experiment),
        ledger=ledger,
        generator=torch.Generator(device).manual_seed(seed),
    )


def retained_sample(images: ImageData, forget: np.ndarray, size: int) -> np.ndarray:
    """Return the sorted indices of retained examples, the same for every model."""
    order = np.random.default_rng(0).permutation(len(images.train))
    return np.sort(order[~np.isin(order, forget)][:size])
