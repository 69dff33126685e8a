"""How a model is unlearned and judged, the same for every method and figure."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.common.data import ImageData
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.methods import METHODS, Autocast, Settings, optimizer_of
from benchmarks.reproduce.workspace import Workspace
from opacus_pi import GradNormLedger, Unlearner
from opacus_pi.evaluation import evaluate
from opacus_pi.evaluation.trace import UnlearningTrace

CRITERION = nn.CrossEntropyLoss()
Judge = Callable[[nn.Module], dict[str, float]]


def judge(workspace: Workspace, experiment: Experiment, forget_set: ForgetSet) -> Judge:
    """The metrics of a model, on the forget set, retained and test examples."""
    images = workspace.images(experiment)
    forget = forget_set.indices(workspace, experiment)
    kept = probe(images, forget, experiment.num_probe)
    parts = {
        "forget": Subset(images.train, forget.tolist()),
        "retain": Subset(images.train, kept.tolist()),
        "test": images.test,
    }
    return lambda model: evaluate(model, CRITERION, **parts)


def unlearn(
    workspace: Workspace,
    experiment: Experiment,
    forget_set: ForgetSet,
    method: str,
    settings: Settings,
    seed: int,
    judged: bool = True,
) -> tuple[nn.Module, UnlearningTrace]:
    """One run from the trained model of a seed, judged after every epoch or never."""
    model, ledger = workspace.trained(experiment, seed)
    unlearner = unlearner_of(experiment, model, ledger, method, settings, seed)
    result = unlearner.unlearn(
        workspace.images(experiment).train,
        forget_set.indices(workspace, experiment),
        num_epochs=experiment.unlearn_epochs,
        evaluate=judge(workspace, experiment, forget_set) if judged else None,
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
    """A method with its settings, ready to run on a model."""
    recipe, device = experiment.recipe, next(model.parameters()).device
    return Unlearner(
        recipe.place(model, device),
        criterion=CRITERION,
        method=Autocast(METHODS[method].build(settings, experiment), recipe),
        optimizer=optimizer_of(settings, experiment),
        ledger=ledger,
        generator=torch.Generator(device).manual_seed(seed),
    )


def probe(images: ImageData, forget: np.ndarray, size: int) -> np.ndarray:
    """Some retained examples, drawn alike for every model."""
    order = np.random.default_rng(0).permutation(len(images.train))
    return np.sort(order[~np.isin(order, forget)][:size])
