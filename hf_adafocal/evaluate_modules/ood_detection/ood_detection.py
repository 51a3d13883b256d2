"""Out-of-distribution detection: how well a score separates in-distribution from out-of-distribution samples."""

import evaluate
import numpy as np

from hf_adafocal.evaluate_modules import base
from hf_adafocal.metrics.ood import ood_aupr, ood_auroc, ood_fpr95

_CITATION = """
@inproceedings{hendrycks2017baseline,
  title={A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks},
  author={Hendrycks, Dan and Gimpel, Kevin},
  booktitle={International Conference on Learning Representations},
  year={2017}
}
"""


class OODDetection(base.ScoreMetric):
    """AUROC, AUPR with either class as positive, and the false-positive rate at 95 % recall, fractions in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return self.metric_info(__doc__, _CITATION)

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        scores, inside = np.array(predictions), np.array(references) == 1
        pair = scores[inside], scores[~inside]
        return {
            "ood_auroc": ood_auroc(*pair),
            "ood_aupr_in": ood_aupr(*pair, positive="in"),
            "ood_aupr_out": ood_aupr(*pair, positive="out"),
            "ood_fpr95": ood_fpr95(*pair),
        }
