"""Classwise ECE: the expected calibration error of each class's probability, averaged over the classes."""

import evaluate

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.classwise import classwise_calibration_error

_CITATION = """
@inproceedings{kull2019beyond,
  title={Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with Dirichlet calibration},
  author={Kull, Meelis and Perello-Nieto, Miquel and K{\\"a}ngsepp, Markus and Silva Filho, Telmo and Song, Hao
          and Flach, Peter},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}
"""


class ClasswiseECE(base.RowMetric):
    """Expected calibration error of every class against "is this the label", averaged; a fraction in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION, base.NUM_BINS)

    def _compute(self, predictions: list[bytes], references: list[bytes], num_bins: int = 15) -> dict[str, float]:
        probabilities, labels = self.rows(predictions), self.rows(references)
        return {"classwise_ece": classwise_calibration_error(probabilities, labels, num_bins)}
