"""A small 3D U-Net for volumes, as a transformers model for semantic segmentation.

This file is self-contained: `save_pretrained` copies it beside a checkpoint, so that the checkpoint also loads where
hf_adafocal is not installed (with `trust_remote_code=True`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput


class UNet3DConfig(PretrainedConfig):
    """Configuration of `UNet3DForSemanticSegmentation`.

    Args:
        num_channels: Channels of the input volume.
        widths: Channels of each level, from full resolution down; each level halves the side.
        semantic_loss_ignore_index: Label of voxels that do not count.
        **kwargs: `num_labels`, `id2label` and everything else of `PretrainedConfig`.
    """

    model_type = "unet3d"

    def __init__(
        self,
        num_channels: int = 1,
        widths: Sequence[int] = (8, 16, 32),
        semantic_loss_ignore_index: int = 255,
        **kwargs,
    ) -> None:
        self.num_channels = num_channels
        self.widths = list(widths)
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


class UNet3DForSemanticSegmentation(PreTrainedModel):
    """3D U-Net: two convolutions per level, halved and doubled sides, skip connections, a 1x1x1 classifier.

    Volumes of any size are taken: a level is resized to the one above it.

    Source: Çiçek et al. 2016, arXiv 1606.06650, with instance normalisation and trilinear upsampling.
    """

    config_class = UNet3DConfig
    main_input_name = "pixel_values"

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        widths = config.widths
        self.down = nn.ModuleList(
            _block(before, width) for before, width in zip([config.num_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _block(below + width, width) for width, below in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.classifier = nn.Conv3d(widths[0], config.num_labels, 1)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Compute class logits of every voxel.

        Args:
            pixel_values: Volumes, shape `(N, num_channels, d1, d2, d3)`.
            labels: Class indices or `semantic_loss_ignore_index`, shape `(N, d1, d2, d3)`; then the output has the
                mean cross-entropy as `loss`.
            return_dict: False for a tuple.

        Returns:
            An output with `logits`, shape `(N, num_labels, d1, d2, d3)`.
        """
        levels: list[Tensor] = []
        features = pixel_values
        for block in self.down:
            features = block(F.max_pool3d(features, 2, ceil_mode=True) if levels else features)
            levels.append(features)
        for block, beside in zip(self.up, levels[-2::-1], strict=True):
            upsampled = F.interpolate(features, size=beside.shape[2:], mode="trilinear", align_corners=False)
            features = block(torch.cat([upsampled, beside], dim=1))
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


def _block(before: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, width):
        layers += [
            nn.Conv3d(channels, width, 3, padding=1, bias=False),
            nn.GroupNorm(width, width),  # instance normalisation that also takes a single voxel
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


AutoConfig.register(UNet3DConfig.model_type, UNet3DConfig)
AutoModelForSemanticSegmentation.register(UNet3DConfig, UNet3DForSemanticSegmentation)
UNet3DConfig.register_for_auto_class()
UNet3DForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
