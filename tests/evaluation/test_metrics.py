"""Accuracies of lists of true and false; other arguments are refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pi.evaluation import accuracy, evaluate, predict, unlearning_accuracy


def test_accuracies_are_means():
    for correct in ([True, False, True, True], np.array([1, 0, 1, 1])):
        assert accuracy(correct) == 0.75 and unlearning_accuracy(correct) == 0.25
    assert accuracy(torch.tensor([True, False])) == 0.5


def test_predictions_and_labels_are_not_correctness():
    data = TensorDataset(torch.randn(6, 2), torch.arange(6) % 3)
    model = torch.nn.Linear(2, 3)
    predictions = predict(model, data, torch.nn.CrossEntropyLoss())
    for metric in (accuracy, unlearning_accuracy):
        with pytest.raises(ValueError, match="got Predictions. Pass predictions.corr"):
            metric(predictions)
        for wrong in ([0, 2, 1], [0.3, 0.5], predictions.losses, ["a", "b"], model):
            with pytest.raises(ValueError, match="must be true or false for each exam"):
                metric(wrong)


@pytest.mark.parametrize("diverged", [True, False])
def test_a_model_that_diverged_is_right_about_nothing(diverged):
    model = torch.nn.Linear(2, 3)
    if diverged:
        torch.nn.init.constant_(model.weight, torch.nan)
    data = TensorDataset(torch.randn(6, 2), torch.arange(6) % 3)  # two of label 0
    parts = {"forget": data, "retain": data, "test": data}
    found = evaluate(model, torch.nn.CrossEntropyLoss(), **parts)
    accuracies = {name for name in found if not np.isnan(found[name])}
    known = {"unlearning_accuracy", "retain_accuracy", "test_accuracy"}
    assert accuracies == (known if diverged else set(found))
    if diverged:
        assert [found[name] for name in sorted(known)] == [0.0, 0.0, 1.0]
