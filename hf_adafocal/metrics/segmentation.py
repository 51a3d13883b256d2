"""Metrics of dense prediction: calibration of foreground and of single images, overlap of classes, topology.

Pixels of one image are not independent, so intervals and tests are over images. Pooled over all pixels a calibration
error is mostly that of the background, which is easy and large: that of the foreground and the mean over images stand
beside it. The Betti error and intervals need SciPy; everything else needs NumPy alone.
"""

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hf_adafocal.betti import betti_numbers
from hf_adafocal.metrics.binning import bin_statistics, equal_width_edges
from hf_adafocal.metrics.bootstrap import PairedTest, compared, draws
from hf_adafocal.metrics.groups import grouped_error_interval

BACKGROUND = 0  # the class that is no object


class DenseCounts(NamedTuple):
    """What the metrics of dense prediction are computed from, per image, so that images can be resampled.

    Attributes:
        bins: Pixels, correct pixels and sum of confidences per bin of all pixels, shape `(n, num_bins, 3)`.
        foreground_bins: Likewise of the pixels whose label or prediction is not background.
        overlap: Pixels predicted and labelled as a class, predicted as it, labelled as it; shape `(n, C, 3)`.
        betti_error: Absolute difference of the Betti numbers of prediction and label, shape `(n, C - 1, dimensions)`;
            None if it was not asked for.
    """

    bins: np.ndarray
    foreground_bins: np.ndarray
    overlap: np.ndarray
    betti_error: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        """Images."""
        return len(self.bins)

    @property
    def num_pixels(self) -> int:
        """Pixels that count, of all images."""
        return int(self.bins[..., 0].sum())

    def of_images(self, images: np.ndarray) -> "DenseCounts":
        """The counts of some images, which may be named repeatedly."""
        return DenseCounts(*(None if part is None else part[images] for part in self))  # type: ignore[arg-type]

    def save(self, path: str | Path | BinaryIO) -> None:
        """Write the counts into an `.npz` file."""
        parts = {name: part for name, part in self._asdict().items() if part is not None}
        np.savez_compressed(path, **parts)

    @classmethod
    def load(cls, path: str | Path) -> "DenseCounts":
        """Read the counts from a file that `save` wrote."""
        with np.load(path) as parts:
            return cls(**parts)


def count_dense(
    confidence: Any,
    predicted: Any,
    labels: Any,
    num_classes: int,
    *,
    num_bins: int = 15,
    ignore_index: int = -100,
    betti: bool = True,
    construction: str = "V",
) -> DenseCounts:
    """Count what the metrics of dense prediction need, image by image.

    Args:
        confidence: Probability of the predicted class, shape `(n, d1, ...)`, in [0, 1].
        predicted: Predicted class, same shape.
        labels: Class indices or `ignore_index`, same shape.
        num_classes: Classes C, background (class 0) included.
        num_bins: Bins of equal width.
        ignore_index: Label of pixels that do not count; they are background for the Betti numbers.
        betti: Whether to compare Betti numbers; only of images and volumes.
        construction: "V" or "T" of `betti_numbers`; take that of the loss.

    Raises:
        ValueError: If the shapes differ, a label is out of range, or no pixel counts.

    >>> counts = count_dense([[[0.9, 0.6]]], [[[1, 0]]], [[[1, 1]]], num_classes=2)
    >>> counts.num_images, counts.num_pixels
    (1, 2)
    """
    confidence, predicted, labels = np.asarray(confidence, dtype=np.float64), np.asarray(predicted), np.asarray(labels)
    if not confidence.shape == predicted.shape == labels.shape or confidence.ndim < 2:
        raise ValueError(
            "confidence, predicted and labels must have one shape (n, d1, ...), found "
            f"{confidence.shape}, {predicted.shape} and {labels.shape}."
        )
    counted = labels != ignore_index
    if not counted.any():
        raise ValueError(f"Every label is ignored ({ignore_index}): there is nothing to measure.")
    found = labels[counted]
    if found.min() < 0 or found.max() >= num_classes:
        raise ValueError(f"Labels must lie in [0, {num_classes}) or be {ignore_index}, found {np.unique(found)}.")
    edges = equal_width_edges(num_bins)
    rows = []
    for image in range(len(labels)):
        kept = counted[image]
        confident, chosen, true = confidence[image][kept], predicted[image][kept], labels[image][kept]
        object_ = (chosen != BACKGROUND) | (true != BACKGROUND)
        hit = chosen == true
        pair = np.bincount(true.astype(np.int64) * num_classes + chosen, minlength=num_classes**2)
        table = pair.reshape(num_classes, num_classes)
        rows.append(
            (
                _bin_sums(confident, hit, edges),
                _bin_sums(confident[object_], hit[object_], edges),
                np.stack([table.diagonal(), table.sum(axis=0), table.sum(axis=1)], axis=-1),
            )
        )
    bins, foreground, overlap = (np.stack(parts) for parts in zip(*rows, strict=True))
    errors = None
    if betti:
        errors = np.stack(
            [
                [
                    np.abs(
                        np.subtract(
                            betti_numbers((chosen == kind) & kept, construction),
                            betti_numbers((true == kind) & kept, construction),
                        )
                    )
                    for kind in range(1, num_classes)
                ]
                for chosen, true, kept in zip(predicted, labels, counted, strict=True)
            ]
        )
    return DenseCounts(bins, foreground, overlap, errors)


