"""Losses as modules: numbers in buffers, maths in `functional` and `gamma`."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_adafocal import functional, gamma


class FocalFamilyLoss(nn.Module):
    """The frame of the focal family: a member says what its gamma is and nothing else.

    Call it with logits and labels (`functional.focal_loss` gives shapes and errors), or hand it to a stock `Trainer`
    as `compute_loss_func`: then it takes the model's outputs, and `num_items_in_batch` so that accumulated
    micro-batches and several processes add up to one mean.

    Args:
        weight: Weight of each class, shape `(C,)`.
        ignore_index: Label of samples that contribute nothing.
        reduction: "mean", "sum" or "none".
    """

    gamma: functional.Gamma  # a number, or a method from the label's probability to gamma
    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor | Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Loss in nats.

        Args:
            logits: Shape `(N, C, d1, ...)`, or a model output that carries them as `logits`.
            labels: Class indices, shape `(N, d1, ...)`.
            num_items_in_batch: Labels in the whole optimizer step; the sum is divided by it instead of being reduced.
        """
        logits = getattr(logits, "logits", logits)
        reduction = self.reduction if num_items_in_batch is None else "sum"
        loss = functional.focal_loss(
            logits, labels, self.gamma, weight=self.weight, ignore_index=self.ignore_index, reduction=reduction
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch


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


class AdaFocalLoss(FocalFamilyLoss):
    """AdaFocal: focal loss whose gamma depends on the label's probability and follows the calibration gap.

    The table starts with bins of one width and one gamma; `update` moves it after each look at held-out data.

    Args:
        num_bins: Bins of the table.
        gamma_initial: Gamma of every bin at the start; below `switch` in size it jumps at the first update.
        lambda_: Step size of the update.
        switch: Where focal and inverse focal loss meet (the paper's S_th).
        gamma_min: Lowest gamma.
        gamma_max: Highest gamma.
        **kwargs: `weight`, `ignore_index` and `reduction` of `FocalFamilyLoss`.

    Attributes:
        edges: Bin edges on the label's probability, shape `(num_bins + 1,)`.
        gammas: Gamma of each bin, shape `(num_bins,)`.

    Raises:
        ValueError: If `gamma_initial` lies outside [gamma_min, gamma_max] or `num_bins` is below 1.

    Source: Ghosh et al. 2022, arXiv 2211.11838; defaults are those of the authors' code.
    """

    edges: Tensor
    gammas: Tensor

    def __init__(
        self,
        num_bins: int = 15,
        gamma_initial: float = 1.0,
        *,
        lambda_: float = 1.0,
        switch: float = 0.2,
        gamma_min: float = -2.0,
        gamma_max: float = 20.0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, found {num_bins}.")
        if not gamma_min <= gamma_initial <= gamma_max:
            raise ValueError(
                f"gamma_initial must lie in [{gamma_min}, {gamma_max}] (gamma_min, gamma_max), found {gamma_initial}."
            )
        self.num_bins, self.gamma_initial = num_bins, gamma_initial
        self.rule = {"lambda_": lambda_, "switch": switch, "gamma_min": gamma_min, "gamma_max": gamma_max}
        self.register_buffer("edges", torch.empty(num_bins + 1))
        self.register_buffer("gammas", torch.empty(num_bins))
        self.reset()

    def reset(self) -> None:
        """Return to the table of an untrained model."""
        self.edges.copy_(torch.linspace(0, 1, self.num_bins + 1))
        self.gammas.fill_(self.gamma_initial)

    def gamma(self, p: Tensor) -> Tensor:
        """Gamma of each sample from the probability of its label."""
        return gamma.lookup(p, self.edges, self.gammas)

    def update(self, edges: Any, gap: Any) -> None:
        """Move the table after a look at held-out data.

        Args:
            edges: Equal-mass edges of the held-out confidences, shape `(num_bins + 1,)`; they become the table's.
            gap: Confidence minus accuracy in each of those bins, shape `(num_bins,)`.

        Raises:
            ValueError: If a shape does not fit, or a number is not finite; the table is then unchanged.
        """
        gap = torch.as_tensor(gap, dtype=self.gammas.dtype, device=self.gammas.device)
        self.set_table(edges, gamma.update(self.gammas, gap, **self.rule))

    def set_table(self, edges: Any, gammas: Any) -> None:
        """Replace the table, as when a run resumes.

        Args:
            edges: Ascending probabilities, shape `(num_bins + 1,)`.
            gammas: Gamma of each bin, shape `(num_bins,)`.

        Raises:
            ValueError: If a shape does not fit, a number is not finite, or edges do not ascend.
        """
        new = {"edges": torch.as_tensor(edges), "gammas": torch.as_tensor(gammas)}
        for name, values in new.items():
            expected = getattr(self, name).shape
            if values.shape != expected or not torch.isfinite(values).all():
                raise ValueError(
                    f"{name} must be {expected.numel()} finite numbers for {self.num_bins} bins, "
                    f"found {values.tolist()}."
                )
        if (new["edges"].diff() < 0).any():
            raise ValueError(f"edges must ascend, found {new['edges'].tolist()}.")
        self.edges.copy_(new["edges"])
        self.gammas.copy_(new["gammas"])

    def extra_repr(self) -> str:
        """Show the settings when printed."""
        settings = {"num_bins": self.num_bins, "gamma_initial": self.gamma_initial, **self.rule}
        return ", ".join(f"{name}={value}" for name, value in settings.items())


LOSSES: dict[str, type[FocalFamilyLoss]] = {
    "cross_entropy": CrossEntropyLoss,
    "focal": FocalLoss,
    "flsd_53": FLSD53Loss,
    "adafocal": AdaFocalLoss,
}
