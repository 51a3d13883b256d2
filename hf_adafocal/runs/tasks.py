"""Tasks to fine-tune on, described by command-line arguments: data, model and data collator."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedModel,
)

from hf_adafocal.data.dense import VOLUMES, encode_masks, highest_class, mask_splits, volume_splits
from hf_adafocal.data.encoding import encode_images, encode_texts
from hf_adafocal.data.loading import Splits, load_splits
from hf_adafocal.models import (
    GlobalPoolingCNNConfig,
    GlobalPoolingCNNForSequenceClassification,
    UNet3DConfig,
    UNet3DForSemanticSegmentation,
    timm_classifier,
    train_word_level_tokenizer,
)


class Prepared(NamedTuple):
    """The data, model, processor and data collator of a task.

    Attributes:
        splits: Model inputs and `labels`.
        model_init: Builds the model; fresh weights depend on torch's seed.
        processing_class: Tokenizer or image processor, saved with the checkpoint.
        data_collator: Makes batches.
        example: A raw input of the test split; None if none is fit to be shown.
    """

    splits: Splits
    model_init: Callable[[], PreTrainedModel]
    processing_class: Any
    data_collator: Callable
    example: Any = None


@dataclass
class Task:
    """Arguments of every classification task; subclasses define how data become model inputs."""

    dataset: str = field(metadata={"help": "A built-in name, a Hub id or a local folder."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to fine-tune, a Hub id or a local folder; left out: train from scratch."},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of class labels (default: found by name or type)."}
    )
    input_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of texts or images, or two text columns of sentence pairs as premise,hypothesis (default: "
            "found by type and name)."
        },
    )
    holdout_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the training split to hold out for calibration if there is no split for it."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many samples, stratified by label."}
    )
    ood: str | None = field(
        default=None,
        metadata={
            "help": "Out-of-distribution inputs to tell from the test split: a Hub id, a local folder, or noise (the "
            "test images under Gaussian noise)."
        },
    )
    split_seed: int | None = field(default=None, metadata={"help": "Seed of the splits (default: --seed)."})

    from_scratch: ClassVar[dict[str, Any]] = {}
    fine_tuned: ClassVar[dict[str, Any]] = {}

    def prepare(self, seed: int) -> Prepared:
        """Load and encode the data, and describe the model."""
        raise NotImplementedError

    @property
    def training_defaults(self) -> dict[str, Any]:
        """Default training arguments of the task."""
        return self.from_scratch if self.model_name_or_path is None else {**self.from_scratch, **self.fine_tuned}

    def load(self, seed: int) -> Splits:
        """Load the data set as disjoint splits."""
        return load_splits(
            self.dataset,
            label_column=self.label_column,
            input_column=self.input_column,
            calibration_fraction=self.holdout_fraction,
            max_train_samples=self.max_train_samples,
            seed=seed if self.split_seed is None else self.split_seed,
            ood=self.ood,
        )


@dataclass
class TextTask(Task):
    """Text classification: the global-pooling CNN from scratch, or any checkpoint with a sequence classifier."""

    dataset: str = field(
        default="20_newsgroups", metadata={"help": "20_newsgroups, a Hub id or a local folder of texts with labels."}
    )
    max_length: int = field(
        default=256, metadata={"help": "Longest text or pair of texts in tokens, at most what the model takes."}
    )
    vocab_size: int = field(default=20000, metadata={"help": "Words of the tokenizer that is trained for the CNN."})

    from_scratch: ClassVar[dict[str, Any]] = {
        "output_dir": "runs/text",
        "calibrate_at_end": True,
        "eval_strategy": "epoch",
        "num_train_epochs": 10,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 256,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_steps": 50,
    }
    fine_tuned: ClassVar[dict[str, Any]] = {
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
    }

    @property
    def loading(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained` for the model."""
        return {}

    def prepare(self, seed: int) -> Prepared:
        """Load and tokenize the data; the tokenizer of a CNN from scratch is trained on the training texts."""
        splits = self.load(seed)
        names = splits.label_names
        labels: dict[str, Any] = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if self.model_name_or_path is None:
            pairs = splits.train["text_pair"][:] if "text_pair" in splits.train.column_names else []
            tokenizer: Any = train_word_level_tokenizer(
                [*splits.train["text"], *pairs], self.vocab_size, self.max_length
            )
            config: Any = GlobalPoolingCNNConfig(
                vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=len(names), **labels
            )

            def model_init() -> PreTrainedModel:
                return GlobalPoolingCNNForSequenceClassification(config)
        else:
            checkpoint = self.model_name_or_path
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            config = AutoConfig.from_pretrained(checkpoint)

            def model_init() -> PreTrainedModel:
                return AutoModelForSequenceClassification.from_pretrained(
                    checkpoint, num_labels=len(names), ignore_mismatched_sizes=True, **labels, **self.loading
                )

        encoded = encode_texts(splits, tokenizer, self.max_length, config=config)
        example = None if "text_pair" in splits.test.column_names else short_text(splits.test["text"])
        return Prepared(encoded, model_init, tokenizer, DataCollatorWithPadding(tokenizer), example)


