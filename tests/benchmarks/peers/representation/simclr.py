"""SimCLR of lightly with a small ResNet for small images: python -m ... IMAGES FOLDER CPU_SECONDS

A ResNet of one basic block a stage, widths 32 to 256, whose first convolution has 3x3 pixels and no stride, as is usual
on CIFAR-10; optimizer and learning rate are those of lightly's CIFAR-10 benchmark.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.peers.representation.budget import BATCH, Views, pretrain, write_features
from tests.benchmarks.peers.torchvision_operators import declare_operators

declare_operators()
from lightly.loss import NTXentLoss  # noqa: E402
from lightly.models.modules import SimCLRProjectionHead  # noqa: E402
from lightly.transforms.simclr_transform import SimCLRTransform  # noqa: E402
from lightly.transforms.utils import IMAGENET_NORMALIZE  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402

SIZE, WIDTHS = 16, (32, 64, 128, 256)


class SimCLR(nn.Module):
    """A ResNet and its projection head."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)]
        for number, width in enumerate(WIDTHS):
            layers.append(stage(WIDTHS[max(0, number - 1)], width, stride=2 if number else 1))
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection_head = SimCLRProjectionHead(WIDTHS[-1], WIDTHS[-1], 128)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections (B, 128) of images (B, 3, SIZE, SIZE)."""
        return self.projection_head(self.backbone(images))


def stage(inputs: int, outputs: int, stride: int) -> BasicBlock:
    """A basic block of torchvision's ResNet."""
    shortcut = None
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


def main() -> None:
    """Pretrains and writes features."""
    images, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    torch.manual_seed(0)
    model, criterion = SimCLR(), NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=6e-2 * BATCH / 128, momentum=0.9, weight_decay=5e-4)
    views = Views(images, SimCLRTransform(input_size=SIZE, gaussian_blur=0.0))
    pretrain(model, optimizer, views, lambda batch: criterion(model(batch[0]), model(batch[1])), seconds, folder)
    mean, deviation = IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"]
    write_features(model, lambda batch: [model.backbone(batch)], images, folder, mean, deviation)


if __name__ == "__main__":
    main()
