"""AURC: the area under the risk-coverage curve of a classifier that answers its most confident samples first."""

import evaluate

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.selective import area_under_risk_coverage

_CITATION = """
@inproceedings{geifman2019bias,
  title={Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers},
  author={Geifman, Yonatan and Uziel, Guy and El-Yaniv, Ran},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""


class AURC(base.TopLabelMetric):
    """Area under the risk-coverage curve of the predicted class, a fraction in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION)

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        return {"aurc": area_under_risk_coverage(predictions, references)}
