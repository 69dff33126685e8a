"""One clear error for each kind of bad input; nothing is changed by a refused call."""

import numpy as np
import pytest
import torch

from opacus_pi.unlearning.heads import RidgeHead, extract_features, unit_rows

ROWS = unit_rows(np.random.default_rng(0).normal(size=(12, 3)))
LABELS = np.arange(12) % 3
SETTINGS = {"num_classes": 3, "num_steps": 5, "seed": 0}


def fitted(**settings):
    return RidgeHead(**SETTINGS | settings).fit(ROWS, LABELS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.where(np.arange(12)[:, None] == 4, np.nan, ROWS), "must be finite.*row"),
        (ROWS * 1e3, "rows of norm at most 1.*unit_rows"),
        (ROWS[0], "must be a matrix"),
        (ROWS + 0j, "real numbers"),
    ],
)
def test_features(rows, message):
    with pytest.raises(ValueError, match=message):
        RidgeHead(**SETTINGS).fit(rows, LABELS)


def test_one_planted_row_is_refused_and_scaling_looks_at_each_row_alone():
    planted = ROWS.copy()
    planted[5] *= 1e3
    with pytest.raises(ValueError, match="in row 5"):
        RidgeHead(**SETTINGS).fit(planted, LABELS)
    for options in ({}, {"bound": 0.5}, {"intercept": True}):
        scaled = unit_rows(planted, **options)
        assert np.linalg.norm(scaled, axis=1).max() <= 1 + 1e-15
        others = unit_rows(np.delete(planted, 5, axis=0), **options)
        np.testing.assert_array_equal(np.delete(scaled, 5, axis=0), others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularisation": 0.0}, "regularisation must be above 0"),
        ({"regularisation": -1.0}, "regularisation must be above 0"),
        ({"noise_std": 0.0}, "noise_std must be above 0"),
        ({"num_steps": 0}, "num_steps must be above 0"),
        ({"num_steps": 2.5}, "num_steps must be a whole number"),
        ({"learning_rate": 1.5}, "learning_rate must be in"),
        ({"initial_std": -1.0}, "initial_std must be finite"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"denominator": 11}, "denominator must be at least the number of rows"),
        ({"denominator": 0}, "denominator must be at least the number of rows"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(**settings)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([12], r"indices must be in \[0, 12\)"),
        ([-1], r"indices must be in \[0, 12\)"),
        ([3, 3], "indices must not have duplicates"),
        ([], "must contain an example"),
        (np.delete(np.arange(12), 1), "must leave at least one example"),
        (ROWS[:, 0] > 0, "flat list of whole numbers"),
        ([1], "must not have been forgotten before"),
    ],
)
def test_indices(indices, message):
    head = fitted()
    head.forget([1], num_steps=1)
    weights, left = head.coef_.copy(), head.remaining
    for call in (head.forget, head.cost):
        with pytest.raises(ValueError, match=message):
            call(indices)
    assert (head.coef_ == weights).all() and head.remaining is left


@pytest.mark.parametrize("name", ["forget", "cost", "epsilons", "predict", "ranking"])
def test_before_fit(name):
    arguments = {"forget": ([0],), "cost": ([0],), "predict": (ROWS,)}.get(name, ())
    with pytest.raises(ValueError, match="must be fitted before"):
        getattr(RidgeHead(**SETTINGS), name)(*arguments)


def test_targets():
    for labels, message in (
        (LABELS + 1, "whole numbers from 0 to 2"),
        (LABELS + 0.5, "whole numbers from 0 to 2"),
        (LABELS[:5], "one entry for each"),
    ):
        with pytest.raises(ValueError, match=message):
            RidgeHead(**SETTINGS).fit(ROWS, labels)
    with pytest.raises(ValueError, match="targets must be finite"):
        RidgeHead(num_steps=5).fit(ROWS, np.full(12, np.inf))


def test_questions():
    head = fitted()
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        head.forget([0], epsilon=0.0)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        head.steps_to(0.0)
    with pytest.raises(ValueError, match="delta must be in"):
        head.forget([0], delta=0.0)
    with pytest.raises(ValueError, match="method must be"):
        head.epsilons(method="exact")
    with pytest.raises(ValueError, match="num_steps must be in"):
        head.epsilons(num_steps=[0, -1])
    with pytest.raises(ValueError, match="must have 3 columns"):
        head.predict(ROWS[:, :2])


def test_extraction_runs_in_evaluation_mode_and_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
    images = torch.arange(12.0).reshape(3, 1, 2, 2)
    data = torch.utils.data.TensorDataset(images, torch.tensor([2, 0, 1]))
    state = torch.get_rng_state()
    rows, labels = extract_features(model, data, batch_size=2)
    assert rows.tolist() == images.flatten(1).tolist() and rows.dtype == np.float64
    assert labels.tolist() == [2, 0, 1]
    assert model.training and torch.equal(state, torch.get_rng_state())
    again, _ = extract_features(model, torch.utils.data.DataLoader(data, 3))
    assert (again == rows).all()


def test_extraction_refuses_what_has_no_rows():
    empty = torch.utils.data.TensorDataset(torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(ValueError, match="at least one example"):
        extract_features(torch.nn.Identity(), empty)
    one = torch.utils.data.TensorDataset(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="one row for each of the 2 labels"):
        extract_features(torch.nn.Flatten(0), one)


def test_regression():
    rng = np.random.default_rng(0)
    rows = unit_rows(rng.normal(size=(50, 2)))
    values = rows @ [1.0, -1.0]
    head = RidgeHead(regularisation=1e-3, noise_std=1e-4, seed=0).fit(rows, values)
    assert head.predict(rows).shape == values.shape
    assert head.score(rows, values) > 0.99


def test_the_weights_of_a_guarantee_cannot_be_written_to():
    head = fitted()
    with pytest.raises(ValueError, match="read-only"):
        head.coef_[:] = 5.0
