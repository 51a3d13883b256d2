"""Base classes of the `evaluate` metrics: each batch is validated and reduced before it is stored.

Wrappers write `from hf_adafocal.evaluate_modules import base`, not the class: `evaluate.load` takes the first metric
class it finds among a script's names, which would be the imported one.
"""

import io
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_adafocal.metrics.scores import calibration_error, top_label
from hf_adafocal.metrics.validation import as_array

NUM_BINS = """    num_bins: Number of bins, an argument of `compute`; 15 unless told otherwise.
"""
_PROBABILITIES = """
Args:
    predictions: Probabilities, shape (N, C), rows sum to 1 (not logits: apply a softmax first). With the configuration
        "binary" (`evaluate.load(path, "binary")`) the probability of class 1, shape (N,), in [0, 1].
    references: Class indices in [0, C), shape (N,); with "binary" 0 or 1. Loaded with
        `evaluate.load(path, labels=[...])`, the class names in the order of the columns, they are class names.
"""
_CONFIDENCES = """        Without "binary", predictions may also be the confidence of each prediction,
        shape (N,), in [0, 1], and references 1 where the prediction was right and 0 where it was wrong, shape (N,).
"""
_SCORES = """
Args:
    predictions: Scores, shape (N,), floating-point numbers; higher means more in-distribution.
    references: 1 where the sample is in-distribution and 0 where it is out of distribution, shape (N,).
"""
Columns = Sequence | np.ndarray

_TWO_NUMBERS = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}


