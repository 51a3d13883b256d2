"""Adaptive ECE (AdaECE): the mean gap between confidence and accuracy over bins of about equal sample counts."""

import evaluate

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.scores import calibration_error

_CITATION = """
@inproceedings{mukhoti2020calibrating,
  title={Calibrating Deep Neural Networks using Focal Loss},
  author={Mukhoti, Jishnu and Kulharia, Viveka and Sanyal, Amartya and Golodetz, Stuart and Torr, Philip H. S.
          and Dokania, Puneet K.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}
"""


class AdaECE(base.CalibrationMetric):
    """Adaptive expected calibration error of the predicted class, a fraction in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION, base.NUM_BINS)

    def _compute(self, predictions: list[float], references: list[int], num_bins: int = 15) -> dict[str, float]:
        return {"ada_ece": calibration_error(predictions, references, num_bins, scheme="equal_mass")}
