"""What the paper and its authors published, to stand beside our numbers."""

from typing import NamedTuple

PAPER = "Chen et al., ICML 2020"
CODE = "github.com/openai/image-gpt"
BLOG = "openai.com/research/image-gpt"


class Published(NamedTuple):
    """One published number; accuracies in percent."""

    measure: str
    dataset: str
    system: str
    value: str
    source: str


NATS = "Test loss, nats per colour"
PROBE = "Linear probe, test accuracy"

PUBLISHED = (
    Published(NATS, "ImageNet 32x32", "iGPT-S (76M)", "2.0895", CODE),
    Published(NATS, "ImageNet 32x32", "iGPT-M (455M)", "2.0614", CODE),
    Published(NATS, "ImageNet 32x32", "iGPT-L (1.4B)", "2.0466", CODE),
    Published(PROBE, "CIFAR-10", "iGPT-L, from ImageNet", "96.3 %", PAPER),
    Published(PROBE, "CIFAR-10", "SimCLR", "95.3 %", PAPER),
    Published(PROBE, "CIFAR-10", "ResNet-152, supervised on ImageNet", "94.0 %", PAPER),
    Published(PROBE, "CIFAR-100", "iGPT-L, from ImageNet", "82.8 %", PAPER),
    Published(PROBE, "CIFAR-100", "SimCLR", "80.2 %", PAPER),
    Published(PROBE, "STL-10", "iGPT-L, from ImageNet", "95.5 %", BLOG),
    Published(PROBE, "STL-10", "AMDIM-L", "94.2 %", PAPER),
    Published(PROBE, "ImageNet 32x32", "iGPT-S / M / L", "41.9 / 54.5 / 60.3 %", PAPER),
    Published(PROBE, "ImageNet 48x48", "iGPT-L", "65.2 %", PAPER),
    Published(PROBE, "ImageNet 64x64", "iGPT-XL (6.8B)", "68.7 %", PAPER),
    Published(PROBE, "ImageNet", "SimCLR", "76.5 %", PAPER),
)
