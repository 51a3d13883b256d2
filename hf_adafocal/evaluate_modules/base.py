"""What the `evaluate` wrappers share: inputs become two numbers a sample before they are stored.

Wrappers write `from hf_adafocal.evaluate_modules import base`, not the class: `evaluate.load` takes the first metric
class it finds among a script's names, which would be the imported one.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_adafocal.metrics import calibration_error, top_label

INPUTS = """
Args:
    predictions: Probabilities, shape (N, C), rows sum to 1 (not logits: apply a softmax first); or the confidence of
        each prediction, shape (N,), in [0, 1].
    references: For (N, C), class indices in [0, C), shape (N,); for (N,), 1 where the prediction was right and 0 where
        it was wrong, shape (N,).
    num_bins: Number of bins, an argument of `compute`; 15 unless told otherwise.
"""


def metric_info(description: str, citation: str) -> evaluate.MetricInfo:
    """Information of a metric whose samples are stored as a confidence and whether the prediction was right.

    Args:
        description: What the metric measures.
        citation: BibTeX of its source.

    Returns:
        What `_info` of a `TopLabelMetric` returns.
    """
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=INPUTS,
        features=datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}),
        format=None,  # "numpy" would hand float64 columns to `_compute` as float32
    )


class TopLabelMetric(evaluate.Metric):
    """A metric of (confidence, correct) pairs; subclasses define `_info` and `_compute`.

    Storing two numbers a sample, not C, is what keeps 50,000 samples of 1,000 classes below a second. A batch is
    checked before it is stored, so a refused one leaves nothing behind.
    """

    _form = ""  # what the samples stored so far came as

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and references.

        Raises:
            ValueError: If the inputs are not what is described below, or come in another form than earlier batches.
        """
        confidence, correct = self._reduce(_to_numpy(predictions), _to_numpy(references))
        super().add_batch(predictions=confidence, references=correct, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample: `prediction` and `reference` are one entry of the inputs described below.

        Raises:
            ValueError: As `add_batch`.
        """
        # evaluate.combine passes the plural names.
        prediction, reference = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        confidence, correct = self._reduce(_to_numpy(prediction)[None], _to_numpy(reference)[None])
        super().add(prediction=confidence[0], reference=correct[0], **kwargs)

    def _reduce(self, predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Confidence (float64) and correctness (0 or 1, int64) of each sample, both of shape `(N,)`."""
        form = "confidences (N,)" if predictions.ndim == 1 else "probabilities (N, C)"
        if self.writer is not None and form != self._form:  # without a writer nothing is stored
            raise ValueError(
                f"Expected {self._form} as in the earlier batches, found {form} in this one. Pass every batch in one "
                "form: a class's probability would otherwise count as the confidence of a prediction."
            )
        if predictions.ndim != 1:
            confidence, correct = top_label(predictions, references)
        elif np.issubdtype(predictions.dtype, np.floating):
            confidence, correct = predictions, references
        else:
            raise ValueError(
                f"Confidences (N,) must be floating-point numbers, found {predictions.dtype}: predicted classes have "
                "no confidence. Pass probabilities (N, C) with the labels as references."
            )
        calibration_error(confidence, correct)  # for its checks: `compute` would raise after all batches
        self._form = form
        return confidence.astype(np.float64), correct.astype(np.int64)


def _to_numpy(values: Any) -> np.ndarray:
    """Array of a list, an array or a torch tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16; float16 is as exact on [2^-14, 1] and its rows may miss a sum of 1 by as much.
        values = values.half() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)
