"""Focal losses with a fixed gamma as modules, and cross-entropy, which is focal loss with gamma 0."""

import torch
from torch import Tensor

from hf_adafocal.losses import functional, gamma_table
from hf_adafocal.losses.base import FocalFamilyLoss, finite


class CrossEntropyLoss(FocalFamilyLoss):
    """Cross-entropy: the values of `torch.nn.CrossEntropyLoss`, computed in float32 or wider.

    Args:
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    >>> CrossEntropyLoss()(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """

    gamma = 0.0


class FocalLoss(FocalFamilyLoss):
    """Focal loss `-(1 - p)^gamma log p` with one gamma for all samples; below 0 it is inverse focal loss.

    Args:
        gamma: Focusing exponent, no unit.
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Raises:
        ValueError: If `gamma` is not finite.

    Source: Lin et al. 2017, arXiv 1708.02002; gamma 3 for calibration: Mukhoti et al. 2020, arXiv 2002.09437.

    >>> FocalLoss(gamma=1.0)(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 2
    tensor(0.3466)
    """

    def __init__(self, gamma: float = 3.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = finite("gamma", gamma)

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

    >>> InverseFocalLoss(gamma=1.0)(torch.zeros(1, 2), torch.tensor([0]))  # 1.5 log 2
    tensor(1.0397)
    """

    gamma: float

    def __init__(self, gamma: float = 2.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = -finite("gamma", gamma, 0)  # a focal loss is FocalLoss

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

    Raises:
        ValueError: If `gamma` is not finite.

    Source: Tao et al. 2023, arXiv 2305.13665.

    >>> DualFocalLoss(gamma=1.0)(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([0]))  # 0.7 -log 0.6
    tensor(0.3576)
    """

    def __init__(self, gamma: float = 5.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = finite("gamma", gamma)

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute dual focal loss with this module's gamma."""
        return functional.dual_focal_loss(logits, labels, self.gamma, **options)

    def extra_repr(self) -> str:
        """Show gamma when printed."""
        return f"gamma={self.gamma}"


class FLSD53Loss(FocalFamilyLoss):
    """FLSD-53: focal loss with gamma 5 where the label's probability is below 0.2, else 3.

    Args:
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Source: Mukhoti et al. 2020, arXiv 2002.09437 (FLSD-53).

    >>> FLSD53Loss()(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 8
    tensor(0.0866)
    """

    edges: Tensor
    gammas: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.register_buffer("edges", torch.tensor(gamma_table.FLSD_53_EDGES), persistent=False)
        self.register_buffer("gammas", torch.tensor(gamma_table.FLSD_53_GAMMAS), persistent=False)

    def gamma(self, p: Tensor) -> Tensor:
        """Look up gamma by the probability of the label."""
        return gamma_table.lookup(p, self.edges, self.gammas)
