"""A small convolutional network for thumbnails, and the augmentations it is trained under."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.errors import ConfigError

LAYOUT = (3, 2)  # rows and columns of the coarse grid


@dataclass(frozen=True)
class ConvNetConfig:
    """Thumbnails of `height` x `width` pixels -> `dim`; trained for `steps` batches at `temperature`."""

    dim: int = 64
    height: int = 48
    width: int = 32
    steps: int = 100
    batch_size: int = 192
    learning_rate: float = 2e-3
    temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ConvNetConfig.{name} must be at least 1, not {getattr(self, name)}")
        if min(self.height, self.width) < 16 or self.batch_size < 2:
            raise ConfigError("ConvNetConfig: height and width must be at least 16 pixels, batch_size at least 2")
        if self.learning_rate <= 0 or self.temperature <= 0:
            raise ConfigError("ConvNetConfig: learning_rate and temperature must be positive")


class ConvNet(nn.Module):
    """Patches of 4 x 4 pixels, a strided convolution, a pooling that keeps the coarse layout, and a linear map.

    Group norms, not batch norms: a picture's vector must not depend on its company.
    """

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 4, stride=4)
        self.patch_norm = nn.GroupNorm(8, 48)
        self.shapes = nn.Conv2d(48, 96, 3, stride=2, padding=1)
        self.shape_norm = nn.GroupNorm(8, 96)
        self.out = nn.Linear(96 * LAYOUT[0] * LAYOUT[1], config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [n, 3, height, width] in [-1, 1] -> [n, dim]."""
        patches = F.gelu(self.patch_norm(self.patches(pixels)))
        shapes = F.gelu(self.shape_norm(self.shapes(patches)))
        return self.out(F.adaptive_avg_pool2d(shapes, LAYOUT).flatten(1))  # type: ignore[no-any-return]


def augment(pixels: Tensor) -> Tensor:
    """Each picture [n, 3, h, w] cropped to at least 0.7 of each side, half of them flipped, lighting shifted.

    Hue stays: a palette says something about a cover, and it is what a shopper sees first.
    """
    count = len(pixels)
    scale = torch.empty(count, 2).uniform_(0.7, 1.0)
    shift = (torch.rand(count, 2) * 2 - 1) * (1 - scale)
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    boxes = torch.zeros(count, 2, 3)
    boxes[:, 0, 0], boxes[:, 1, 1], boxes[:, :, 2] = scale[:, 0] * flip, scale[:, 1], shift
    grid = F.affine_grid(boxes, list(pixels.shape), align_corners=False)
    cropped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.8, 1.2)
    brightness = torch.empty(count, 1, 1, 1).uniform_(-0.15, 0.15)
    return (cropped * contrast + brightness).clamp(-1, 1)


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Each view must find its other view [n, d] among the batch: symmetric cross-entropy over cosines."""
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / temperature
    own = torch.arange(len(first))
    return (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2
