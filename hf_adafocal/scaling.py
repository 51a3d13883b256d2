"""Temperature scaling: one number fitted on held-out logits."""

import math
import warnings

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

LOG_TEMPERATURE_BOUND = 5.0  # T between 1/148 and 148


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature T that minimises the NLL of `logits / T`.

    A bounded search on log T, so T is positive by construction; the NLL has one minimum in T. A T that does not lower
    the NLL is not returned: then it is 1.

    Args:
        logits: Held-out logits, not probabilities, shape `(N, C)`, N >= 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.

    Returns:
        T, no unit: above 1 softens over-confident predictions. If every sample is classified correctly the NLL has no
        minimum (T would fall to 0 and one later mistake would cost hundreds of nats): T is then 1, with a warning.

    Raises:
        ValueError: If shapes do not fit, a label is no class index, or a logit is NaN or infinite.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,) with N >= 1, found {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be integers in [0, {logits.shape[1]}), found {labels.min()} to {labels.max()} as "
            f"{labels.dtype}. Drop ignored samples first."
        )
    if not torch.isfinite(logits).all():
        raise ValueError("Held-out logits must be finite, found NaN or infinite values.")

    if (logits.argmax(dim=-1) == labels).all():
        warnings.warn(
            f"All {len(labels)} held-out samples are classified correctly, so no temperature fits best: T stays 1. "
            "Hold out more samples.",
            stacklevel=2,
        )
        return 1.0

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits * math.exp(-log_temperature), labels.long()).item()

    bounds = (-LOG_TEMPERATURE_BOUND, LOG_TEMPERATURE_BOUND)
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x) if found.fun < nll(0.0) else 1.0
