"""Losses as modules: numbers in buffers, maths in `functional` and `gamma`; `LOSSES` names them all."""

import torch
from torch import Tensor

from hf_adafocal.losses import functional
from hf_adafocal.losses import gamma_table as gamma
from hf_adafocal.losses.base import AdaptiveLoss, FocalFamilyLoss, PerSampleLoss


class CrossEntropyLoss(FocalFamilyLoss):
    """Cross-entropy: gamma is 0.

    >>> CrossEntropyLoss()(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """

    gamma = 0.0


class FocalLoss(FocalFamilyLoss):
    """Focal loss with one gamma for all samples; below 0 it is inverse focal loss.

    Source: Lin et al. 2017, arXiv 1708.02002; gamma 3 for calibration: Mukhoti et al. 2020, arXiv 2002.09437.
    """

    def __init__(self, gamma: float = 3.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma

    def extra_repr(self) -> str:
        """Show gamma when printed."""
        return f"gamma={self.gamma}"


class InverseFocalLoss(FocalFamilyLoss):
    """Inverse focal loss `-(1 + p)^gamma log p`: `FocalLoss` with the gamma's sign turned.

    It makes predictions more certain, as a start for temperature scaling. Gamma was tuned per data set and model;
    values of the code that compares it with AURC losses (CalibWeightedRisk):

    | data          | ResNet-50 | ResNet-110 | Wide-ResNet | DenseNet-121 |
    | ------------- | --------- | ---------- | ----------- | ------------ |
    | CIFAR-10      | 2.0       | 3.5        | 2.5         | 2.0          |
    | CIFAR-100     | 2.0       | 1.5        | 3.0         | 1.5          |
    | Tiny-ImageNet | 2.3       |            |             |              |

    Errata: that code's class has gamma 0 as its default, which is cross-entropy; and it clamps p to at most 1 - 1e-9,
    which float32 rounds to 1.

    Args:
        gamma: As in the formula, so not negative; the default is that for ResNet-50 on CIFAR-10 and CIFAR-100.
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Raises:
        ValueError: If `gamma` is negative or not finite.

    Source: Wang, Feng and Zhang 2021, "Rethinking calibration of deep neural networks".
    """

    def __init__(self, gamma: float = 2.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma must be a finite number from 0, found {gamma}; a focal loss is FocalLoss.")
        self.gamma = -gamma

    def extra_repr(self) -> str:
        """Show gamma when printed."""
        return f"gamma={-self.gamma}"


class DualFocalLoss(FocalFamilyLoss):
    """Dual focal loss `-(1 - q_y + q_j)^gamma log q_y`, q_j the largest probability below that of the label.

    Gamma was tuned per data set and model, so the default is a convention (ResNet-50 on both CIFARs):

    | data          | ResNet-50 | ResNet-110 | Wide-ResNet | DenseNet-121 |
    | ------------- | --------- | ---------- | ----------- | ------------ |
    | CIFAR-10      | 5         | 4.5        | 2.6         | 5            |
    | CIFAR-100     | 5         | 6.1        | 3.9         | 3.4          |
    | Tiny-ImageNet | 2.3       |            |             |              |

    Errata: `DualFocalLoss()` of the authors' README has gamma 0, which is cross-entropy, summed. q_j is not the
    runner-up where the prediction is wrong, so the loss jumps where the label becomes the top class: with two classes
    and gamma 5 from 0.684 at p = 0.501 down to 0.022 at p = 0.499, the wrong side.

    Args:
        gamma: Focusing exponent, no unit; below 0 the inverse form.
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Source: Tao et al. 2023, arXiv 2305.13665.
    """

    def __init__(self, gamma: float = 5.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Dual focal loss with this gamma."""
        return functional.dual_focal_loss(logits, labels, self.gamma, **options)

    def extra_repr(self) -> str:
        """Show gamma when printed."""
        return f"gamma={self.gamma}"


class FLSD53Loss(FocalFamilyLoss):
    """Focal loss with gamma 5 where the label's probability is below 0.2, else 3.

    Source: Mukhoti et al. 2020, arXiv 2002.09437 (FLSD-53).
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.register_buffer("edges", torch.tensor(gamma.FLSD_53_EDGES), persistent=False)
        self.register_buffer("gammas", torch.tensor(gamma.FLSD_53_GAMMAS), persistent=False)

    def gamma(self, p: Tensor) -> Tensor:
        """Gamma of each sample from the probability of its label."""
        return gamma.lookup(p, self.edges, self.gammas)


class LabelSmoothingLoss(PerSampleLoss):
    """Label smoothing as PyTorch means it: the label's target is `1 - eps + eps / C`, the others' `eps / C`.

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
    """

    smoothing: Tensor

    def __init__(self, smoothing: float = 0.05, **kwargs) -> None:
        super().__init__(**kwargs)
        self.register_buffer("smoothing", torch.empty(()))
        self.set_smoothing(smoothing)

    def set_smoothing(self, smoothing: float) -> None:
        """Change eps.

        Raises:
            ValueError: If it is not in [-0.1, 0.5]; it is then unchanged.
        """
        functional.check_smoothing(smoothing)
        self.smoothing.fill_(smoothing)

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Label smoothing with this eps."""
        return functional.label_smoothing_loss(logits, labels, self.smoothing, **options)

    def extra_repr(self) -> str:
        """Show eps when printed."""
        return f"smoothing={self.smoothing.item():.4g}"


class AdaptiveLabelSmoothingLoss(AdaptiveLoss, LabelSmoothingLoss):
    """Ours, not a paper's: label smoothing whose eps follows the temperature that fits held-out data.

    Args:
        smoothing: eps before the first update, in [-0.1, 0.5].
        **kwargs: As in `LabelSmoothingLoss`.

    Attributes:
        smoothing: eps, a scalar buffer.

    Raises:
        ValueError: If `smoothing` is out of range.
    """

    follows = "temperature"
    steering_gain = 2.0  # over a run, per unit of log T

    def __init__(self, smoothing: float = 0.0, **kwargs) -> None:
        super().__init__(smoothing, **kwargs)
        self.initial = smoothing

    def reset(self) -> None:
        """Return to the eps of an untrained model."""
        self.set_smoothing(self.initial)

    def steer(self, change: float) -> None:
        """Add `change` to eps, within its range."""
        low, high = functional.SMOOTHING_RANGE
        self.set_smoothing(min(max(self.smoothing.item() + change, low), high))

    def table(self) -> dict[str, float]:
        """The state as JSON can hold it, by the names of `set_table`'s arguments."""
        return {"smoothing": self.smoothing.item()}

    def set_table(self, smoothing: float) -> None:
        """Set eps, as when a run resumes.

        Raises:
            ValueError: If it is not in [-0.1, 0.5].
        """
        functional.check_smoothing(round(smoothing, 6))  # in float32 -0.1 lies below itself
        self.smoothing.fill_(smoothing)

    def readings(self) -> dict[str, float]:
        """What a log shows."""
        return self.table()


class BrierLoss(PerSampleLoss):
    """The Brier score of the softmax, summed over classes.

    Errata: the class of Mukhoti et al.'s code needs a GPU (`get_device()` is -1 on the CPU) and takes the softmax over
    a dimension that it does not name; it divides by the batch size only, which is this mean.

    Source: Brier 1950; as a training loss Mukhoti et al. 2020, arXiv 2002.09437.
    """

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """The Brier score."""
        return functional.brier_loss(logits, labels, **options)


class ConfidencePenaltyLoss(PerSampleLoss):
    """Cross-entropy minus `penalty` times the entropy of the prediction.

    Errata: no code of the authors. netcal's `ConfidencePenalty` module adds the entropy instead (its function
    subtracts it), averages over classes as well as samples, and raises TypeError with a threshold.

    Args:
        penalty: The paper's beta; the default is its value for CIFAR-10, other tasks there took up to 2.
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Raises:
        ValueError: If `penalty` is negative or not finite.

    Source: Pereyra et al. 2017, arXiv 1701.06548.
    """

    def __init__(self, penalty: float = 0.1, **kwargs) -> None:
        super().__init__(**kwargs)
        functional.check_penalty(penalty)
        self.penalty = penalty

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Cross-entropy minus the entropy with this penalty."""
        return functional.confidence_penalty_loss(logits, labels, self.penalty, **options)

    def extra_repr(self) -> str:
        """Show the penalty when printed."""
        return f"penalty={self.penalty}"
