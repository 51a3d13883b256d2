"""Smooth ECE: the calibration error of predictions smoothed with a kernel whose width the data choose; no bins."""

import evaluate

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.bin_free import smooth_calibration_error

_CITATION = """
@inproceedings{blasiok2024smooth,
  title={Smooth {ECE}: Principled Reliability Diagrams via Kernel Smoothing},
  author={B{\\l}asiok, Jaros{\\l}aw and Nakkiran, Preetum},
  booktitle={International Conference on Learning Representations},
  year={2024}
}
"""


class SmoothECE(base.CalibrationMetric):
    """Smooth expected calibration error of the predicted class, a fraction in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION)

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        return {"smooth_ece": smooth_calibration_error(predictions, references)}
