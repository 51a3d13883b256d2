"""Negative log-likelihood (NLL): the mean of -log p, p the predicted probability of the label."""

import evaluate
import numpy as np

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.scores import negative_log_likelihood

_CITATION = """
@article{good1952rational,
  title={Rational Decisions},
  author={Good, I. J.},
  journal={Journal of the Royal Statistical Society. Series B (Methodological)},
  volume={14},
  number={1},
  pages={107--114},
  year={1952}
}
"""


class NLL(base.MeanMetric):
    """Negative log-likelihood of the labels, the mean in nats; 0 is perfect."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION)

    def _value(self, probabilities: np.ndarray, labels: np.ndarray) -> float:
        return negative_log_likelihood(probabilities, labels)