@dataclass
class ImageTask(Task):
    """Image classification: a small timm ViT from scratch, any timm architecture, or any checkpoint."""

    dataset: str = field(
        default="digits", metadata={"help": "digits, cifar10, a Hub id or a local folder of images with labels."}
    )
    architecture: str = field(
        default="vit_tiny_patch16_224", metadata={"help": "timm architecture that is trained from scratch."}
    )
    model_args: str = field(
        default='{"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}',
        metadata={"help": "Further arguments of timm.create_model, as JSON."},
    )
    image_size: int = field(default=16, metadata={"help": "Input size of a network from scratch, in pixels."})
    random_shift: float = field(
        default=0.0, metadata={"help": "Shift training images at random by up to this share of their side."}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror training images at random, half of them."})

    from_scratch: ClassVar[dict[str, Any]] = {
        "output_dir": "runs/vision",
        "calibrate_at_end": True,
        "eval_strategy": "epoch",
        "num_train_epochs": 100,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 256,
        "weight_decay": 0.05,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 20,
        "remove_unused_columns": False,  # images are encoded as they are read
    }
    fine_tuned: ClassVar[dict[str, Any]] = {
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
    }

    def prepare(self, seed: int) -> Prepared:
        """Load the data; images are encoded as they are read."""
        splits = self.load(seed)
        names = splits.label_names
        if self.model_name_or_path is None:

            def model_init() -> PreTrainedModel:
                return timm_classifier(self.architecture, names, self.image_size, json.loads(self.model_args))

            from transformers import TimmWrapperImageProcessor  # needs timm

            config = model_init().config
            processor = TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
        else:
            checkpoint = self.model_name_or_path
            processor = AutoImageProcessor.from_pretrained(checkpoint)

            def model_init() -> PreTrainedModel:
                return AutoModelForImageClassification.from_pretrained(
                    checkpoint,
                    num_labels=len(names),
                    id2label=dict(enumerate(names)),
                    label2id={name: index for index, name in enumerate(names)},
                    ignore_mismatched_sizes=True,
                )

        encoded = encode_images(
            splits, processor, random_shift=self.random_shift, horizontal_flip=self.horizontal_flip
        )
        return Prepared(encoded, model_init, processor, DefaultDataCollator(), splits.test[0]["image"])


def short_text(texts: Iterable[str], shortest: int = 20, longest: int = 200) -> str | None:
    r"""Return the first text that is short enough to show, in one line; None if there is none.

    >>> short_text(["Hi.", "It was a pleasure\nto be there."])
    'It was a pleasure to be there.'
    """
    lines = (" ".join(text.split()) for text in texts)
    return next((line for line in lines if shortest <= len(line) <= longest), None)


@dataclass
class SegmentationTask(Task):
    """Semantic segmentation: a small 3D U-Net on synthetic volumes, or any checkpoint on images with label masks."""

    dataset: str = field(
        default=VOLUMES,
        metadata={"help": "volumes (synthetic, of known topology), a Hub id or a local folder of images and masks."},
    )
    architecture: str = field(
        default="unet3d", metadata={"help": "Network that is trained from scratch: unet3d, for volumes."}
    )
    volume_size: int = field(default=24, metadata={"help": "Side of the synthetic volumes, in voxels."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Classes, background included (default: from the training masks)."}
    )

    from_scratch: ClassVar[dict[str, Any]] = {
        "output_dir": "runs/segmentation",
        "calibrate_at_end": True,
        "eval_strategy": "epoch",
        "num_train_epochs": 15,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 20,
        "remove_unused_columns": False,  # images are encoded as they are read
    }
    fine_tuned: ClassVar[dict[str, Any]] = {"learning_rate": 6e-5, "num_train_epochs": 10}

    def prepare(self, seed: int) -> Prepared:
        """Make or load the data, and describe the model.

        Raises:
            ValueError: If the data and the network do not fit each other.
        """
        seed = seed if self.split_seed is None else self.split_seed
        checkpoint = self.model_name_or_path
        if checkpoint is None and (self.dataset != VOLUMES or self.architecture != "unet3d"):
            raise ValueError(
                f"From scratch there is the architecture unet3d, for --dataset volumes; found {self.architecture!r} "
                f"and {self.dataset!r}. Images need a checkpoint: --model_name_or_path nvidia/mit-b0."
            )
        if self.dataset == VOLUMES:
            splits, processor = volume_splits(self.volume_size, seed, self.max_train_samples), None
        else:
            splits = mask_splits(
                self.dataset,
                input_column=self.input_column,
                label_column=self.label_column,
                holdout_fraction=self.holdout_fraction,
                max_train_samples=self.max_train_samples,
                seed=seed,
            )
            processor = AutoImageProcessor.from_pretrained(checkpoint)
        masks = splits.train
        if processor is not None:
            splits = encode_masks(splits, processor)

        def model_init() -> PreTrainedModel:
            # here, so that nobody reads all masks of the training split to evaluate a checkpoint
            classes = self.num_classes or (2 if processor is None else highest_class(masks) + 1)
            names = ["background", *(["object"] if classes == 2 else [f"class {k}" for k in range(1, classes)])]
            labels: dict[str, Any] = {
                "id2label": dict(enumerate(names)),
                "label2id": {name: index for index, name in enumerate(names)},
            }
            if checkpoint is None:
                return UNet3DForSemanticSegmentation(UNet3DConfig(num_labels=classes, **labels))
            return AutoModelForSemanticSegmentation.from_pretrained(
                checkpoint, num_labels=classes, ignore_mismatched_sizes=True, **labels
            )

        return Prepared(splits, model_init, processor, DefaultDataCollator())


TASKS: dict[str, type[Task]] = {"text": TextTask, "vision": ImageTask, "segmentation": SegmentationTask}
