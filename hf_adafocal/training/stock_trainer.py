"""AdaFocal with a stock `Trainer`: the metrics that feed `AdaFocalCallback`."""

import numpy as np
from torch import Tensor

from hf_adafocal.losses.layout import classes_last
from hf_adafocal.metrics.binning import BinStats
from hf_adafocal.training.sample_rows import (
    COLUMNS,
    check_counts,
    counted_rows,
    equal_mass_statistics,
    sample_metrics,
    sample_rows,
    split_finite,
)


class CalibrationMetrics:
    """Compute calibration metrics in a `Trainer` that is not ours, and feed its `AdaFocalCallback`.

    Only five numbers per sample are gathered. The evaluation set is then the calibration set; of several it is the
    entry "calibration". The loss may be an `AdaFocalLoss` of any kind, also `ClasswiseAdaFocalLoss`.

    Args:
        num_bins: Bins of the metrics and of the loss's table.
        ignore_index: Label of samples that do not count; that of the loss. A stock Trainer takes the number of labels
            that its loss is divided by from those that are not -100, so give pixels that do not count this label.

    Give the Trainer `compute_loss_func=loss`, `preprocess_logits_for_metrics=calibration.reduce`,
    `compute_metrics=calibration` and `callbacks=[AdaFocalCallback(loss, calibration.calibrate)]`. It then calls:

    >>> import torch
    >>> from transformers import EvalPrediction
    >>> calibration = CalibrationMetrics(num_bins=1)
    >>> rows = calibration.reduce(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))  # confidence 1/2, class 0
    >>> calibration(EvalPrediction(rows.numpy(), None))["ece"]
    0.25
    >>> calibration.calibrate().gap
    array([-0.25])
    """

    def __init__(self, num_bins: int = 15, ignore_index: int = -100) -> None:
        self.num_bins, self.ignore_index = num_bins, ignore_index
        self._rows: np.ndarray | None = None
        self._num_classes: int | None = None

    def reduce(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Replace logits by `sample_rows`; for `preprocess_logits_for_metrics`."""
        logits = classes_last(logits[0] if isinstance(logits, tuple) else logits, labels)
        self._num_classes = logits.shape[-1]
        return sample_rows(logits, labels, self.ignore_index)

    def __call__(self, prediction) -> dict[str, float]:
        """Compute metrics of an `EvalPrediction` whose predictions are rows; for `compute_metrics`.

        Raises:
            ValueError: If the predictions are logits: the Trainer was not given `reduce`.
        """
        shape = np.shape(prediction.predictions)
        if shape[-1] != len(COLUMNS):
            raise ValueError(
                f"Expected the five numbers per sample of `reduce`, found predictions of shape {shape}: give the "
                "Trainer preprocess_logits_for_metrics=calibration.reduce as well."
            )
        rows, others = split_finite(counted_rows(prediction.predictions))
        check_counts(len(rows), others, "evaluation set", self.ignore_index)
        self._rows = rows
        return sample_metrics(self._rows, self.num_bins)

    def calibrate(self) -> BinStats:
        """Equal-mass statistics of the last evaluation, also of single classes; for `AdaFocalCallback`.

        Raises:
            RuntimeError: If nothing has been evaluated.
        """
        if self._rows is None:
            raise RuntimeError("No evaluation yet: pass this object as the Trainer's `compute_metrics`.")
        return equal_mass_statistics(self._rows, self.num_bins, self._num_classes)
