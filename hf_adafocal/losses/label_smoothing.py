"""Label smoothing with a fixed eps, and with an eps adapted to the temperature that fits held-out data."""

import torch
from torch import Tensor

from hf_adafocal.losses import functional
from hf_adafocal.losses.base import AdaptiveLoss, PerSampleLoss, table_numbers


class LabelSmoothingLoss(PerSampleLoss):
    """Label smoothing as in PyTorch: the label's target is `1 - eps + eps / C`, the others' `eps / C`.

    C counts the possible classes: one whose logit is -inf, or what masks write instead, takes no part.

    Errata: in MDCA's code the label's target is `1 - alpha` and the others' `alpha / (C - 1)`, which is eps
    `alpha C / (C - 1)` here: with 2 classes alpha 0.05 is eps 0.1. CalibWeightedRisk's class has PyTorch's meaning,
    but its `reduction="sum"` does not sum, and it builds its targets on the CPU.

    Args:
        smoothing: eps, in [-0.1, 0.5]; below 0 it sharpens. The default is the one of Mukhoti et al. and of AdaFocal's
            tables; Szegedy et al. took 0.1.
        **kwargs: `weight` (as in PyTorch), `ignore_index` and `reduction` of `PerSampleLoss`.

    Attributes:
        smoothing: eps, a scalar buffer, so that a compiled loss sees a change; `set_smoothing` changes it.

    Raises:
        ValueError: If `smoothing` is out of range.

    Source: Szegedy et al. 2016, arXiv 1512.00567; for calibration Mukhoti et al. 2020, arXiv 2002.09437.

    >>> LabelSmoothingLoss(0.1)(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]))  # -0.95 log 0.8 - 0.05 log 0.2
    tensor(0.2925)
    """

    smoothing: Tensor

    def __init__(self, smoothing: float = 0.05, **kwargs) -> None:
        super().__init__(**kwargs)
        self.register_buffer("smoothing", torch.empty(()))
        self.set_smoothing(smoothing)

    def set_smoothing(self, smoothing: float) -> None:
        """Change eps.

        Args:
            smoothing: The new eps.

        Raises:
            ValueError: If it is not in [-0.1, 0.5]; it is then unchanged.
        """
        functional.check_smoothing(smoothing)
        self.smoothing.fill_(smoothing)

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute label smoothing with this module's eps."""
        return functional.label_smoothing_loss(logits, labels, self.smoothing, **options)

    def extra_repr(self) -> str:
        """Show eps when printed."""
        return f"smoothing={self.smoothing.item():.4g}"


class AdaptiveLabelSmoothingLoss(AdaptiveLoss, LabelSmoothingLoss):
    """Ours, not a paper's: label smoothing with an eps adapted to the temperature that fits held-out data.

    Args:
        smoothing: eps before the first update, in [-0.1, 0.5].
        **kwargs: As in `LabelSmoothingLoss`.

    Attributes:
        smoothing: eps, a scalar buffer.

    Raises:
        ValueError: If `smoothing` is out of range.

    >>> loss = AdaptiveLabelSmoothingLoss()
    >>> loss.steer(0.25)
    >>> loss
    AdaptiveLabelSmoothingLoss(smoothing=0.25)
    """

    follows = "temperature"
    steering_gain = 2.0  # over a run, per unit of log T

    def __init__(self, smoothing: float = 0.0, **kwargs) -> None:
        super().__init__(smoothing, **kwargs)
        self.initial = smoothing

    def reset(self) -> None:
        """Return to the eps for an untrained model."""
        self.set_smoothing(self.initial)

    def steer(self, change: float) -> None:
        """Add to eps and clip it to its range.

        Args:
            change: What to add.
        """
        low, high = functional.SMOOTHING_RANGE
        self.set_smoothing(min(max(self.smoothing.item() + change, low), high))

    def table(self) -> dict[str, float]:
        """Return eps as JSON can hold it, by the name of `set_table`'s argument."""
        return {"smoothing": self.smoothing.item()}

    def set_table(self, smoothing: float) -> None:
        """Set eps, as when a run resumes.

        Args:
            smoothing: The new eps.

        Raises:
            ValueError: If it is no number in [-0.1, 0.5]; eps is then unchanged.
        """
        found = table_numbers("smoothing", smoothing, (), self.smoothing)
        functional.check_smoothing(round(found.item(), 6))  # in float32 -0.1 lies below itself
        self.smoothing.copy_(found)

    def readings(self) -> dict[str, float]:
        """Return eps, for a log."""
        return self.table()
