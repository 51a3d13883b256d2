"""Platt scaling: a factor and a bias for the single logit of a binary classifier or a reranker."""

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from hf_adafocal.scaling.fit import Scaling, checked, measured

FLAT = 1e-4  # of their mean: logits that differ by less differ by rounding


def fit_platt_scaling(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Scaling:
    """Fit the factor a and bias b with which `sigmoid(a z + b)` is the probability of the positive class.

    It is logistic regression on the logit z with Platt's targets, `(n1 + 1) / (n1 + 2)` for the n1 positive samples
    and `1 / (n0 + 2)` for the others, so that classes which a threshold separates have a finite fit too.

    Args:
        logits: Held-out logits, not probabilities: of the positive class, shape `(N,)` or `(N, 1)`, or of both
            classes, shape `(N, 2)`, of which the difference counts.
        labels: 0 or 1, shape `(N,)`.

    Returns:
        A scaling with the factor as `scale` and the bias of the positive class as `bias`. With a warning the identity,
        where one of the classes has no sample or the logits do not rise with the label.

    Raises:
        ValueError: If shapes do not fit, a label is neither 0 nor 1, or a logit is not finite.

    Source: Platt 1999, Probabilistic outputs for support vector machines.

    >>> found = fit_platt_scaling(np.repeat([-2.0, 2.0], 500), np.repeat([0, 1, 0, 1], [400, 100, 50, 450]))
    >>> round(found.scale, 2), round(found.bias, 2), found.method  # logits of 0.2 and 0.9: -1.39 and 2.20
    (0.89, 0.4, 'platt')
    """
    given = torch.as_tensor(logits).detach()
    given = given[:, None] if given.ndim == 1 else given
    if given.ndim == 2 and given.shape[1] == 1:
        given = torch.cat([torch.zeros_like(given), given], dim=1)
    both, labels = checked(given, labels)
    if both.shape[1] != 2 or not torch.isfinite(both).all():
        raise ValueError(f"Platt scaling takes finite logits of two classes, found shape {tuple(both.shape)}.")
    z, positive = (both[:, 1] - both[:, 0]).numpy(), labels.numpy() == 1
    found = _fit(z, positive)
    if found is None or found[0] <= 0:
        warnings.warn(
            f"Of {len(z)} held-out samples {positive.sum()} are positive, and their logits "
            + ("do not rise with the label" if 0 < positive.sum() < len(z) else "are of one class alone")
            + ": nothing was fitted, and the scores stay as they are. Hold out more samples of both classes.",
            stacklevel=2,
        )
        return measured(Scaling(1.0), both, labels)
    return measured(Scaling(*found), both, labels)


def _fit(z: np.ndarray, positive: np.ndarray) -> tuple[float, float] | None:
    """Return factor and bias; None if the samples do not determine them."""
    center, spread = z.mean(), z.std()
    if spread <= FLAT * max(1.0, abs(center)) or positive.all() or not positive.any():
        return None
    others = len(z) - positive.sum()
    target = np.where(positive, (positive.sum() + 1) / (positive.sum() + 2), 1 / (others + 2))
    standard = torch.from_numpy((z - center) / spread)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = parameters[0] * standard + parameters[1]
        loss = F.binary_cross_entropy_with_logits(scaled, torch.from_numpy(target))
        slope = (scaled.sigmoid().numpy() - target) / len(z)
        return loss.item(), np.array([slope @ standard.numpy(), slope.sum()])

    options: Any = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10}
    factor, bias = minimize(objective, np.array([spread, center]), jac=True, method="L-BFGS-B", options=options).x
    return float(factor / spread), float(bias - factor * center / spread)
