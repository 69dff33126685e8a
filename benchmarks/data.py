"""The one place where the benchmarks load data: real images as tensors in [0, 1].

``digits`` (1,797 handwritten digits, 8×8) is embedded in scikit-learn; the others
come through torchvision, which downloads them unless their files are in ``data_root``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset

NAMES = ("digits", "fashion-mnist", "cifar10", "svhn")


@dataclass(frozen=True)
class ImageData:
    """A data set split as published (digits: 1,437 + 360, stratified, fixed).

    Attributes:
        name: One of ``NAMES``.
        train: Images ``(n, c, h, w)`` float32 and labels ``(n,)`` int64.
        test: The same.
        num_classes: Number of labels.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    num_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(c, h, w)``."""
        return tuple(self.train.tensors[0].shape[1:])


def load(name: str, data_root: Path | None = None, num_train: int = 0) -> ImageData:
    """Load a data set.

    Args:
        name: One of ``NAMES``.
        data_root: Where torchvision finds or puts the files; not needed for digits.
        num_train: Keep only the first so many training images (0: all).

    Returns:
        The images and labels as tensors.

    Raises:
        ValueError: For another name, or a missing ``data_root``.
    """
    if name not in NAMES:
        raise ValueError(f"Expected dataset={name} to be one of {', '.join(NAMES)}.")
    if name != "digits" and data_root is None:
        raise ValueError(f"Expected data_root for {name}. Pass --data-root DIR.")
    train, test = _digits() if name == "digits" else _torchvision(name, data_root)
    if num_train:
        train = tuple(array[:num_train] for array in train)
    return ImageData(name, TensorDataset(*train), TensorDataset(*test))


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits, split once and for all."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.reshape(-1, 1, 8, 8) / 16.0,
        labels,
        test_size=360,
        stratify=labels,
        random_state=0,
    )
    x_train, x_test, y_train, y_test = parts
    return (_images(x_train), _labels(y_train)), (_images(x_test), _labels(y_test))


def _torchvision(
    name: str, root: Path
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A torchvision data set as two pairs of tensors."""
    from torchvision import datasets

    root = Path(root)
    if name == "svhn":
        pair = [datasets.SVHN(root, split, download=True) for split in _SPLITS]
        return tuple((_images(s.data / 255.0), _labels(s.labels)) for s in pair)
    cls = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    pair = [cls(root, train=split == "train", download=True) for split in _SPLITS]
    return tuple((_images(_channels_first(s.data)), _labels(s.targets)) for s in pair)


_SPLITS = ("train", "test")


def _channels_first(data: np.ndarray | Tensor) -> np.ndarray:
    """Raw bytes ``(n, h, w)`` or ``(n, h, w, c)`` as ``(n, c, h, w)`` in [0, 1]."""
    array = np.asarray(data) / 255.0
    return array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)


def _images(array: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float32)


def _labels(array: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.int64)
