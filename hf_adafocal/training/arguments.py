"""Training arguments of a calibrated fine-tune: those of `TrainingArguments`, and the loss with its settings."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import TrainingArguments

from hf_adafocal.betti import CONSTRUCTIONS
from hf_adafocal.data.overlap import POLICIES
from hf_adafocal.losses.batch_loss import TERMS
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES, build_loss, name_of_class
from hf_adafocal.training.sample_rows import is_lower_better

BATCH_LOSSES = tuple(TERMS)
ADAFOCAL_LOSSES = ("adafocal", "ada_dual_focal", "classwise_adafocal")
REDUCTIONS = ("mean", "sum")
DEFAULT_LOSS, DEFAULT_BINS = "adafocal", 15


class LossArgument(NamedTuple):
    """A training argument that only some losses use.

    Attributes:
        keyword: Of the loss's constructor.
        losses: Names of the losses that take it.
    """

    keyword: str
    losses: tuple[str, ...]


LOSS_ARGUMENTS = {
    "focal_gamma": LossArgument("gamma", ("focal",)),
    "inverse_focal_gamma": LossArgument("gamma", ("inverse_focal",)),
    "dual_focal_gamma": LossArgument("gamma", ("dual_focal",)),
    "smoothing": LossArgument("smoothing", ("label_smoothing", "adaptive_label_smoothing")),
    "entropy_penalty": LossArgument("penalty", ("confidence_penalty",)),
    "class_prior": LossArgument("prior", ("classwise_adafocal",)),
    "gamma_initial": LossArgument("gamma_initial", ADAFOCAL_LOSSES),
    "gamma_lambda": LossArgument("lambda_", ADAFOCAL_LOSSES),
    "gamma_switch": LossArgument("switch", ADAFOCAL_LOSSES),
    "gamma_min": LossArgument("gamma_min", ADAFOCAL_LOSSES),
    "gamma_max": LossArgument("gamma_max", ADAFOCAL_LOSSES),
    "topology_start": LossArgument("start", ("topological_focal",)),
    "topology_construction": LossArgument("construction", ("topological_focal",)),
}
# Arguments of the callback that steers adaptive label smoothing.
STEERING_ARGUMENTS = ("calibration_steps", "calibration_samples", "steering_gain")


def _argument(help: str, **metadata: Any) -> Any:
    return field(default=None, metadata={"help": help, **metadata})


@dataclass
class AdaFocalTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the loss, its settings and the calibration set.

    With nothing said, the loss is AdaFocal by its paper's rule: 15 bins of equal mass, gamma 1 at the start, an update
    per evaluation of the calibration set.

    Attributes:
        greater_is_better: False for `metric_for_best_model` among our metrics that fall as a model improves (`ece`,
            `ada_ece`, `nll`, `brier`, `refinement`), unless you say otherwise.

    Raises:
        ValueError: If a choice is unknown, a number is NaN or out of range, or a setting belongs to a loss that is not
            in use.

    >>> AdaFocalTrainingArguments("out", use_cpu=True).build_loss()
    AdaFocalLoss(num_bins=15, gamma_initial=1.0, lambda_=1.0, switch=0.2, gamma_min=-2.0, gamma_max=20.0)
    """

    loss: str = field(
        default=DEFAULT_LOSS, metadata={"help": f"The training loss: {', '.join(LOSSES)}.", "choices": list(LOSSES)}
    )
    loss_reduction: str = field(
        default="mean",
        metadata={
            "help": "Mean over the samples of an optimizer step, or their sum as in the code of AdaFocal's authors "
            "(which also clips gradients: max_grad_norm=2).",
            "choices": list(REDUCTIONS),
        },
    )
    num_bins: int = field(
        default=DEFAULT_BINS, metadata={"help": "Bins of AdaFocal's table and of eval_ece and eval_ada_ece."}
    )
    class_weights: str | None = _argument(
        "Weight of each class in the loss: balanced (from the training labels), or numbers separated by commas."
    )
    focal_gamma: float | None = _argument("Gamma of loss='focal' (default 3); below 0 it is inverse focal loss.")
    gamma_initial: float | None = _argument("AdaFocal's gamma before the first update (default 1).")
    gamma_lambda: float | None = _argument("Step size of AdaFocal's update (default 1).")
    gamma_switch: float | None = _argument("Where AdaFocal switches to inverse focal loss, S_th (default 0.2).")
    gamma_min: float | None = _argument("AdaFocal's lowest gamma (default -2).")
    gamma_max: float | None = _argument("AdaFocal's highest gamma (default 20).")
    class_prior: float | None = _argument(
        "Held-out samples of a class at which loss='classwise_adafocal' weighs its own gammas and the shared ones "
        "equally (default 150)."
    )
    inverse_focal_gamma: float | None = _argument("Gamma of loss='inverse_focal', not negative (default 2).")
    dual_focal_gamma: float | None = _argument("Gamma of loss='dual_focal' (default 5).")
    smoothing: float | None = _argument(
        "Epsilon of loss='label_smoothing' (default 0.05), and of loss='adaptive_label_smoothing' at the start "
        "(default 0); in [-0.1, 0.5], below 0 it sharpens."
    )
    entropy_penalty: float | None = _argument("Beta of loss='confidence_penalty' (default 0.1).")
    auxiliary_weight: float | None = _argument(
        f"Weight of the batch term in loss={'/'.join(BATCH_LOSSES)} (default: that of its authors)."
    )
    auxiliary_base: str | None = _argument(
        "The per-sample loss beside the batch term (default cross_entropy; focal for topological_focal).",
        choices=list(PER_SAMPLE_LOSSES),
    )
    topology_start: float | None = _argument(
        "Share of the run after which topological_focal adds its term (default 0.5)."
    )
    topology_construction: str | None = _argument(
        "V: pixels join through faces (default), T: through corners too.",
        choices=list(CONSTRUCTIONS),
    )
    steering_gain: float | None = _argument(
        "How much loss='adaptive_label_smoothing' moves epsilon over a run per unit of log temperature (default 2)."
    )
    calibration_steps: int | None = _argument(
        "Optimizer steps between updates of loss='adaptive_label_smoothing' (default: from the run's length)."
    )
    calibration_samples: int | None = _argument(
        "Calibration samples of an update of loss='adaptive_label_smoothing' (default: from the run's length)."
    )
    calibration_fraction: float | None = _argument(
        "Share of the training set to hold out as the calibration set, stratified by label. Left out: 0.1 if there is "
        "no other held-out set and the loss needs one; 0 never holds out."
    )
    calibrate_at_end: bool = field(
        default=False,
        metadata={
            "help": "After training fit a temperature on the calibration set and fold it into the classifier's last "
            "layer, if a likelihood-ratio test finds it different from 1."
        },
    )
    split_overlap: str = field(
        default="drop",
        metadata={
            "help": "What to do if training rows also occur in a held-out set: drop, error, warn, skip (no check).",
            "choices": list(POLICIES),
        },
    )
    streaming_calibration: bool | None = _argument(
        "Evaluate with a histogram of fixed size instead of keeping every sample (default: from 4 million tokens or "
        "pixels on)."
    )

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self.check_loss_settings()
        if self.greater_is_better is None and is_lower_better(self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()

    @property
    def per_sample_loss(self) -> str:
        """Name of the per-sample loss: the loss itself, or the base that a batch term is added to."""
        return per_sample_part(self.loss, self.auxiliary_base)

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Arguments of the loss as `build_loss` takes them, defaults included."""
        if self.loss not in BATCH_LOSSES:
            return self._settings_of(self.loss)
        weight = TERMS[self.loss].weight if self.auxiliary_weight is None else self.auxiliary_weight
        base = {"name": self.per_sample_loss, **self._settings_of(self.per_sample_loss)}
        return {"auxiliary_weight": weight, **self._settings_of(self.loss), "base": base}

    def _settings_of(self, loss: str) -> dict[str, Any]:
        settings = {"num_bins": self.num_bins} if loss in ADAFOCAL_LOSSES else {}
        for name, argument in LOSS_ARGUMENTS.items():
            if loss in argument.losses:
                given = getattr(self, name)
                settings[argument.keyword] = _default_of(loss, argument.keyword) if given is None else given
        return settings

    def build_loss(self, weight: Tensor | None = None, ignore_index: int = -100) -> nn.Module:
        """Build the loss that these arguments describe, freshly initialised.

        Args:
            weight: Weight of each class, shape `(C,)`.
            ignore_index: Label of samples that do not count.

        Raises:
            ValueError: If a setting of the loss is out of range.
        """
        settings = self.loss_settings
        common: dict[str, Any] = {"ignore_index": ignore_index, **({} if weight is None else {"weight": weight})}
        if "base" in settings:
            return build_loss(self.loss, **{**settings, "base": {**settings["base"], **common}})
        return build_loss(self.loss, **settings, **common)

    def parsed_class_weights(self) -> str | list[float] | None:
        """`class_weights` as "balanced", a list of numbers, or None.

        Raises:
            ValueError: If it is none of these.
        """
        given = self.class_weights
        if given in (None, "balanced"):
            return given
        if isinstance(given, Mapping):  # a loop over it would take the classes for the weights
            raise ValueError(f"class_weights must be a list of one number per class, in their order, found {given!r}.")
        try:
            weights = [float(part) for part in (given.split(",") if isinstance(given, str) else given)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"class_weights must be 'balanced' or one number per class, found {given!r}.") from error
        if not weights or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"class_weights must be finite numbers from 0, not all of them 0, found {given!r}.")
        return weights

    def check_loss_settings(self) -> None:
        """Check that every setting given belongs to the loss in use.

        Raises:
            ValueError: If one would be ignored; the error names it and the losses that take it.
        """
        used = {self.loss, self.per_sample_loss}
        for name, argument in LOSS_ARGUMENTS.items():
            self._check_used(name, used & set(argument.losses), argument.losses)
        for name in STEERING_ARGUMENTS:
            losses = ("adaptive_label_smoothing",)
            self._check_used(name, used & set(losses), losses)
        for name in ("auxiliary_weight", "auxiliary_base"):
            self._check_used(name, used & set(BATCH_LOSSES), BATCH_LOSSES)

    def check_no_loss_settings(self) -> None:
        """Check that no setting of a loss is given, for a trainer that gets a loss module of its own.

        Raises:
            ValueError: If one would be ignored; the error names it.
        """
        own = ("class_weights", "auxiliary_weight", "auxiliary_base", *LOSS_ARGUMENTS)
        given = [name for name in own if getattr(self, name) is not None]
        given += ["loss"] if self.loss != DEFAULT_LOSS else []
        if given:
            raise ValueError(
                f"{', '.join(given)} would be ignored: the trainer was given a loss module. Set it up in the module, "
                "or leave the module out."
            )

    def _check_used(self, name: str, users: set[str], losses: tuple[str, ...]) -> None:
        if getattr(self, name) is not None and not users:
            raise ValueError(
                f"{name}={getattr(self, name)!r} would be ignored: it is a setting of loss={' or '.join(losses)}, and "
                f"the loss is {self.loss!r}. Leave it out, or choose that loss."
            )

    def _check_choices(self) -> None:
        choices: Mapping[str, Any] = {
            "loss": LOSSES,
            "loss_reduction": REDUCTIONS,
            "split_overlap": POLICIES,
            "auxiliary_base": (None, *PER_SAMPLE_LOSSES),
            "topology_construction": (None, *CONSTRUCTIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(choice for choice in allowed if choice is not None)
                raise ValueError(f"{name} must be one of {known}; found {getattr(self, name)!r}.")
        self.parsed_class_weights()

    def _check_numbers(self) -> None:
        for own in dataclasses.fields(AdaFocalTrainingArguments):
            value = getattr(self, own.name)
            if (
                own.name in AdaFocalTrainingArguments.__annotations__
                and isinstance(value, float)
                and math.isnan(value)
            ):
                raise ValueError(f"{own.name} must be a number, found NaN.")
        for name in ("num_bins", "calibration_steps", "calibration_samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, found {number}.")
        if self.steering_gain is not None and not 0 <= self.steering_gain < math.inf:
            raise ValueError(f"steering_gain must be a finite number from 0, found {self.steering_gain}.")
        if self.topology_start is not None and not 0 <= self.topology_start <= 1:
            raise ValueError(f"topology_start is a share of the run in [0, 1], found {self.topology_start}.")
        if self.calibration_fraction is not None and not 0 <= self.calibration_fraction < 1:
            raise ValueError(f"calibration_fraction must lie in [0, 1), found {self.calibration_fraction}.")


def per_sample_part(loss: str, base: str | None = None) -> str:
    """Return the per-sample loss's name: of the base of a loss with a batch term (its default if `base` is None)."""
    return (base or name_of_class(TERMS[loss].base)) if loss in TERMS else loss


def _default_of(loss: str, keyword: str) -> Any:
    """Look up the default of a constructor's keyword of a loss, or of the nearest base class that has it."""
    if loss in TERMS:
        return TERMS[loss].settings[keyword]
    for kind in PER_SAMPLE_LOSSES[loss].__mro__:
        parameter = inspect.signature(kind).parameters.get(keyword)
        if parameter is not None:
            return parameter.default
    raise LookupError(f"{loss} has no argument {keyword}")  # a mistake in LOSS_ARGUMENTS
