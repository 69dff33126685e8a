"""The one place where the benchmarks load data: real images as tensors in [0, 1].

``digits`` (1,797 handwritten digits, 8×8) is embedded in scikit-learn; the others come
through torchvision, which downloads them unless their files are in ``data_root``, or
from an npz of arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
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


def load(
    name: str,
    data_root: Path | None = None,
    num_train: int = 0,
    arrays: Path | None = None,
    num_test: int = 0,
) -> ImageData:
    """Load a data set.

    Args:
        name: One of ``NAMES``.
        data_root: Where torchvision finds or puts the files; not needed for digits.
        num_train: Keep only the first so many training images (0: all).
        arrays: An npz of images ``(n, h, w)`` or ``(n, h, w, c)`` in bytes (uint8) and
            of labels, read in place of the files in ``data_root``.
        num_test: Keep only the first so many test images (0: all).

    Returns:
        The images and labels as tensors.

    Raises:
        ValueError: For another name, or where neither files nor arrays are named.
    """
    if name not in NAMES:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)}, got {name}.")
    if name == "digits":
        train, test = _digits()
    elif arrays is not None:
        train, test = _npz(arrays)
    elif data_root is not None:
        train, test = _torchvision(name, data_root)
    else:
        raise ValueError(
            f"data_root must be given for {name}. Pass --data-root DIR or "
            "--data FILE.npz."
        )
    return ImageData(name, _tensors(*train, num_train), _tensors(*test, num_test))


Arrays = tuple[np.ndarray, np.ndarray]


def _digits() -> tuple[Arrays, Arrays]:
    """scikit-learn's digits in [0, 1], split once and for all."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.reshape(-1, 1, 8, 8) / 16.0,
        labels,
        test_size=360,
        stratify=labels,
        random_state=0,
    )
    x_train, x_test, y_train, y_test = parts
    return (x_train, y_train), (x_test, y_test)


def _npz(path: Path) -> tuple[Arrays, Arrays]:
    """Arrays from an npz.

    Raises:
        ValueError: If one of them is missing.
    """
    with np.load(path, allow_pickle=False) as found:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(found.files)
        if missing:
            raise ValueError(
                f"data must contain {', '.join(sorted(missing))}, got "
                f"{', '.join(found.files)} in {path}. Save it with numpy.savez."
            )
        return tuple((found[f"x_{split}"], found[f"y_{split}"]) for split in _SPLITS)


def _torchvision(name: str, root: Path) -> tuple[Arrays, Arrays]:
    """A torchvision data set, training and test part."""
    from torchvision import datasets

    root = Path(root)
    if name == "svhn":
        pair = [datasets.SVHN(root, split, download=True) for split in _SPLITS]
        return tuple((s.data.transpose(0, 2, 3, 1), s.labels) for s in pair)
    cls = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    pair = [cls(root, train=split == "train", download=True) for split in _SPLITS]
    return tuple((np.asarray(s.data), np.asarray(s.targets)) for s in pair)


_SPLITS = ("train", "test")


def _tensors(images: np.ndarray, labels: np.ndarray, count: int) -> TensorDataset:
    """The first ``count`` examples (0: all) as float32 and int64 tensors."""
    images, labels = images[: count or None], labels[: count or None]
    if images.dtype == np.uint8:
        images = _channels_first(images) / np.float32(255)
    return TensorDataset(
        torch.as_tensor(np.ascontiguousarray(images), dtype=torch.float32),
        torch.as_tensor(labels, dtype=torch.int64),
    )


def _channels_first(images: np.ndarray) -> np.ndarray:
    """Images ``(n, h, w)`` or ``(n, h, w, c)`` as ``(n, c, h, w)``."""
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
