"""Encoding of texts as token ids and of images as pixel values, with the labels of their rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from hf_adafocal.data.images import looks_like_eight_bits, to_rgb
from hf_adafocal.data.loading import Splits, without_shared_rows

logger = logging.get_logger(__name__)

NO_LIMIT = 10**9  # tokenizers without a limit of their own say 10**30
# Models whose positions are counted from the padding token's id on, so that fewer tokens fit.
SHIFTED_POSITIONS = ("roberta", "camembert", "longformer", "mpnet", "data2vec-text", "xmod", "ibert")
CHECKED_IMAGES = 64


def longest_input(tokenizer: Any, config: Any = None) -> int | None:
    """Return how many tokens a model takes: the least of the tokenizer's limit and the model's positions.

    Args:
        tokenizer: A transformers tokenizer.
        config: Configuration of the model; None if there is none yet.

    Returns:
        The number, special tokens included; None if neither knows a limit.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if positions and any(kind in getattr(text, "model_type", "") for kind in SHIFTED_POSITIONS):
        positions -= (text.pad_token_id or 0) + 1
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < NO_LIMIT]
    return min(limits, default=None)


def encode_texts(splits: Splits, tokenizer: Any, max_length: int | None = None, *, config: Any = None) -> Splits:
    """Tokenize the texts or pairs of texts of all splits, and rename `label` to `labels`.

    Different texts can have the same tokens, cut at `max_length` or with words that the tokenizer does not know. To
    the model they are one, so rows are dropped as `load_splits` drops equal texts.

    Args:
        splits: Splits with the columns `text` and `label`, and `text_pair` for pairs.
        tokenizer: A transformers tokenizer; it truncates and does not pad (that is the collator's part).
        max_length: Tokens kept, special tokens included; the model's own limit if left out, or if that is less.
        config: Configuration of the model, for its limit; None if the tokenizer's is enough.

    Raises:
        ValueError: If there is no limit: neither `max_length` nor one of the tokenizer or the model.
    """
    limit = longest_input(tokenizer, config)
    if max_length is None and limit is None:
        raise ValueError(
            "Neither the tokenizer nor the model limits the length of a text, and a single long text could exhaust "
            "the memory. Set max_length."
        )
    if max_length is not None and limit is not None and limit < max_length:
        logger.warning(f"Texts are cut at {limit} tokens, which is all that the model takes, instead of {max_length}.")
    length = min(known for known in (max_length, limit) if known is not None)
    columns = [name for name in ("text", "text_pair") if name in splits.train.column_names]

    def encode(dataset: Dataset, role: str) -> Dataset:
        dataset = dataset.rename_column("label", "labels") if "label" in dataset.column_names else dataset
        return dataset.map(
            lambda batch: tokenizer(*(batch[name] for name in columns), truncation=True, max_length=length),
            batched=True,
            remove_columns=columns,
            desc=f"Tokenizing {role}",
        )

    return without_shared_rows(splits.map(encode), tokenizer.all_special_ids)


def encode_images(
    splits: Splits, processor: Any, *, random_shift: float = 0.0, horizontal_flip: bool = False
) -> Splits:
    """Compute the pixel values of images as they are read, with `labels`.

    Images of any mode become 8-bit RGB, 16-bit ones by their value (see `images.to_rgb`).

    Args:
        splits: Splits with the columns `image` and `label`.
        processor: A transformers image processor.
        random_shift: Training images are shifted by up to this share of their side, filled with black.
        horizontal_flip: Training images are mirrored half of the time.

    Raises:
        ImportError: If a shift or flip is asked for and torchvision is missing (the extra `vision`).
        ValueError: If grey levels of an image lie outside of their range.
    """
    augment = _augmentation(random_shift, horizontal_flip)
    _check_depth(splits.train)

    def encode(dataset: Dataset, role: str) -> Dataset:
        change = augment if role == "train" else None
        return dataset.with_transform(partial(_pixel_values, processor=processor, augment=change))

    return splits.map(encode)


def _check_depth(train: Dataset) -> None:
    """Warn if training images have more than 8 bits per channel, above all if they hold unscaled 8-bit values."""
    images = train.with_format(None)[: min(CHECKED_IMAGES, len(train))]["image"]
    if looks_like_eight_bits(images):
        logger.warning(
            f"The first {len(images)} training images are 16-bit and none has a grey level above 255, so they become "
            "nearly black. If their values are 8-bit ones, store them so: "
            "PIL.Image.fromarray(np.asarray(image).astype('uint8'))."
        )
    elif any(image.mode[0] in "IF" for image in images):
        logger.warning(
            "Grey images of more than 8 bits are scaled to 8 bits by value. Pipelines of transformers clip them "
            "instead: give these the images as hf_adafocal.data.to_rgb returns them."
        )


def _augmentation(random_shift: float, horizontal_flip: bool) -> Callable | None:
    if not (random_shift or horizontal_flip):
        return None
    from torchvision.transforms import v2

    steps = []
    if random_shift:
        steps.append(v2.RandomAffine(degrees=0, translate=(random_shift, random_shift)))
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def _pixel_values(batch: dict, processor: Any, augment: Callable | None) -> dict:
    images = [to_rgb(image) for image in batch["image"]]
    if augment is not None:
        images = [augment(image) for image in images]
    encoded = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
    return encoded if "label" not in batch else {**encoded, "labels": batch["label"]}
