"""Models to calibrate: a global-pooling CNN for text, timm networks for images, a 3D U-Net for volumes.

This file is self-contained: `save_pretrained` copies it beside a checkpoint of the CNN or the U-Net, so that the
checkpoint also loads where hf_adafocal is not installed (with `trust_remote_code=True`).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers import models as token_models
from tokenizers.normalizers import NFKC, Lowercase, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SemanticSegmenterOutput, SequenceClassifierOutput


class GlobalPoolingCNNConfig(PretrainedConfig):
    """Configuration of `GlobalPoolingCNNForSequenceClassification`.

    Args:
        vocab_size: Tokens, padding included.
        embedding_size: Width of a token embedding.
        num_filters: Channels of each convolution.
        kernel_size: Tokens a convolution sees.
        pool_size: Window of the max pooling (stride 1) after the first two convolutions.
        hidden_size: Width of the layer before the classifier.
        dropout: Dropout probability before the classifier.
        pad_token_id: Token id of padding.
        **kwargs: `num_labels`, `id2label` and everything else of `PretrainedConfig`.
    """

    model_type = "global_pooling_cnn"

    def __init__(
        self,
        vocab_size: int = 20000,
        embedding_size: int = 100,
        num_filters: int = 128,
        kernel_size: int = 5,
        pool_size: int = 5,
        hidden_size: int = 128,
        dropout: float = 0.3,
        pad_token_id: int = 0,
        **kwargs,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.num_filters = num_filters
        self.kernel_size = kernel_size
        self.pool_size = pool_size
        self.hidden_size = hidden_size
        self.dropout = dropout
        super().__init__(pad_token_id=pad_token_id, **kwargs)  # type: ignore[call-arg]

    @property
    def receptive_field(self) -> int:
        """Number of tokens that one position after the last convolution sees."""
        return 3 * (self.kernel_size - 1) + 2 * (self.pool_size - 1) + 1


class GlobalPoolingCNNForSequenceClassification(PreTrainedModel):
    """Text classifier with three convolutions, a global maximum over the text, and one hidden layer.

    Embeddings are learned (the original freezes GloVe). The maximum runs over windows that hold real tokens only, so a
    text scores the same in any batch; a text shorter than the receptive field has one window, filled up with padding.

    Source: the network of Mukhoti et al. 2020, arXiv 2002.09437, for 20 Newsgroups (after Lin et al. 2014).
    """

    config_class = GlobalPoolingCNNConfig
    main_input_name = "input_ids"

    def __init__(self, config: GlobalPoolingCNNConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        widths = [config.embedding_size, *[config.num_filters] * 3]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width_in, width_out, config.kernel_size)
            for width_in, width_out in zip(widths, widths[1:], strict=False)
        )
        self.hidden = nn.Linear(config.num_filters, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -0.05, 0.05)  # Keras's, which the original is written in; learns fast
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Compute class logits from token ids.

        Args:
            input_ids: Token ids padded on the right, shape `(N, L)`.
            attention_mask: 1 for tokens and 0 for padding, shape `(N, L)`; taken from the padding id if left out.
            labels: Class indices, shape `(N,)`; then the output has the mean cross-entropy as `loss`.
            return_dict: False for a tuple.

        Returns:
            An output with `logits`, shape `(N, num_labels)`.
        """
        field = self.config.receptive_field
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        lengths = attention_mask.sum(dim=1)
        input_ids = F.pad(input_ids, (0, max(field - input_ids.shape[1], 0)), value=self.config.pad_token_id)

        features = self.embedding(input_ids).transpose(1, 2)  # (N, channels, L)
        for index, convolution in enumerate(self.convolutions):
            features = F.relu(convolution(features))
            if index < 2:
                features = F.max_pool1d(features, self.config.pool_size, stride=1)
        windows = (lengths - field + 1).clamp_min(1)
        beyond = torch.arange(features.shape[2], device=features.device) >= windows[:, None]
        pooled = features.masked_fill(beyond[:, None], 0.0).amax(dim=2)  # 0 is the least a ReLU gives
        logits = self.classifier(self.dropout(F.relu(self.hidden(pooled))))

        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


def train_word_level_tokenizer(
    texts: Iterable[str], vocab_size: int = 20000, max_length: int = 256
) -> PreTrainedTokenizerFast:
    """Train a lower-casing word tokenizer with the most frequent words of `texts`.

    Each text starts with `[CLS]`, so that an empty one still has a token; of a pair both do.

    Args:
        texts: Training texts.
        vocab_size: Words kept, the three special tokens included; the rest are `[UNK]`.
        max_length: Tokens kept of a text with `truncation=True`, the first included.
    """
    tokenizer = Tokenizer(token_models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = Sequence([NFKC(), Lowercase()])
    tokenizer.pre_tokenizer = Split(Regex(r"[^\w']+"), behavior="removed")
    trainer = WordLevelTrainer(vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[CLS]"])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS] $B", special_tokens=[("[CLS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        model_max_length=max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def timm_classifier(
    architecture: str, label_names: list[str], image_size: int, model_args: dict | None = None
) -> PreTrainedModel:
    """Build a timm network with fresh weights as a transformers image classifier.

    The checkpoint it saves loads offline with `AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline`.

    Args:
        architecture: A timm name, as "vit_tiny_patch16_224".
        label_names: Name of each class, in the order of the labels.
        image_size: Side of the square input, in pixels.
        model_args: Further arguments of `timm.create_model`, as `{"img_size": 32, "patch_size": 4}`.

    Raises:
        ImportError: If timm is not installed (the extra `vision`).
    """
    from transformers import TimmWrapperConfig  # needs timm

    config = TimmWrapperConfig(  # type: ignore[call-arg]  # the other arguments go to PretrainedConfig
        architecture=architecture,
        model_args=model_args or {},
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        # The processor reads its sizes from here; without it AutoImageProcessor finds no file.
        pretrained_cfg={
            "input_size": [3, image_size, image_size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
    )
    return AutoModelForImageClassification.from_config(config)


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
        widths: Iterable[int] = (8, 16, 32),
        semantic_loss_ignore_index: int = 255,
        **kwargs,
    ) -> None:
        self.num_channels = num_channels
        self.widths = list(widths)
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


# Not the U-Net of MONAI: small as its wheel is (1.7 MB), it asks for torch 2.8 where we take 2.6, and its networks
# would still need a `PreTrainedModel` around them to be saved, folded and loaded.
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


AutoConfig.register(GlobalPoolingCNNConfig.model_type, GlobalPoolingCNNConfig)
AutoModelForSequenceClassification.register(GlobalPoolingCNNConfig, GlobalPoolingCNNForSequenceClassification)
GlobalPoolingCNNConfig.register_for_auto_class()
GlobalPoolingCNNForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(UNet3DConfig.model_type, UNet3DConfig)
AutoModelForSemanticSegmentation.register(UNet3DConfig, UNet3DForSemanticSegmentation)
UNet3DConfig.register_for_auto_class()
UNet3DForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
