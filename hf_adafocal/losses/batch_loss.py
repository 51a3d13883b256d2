"""Per-sample loss plus a weighted auxiliary term that is computed over the whole batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_adafocal.losses import aurc, calibration_penalties, topology
from hf_adafocal.losses.base import AdaptiveLoss, ClassificationLoss, PerSampleLoss
from hf_adafocal.losses.focal import CrossEntropyLoss, FocalLoss
from hf_adafocal.losses.layout import of_model


class Term(NamedTuple):
    """An auxiliary term computed over the whole batch, with its authors' weight and settings.

    Attributes:
        function: From logits and labels to one number.
        weight: The authors' weight of the term.
        replaces: The term takes the place of the base, `(1 - weight) base + weight term`; else it is added to it.
        base: The per-sample loss that it is added to if no other is given.
        settings: Default arguments of `CombinedLoss` for this term, `start` among them.
        least_batch: Shape of logits that the function takes at least.
    """

    function: Callable[..., Tensor]
    weight: float
    replaces: bool = False
    base: type[PerSampleLoss] = CrossEntropyLoss
    settings: Mapping[str, Any] = {}
    least_batch: tuple[int, ...] = (1, 2)


TERMS = {
    "mmce": Term(calibration_penalties.mmce, 2.0),
    "mmce_w": Term(calibration_penalties.mmce_weighted, 2.0),
    "dca": Term(calibration_penalties.dca, 5.0),
    "mdca": Term(calibration_penalties.mdca, 1.0),
    "soft_ece": Term(calibration_penalties.soft_binned_ece, 1.0),
    "soft_ece_label_binned": Term(calibration_penalties.soft_label_binned_ece, 1.0),
    "dece": Term(calibration_penalties.differentiable_ece, 0.5),
    "aurc": Term(aurc.aurc, 1.0, replaces=True),
    "aurc_regularised": Term(aurc.regularised_aurc, 0.3, replaces=True),
    "selective_au": Term(aurc.selective_au, 1.0, replaces=True),
    "topological_focal": Term(
        topology.topological_distance,
        0.001,
        base=FocalLoss,
        settings={"start": 0.5, "construction": "V"},
        least_batch=(1, 2, 1, 1),
    ),
}


class CombinedLoss(ClassificationLoss):
    """Per-sample loss plus a weighted term of the whole batch: `base + auxiliary_weight * term`.

    "aurc", "aurc_regularised" and "selective_au" are losses themselves and take a share of the base instead:
    `(1 - auxiliary_weight) base + auxiliary_weight term`, and at weight 1 all of it.

    The batch is that of one call: the micro-batch of one device, ignored labels left out, the positions of dense
    targets as samples. A term is no mean over samples, so its value depends on that batch: four accumulated batches
    of 8 are not one of 32, on any number of processes. What is kept is the scale: with `num_items_in_batch` a
    micro-batch adds `term * count / num_items_in_batch`, `count` its labels or the sum of their class weights, so that
    the optimizer step follows the mean of its micro-batches' terms beside a base that is exactly the base's mean.

    Default weights: 2 for MMCE and MMCE_w (Mukhoti et al.'s comparison; the MMCE code has 4, and both divide twice in
    MMCE_w, so that there it weighs less); 5 for DCA as in copies of its authors' code (MDCA's authors run DCA with 1);
    1 for MDCA; 0.5 for DECE, as in its authors' objective; 0.3 and 1 for the AURC losses. The soft-binned errors'
    weight 1 is ours: their paper tunes it. So are weight 0.001 and start 0.5 of "topological_focal": the weight that
    cost no overlap in `model_cards/topology.md`.

    Args:
        term: Which term, a name in `TERMS`.
        base: The per-sample loss; if left out focal loss for "topological_focal", else cross-entropy. With an
            `AdaFocalLoss` its table moves as it does alone. Class weights belong here. It must have reduction "mean".
        auxiliary_weight: Weight of the term; the authors' if left out.
        weight: Class weights make no sense for a term: an error. Give them to the base.
        ignore_index: Label of samples that do not count; that of the base if left out.
        start: Share of the run, in [0, 1], after which the term is added; until then the base trains alone. If left
            out 0.5 for "topological_focal", which needs a model that already sees something, else 0.
        reduction: "mean", or "sum" for the mean times `count`. A term has no value per sample, so "none" is an error.
        **settings: Further arguments of the term's function in `calibration_penalties`, `aurc` or `topology`.

    Attributes:
        progress: Share of the run that is done, which `start` is compared with. `AdaFocalTrainer` sets it before each
            step; a loop of your own sets it too, or leaves it at 1, where the term always counts.

    Raises:
        ValueError: If a name, a number or a combination makes no sense.
        TypeError: If a setting is not one of the term's.
        ImportError: If the term needs a library that is not installed.

    >>> CombinedLoss("mmce", auxiliary_weight=2.0)(torch.zeros(1, 2), torch.tensor([0]))  # log 2 + 2 / 2
    tensor(1.6931)
    """

    takes_weights = False

    def __init__(
        self,
        term: str,
        base: PerSampleLoss | None = None,
        *,
        auxiliary_weight: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        start: float | None = None,
        reduction: str = "mean",
        **settings: Any,
    ) -> None:
        super().__init__()
        if term not in TERMS:
            raise ValueError(f"term must be one of {', '.join(TERMS)}; found {term!r}.")
        _check_arguments(term, weight, reduction)
        kind = TERMS[term]
        defaults = dict(kind.settings)
        self.start = _share_of_run(defaults.pop("start", 0.0) if start is None else start)
        defaults.pop("start", None)
        self.progress = 1.0
        self.term, self.settings, self.reduction = term, {**defaults, **settings}, reduction
        self.function = kind.function
        logits = torch.zeros(kind.least_batch)
        self.function(logits, logits[:, 0].long(), **self.settings)  # refuses settings now
        self.auxiliary_weight = kind.weight if auxiliary_weight is None else auxiliary_weight
        self.base_weight = 1 - self.auxiliary_weight if kind.replaces else 1.0
        if base is None:
            base = kind.base(ignore_index=-100 if ignore_index is None else ignore_index)
        _check_weights(term, base, self.auxiliary_weight, self.base_weight)
        _check_base(base, ignore_index)
        self.base = base

    @property
    def ignore_index(self) -> int:
        """Label of samples that contribute nothing: the base's."""
        return self.base.ignore_index

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        self.base.ignore_index = value

    @property
    def adaptive(self) -> AdaptiveLoss | None:
        """The base if it is updated from held-out data, else None."""
        return self.base.adaptive

    def count(self, labels: Tensor) -> Tensor:
        """Count the labels that are not ignored, or sum the base's class weights over them."""
        return self.base.count(labels)

    def forward(self, logits: Tensor | Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the loss of a batch, as `ClassificationLoss.forward`."""
        logits, labels = of_model(logits, labels)
        divisor = 1 if self.reduction == "sum" else num_items_in_batch
        if self.progress < self.start:
            return self.base(logits, labels, divisor)
        term = self.function(logits, labels, **self.settings, ignore_index=self.ignore_index)
        if divisor is not None:
            term = term * self.count(labels) / divisor
        if self.base_weight == 0:
            return self.auxiliary_weight * term
        return self.base_weight * self.base(logits, labels, divisor) + self.auxiliary_weight * term

    def extra_repr(self) -> str:
        """Show the term, its weight and its settings when printed."""
        started = {"start": self.start} if self.start else {}
        settings = {"auxiliary_weight": self.auxiliary_weight, **started, **self.settings}
        return ", ".join([repr(self.term), *(f"{name}={value}" for name, value in settings.items())])


def _share_of_run(start: float) -> float:
    if not 0 <= start <= 1:
        raise ValueError(f"start must be a share of the run in [0, 1], found {start}.")
    return start


def _check_arguments(term: str, weight: Tensor | None, reduction: str) -> None:
    if weight is not None:
        raise ValueError(
            f"Class weights make no sense for {term!r}, which asks how often the confidences of a batch are right. "
            "Give them to the base: base=CrossEntropyLoss(weight=...)."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction must be 'mean' or 'sum', found {reduction!r}: {term!r} is a number of the whole batch and has "
            "no value per sample. For values per sample call the base."
        )


def _check_weights(term: str, base: PerSampleLoss, auxiliary_weight: float, base_weight: float) -> None:
    if not (auxiliary_weight >= 0 and base_weight >= 0 and auxiliary_weight < float("inf")):
        limits = "lie in [0, 1]" if base_weight != 1 else "be a finite number from 0"
        raise ValueError(f"auxiliary_weight of {term!r} must {limits}, found {auxiliary_weight}.")
    if base_weight == 0 and type(base) is not CrossEntropyLoss:
        raise ValueError(
            f"With auxiliary_weight=1, {term!r} replaces its base: {type(base).__name__} would do nothing. Choose a "
            "weight below 1."
        )


def _check_base(base: PerSampleLoss, ignore_index: int | None) -> None:
    if not isinstance(base, PerSampleLoss):
        raise ValueError(f"base must be a per-sample loss of this package, found {type(base).__name__}.")
    if base.reduction != "mean":
        raise ValueError(f"The base must have reduction 'mean', found {base.reduction!r}; set it on CombinedLoss.")
    if ignore_index is not None and ignore_index != base.ignore_index:
        raise ValueError(
            f"ignore_index is {ignore_index} here and {base.ignore_index} in the base; leave it out here."
        )