def _bin_sums(confidence: np.ndarray, correct: np.ndarray, edges: np.ndarray) -> np.ndarray:
    if not len(confidence):
        return np.zeros((len(edges) - 1, 3))
    stats = bin_statistics(confidence, correct, edges)
    return np.stack([stats.count, stats.count * stats.accuracy, stats.count * stats.confidence], axis=-1)


def dense_metrics(counts: DenseCounts) -> dict[str, float]:
    """Compute the metrics of dense prediction from what was counted.

    Args:
        counts: Of `count_dense`.

    Returns:
        `pixel_accuracy` and `pixel_ece` of all pixels; `foreground_ece` of those whose label or prediction is not
        background (absent if
        there are none); `image_ece`, the mean over images of the error of each; `dice_K` and `iou_K` of each class K
        that some pixel has or is given, pooled over images, and their means over foreground classes, `dice` and `iou`
        (absent if there is no object at all); and `betti_0_error`, `betti_1_error`, ... the mean over images of the
        absolute difference, summed over foreground classes. Fractions in [0, 1] but for the Betti errors.

    >>> counts = count_dense([[[0.9, 0.6]]], [[[1, 0]]], [[[1, 1]]], num_classes=2)
    >>> metrics = dense_metrics(counts)
    >>> round(metrics["pixel_ece"], 3), round(metrics["dice"], 3), metrics["betti_0_error"]
    (0.35, 0.667, 0.0)
    """
    return _metrics(counts)


def _metrics(counts: DenseCounts, signs: dict[str, np.ndarray] | None = None) -> dict[str, float]:
    """`dense_metrics`; with the signs of the bins' gaps given by name the pooled errors are linear in the counts."""
    signs = signs or {}
    pixels = counts.bins.sum(axis=0)
    found = {"pixel_accuracy": float(pixels[:, 1].sum() / pixels[:, 0].sum())}
    found["pixel_ece"] = _ece(pixels, signs.get("pixel_ece"))
    foreground = counts.foreground_bins.sum(axis=0)
    if foreground[:, 0].any():
        found["foreground_ece"] = _ece(foreground, signs.get("foreground_ece"))
    sizes, gaps = counts.bins[..., 0].sum(axis=1), np.abs(counts.bins[..., 2] - counts.bins[..., 1]).sum(axis=1)
    found["image_ece"] = float((gaps[sizes > 0] / sizes[sizes > 0]).mean())
    both, chosen, true = np.moveaxis(counts.overlap.sum(axis=0), -1, 0)
    present = np.flatnonzero(chosen + true)
    both, total = both[present], (chosen + true)[present]
    dice, iou = 2 * both / total, both / (total - both)
    objects = present != BACKGROUND
    if objects.any():
        found |= {"dice": float(dice[objects].mean()), "iou": float(iou[objects].mean())}
    for kind, overlap, ratio in zip(present, dice, iou, strict=True):
        found |= {f"dice_{kind}": float(overlap), f"iou_{kind}": float(ratio)}
    if counts.betti_error is not None:
        errors = counts.betti_error.sum(axis=1).mean(axis=0)
        found |= {f"betti_{dimension}_error": float(error) for dimension, error in enumerate(errors)}
    return found


