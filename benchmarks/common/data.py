"""Image data sets as tensors in [0, 1]; all benchmarks load their images here.

``digits`` (1,797 handwritten digits, 8×8) is included in scikit-learn. torchvision
loads the others, and downloads them if their files are not in ``data_root``. They can
also be read from an .npz file with the arrays ``x_train``, ``y_train``, ``x_test`` and
``y_test``. ``MODULE:NAME`` names a training and a test set of the user's code, whose
items are pairs of an image and its label.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, TensorDataset

from benchmarks.common.own import DATA_SETS, is_own, own

NAMES = ("digits", "fashion-mnist", "cifar10", "svhn")


@dataclass(frozen=True)
class ImageData:
    """A data set with its published split (digits: 1,437 + 360, stratified, fixed).

    Attributes:
        name: Its name.
        train: Images ``(n, c, h, w)`` float32 and labels ``(n,)`` int64.
        test: Like ``train``.
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
        name: One of ``NAMES``, or ``MODULE:NAME``, a tuple of two data sets or a
            function that returns one; any name if ``arrays`` is given.
        data_root: Folder of torchvision's files; not needed for digits.
        num_train: Number of training images; the first ones are kept (0: all).
        arrays: An .npz file with images ``(n, h, w)`` or ``(n, h, w, c)`` in uint8 or
            ``(n, c, h, w)`` in floats, and labels from 0 on. It is read instead of any
            other file. Items of own data sets have the same shapes, without ``n``.
        num_test: Number of test images; the first ones are kept (0: all).

    Raises:
        ValueError: The name is unknown, neither ``data_root`` nor ``arrays`` is
            given, or the arrays are not images of one shape and a label for each. A
            value that is not finite, and a class without a training image, are refused.
    """
    if arrays is not None:
        train, test = _npz(arrays)
    elif is_own(name):
        train, test = map(
            _arrays_of, own("--dataset", name, DATA_SETS), (num_train, num_test)
        )
    elif name not in NAMES:
        raise ValueError(
            f"name must be one of {', '.join(NAMES)}, or arrays must be given; got "
            f"{name} without arrays."
        )
    elif name == "digits":
        train, test = _digits()
    elif data_root is not None:
        train, test = _torchvision(name, data_root)
    else:
        raise ValueError(
            f"{name} needs data_root or arrays, but neither was given. Pass "
            "--data-root DIR, the folder of torchvision's data sets, or --data "
            f"{name} FILE.npz if the command has this option."
        )
    _require_images("training", *train)
    _require_images("test", *test)
    _require_same_kind(train, test)
    classes = 1 + int(train[1].max())
    parts = _tensors(*train, num_train), _tensors(*test, num_test)
    return ImageData(name, *parts, classes)


def digest(images: ImageData) -> str:
    """Return a digest of all images and labels, the same on every machine."""
    found = hashlib.sha256()
    for part in (images.train, images.test):
        for tensor in part.tensors:
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:24]


Arrays = tuple[np.ndarray, np.ndarray]


def _digits() -> tuple[Arrays, Arrays]:
    """Return scikit-learn's digits in [0, 1], with a fixed split."""
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


def require_arrays(path: Path) -> None:
    """Raise unless a file has the four arrays of a data set.

    Raises:
        OSError, zipfile.BadZipFile: It cannot be read.
        ValueError: It is no .npz file, or an array is missing.
    """
    with np.load(path, allow_pickle=False) as found:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(found.files)
        if missing:
            raise ValueError(
                f"{path} must contain x_train, y_train, x_test and y_test; missing: "
                f"{', '.join(sorted(missing))}. Write it again with numpy.savez."
            )


def _npz(path: Path) -> tuple[Arrays, Arrays]:
    """Return training and test part from an .npz file.

    Raises:
        ValueError: An array is missing.
    """
    require_arrays(path)
    with np.load(path, allow_pickle=False) as found:
        return tuple((found[f"x_{split}"], found[f"y_{split}"]) for split in _SPLITS)


