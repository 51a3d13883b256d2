"""Loading of a labelled data set as training, calibration and test split that share no rows."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from transformers.utils import logging

from hf_adafocal.data.columns import InputColumns, find_input_columns, find_label_column
from hf_adafocal.data.holdout import hold_out
from hf_adafocal.data.images import add_noise
from hf_adafocal.data.labels import ClassEncoding, check_classes, encode_labels, has_labels
from hf_adafocal.data.overlap import drop_overlap, without_overlap

logger = logging.get_logger(__name__)

BUILT_IN = ("digits",)
HUB_IDS = {"20_newsgroups": "SetFit/20_newsgroups", "cifar10": "uoft-cs/cifar10"}
LANGUAGES = {"20_newsgroups": "en"}  # of texts
NOISE = "noise"
NOISE_DEVIATION = 0.1  # of Gaussian noise on pixels in [0, 1], as the fifth severity of CIFAR-10-C


class Splits(NamedTuple):
    """A labelled data set: the columns `image`, `text` or `text` and `text_pair`, and `label` (a `ClassLabel`).

    Attributes:
        train: Training data.
        calibration: Held-out data that moves the loss and fits the temperature.
        test: Held-out data of the report.
        ood: Out-of-distribution inputs, to be told from the test set; None if not asked for.
    """

    train: Dataset
    calibration: Dataset
    test: Dataset
    ood: Dataset | None = None

    @property
    def label_names(self) -> list[str]:
        """Name of each class, in the order of the labels."""
        return self.train.features["labels" if "labels" in self.train.features else "label"].names

    def map(self, change: Callable[[Dataset, str], Dataset]) -> "Splits":
        """Apply `change(dataset, role)` to each split that is there."""
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
    """Load a data set as disjoint training, calibration and test splits, stratified by label and seeded.

    The test split is the data set's own if its labels are public, else its validation split, else a part of train.
    The calibration split is the data set's validation split if that is free, else a part of train. Rows without a
    label (None, -1) are dropped, and labels are numbered from 0 in the order of their names or values.

    The splits are disjoint by content: rows of train whose input also stands in calibration or test are dropped, and
    so are rows of calibration that stand in test. Empty texts stay, and so do rows repeated within one split. Log
    lines count what was dropped.

    Args:
        dataset: "digits" (embedded in scikit-learn; 400, 400 and 997 images), "20_newsgroups", "cifar10", or any Hub
            id or local folder.
        label_column: Column of class labels; found by its name or type if left out.
        input_column: Column of images or texts, or two text columns of sentence pairs separated by a comma
            ("premise,hypothesis"); found by type and name if left out.
        calibration_fraction: Share of train held out for calibration, if the data set has no split for it.
        test_fraction: Share of train held out for the test, if the data set has no split for it.
        max_train_samples: Keep this many training samples, stratified; calibration and test stay whole.
        seed: Seed of every split.
        ood: Hub id or local folder of out-of-distribution inputs of the same kind, or "noise": the test images under
            Gaussian noise of standard deviation 0.1 on pixels in [0, 1].

    Returns:
        The splits, with columns renamed to `image`, `text` or `text` and `text_pair`, and `label`.

    Raises:
        ValueError: If a column cannot be told from its name or type, a text or image is missing, a held-out split has
            labels that train lacks, or all rows of train stand in calibration or test too.

    >>> splits = load_splits("digits")
    >>> [len(part) for part in splits[:3]], splits.label_names[:3]
    ([400, 400, 997], ['0', '1', '2'])
    """
    raw = _digits(seed) if dataset == "digits" else _read(dataset)
    if "train" not in raw:
        raise ValueError(f"{dataset!r} needs a split 'train', found {sorted(raw)}.")
    parts, inputs = _canonical(raw, label_column, input_column)
    held_out = [name for name in ("test", "validation") if name in parts]

    train = parts["train"]
    if held_out:
        test = parts[held_out[0]]
    else:
        train, test = hold_out(train, test_fraction, seed)
    if len(held_out) == 2:
        calibration = parts[held_out[1]]
    else:
        train, calibration = hold_out(train, calibration_fraction, seed)
    train, calibration, test, _ = without_shared_rows(Splits(train, calibration, test))
    if max_train_samples is not None and max_train_samples < len(train):
        classes = len(np.unique(train["label"][:]))
        if max_train_samples < classes:
            raise ValueError(f"max_train_samples={max_train_samples} is fewer than the {classes} classes of train.")
        train, _ = hold_out(train, len(train) - max_train_samples, seed)
    splits = Splits(train, calibration, test)
    return splits if ood is None else splits._replace(ood=_out_of_distribution(ood, test, inputs, input_column, seed))


def without_shared_rows(splits: Splits, blank_tokens: Collection[int] = ()) -> Splits:
    """Drop training rows that also occur in the calibration or test split, and calibration rows that occur in test.

    The test split stays as it is. Log lines count the dropped rows.

    Args:
        splits: Rows are compared by their inputs.
        blank_tokens: As in `fingerprint`: rows of such tokens alone stay.
    """
    calibration = without_overlap(splits.calibration, splits.test, blank_tokens=blank_tokens)
    dropped = len(splits.calibration) - len(calibration)
    if dropped:
        logger.warning(
            f"Dropped {dropped} of {len(splits.calibration)} calibration rows whose inputs stand in test too."
        )
    held_out = {"calibration": calibration, "test": splits.test}
    train, _ = drop_overlap(splits.train, held_out, blank_tokens=blank_tokens)
    return splits._replace(train=train, calibration=calibration)


def _read(dataset: str) -> DatasetDict:
    """Load all splits of a data set by its built-in name, Hub id or folder."""
    source = HUB_IDS.get(dataset, dataset)
    if Path(source).is_file():
        raise ValueError(f"{source!r} is a file: name the folder that it is in, which holds the data set alone.")
    try:
        return load_dataset(source)
    except OSError as error:  # no network, no such data set
        raise OSError(
            f"The data set {source!r} cannot be loaded: {str(error).rstrip('.')}. Without a network name a local "
            "folder of its files: --dataset FOLDER."
        ) from error
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"The data set {source!r} cannot be read: {error.__cause__ or error}") from error


def _digits(seed: int) -> DatasetDict:
    """Return the 1,797 handwritten digits (8 x 8) that scikit-learn carries, as train, validation and test.

    So small a training set is overfitted, and so large a test set tells calibration errors of a few percent apart.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    rest, test = hold_out(Dataset.from_dict(rows, features=features), 997, seed)
    train, validation = hold_out(rest, 400, seed)
    return DatasetDict(train=train, validation=validation, test=test)


