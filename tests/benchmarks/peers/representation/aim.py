"""AIM as lightly's example builds it, for small images: python -m ... IMAGES FOLDER CPU_SECONDS

A ViT of 8 blocks of width 96 over patches of 2x2 pixels, as many blocks and as wide as the model of ours, and a head of
one block. The example's learning rate, 1.5e-4, is for 224x224; here it is the paper's 1e-3 with its weight decay.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.peers.representation.budget import Views, pretrain, write_features
from tests.benchmarks.peers.torchvision_operators import declare_operators

declare_operators()
from lightly.models import utils  # noqa: E402
from lightly.models.modules import AIMPredictionHead, MaskedCausalVisionTransformer  # noqa: E402
from lightly.transforms import AIMTransform  # noqa: E402
from lightly.transforms.utils import IMAGENET_NORMALIZE  # noqa: E402

SIZE, PATCH, WIDTH, DEPTH, HEADS = 16, 2, 96, 8, 2


class AIM(nn.Module):
    """Predicts the pixels of each patch, normalized, from those before it; a prefix is seen in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = MaskedCausalVisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, qk_norm=False,
            class_token=False, no_embed_class=True, global_pool="avg",
        )  # fmt: skip
        utils.initialize_2d_sine_cosine_positional_embedding(self.backbone.pos_embed, has_class_token=False)
        self.projection_head = AIMPredictionHead(WIDTH, 3 * PATCH**2, hidden_dim=4 * WIDTH, num_blocks=1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and targets, (B, patches, 3 * PATCH**2), of images (B, 3, SIZE, SIZE)."""
        patches = self.backbone.patch_embed.num_patches
        mask = utils.random_prefix_mask(
            size=(len(images), patches), max_prefix_length=patches - 1, device=images.device
        )
        features = self.backbone._pos_embed(self.backbone.forward_features(images, mask=mask))
        targets = utils.normalize_mean_var(utils.patchify(images, PATCH), dim=-1)
        return self.projection_head(features), targets

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The mean over the patches after each block, (B, WIDTH); attention in both directions, as AIM is probed."""
        states, pooled = self.backbone._pos_embed(self.backbone.patch_embed(images)), []
        for block in self.backbone.blocks:
            states = block(states, mask=None)
            pooled.append(states.mean(1))
        return pooled


def main() -> None:
    """Pretrains and writes features."""
    images, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    torch.manual_seed(0)
    model, criterion = AIM(), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    views = Views(images, AIMTransform(input_size=SIZE))
    pretrain(model, optimizer, views, lambda batch: criterion(*model(batch[0])), seconds, folder)
    write_features(model, model.features, images, folder, IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"])


if __name__ == "__main__":
    main()
