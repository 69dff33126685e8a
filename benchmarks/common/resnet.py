"""ResNet-18 for small images, with group or batch normalisation.

He et al. 2016 (arXiv 1512.03385) with a 3 × 3 stem and no pooling after it, as is usual
for 32 × 32 images. Per-example clipping needs group normalisation.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def resnet18(
    image_shape: tuple[int, ...],
    num_classes: int = 10,
    norm: str = "group",
    width: int = 64,
) -> "ResNet18":
    """Build a ResNet-18; 11.2 million weights at width 64.

    Args:
        image_shape: ``(c, h, w)``.
        num_classes: Number of outputs.
        norm: ``"group"`` (at most 32 groups, of at least 4 channels) or ``"batch"``.
        width: Channels of the first stage.

    Raises:
        ValueError: ``norm`` is unknown.
    """
    if norm not in ("group", "batch"):
        raise ValueError(f"norm must be 'group' or 'batch'; got {norm}.")
    return ResNet18(image_shape[0], num_classes, norm, width)


class ResNet18(nn.Module):
    """Convolution, four stages of two residual blocks, and a linear layer."""

    def __init__(self, channels: int, num_classes: int, norm: str, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = _norm(norm, width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(fan_in, fan_out, 1 if stage == 0 else 2, norm),
                    BasicBlock(fan_out, fan_out, 1, norm),
                )
                for stage, (fan_in, fan_out) in enumerate(
                    zip(widths, widths[1:], strict=False)
                )
            )
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``(b, c, h, w)``."""
        x = self.stages(F.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Residual block: two 3 × 3 convolutions and a shortcut."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), _norm(norm, fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(b, c, h, w)``."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def _norm(name: str, channels: int) -> nn.Module:
    """Build a normalisation layer."""
    if name == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels)