def _canonical(
    raw: DatasetDict, label_column: str | None, input_column: str | None
) -> tuple[dict[str, Dataset], InputColumns]:
    """Return train and the held-out splits that have labels, with the inputs under their usual names and `label`."""
    features = raw["train"].features
    label = label_column or find_label_column(features)
    if label not in features:
        raise ValueError(f"There is no column {label!r}; the data set has {sorted(features)}.")
    inputs = find_input_columns(features, input_column, exclude=label)
    encoding = ClassEncoding.of(raw["train"], label)
    parts = {}
    for name in ("train", "validation", "test"):
        if name not in raw or (name != "train" and not has_labels(raw[name], label)):
            continue
        part = raw[name].select_columns([*inputs.names, label])
        part = part.rename_columns({old: new for old, new in inputs.names.items() if old != new})
        _check_inputs(part, list(inputs.names.values()), name)
        parts[name] = encode_labels(part, label, encoding, name)
    check_classes(parts, encoding)
    return parts, inputs


def _check_inputs(part: Dataset, columns: list[str], split: str) -> None:
    """Raise if inputs are missing."""
    table = part.with_format("arrow")
    for name in columns:
        missing = np.flatnonzero(table[name][:].is_null().to_numpy())
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(part)} rows of the split {split!r} have no {name}: rows "
                f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}. Drop these rows, or fill "
                "in empty texts."
            )


def _out_of_distribution(
    path: str, test: Dataset, inputs: InputColumns, input_column: str | None, seed: int
) -> Dataset:
    names = list(inputs.names.values())
    if path == NOISE:
        if inputs.kind != "image":
            raise ValueError("ood='noise' is for images; of texts name a data set: a Hub id or a local folder.")

        def noisy(row: dict, index: int) -> dict:
            return {"image": add_noise(row["image"], NOISE_DEVIATION, np.random.default_rng((seed, index)))}

        return test.select_columns(names).map(noisy, with_indices=True, desc="Adding noise")
    raw = _read(path)
    part = raw["test"] if "test" in raw else raw[next(iter(raw))]
    own = input_column if input_column in part.features else None
    try:
        label = find_label_column(part.features)
    except ValueError:  # inputs alone are enough here
        label = ""
    found = find_input_columns(part.features, own, exclude=label)
    if list(found.names.values()) != names:
        raise ValueError(
            f"Out-of-distribution inputs must be of the kind {' and '.join(map(repr, names))}, found "
            f"{' and '.join(map(repr, found.names.values()))} in {path!r}."
        )
    part = part.select_columns(list(found.names))
    part = part.rename_columns({old: new for old, new in found.names.items() if old != new})
    _check_inputs(part, names, path)
    return part