def _ece(bins: np.ndarray, signs: np.ndarray | None = None) -> float:
    gaps = bins[:, 2] - bins[:, 1]
    return float((np.abs(gaps) if signs is None else signs * gaps).sum() / bins[:, 0].sum())


def dense_intervals(
    counts: DenseCounts, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Confidence intervals of the metrics of dense prediction over other images from the same source.

    The pooled errors `pixel_ece` and `foreground_ece` have those of `groups.grouped_error_interval`, the other metrics
    percentile bootstrap intervals that resample images.

    Args:
        counts: Of `count_dense`, two images at least.
        level: Coverage asked for.
        num_resamples: Resamples.
        seed: Of the resampling.

    Returns:
        Lower and upper end by the names of `dense_metrics`; a metric that some resamples lack is taken over the
        others. `foreground_ece` is absent if only one image has foreground.

    Raises:
        ValueError: If there are fewer than two images.

    Source: Davison and Hinkley 1997, section 3.8 (resampling of clusters).
    """
    _check_images(counts, "An interval")
    found: dict[str, list[float]] = {}
    for drawn in draws(counts.num_images, num_resamples, seed):
        for name, value in _metrics(counts.of_images(drawn)).items():
            found.setdefault(name, []).append(value)
    tail = (1 - level) / 2
    ends = {name: tuple(np.quantile(values, [tail, 1 - tail]).tolist()) for name, values in found.items()}
    for name, bins in _pooled(counts).items():
        ends.pop(name, None)
        if np.count_nonzero(bins[..., 0].sum(axis=1)) > 1:
            ends[name] = grouped_error_interval(bins, level)[1:]
    return ends


def dense_differences(
    one: DenseCounts, other: DenseCounts, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> dict[str, PairedTest]:
    """Test whether two models differ in the metrics of dense prediction, by the paired bootstrap over images.

    Each resample draws the same images for both, so that what makes an image hard for both cancels. The gaps of the
    bins of `pixel_ece` and `foreground_ece` keep their signs in the resamples, as in `paired_calibration_error_test`:
    resampling the errors themselves would add noise to noise.

    Args:
        one: Counts of the first model, two images at least.
        other: Counts of the second model on the same images in the same order.
        level: Coverage of the intervals.
        num_resamples: Resamples; a p-value is a multiple of `2 / (num_resamples + 1)`.
        seed: Of the resampling.

    Returns:
        First minus second by the names of `dense_metrics`, of those that both have on every resample.

    Raises:
        ValueError: If there are fewer than two images or the two are not of the same images.

    >>> labels = np.array([[[1, 1]], [[1, 0]]])
    >>> sure, fair = (count_dense(np.full((2, 1, 2), p), labels, labels, 2) for p in (0.9, 0.6))
    >>> round(dense_differences(sure, fair)["pixel_ece"].difference, 3)
    -0.3
    """
    _check_images(one, "A test")
    if not np.array_equal(one.overlap[..., 2], other.overlap[..., 2]):
        raise ValueError(
            f"The models must be measured on the same images in the same order; found {one.num_images} and "
            f"{other.num_images} images whose labels differ."
        )
    signs = [
        {name: np.sign((bins[..., 2] - bins[..., 1]).sum(axis=0)) for name, bins in _pooled(counts).items()}
        for counts in (one, other)
    ]
    found: dict[str, list[float]] = {}
    for drawn in draws(one.num_images, num_resamples, seed):
        first, second = (
            _metrics(counts.of_images(drawn), fixed) for counts, fixed in zip((one, other), signs, strict=True)
        )
        for name in first.keys() & second.keys():
            found.setdefault(name, []).append(first[name] - second[name])
    values = dense_metrics(one), dense_metrics(other)
    return {
        name: compared(values[0][name] - values[1][name], np.array(found[name]), level)
        for name in values[0]
        if len(found.get(name, ())) == num_resamples
    }


def _pooled(counts: DenseCounts) -> dict[str, np.ndarray]:
    return {"pixel_ece": counts.bins, "foreground_ece": counts.foreground_bins}


def _check_images(counts: DenseCounts, what: str) -> None:
    if counts.num_images < 2:
        raise ValueError(f"{what} over images needs two images at least, found {counts.num_images}.")
