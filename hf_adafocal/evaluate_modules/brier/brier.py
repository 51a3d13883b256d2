"""Brier score: the mean squared distance between the predicted probabilities and the one-hot label."""

import evaluate
import numpy as np

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.scores import binary_calibration_report, brier_score

_CITATION = """
@article{brier1950verification,
  title={Verification of forecasts expressed in terms of probability},
  author={Brier, Glenn W.},
  journal={Monthly Weather Review},
  volume={78},
  number={1},
  pages={1--3},
  year={1950}
}
"""


class Brier(base.MeanMetric):
    """Brier score: summed over classes, in [0, 2]; with the configuration "binary" of class 1 alone, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION)

    def _value(self, probabilities: np.ndarray, labels: np.ndarray) -> float:
        return brier_score(probabilities, labels)

    def _of_binary(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[float], list[int]]:
        return [binary_calibration_report(probabilities, labels)["brier"]], [len(labels)]
