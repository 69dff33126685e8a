"""Features for linear heads: rows of norm 1, scaled without the other rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.data import load
from benchmarks.common.models import build_model
from opacus_pi.unlearning.heads import extract_features, unit_rows

Array = NDArray[np.float64]
NUM_CLASSES = 10


@dataclass(frozen=True)
class HeadData:
    """Rows with an intercept, and labels.

    Attributes:
        name: For tables.
        train: Rows ``(n, d)`` and labels ``(n,)`` of the head.
        test: Like ``train``.
    """

    name: str
    train: tuple[Array, NDArray[np.int64]]
    test: tuple[Array, NDArray[np.int64]]


def digits() -> HeadData:
    """Return the pixels of scikit-learn's digits, shifted by a constant."""
    data = load("digits")
    parts = [part.tensors for part in (data.train, data.test)]
    rows = [
        unit_rows(x.flatten(1).double().numpy() - 0.5, intercept=True) for x, _ in parts
    ]
    labels = [y.numpy() for _, y in parts]
    return HeadData("digits", (rows[0], labels[0]), (rows[1], labels[1]))


@dataclass(frozen=True)
class Extractor:
    """A small network whose last hidden layer gives the features.

    Attributes:
        title: Name of the data set, for tables.
        num_public: Images that train the network: those that follow the rows of the
            head. They also give the mean that is subtracted from all features.
        num_epochs: Passes over them.
    """

    title: str
    num_public: int
    num_epochs: int


EXTRACTORS = {
    "fashion-mnist": Extractor("Fashion-MNIST", num_public=12_000, num_epochs=4),
    "cifar10": Extractor("CIFAR-10", num_public=40_000, num_epochs=8),
}


def network_features(
    name: str, data_root: Path, num_train: int, seed: int = 0
) -> HeadData:
    """Return features of a small network that was trained on other images.

    Args:
        name: One of ``EXTRACTORS``.
        data_root: Folder of torchvision's data sets.
        num_train: Rows of the head: the first images.
        seed: Of the network.
    """
    extractor = EXTRACTORS[name]
    data = load(name, data_root, num_train=num_train + extractor.num_public)
    x, y = data.train.tensors
    public = TensorDataset(x[num_train:], y[num_train:])
    model = _trained(public, data.image_shape, seed, extractor.num_epochs)
    body = nn.Sequential(*list(model)[:-1])
    centre = extract_features(body, public)[0].mean(axis=0)
    parts = []
    for part in (TensorDataset(x[:num_train], y[:num_train]), data.test):
        features, labels = extract_features(body, part)
        parts.append((unit_rows(features - centre, intercept=True), labels))
    return HeadData(extractor.title, parts[0], parts[1])


def _trained(
    data_set: TensorDataset, shape: tuple[int, ...], seed: int, num_epochs: int
) -> nn.Sequential:
    """Return a small network that was trained on a data set."""
    torch.manual_seed(seed)
    model = build_model("strided-cnn", shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(num_epochs):
        for images, labels in DataLoader(data_set, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model
