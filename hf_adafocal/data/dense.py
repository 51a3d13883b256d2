"""Data sets of images or volumes with a class for every pixel, as disjoint splits."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Image

from hf_adafocal.data.holdout import hold_out
from hf_adafocal.data.images import to_rgb
from hf_adafocal.data.loading import Splits, _read
from hf_adafocal.data.volumes import synthetic_volumes

VOLUMES = "volumes"  # name of the synthetic volumes
MASKS = ("label", "labels", "mask", "annotation", "segmentation_mask")
UNLABELLED = 255  # what transformers' image processors and configs mean by a pixel that does not count
SIZES = {"train": 48, "calibration": 16, "test": 32}  # of the synthetic volumes


def volume_splits(size: int = 24, seed: int = 0, max_train_samples: int | None = None) -> Splits:
    """Synthetic volumes of known topology as training, calibration and test split.

    Args:
        size: Side in voxels.
        seed: Of the volumes; each split has its own.
        max_train_samples: At most this many training volumes.

    Returns:
        Lists of rows with `pixel_values` `(1, size, size, size)` and `labels` `(size, size, size)`.
    """
    parts: dict[str, Any] = {}
    for index, (role, count) in enumerate(SIZES.items()):
        if role == "train" and max_train_samples is not None:
            count = min(count, max_train_samples)
        volumes = synthetic_volumes(count, size, seed=1000 * seed + index + 1)
        parts[role] = [
            {"pixel_values": image[None], "labels": label.astype(np.int64)}
            for image, label in zip(volumes.images, volumes.labels, strict=True)
        ]
    return Splits(**parts)


def mask_splits(
    dataset: str,
    *,
    input_column: str | None = None,
    label_column: str | None = None,
    holdout_fraction: float = 0.1,
    max_train_samples: int | None = None,
    seed: int = 0,
) -> Splits:
    """Load images with label masks as disjoint splits; splits that the data set lacks are held out from train.

    Args:
        dataset: A Hub id or local folder with a split "train" and two image columns.
        input_column: Column of images; the other image column if left out.
        label_column: Column of masks, whose grey levels are class indices and 255 where a pixel does not count; found
            by its name if left out.
        holdout_fraction: Share of train held out for calibration if there is no split "validation", and twice of it
            for the test if there is no split "test".
        max_train_samples: At most this many training images.
        seed: Of the splits.

    Returns:
        Splits with the columns `image` and `mask`.

    Raises:
        ValueError: If there is no split "train" or the two columns cannot be told.
    """
    raw = _read(dataset)
    if "train" not in raw:
        raise ValueError(f"{dataset!r} needs a split 'train', found {sorted(raw)}.")
    images = [name for name, kind in raw["train"].features.items() if isinstance(kind, Image)]
    masks = [name for name in images if name in MASKS] if label_column is None else [label_column]
    inputs = [name for name in images if name not in masks] if input_column is None else [input_column]
    if len(masks) != 1 or len(inputs) != 1:
        raise ValueError(
            f"Expected one column of images and one of masks in {dataset!r}, found the image columns {images}. Name "
            "them with input_column and label_column."
        )
    parts: dict[str, Any] = {
        name: part.select_columns([*inputs, *masks]).rename_columns({inputs[0]: "image", masks[0]: "mask"})
        for name, part in raw.items()
    }
    train = parts["train"]
    test = parts.get("test")
    if test is None:
        train, test = hold_out(train, 2 * holdout_fraction, seed)
    calibration = parts.get("validation")
    if calibration is None:
        train, calibration = hold_out(train, holdout_fraction, seed)
    if max_train_samples is not None:
        train = train.select(range(min(max_train_samples, len(train))))
    return Splits(train, calibration, test)


def highest_class(train: Dataset) -> int:
    """Return the highest class index in the masks of a split; every mask is read."""
    return max(int(values[values != UNLABELLED].max(initial=0)) for values in map(_mask, train["mask"]))


def encode_masks(splits: Splits, processor: Any) -> Splits:
    """Compute pixel values and labels as rows are read.

    Args:
        splits: Of `mask_splits`.
        processor: A transformers image processor for segmentation; it resizes masks as it resizes images.
    """
    return splits.map(lambda part, _: part.with_transform(partial(_encoded, processor=processor)))


def _encoded(batch: dict, processor: Any) -> dict:
    images = [to_rgb(image) for image in batch["image"]]
    encoded = processor(images, segmentation_maps=[_mask(mask) for mask in batch["mask"]], return_tensors="pt")
    return {"pixel_values": encoded["pixel_values"], "labels": [label.long() for label in encoded["labels"]]}


def _mask(image: Any) -> np.ndarray:
    values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError(f"A mask must be a grey image of class indices, found shape {values.shape}.")
    return values.astype(np.int64)
