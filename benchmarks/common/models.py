"""The models of all benchmarks, by name."""

from functools import partial
from math import prod

from torch import nn

from benchmarks.common.own import MODEL, is_own, own
from benchmarks.common.resnet import resnet18
from benchmarks.common.transformer import vit


def build_model(
    name: str, image_shape: tuple[int, ...], num_classes: int = 10
) -> nn.Module:
    """Build a model by name.

    Args:
        name: A key of ``MODELS``, or ``MODULE:FUNCTION``, an own function with the two
            arguments below.
        image_shape: ``(c, h, w)``.
        num_classes: Number of outputs.

    Returns:
        The model with random weights, drawn from torch's global generator.

    Raises:
        ValueError: The name is unknown, or the function cannot be imported.
    """
    if is_own(name):
        return own("--model", name, MODEL)(image_shape, num_classes)
    if name not in MODELS:
        raise ValueError(
            f"name must be one of {', '.join(MODELS)} or MODULE:FUNCTION; got {name}."
        )
    return MODELS[name](image_shape, num_classes)


def mlp(
    image_shape: tuple[int, ...], num_classes: int = 10, widths: tuple[int, ...] = ()
) -> nn.Sequential:
    """Build a multi-layer perceptron with ReLU; default: two hidden layers of 128."""
    sizes = (prod(image_shape), *(widths or (128, 128)))
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def small_cnn(image_shape: tuple[int, ...], num_classes: int = 10) -> nn.Sequential:
    """Build two convolutions and two linear layers; 26,000 weights on 28×28 images."""
    channels, height, width = image_shape
    features = nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
    )
    side = _pooled(height), _pooled(width)
    return nn.Sequential(
        *features,
        nn.Linear(32 * prod(side), 32),
        nn.ReLU(),
        nn.Linear(32, num_classes),
    )


def strided_cnn(image_shape: tuple[int, ...], num_classes: int = 10) -> nn.Sequential:
    """Build two strided convolutions and two linear layers.

    It has 115,000 weights on 28×28 images, is twice as fast as ``small_cnn``, and fits
    10,000 images in 40 epochs.
    """
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * _halved(height) * _halved(width), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def _halved(size: int) -> int:
    """Return the side of the last feature map of ``strided_cnn``."""
    return ((size + 1) // 2 + 1) // 2


def _pooled(size: int) -> int:
    """Return the side of the last feature map of ``small_cnn``."""
    first = (size + 2 * 3 - 8) // 2 + 1 - 1
    return (first - 4) // 2 + 1 - 1


MODELS = {
    "mlp": mlp,
    "small-cnn": small_cnn,
    "strided-cnn": strided_cnn,
    "resnet18": resnet18,
    "resnet18-w16": partial(resnet18, width=16),
    "resnet18-batch-norm": partial(resnet18, norm="batch"),
    "resnet18-batch-norm-w16": partial(resnet18, norm="batch", width=16),
    "vit": vit,
}
