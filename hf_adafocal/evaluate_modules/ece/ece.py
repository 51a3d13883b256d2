"""Expected calibration error (ECE): the mean gap between confidence and accuracy over bins of equal width."""

import evaluate

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.scores import calibration_error

_CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""


class ECE(base.CalibrationMetric):
    """Expected calibration error of the predicted class, a fraction in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION, base.NUM_BINS)

    def _compute(self, predictions: list[float], references: list[int], num_bins: int = 15) -> dict[str, float]:
        return {"ece": calibration_error(predictions, references, num_bins)}