def _arrays_of(data_set: Dataset, count: int) -> Arrays:
    """Return images and labels of the first ``count`` items (0: all).

    Raises:
        ValueError: The items have no common shape.
    """
    number = min(count or len(data_set), len(data_set))
    images, labels = zip(*(data_set[i] for i in range(number)), strict=True)
    return np.stack([np.asarray(one) for one in images]), np.asarray(labels)


def _torchvision(name: str, root: Path) -> tuple[Arrays, Arrays]:
    """Return training and test part of a torchvision data set."""
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
    """Return the first ``count`` examples (0: all) as float32 and int64 tensors."""
    images, labels = images[: count or None], labels[: count or None]
    if images.dtype == np.uint8:
        images = _channels_first(images) / np.float32(255)
    return TensorDataset(
        torch.as_tensor(np.ascontiguousarray(images), dtype=torch.float32),
        torch.as_tensor(labels.astype(np.int64)),
    )


def _require_images(part: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise unless two arrays are finite images and a label for each.

    Args:
        part: ``"training"`` or ``"test"``, for the message.
        images: The images.
        labels: The labels.

    Raises:
        ValueError: The shape or the type of an array is another one, a value is not
            finite in float32, or a label is negative.
    """
    dims = (3, 4) if images.dtype == np.uint8 else (4,)
    number = images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)
    if images.ndim not in dims or not number or not images.size:
        raise ValueError(
            f"The {part} images must be uint8 of shape (n, h, w) or (n, h, w, c), or "
            f"floats of shape (n, c, h, w), and not empty; got {images.dtype} of shape "
            f"{images.shape}. Convert the array."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"The {part} labels must be one integer for each of the {len(images)} "
            f"{part} images; got {labels.dtype} of shape {labels.shape}. Convert the "
            "array."
        )
    if odd := _not_finite(images):
        raise ValueError(
            f"The {part} images must be finite numbers of float32; got NaN, infinity "
            f"or a larger number in {odd} of {len(images)} images. Replace these "
            "values, or leave these images out."
        )
    if labels.min() < 0:
        raise ValueError(
            f"The {part} labels must be 0 or above; got {labels.min()}. Number the "
            "classes from 0."
        )


def _not_finite(images: np.ndarray) -> int:
    """Return how many images have a value that is not finite in float32."""
    if images.dtype == np.uint8:
        return 0
    # NaN fails the comparison, too.
    within = np.abs(images) <= np.finfo(np.float32).max
    return int((~within.reshape(len(images), -1).all(axis=1)).sum())


def _require_same_kind(train: Arrays, test: Arrays) -> None:
    """Raise unless both parts have the same kind of images and the same classes.

    Raises:
        ValueError: The images differ in shape or type, or a class has no training
            image.
    """
    kinds = [f"{x.dtype.name} of shape {x.shape[1:]}" for x, _ in (train, test)]
    scaled = [x.dtype == np.uint8 for x, _ in (train, test)]
    if train[0].shape[1:] != test[0].shape[1:] or scaled[0] != scaled[1]:
        raise ValueError(
            "Training and test images must have the same shape, and both or neither "
            f"must be uint8; got {kinds[0]} and {kinds[1]}. Convert one of the arrays."
        )
    known = np.unique(train[1])
    gaps = np.flatnonzero(known != np.arange(len(known)))
    absent = [int(gaps[0])] if len(gaps) else np.setdiff1d(test[1], known).tolist()
    if absent:
        raise ValueError(
            "The classes must be numbered from 0 without gaps, and each must have a "
            f"training image; got no training image of class {absent[0]}, but labels "
            f"up to {max(int(train[1].max()), int(test[1].max()))}. Number the classes "
            "again, or leave out the test images of classes that are not trained."
        )


def _channels_first(images: np.ndarray) -> np.ndarray:
    """Return images ``(n, h, w)`` or ``(n, h, w, c)`` as ``(n, c, h, w)``."""
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
