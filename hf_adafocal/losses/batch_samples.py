"""Flatten a batch to one row per sample, for losses that compare the samples of a batch with each other."""

import math
from dataclasses import dataclass

from torch import Tensor

from hf_adafocal.losses import functional

MOST_PAIRED = 4096  # samples that are compared in pairs: some 0.4 GB


@dataclass
class BatchSamples:  # no NamedTuple, whose methods torch 2.6 does not compile
    """A batch with one row per sample; ignored samples stay, with weight 0, so that no shape depends on the data."""

    log_p: Tensor  # (N, C)
    ce: Tensor  # (N,), 0 where ignored
    labels: Tensor  # (N,), 0 where ignored
    counted: Tensor  # (N,), 1 or 0, of the dtype of log_p
    divisor: Tensor  # scalar, the number of counted samples, at least 1

    @property
    def p(self) -> Tensor:
        """Probabilities, shape `(N, C)`."""
        return self.log_p.exp()

    @property
    def possible(self) -> Tensor:
        """Number of classes that some counted sample can have, a scalar of the dtype of `log_p`, at least 1."""
        seen = (self.log_p.detach() > functional.LEAST_LOG_P) & (self.counted > 0)[:, None]
        return seen.any(dim=0).sum().clamp_min(1).to(self.log_p.dtype)

    def top(self) -> tuple[Tensor, Tensor]:
        """Return the confidence of the predicted class and whether it is the label (1 or 0), both of shape `(N,)`."""
        confidence, predicted = self.p.max(dim=1)
        return confidence, (predicted == self.labels).to(confidence.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """Average values of shape `(N,)` over the counted samples."""
        return (values * self.counted).sum() / self.divisor


def batch_samples(logits: Tensor, labels: Tensor, ignore_index: int) -> BatchSamples:
    """Check logits and labels and flatten them to one row per sample.

    Raises:
        ValueError: As `functional.focal_loss`.
    """
    ce = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")  # and checks
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    labels = labels.reshape(-1).long()
    kept = labels != ignore_index
    counted = kept.to(ce.dtype)
    log_p = rows.log_softmax(dim=1, dtype=ce.dtype)
    return BatchSamples(log_p, ce.reshape(-1), labels.where(kept, 0), counted, counted.sum().clamp_min(1))


def refuse_pairs(term: str, labels: Tensor) -> None:
    """Reject batches with too many samples to compare all pairs of them.

    Raises:
        ValueError: If there are more than `MOST_PAIRED`.
    """
    if labels.numel() > MOST_PAIRED:
        raise ValueError(
            f"{term} compares all pairs of samples and takes at most {MOST_PAIRED} per call, found {labels.numel()} "
            "labels. Take smaller batches, or a term that needs no pairs: dca, mdca, soft_ece, dece, aurc."
        )


def check_bins(num_bins: int, **positive: float) -> None:
    """Check the settings of a histogram of the confidences.

    Raises:
        ValueError: If there is no bin, or one of the others is not a finite number above 0.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, found {num_bins}.")
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, found {value}.")
