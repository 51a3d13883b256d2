"""Data in three roles that never mix: training, calibration (gamma and temperature) and test (the report)."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from transformers.utils import logging

from hf_adafocal.data.columns import LABEL_COLUMNS
from hf_adafocal.data.holdout import hold_out
from hf_adafocal.data.overlap import without_overlap

logger = logging.get_logger(__name__)

HUB_IDS = {"20_newsgroups": "SetFit/20_newsgroups", "cifar10": "uoft-cs/cifar10"}
TEXT_COLUMNS = ("text", "sentence", "content")
NOISE = "noise"
NOISE_DEVIATION = 0.1  # of Gaussian noise on pixels in [0, 1], as the fifth severity of CIFAR-10-C


class Splits(NamedTuple):
    """A labelled data set, with the columns `image` or `text`, and `label` (a `ClassLabel`).

    Attributes:
        train: What the weights see.
        calibration: What gamma and the temperature see.
        test: What the report sees.
        ood: Inputs of another kind, to tell from the test set; None if not asked for.
    """

    train: Dataset
    calibration: Dataset
    test: Dataset
    ood: Dataset | None = None

    @property
    def label_names(self) -> list[str]:
        """Name of each class, in the order of the labels."""
        return self.train.features["label"].names

    def map(self, change: Callable[[Dataset, str], Dataset]) -> "Splits":
        """Apply `change(dataset, role)` to each part that is there."""
        return Splits(
            *(None if part is None else change(part, role) for role, part in zip(self._fields, self, strict=True))
        )


def load_splits(
    dataset: str = "digits",
    *,
    label_column: str | None = None,
    input_column: str | None = None,
    calibration_fraction: float = 0.1,
    test_fraction: float = 0.2,
    max_train_samples: int | None = None,
    seed: int = 0,
    ood: str | None = None,
) -> Splits:
    """Train, calibration and test split of a data set: disjoint, stratified by label, and the same for one seed.

    They are disjoint by content: rows of train whose input stands in calibration or test too are dropped, and so are
    rows of calibration that stand in test (20 Newsgroups has some; the log says how many). The test split is left as
    it is, empty texts are kept, and rows repeated within one split stay.

    The test split is the data set's own if its labels are public, else its validation split, else a part of train.
    The calibration split is the data set's validation split if that is free, else a part of train.

    Args:
        dataset: "digits" (embedded in scikit-learn), "20_newsgroups", "cifar10", or any Hub id or local folder.
        label_column: Column of class labels; found by its name or type if left out.
        input_column: Column of images or texts; found by its type or name if left out.
        calibration_fraction: Share of train held out for calibration, if the data set has no split for it.
        test_fraction: Share of train held out for the test, if the data set has no split for it.
        max_train_samples: Keep this many training samples, stratified; calibration and test stay whole.
        seed: Seed of every split.
        ood: Hub id or local folder of out-of-distribution inputs of the same kind, or "noise": the test images under
            Gaussian noise of standard deviation 0.1 on pixels in [0, 1].

    Returns:
        The splits, with columns renamed to `image` or `text`, and `label`.

    Raises:
        ValueError: If a column cannot be told from its name or type, a class is too small to be split, or all rows
            of train stand in calibration or test too.
    """
    raw = DatasetDict(train=_digits()) if dataset == "digits" else load_dataset(HUB_IDS.get(dataset, dataset))
    if "train" not in raw:
        raise ValueError(f"{dataset!r} needs a split 'train', found {sorted(raw)}.")
    raw = _canonical(raw, label_column, input_column)
    held_out = [name for name in ("test", "validation") if name in raw and _has_labels(raw[name])]

    train = raw["train"]
    if held_out:
        test = raw[held_out[0]]
    else:
        train, test = hold_out(train, test_fraction, seed)
    if len(held_out) == 2:
        calibration = raw[held_out[1]]
    else:
        train, calibration = hold_out(train, calibration_fraction, seed)
    train, calibration, test, _ = _apart(Splits(train, calibration, test))
    if max_train_samples is not None and max_train_samples < len(train):
        train, _ = hold_out(train, len(train) - max_train_samples, seed)
    return Splits(train, calibration, test, _out_of_distribution(ood, test, input_column, seed) if ood else None)


def encode_texts(splits: Splits, tokenizer: Any, max_length: int | None = None) -> Splits:
    """Token ids of each text, and `labels`.

    Different texts can have the same tokens, cut at `max_length` or with words that the tokenizer does not know. To
    the model they are one, so rows are dropped as `load_splits` drops equal texts.

    Args:
        splits: Splits with the columns `text` and `label`.
        tokenizer: A transformers tokenizer; it truncates and does not pad (that is the collator's part).
        max_length: Tokens kept; the tokenizer's own limit if left out.
    """

    def encode(dataset: Dataset, role: str) -> Dataset:
        dataset = dataset.rename_column("label", "labels") if "label" in dataset.column_names else dataset
        return dataset.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length),
            batched=True,
            remove_columns="text",
            desc=f"Tokenizing {role}",
        )

    return _apart(splits.map(encode), tokenizer.all_special_ids)


def encode_images(
    splits: Splits, processor: Any, *, random_shift: float = 0.0, horizontal_flip: bool = False
) -> Splits:
    """Pixel values of each image, computed as they are read, and `labels`.

    Args:
        splits: Splits with the columns `image` and `label`.
        processor: A transformers image processor.
        random_shift: Training images are shifted by up to this share of their side, filled with black.
        horizontal_flip: Training images are mirrored half of the time.

    Raises:
        ImportError: If a shift or flip is asked for and torchvision is missing (the extra `vision`).
    """
    augment = _augmentation(random_shift, horizontal_flip)

    def encode(dataset: Dataset, role: str) -> Dataset:
        change = augment if role == "train" else None
        return dataset.with_transform(partial(_pixel_values, processor=processor, augment=change))

    return splits.map(encode)


def _apart(splits: Splits, blank_tokens: Collection[int] = ()) -> Splits:
    """Splits that share no content; test stays whole."""
    train = without_overlap(splits.train, splits.calibration, splits.test, blank_tokens=blank_tokens)
    calibration = without_overlap(splits.calibration, splits.test, blank_tokens=blank_tokens)
    dropped = {
        role: len(before) - len(after)
        for role, before, after in (
            ("train", splits.train, train),
            ("calibration", splits.calibration, calibration),
        )
    }
    if any(dropped.values()):
        logger.warning(
            "Dropped rows whose inputs stand in a held-out split too: "
            + ", ".join(f"{count} of {role}" for role, count in dropped.items())
            + "."
        )
    return splits._replace(train=train, calibration=calibration)


def _digits() -> Dataset:
    """The 1,797 handwritten digits (8 x 8) that scikit-learn carries."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    return Dataset.from_dict(rows, features=features)


def _canonical(raw: DatasetDict, label_column: str | None, input_column: str | None) -> DatasetDict:
    """Keep the input and the label, under one name each; the label becomes a `ClassLabel`."""
    features = raw["train"].features
    label = label_column or _find_label(features)
    source, target = _find_input(features, input_column, exclude=label)
    for name in (label, source):
        if name not in features:
            raise ValueError(f"There is no column {name!r}; the data set has {sorted(features)}.")
    classes = _class_label(raw["train"], label)
    parts = {}
    for name, part in raw.items():
        part = part.select_columns([source, label])
        part = part.rename_columns({old: new for old, new in ((source, target), (label, "label")) if old != new})
        if part.features["label"] != classes:
            part = part.cast_column("label", classes)
        parts[name] = part
    return DatasetDict(parts)


def _find_label(features: Features) -> str:
    named = [name for name in LABEL_COLUMNS if name in features]
    typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    for found in (named, typed):
        if len(found) == 1:
            return found[0]
    raise ValueError(f"Cannot tell the label among the columns {sorted(features)}; pass label_column.")


def _find_input(features: Features, input_column: str | None, exclude: str) -> tuple[str, str]:
    """The input's column, and whether it becomes "image" or "text"."""
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    texts = [
        name
        for name, feature in features.items()
        if isinstance(feature, Value) and "string" in feature.dtype and name not in (exclude, "label_text")
    ]
    if input_column is not None:
        return input_column, "image" if input_column in images else "text"
    if len(images) == 1:
        return images[0], "image"
    known = [name for name in TEXT_COLUMNS if name in texts] or texts
    if not images and len(known) == 1:
        return known[0], "text"
    raise ValueError(f"Cannot tell the input among the columns {sorted(features)}; pass input_column.")


def _class_label(train: Dataset, label: str) -> ClassLabel:
    feature = train.features[label]
    if isinstance(feature, ClassLabel):
        return feature
    values = np.asarray(train[label][:])
    if not np.issubdtype(values.dtype, np.integer):
        return ClassLabel(names=sorted({str(value) for value in values}))
    names = {int(value): str(value) for value in np.unique(values)}
    if "label_text" in train.column_names:
        names = dict(zip(values.tolist(), train["label_text"][:], strict=True))
    return ClassLabel(names=[names.get(index, str(index)) for index in range(max(names) + 1)])


def _has_labels(part: Dataset) -> bool:
    return len(part) > 0 and min(part["label"][:]) >= 0  # benchmarks hide test labels as -1


def _out_of_distribution(path: str, test: Dataset, input_column: str | None, seed: int) -> Dataset:
    target = "image" if "image" in test.column_names else "text"
    if path == NOISE:
        if target != "image":
            raise ValueError("ood='noise' is for images; of texts name a data set: a Hub id or a local folder.")
        return test.select_columns([target]).map(partial(_noisy, seed=seed), with_indices=True, desc="Adding noise")
    raw = load_dataset(HUB_IDS.get(path, path))
    part = raw["test"] if "test" in raw else raw[next(iter(raw))]
    source, kind = _find_input(part.features, input_column, exclude=_find_label(part.features))
    if kind != target:
        raise ValueError(f"Out-of-distribution inputs must be of the kind {target!r}, found {kind!r} in {path!r}.")
    return part.select_columns([source]).rename_columns({source: target} if source != target else {})


def _noisy(row: dict, index: int, seed: int) -> dict:
    pixels = np.asarray(row["image"], dtype=float)
    noise = np.random.default_rng((seed, index)).normal(scale=255 * NOISE_DEVIATION, size=pixels.shape)
    return {"image": PILImage.fromarray(np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8))}


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
    images = [image.convert("RGB") for image in batch["image"]]
    if augment is not None:
        images = [augment(image) for image in images]
    encoded = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
    return encoded if "label" not in batch else {**encoded, "labels": batch["label"]}
