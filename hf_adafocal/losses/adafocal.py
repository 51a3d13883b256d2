"""Adaptive focal losses: gamma is a table over bins, updated from the calibration gap on held-out data."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from hf_adafocal.losses import functional, gamma_table
from hf_adafocal.losses.base import AdaptiveLoss, FocalFamilyLoss, finite, table_numbers


class AdaFocalLoss(AdaptiveLoss, FocalFamilyLoss):
    """AdaFocal: focal loss with a gamma per bin of the label's probability, updated from the bin's calibration gap.

    The table starts with bins of one width and one gamma; `update` moves it after each evaluation of held-out data.

    Args:
        num_bins: Bins of the table.
        gamma_initial: Gamma of every bin at the start; below `switch` in size it jumps at the first update.
        lambda_: Step size of the update.
        switch: Where focal and inverse focal loss meet (the paper's S_th).
        gamma_min: Lowest gamma.
        gamma_max: Highest gamma.
        **kwargs: `weight`, `ignore_index` and `reduction` of `ClassificationLoss`.

    Attributes:
        edges: Bin edges on the label's probability, shape `(num_bins + 1,)`.
        gammas: Gamma of each bin, shape `(num_bins,)`.

    Raises:
        ValueError: If `gamma_initial` lies outside [gamma_min, gamma_max], `num_bins` is below 1, or another number is
            not finite, or below 0 where that makes no sense.

    Source: Ghosh et al. 2022, arXiv 2211.11838; defaults are those of the authors' code.

    >>> loss = AdaFocalLoss(num_bins=2)
    >>> loss(torch.zeros(1, 2), torch.tensor([0]))  # gamma 1: log 2 / 2
    tensor(0.3466)
    >>> loss.update(edges=[0.4, 0.7, 0.9], gap=[0.1, 0.0])  # confident by 0.1 too much in the lower bin
    >>> loss.readings()
    {'gamma_min': 1.0, 'gamma_mean': 1.052..., 'gamma_max': 1.105...}
    """

    edges: Tensor
    gammas: Tensor
    follows = "bins"

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
        settings = {"lambda_": lambda_, "switch": switch, "gamma_min": gamma_min, "gamma_max": gamma_max}
        for name, value in settings.items():
            finite(name, value, 0 if name in ("lambda_", "switch") else -math.inf)
        if not gamma_min <= gamma_initial <= gamma_max:
            raise ValueError(
                f"gamma_initial must lie in [{gamma_min}, {gamma_max}] (gamma_min, gamma_max), found {gamma_initial}."
            )
        self.num_bins, self.gamma_initial = num_bins, gamma_initial
        self.update_settings = settings
        self.register_buffer("edges", torch.empty(num_bins + 1))
        self.register_buffer("gammas", torch.empty(num_bins))
        self.reset()

    def reset(self) -> None:
        """Return to the table for an untrained model."""
        self.edges.copy_(torch.linspace(0, 1, self.num_bins + 1))
        self.gammas.fill_(self.gamma_initial)

    def gamma(self, p: Tensor) -> Tensor:
        """Look up gamma by the probability of the label.

        Args:
            p: Probability of the label, any shape.

        Returns:
            Gammas, the shape of `p`.
        """
        return gamma_table.lookup(p, self.edges, self.gammas)

    def update(self, edges: Any, gap: Any) -> None:
        """Update the table from the calibration of held-out data, as the paper does once an epoch.

        Args:
            edges: Equal-mass edges of the held-out confidences, shape `(num_bins + 1,)`; they become the table's.
            gap: Confidence minus accuracy in each of those bins, shape `(num_bins,)`.

        Raises:
            ValueError: If a shape does not fit, or a number is not finite; the table is then unchanged.
        """
        self.set_table(edges, self._moved(self.gammas, gap))

    def update_from(self, statistics: Any) -> None:
        """Update the table from the statistics of held-out data, by `update`.

        Args:
            statistics: Has `edges` and `gap`, as `BinStats`.

        Raises:
            ValueError: As `update`.
        """
        self.update(statistics.edges, statistics.gap)

    def readings(self) -> dict[str, float]:
        """Summarise the gammas for a log: `gamma_min`, `gamma_mean` and `gamma_max` over the bins."""
        gammas = self.gammas.tolist()
        return {"gamma_min": min(gammas), "gamma_mean": sum(gammas) / len(gammas), "gamma_max": max(gammas)}

    def table(self) -> dict[str, list]:
        """Return the table as plain lists, by the names of `set_table`'s arguments."""
        return {"edges": self.edges.tolist(), "gammas": self.gammas.tolist()}

    def set_table(self, edges: Any, gammas: Any) -> None:
        """Replace the table, as when a run resumes.

        Args:
            edges: Ascending probabilities, shape `(num_bins + 1,)`.
            gammas: Gamma of each bin, shape `(num_bins,)`.

        Raises:
            ValueError: If a shape does not fit, a number is not finite, or edges do not ascend.
        """
        edges = table_numbers("edges", edges, (self.num_bins + 1,), self.edges)
        gammas = table_numbers("gammas", gammas, (self.num_bins,), self.gammas)
        if (edges.diff() < 0).any():
            raise ValueError(f"edges must ascend, found {edges.tolist()}.")
        self.edges.copy_(edges)
        self.gammas.copy_(gammas)

    def _moved(self, gammas: Tensor, gap: Any) -> Tensor:
        gap = torch.as_tensor(gap, dtype=gammas.dtype, device=gammas.device)
        return gamma_table.update(gammas, gap, **self.update_settings)

    def extra_repr(self) -> str:
        """Show the settings when printed."""
        settings = {"num_bins": self.num_bins, "gamma_initial": self.gamma_initial, **self.update_settings}
        return ", ".join(f"{name}={value}" for name, value in settings.items())


class AdaDualFocalLoss(AdaFocalLoss):
    """Dual focal loss with AdaFocal's table of gammas: bins and factor take `q_y - q_j` where AdaFocal takes q_y.

    Args, attributes and errors are those of `AdaFocalLoss`, and so are updates: edges are held-out confidences and the
    gap is theirs, as in the code of dual focal loss's authors. That code's gamma never falls below 0 (it multiplies by
    `exp(gap)`); here the rule is AdaFocal's, and a negative gamma gives the inverse form `(1 + q_y - q_j)^|gamma|`.

    Source: Tao et al. 2023, arXiv 2305.13665 (their code; the paper does not describe it).

    >>> AdaDualFocalLoss()(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([0]))  # 0.7 -log 0.6
    tensor(0.3576)
    """

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute dual focal loss with gamma from the table."""
        return functional.dual_focal_loss(logits, labels, self.gamma, **options)


class ClasswiseAdaFocalLoss(AdaFocalLoss):
    """AdaFocal with a table of gammas per class, shrunk toward one that all classes share; ours, not a paper's.

    Bins are the same for all classes. Every table moves by AdaFocal's rule, the shared one by the gap of all held-out
    samples in a bin, a class's own by the gap of those that were predicted as that class: conditional on the predicted
    class a calibrated model has no gap, conditional on the true one it has. A training sample with label k meets
    `w own_k + (1 - w) shared`, `w = n_k / (n_k + prior)`, n_k the held-out samples predicted as k at the last update.

    Before the first update with class statistics it is `AdaFocalLoss`.

    Args:
        num_bins: As in `AdaFocalLoss`.
        gamma_initial: As in `AdaFocalLoss`.
        prior: Held-out samples of a class at which its own table counts as much as the shared one.
        **kwargs: The other arguments of `AdaFocalLoss`.

    Attributes:
        edges: Bin edges on the label's probability, shape `(num_bins + 1,)`.
        gammas: The shared table, shape `(num_bins,)`.
        class_gammas: Own table of each class, shape `(C, num_bins)`; no rows before the first update.
        class_counts: n_k of each class, shape `(C,)`.

    Raises:
        ValueError: As `AdaFocalLoss`, or if `prior` is not above 0.

    >>> loss = ClasswiseAdaFocalLoss(num_bins=1)
    >>> loss.update([0.2, 0.9], [0.0], class_gap=[[0.2], [0.0]], class_counts=[150, 0])
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))  # gammas 1.11 and 1
    tensor(0.3338)
    """

    needs_class_statistics = True
    class_gammas: Tensor
    class_counts: Tensor

    def __init__(self, num_bins: int = 15, gamma_initial: float = 1.0, *, prior: float = 150.0, **kwargs) -> None:
        if not 0 < prior < float("inf"):
            raise ValueError(f"prior must be a finite number above 0, found {prior}.")
        super().__init__(num_bins, gamma_initial, **kwargs)
        self.prior = prior

    def reset(self) -> None:
        """Return to the shared table for an untrained model."""
        super().reset()
        self._set_classes(self.gammas.new_empty(0, self.num_bins), self.gammas.new_empty(0))

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute focal loss with gamma from the table of the label's class."""
        num_classes = len(self.class_gammas)
        if num_classes == 0:
            return super().formula(logits, labels, **options)
        if logits.ndim > 1 and logits.shape[1] != num_classes:
            raise ValueError(f"Expected logits of {num_classes} classes, one per table, found {tuple(logits.shape)}.")
        gammas = gamma_table.pool(self.class_gammas, self.gammas, self.class_counts, self.prior)

        def of_class(p: Tensor) -> Tensor:
            return gamma_table.lookup_by_class(p, labels.long().clamp(0, num_classes - 1), self.edges, gammas)

        return functional.focal_loss(logits, labels, of_class, **options)

    def update(self, edges: Any, gap: Any, class_gap: Any = None, class_counts: Any = None) -> None:
        """Update all tables from the calibration of held-out data.

        Args:
            edges: As in `AdaFocalLoss.update`.
            gap: As in `AdaFocalLoss.update`.
            class_gap: The same gap of the samples predicted as each class, shape `(C, num_bins)`; 0 where there are
                none. Without it only the shared table moves, and a warning says so.
            class_counts: How many samples were predicted as each class, shape `(C,)`.

        Raises:
            ValueError: If a shape does not fit or a number is not finite; the tables are then unchanged.
        """
        if class_gap is None or class_counts is None:
            warnings.warn(
                "ClasswiseAdaFocalLoss got no statistics of single classes, so only the table that all classes share "
                "moves. Pass class_gap and class_counts to `update`.",
                stacklevel=2,
            )
            self.set_table(edges, self._moved(self.gammas, gap), self.class_gammas, self.class_counts)
            return
        class_gap = torch.as_tensor(class_gap, dtype=self.gammas.dtype, device=self.gammas.device)
        own = self.class_gammas
        if len(own) == 0 and class_gap.ndim == 2:
            own = self.gammas.expand(len(class_gap), -1)
        self.set_table(edges, self._moved(self.gammas, gap), self._moved(own, class_gap), class_counts)

    def update_from(self, statistics: Any) -> None:
        """Update all tables from the statistics of held-out data, by `update`.

        Args:
            statistics: Has `edges` and `gap`, and `class_gap` and `class_counts` if class tables are to move.

        Raises:
            ValueError: As `update`.
        """
        of_classes = (getattr(statistics, name, None) for name in ("class_gap", "class_counts"))
        self.update(statistics.edges, statistics.gap, *of_classes)

    def set_table(self, edges: Any, gammas: Any, class_gammas: Any = (), class_counts: Any = ()) -> None:
        """Replace the tables, as when a run resumes.

        Args:
            edges: As in `AdaFocalLoss.set_table`.
            gammas: The shared table, as in `AdaFocalLoss.set_table`.
            class_gammas: Own table of each class, shape `(C, num_bins)`; none to have the shared table alone.
            class_counts: Held-out samples of each class, shape `(C,)`, not negative.

        Raises:
            ValueError: As `AdaFocalLoss.set_table`; the tables are then unchanged.
        """
        own = table_numbers("class_gammas", class_gammas, None, self.gammas)
        if own.numel() == 0:
            own = own.new_empty(0, self.num_bins)
        num_classes = len(self.class_gammas) or len(own)
        if own.shape not in ((0, self.num_bins), (num_classes, self.num_bins)):
            raise ValueError(
                f"class_gammas must have {num_classes} rows of {self.num_bins} bins, found shape {tuple(own.shape)}."
            )
        counts = table_numbers("class_counts", class_counts, own.shape[:1], self.gammas)
        if (counts < 0).any():
            raise ValueError(f"class_counts must be numbers from 0, found {counts.tolist()}.")
        super().set_table(edges, gammas)
        self._set_classes(own.clone(), counts.clone())

    def table(self) -> dict[str, list]:
        """Return the tables as plain lists, by the names of `set_table`'s arguments."""
        of_classes = {"class_gammas": self.class_gammas.tolist(), "class_counts": self.class_counts.tolist()}
        return {**super().table(), **of_classes}

    def _set_classes(self, class_gammas: Tensor, class_counts: Tensor) -> None:
        self.register_buffer("class_gammas", class_gammas)
        self.register_buffer("class_counts", class_counts)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved = state_dict.get(f"{prefix}class_gammas")
        if saved is not None:  # as many classes as were saved
            self._set_classes(self.gammas.new_empty(saved.shape), self.gammas.new_empty(saved.shape[:1]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the settings when printed."""
        return f"{super().extra_repr()}, prior={self.prior}"