class ReducedMetric(evaluate.Metric):
    """Base class of metrics that store a reduction of each batch; subclasses define `_reduce`, `_info`, `_compute`.

    A batch is validated before it is stored, so a rejected one leaves nothing behind.
    """

    _configs: tuple[str, ...] = ("default",)
    _features = _TWO_NUMBERS
    _inputs = ""

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        if config_name is not None and config_name not in self._configs:
            raise ValueError(f"The configuration must be one of {', '.join(self._configs)}; found {config_name!r}.")
        super().__init__(config_name=config_name, **options)

    def metric_info(self, description: str, citation: str, options: str = "") -> evaluate.MetricInfo:
        """Build the `MetricInfo` that `_info` returns.

        Args:
            description: What the metric measures.
            citation: BibTeX of its source.
            options: Lines on the arguments of `compute` besides predictions and references.
        """
        return evaluate.MetricInfo(
            description=description,
            citation=citation,
            inputs_description=self._inputs + options,
            features=datasets.Features(self._features),
            format=None,  # "numpy" would hand float64 columns to `_compute` as float32
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and references.

        Raises:
            ValueError: If the inputs are not what is described below, or come in another form than earlier batches.
        """
        predictions, references = self._reduce(as_array(predictions), as_array(references))
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample: `prediction` and `reference` are one entry of the inputs described below.

        Raises:
            ValueError: As `add_batch`.
        """
        # evaluate.combine passes the plural names.
        prediction, reference = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        predictions, references = self._reduce(as_array(prediction)[None], as_array(reference)[None])
        super().add(prediction=predictions[0], reference=references[0], **kwargs)

    def _reduce(self, predictions: np.ndarray, references: np.ndarray) -> tuple[Columns, Columns]:
        """Validate a batch and return the two columns that are stored."""
        raise NotImplementedError


class ScoreMetric(ReducedMetric):
    """Base class of metrics of a score and a 0/1 reference per sample; subclasses define `_info` and `_compute`."""

    _inputs = _SCORES

    def _reduce(self, scores: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if scores.ndim != 1 or scores.shape != inside.shape or scores.size == 0:
            raise ValueError(
                "Expected two vectors of one length N >= 1: a score and a 0/1 reference per sample; "
                f"found shapes {scores.shape} and {inside.shape}. Reduce probabilities or logits to a score first."
            )
        if not np.issubdtype(scores.dtype, np.floating) or np.isnan(scores).any():
            raise ValueError(f"Scores must be floating-point numbers without NaN, found {scores.dtype}: {scores}.")
        if not np.isin(inside, (0, 1)).all():
            raise ValueError(f"References must be 1 (in-distribution) or 0 (out of distribution), found {inside}.")
        return scores.astype(np.float64), inside.astype(np.int64)


class ProbabilityMetric(ReducedMetric):
    """Base class of metrics of predicted probabilities; subclasses define `_of_classes`, `_info` and `_compute`.

    Args:
        config_name: "binary" if predictions are the probability of class 1, shape (N,); None for shape (N, C).
        labels: Class names in the order of the columns, if references are names; None if they are indices.
        **options: Those of `evaluate.Metric`.

    Raises:
        ValueError: If there is no such configuration, or `labels` are not distinct strings, two for "binary".
    """

    _configs = ("default", "binary")
    _inputs = _PROBABILITIES
    _form = ""  # of the samples stored so far

    def __init__(self, config_name: str | None = None, labels: Sequence[str] | None = None, **options: Any) -> None:
        self._class_names = None if labels is None else _checked_names(labels, config_name)
        super().__init__(config_name, **options)

    def _of_classes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[Columns, Columns]:
        """Validate probabilities `(N, C)` and class indices `(N,)` and return the stored columns."""
        raise NotImplementedError

    def _of_binary(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[Columns, Columns]:
        """Return the stored columns of valid probabilities of class 1 (float64) and labels (int64), both `(N,)`."""
        return self._of_classes(np.column_stack([1 - probabilities, probabilities]), labels)

    def _of_confidences(self, confidence: np.ndarray, correct: np.ndarray) -> tuple[Columns, Columns]:
        """Validate confidences `(N,)` and correctness `(N,)` and return the stored columns."""
        raise ValueError(
            f"Expected probabilities (N, C), found shape {confidence.shape}. For a binary classifier's probabilities "
            "of class 1 load the metric with evaluate.load(path, 'binary')."
        )

    def _reduce(self, predictions: np.ndarray, references: np.ndarray) -> tuple[Columns, Columns]:
        if predictions.ndim == 1 and not np.issubdtype(predictions.dtype, np.floating):
            raise ValueError(
                f"Predictions (N,) must be floating-point numbers, found {predictions.dtype}: predicted classes have "
                "no confidence. Pass probabilities (N, C) with the labels as references."
            )
        references = self._indices(predictions, references)
        if self.config_name == "binary":
            form, stored = "probabilities of class 1 (N,)", self._of_binary(*_checked_binary(predictions, references))
        elif predictions.ndim == 1:
            form, stored = "confidences (N,)", self._of_confidences(predictions, references)
        else:
            stored = self._of_classes(predictions, references)
            form = f"probabilities (N, {predictions.shape[1]})"
        if self.writer is not None and form != self._form:  # without a writer nothing is stored
            raise ValueError(
                f"Expected {self._form} as in the earlier batches, found {form} in this one. Pass every batch in one "
                "form: a class's probability would otherwise count as the confidence of a prediction."
            )
        self._form = form
        return stored

    def _indices(self, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Convert class names to the indices of their columns; other references are returned as they are."""
        found = [name for name in references.flat if isinstance(name, str)] if references.dtype.kind in "UO" else []
        if self._class_names is None:
            if found:
                raise ValueError(
                    f"References are class names, such as {str(found[0])!r}, and the order of the columns is unknown: "
                    "load the metric with evaluate.load(path, labels=[...])."
                )
            return references
        if not found or len(found) < references.size:
            raise ValueError(
                f"Expected class names as references, found dtype {references.dtype}. The metric was loaded with "
                f"labels={self._class_names}: load it without them for class indices or correctness."
            )
        shape = predictions.shape
        if self.config_name != "binary" and shape[1:] != (len(self._class_names),):
            raise ValueError(
                f"labels name {len(self._class_names)} classes, found predictions of shape {shape}. "
                "Expected probabilities (N, C) with a column for each name."
            )
        index = {name: column for column, name in enumerate(self._class_names)}
        unknown = sorted(set(found) - set(index))
        if unknown:
            raise ValueError(f"References must be among labels={self._class_names}, found {str(unknown[0])!r}.")
        return np.array([index[name] for name in found]).reshape(references.shape)


class TopLabelMetric(ProbabilityMetric):
    """Base class of metrics of confidence and correctness; subclasses define `_info` and `_compute`.

    Two numbers are stored per sample, not C: 50,000 samples of 1,000 classes take less than a second.
    """

    _inputs = _PROBABILITIES + _CONFIDENCES

    def _of_classes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[Columns, Columns]:
        return self._of_confidences(*top_label(probabilities, labels))

    def _of_confidences(self, confidence: np.ndarray, correct: np.ndarray) -> tuple[Columns, Columns]:
        calibration_error(confidence, correct)  # for its checks: `compute` would raise after all batches
        return confidence.astype(np.float64), correct.astype(np.int64)


class CalibrationMetric(TopLabelMetric):
    """Base class of calibration metrics: for "binary" the pairs are the probability of class 1 and the label."""

    def _of_binary(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return probabilities, labels


class MeanMetric(ProbabilityMetric):
    """Base class of means over samples: stores value and size of each batch; subclasses define `_value`, `_info`."""

    def _value(self, probabilities: np.ndarray, labels: np.ndarray) -> float:
        """Validate probabilities `(N, C)` and class indices `(N,)` and return the metric."""
        raise NotImplementedError

    def _of_classes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[float], list[int]]:
        return [self._value(probabilities, labels)], [len(labels)]

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        shares = np.array(references) / np.sum(references)  # 1 for a single batch, whose value is returned as it is
        return {self.name: float(shares @ predictions)}


class RowMetric(ProbabilityMetric):
    """Base class of metrics that need the probability of every class; subclasses define `_info` and `_compute`.

    The bins are known in `compute` only, so whole rows are stored: each batch as the bytes of a `.npy` file, which
    takes the memory of the array; one list per row takes seconds for 50,000 samples of 100 classes. Counts and sums
    per class and bin would be larger than the rows for a batch of fewer than two or three samples per bin.
    """

    _features = {"predictions": datasets.Value("large_binary"), "references": datasets.Value("large_binary")}

    def _of_classes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[bytes], list[bytes]]:
        top_label(probabilities, labels)  # for its checks: `compute` would raise after all batches
        return [_to_bytes(probabilities)], [_to_bytes(labels)]

    @staticmethod
    def rows(batches: list[bytes]) -> np.ndarray:
        """Concatenate the stored batches."""
        return np.concatenate([np.load(io.BytesIO(batch), allow_pickle=False) for batch in batches])


def _to_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _checked_names(labels: Sequence[str], config_name: str | None) -> list[str]:
    names = [] if isinstance(labels, str) else list(labels)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"labels must be the distinct names of the classes in the order of the columns, found {labels!r}."
        )
    if config_name == "binary" and len(names) != 2:
        raise ValueError(f"The configuration 'binary' has two classes, found {len(names)} labels: {names}.")
    return names


def _checked_binary(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if probabilities.ndim != 1:
        raise ValueError(
            "The configuration 'binary' expects the probability of class 1, shape (N,), found shape "
            f"{probabilities.shape}. Load the metric without it for probabilities (N, C)."
        )
    calibration_error(probabilities, labels)  # for its checks
    return probabilities.astype(np.float64), labels.astype(np.int64)
