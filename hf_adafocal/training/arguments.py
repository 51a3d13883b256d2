"""Arguments of a calibrated fine-tune: those of `TrainingArguments`, and which loss."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_adafocal.data.overlap import POLICIES
from hf_adafocal.losses.batch_loss import TERMS
from hf_adafocal.losses.registry import LOSSES, PER_SAMPLE_LOSSES, build_loss

UPDATE_RULES = ("paper", "temperature")
DEFAULT_LOSS = "adaptive_label_smoothing"  # the one that the study of short runs found to cost no accuracy


@dataclass
class AdaFocalTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the loss, its settings and the calibration split.

    With nothing said, the loss is label smoothing steered by the temperature of the calibration set, which is ours.
    `update_rule="paper"` is AdaFocal as its paper has it. By the paper's rule gamma moves once per evaluation, so
    `eval_strategy` is "epoch" unless you choose otherwise.

    Attributes:
        loss_by_default: Nothing was said of the loss.

    Raises:
        ValueError: If `loss`, `update_rule` or `split_overlap` is unknown or two of them do not go
            together, or `calibration_fraction` is not in [0, 1), or if `streaming_calibration` cannot feed the loss.
    """

    loss: str | None = field(
        default=None,
        metadata={
            "help": f"The training loss: {', '.join(LOSSES)}. Left out: adafocal if update_rule is given, else "
            f"{DEFAULT_LOSS}.",
            "choices": list(LOSSES),
        },
    )
    num_bins: int = field(default=15, metadata={"help": "Bins of AdaFocal's table and of eval_ece and eval_ada_ece."})
    focal_gamma: float = field(default=3.0, metadata={"help": "Gamma of loss='focal'; below 0 is inverse focal loss."})
    update_rule: str | None = field(
        default=None,
        metadata={
            "help": "What moves the loss. paper (AdaFocal): the gap of each bin, once an evaluation. temperature "
            "(adaptive_label_smoothing): the temperature of a slice of the calibration set, some ten times a run.",
            "choices": list(UPDATE_RULES),
        },
    )
    calibration_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between updates of the temperature rule; from the run's length if left out."},
    )
    calibration_samples: int | None = field(
        default=None,
        metadata={"help": "Calibration samples of such an update; from the run's length if left out."},
    )
    steering_gain: float | None = field(
        default=None,
        metadata={
            "help": "Change of the eps of adaptive_label_smoothing over a run per unit of log T: 2 if left out, 0 for "
            "none."
        },
    )
    gamma_initial: float | None = field(
        default=None,
        metadata={"help": "AdaFocal's gamma before the first update: 1 if left out."},
    )
    gamma_lambda: float = field(default=1.0, metadata={"help": "Step size of AdaFocal's update."})
    gamma_switch: float = field(default=0.2, metadata={"help": "Where AdaFocal switches to inverse focal (S_th)."})
    gamma_min: float = field(default=-2.0, metadata={"help": "AdaFocal's lowest gamma."})
    gamma_max: float = field(default=20.0, metadata={"help": "AdaFocal's highest gamma."})
    class_prior: float = field(
        default=150.0,
        metadata={"help": "Held-out samples of a class at which loss='classwise_adafocal' trusts its table by half."},
    )
    inverse_focal_gamma: float = field(
        default=2.0, metadata={"help": "Gamma of loss='inverse_focal' as its paper writes it: not negative."}
    )
    dual_focal_gamma: float = field(default=5.0, metadata={"help": "Gamma of loss='dual_focal'."})
    smoothing: float = field(
        default=0.05, metadata={"help": "Epsilon of loss='label_smoothing', in [-0.1, 0.5]; below 0 it sharpens."}
    )
    entropy_penalty: float = field(default=0.1, metadata={"help": "Beta of loss='confidence_penalty'."})
    auxiliary_weight: float | None = field(
        default=None,
        metadata={"help": f"Weight of the term of a batch in loss={'/'.join(TERMS)}; its authors' if left out."},
    )
    auxiliary_base: str = field(
        default="cross_entropy",
        metadata={
            "help": "The loss of single samples that the term of a batch joins; it has its own arguments.",
            "choices": list(PER_SAMPLE_LOSSES),
        },
    )
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training set to hold out as the calibration set, stratified."}
    )
    split_overlap: str = field(
        default="error",
        metadata={
            "help": "What rows are that train, calibration and test share by content: an error, a warning (warn), or "
            "never looked for (skip), for sets too large to be read once more.",
            "choices": list(POLICIES),
        },
    )
    streaming_calibration: bool = field(
        default=False,
        metadata={"help": "Evaluate with a histogram of fixed size, for many millions of tokens or pixels."},
    )
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "When to evaluate, and so to move gamma: epoch, steps or no."}
    )

    def __post_init__(self):
        self.loss_by_default = self.loss is None and self.update_rule is None
        if self.loss is None:
            self.loss = DEFAULT_LOSS if self.loss_by_default else "adafocal"
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; found {self.loss!r}.")
        if self.auxiliary_base not in PER_SAMPLE_LOSSES:
            raise ValueError(
                f"auxiliary_base must be one of {', '.join(PER_SAMPLE_LOSSES)}; found {self.auxiliary_base!r}."
            )
        self._check_rule()
        if not 0 <= self.calibration_fraction < 1:
            raise ValueError(f"calibration_fraction must lie in [0, 1), found {self.calibration_fraction}.")
        if self.split_overlap not in POLICIES:
            raise ValueError(f"split_overlap must be one of {', '.join(POLICIES)}; found {self.split_overlap!r}.")
        refuse_streaming(self.streaming_calibration, PER_SAMPLE_LOSSES[self._sample_loss])
        super().__post_init__()

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Arguments of the loss, as `registry.build_loss` takes them."""
        if self.loss not in TERMS:
            return self._settings_of(self.loss)
        weight = TERMS[self.loss].weight if self.auxiliary_weight is None else self.auxiliary_weight
        base = {"name": self.auxiliary_base, **self._settings_of(self.auxiliary_base)}
        return {"auxiliary_weight": weight, "base": base}

    def _settings_of(self, loss: str) -> dict[str, Any]:
        settings = {
            "focal": {"gamma": self.focal_gamma},
            "inverse_focal": {"gamma": self.inverse_focal_gamma},
            "dual_focal": {"gamma": self.dual_focal_gamma},
            "label_smoothing": {"smoothing": self.smoothing},
            "confidence_penalty": {"penalty": self.entropy_penalty},
            "classwise_adafocal": {"prior": self.class_prior},
        }.get(loss, {})
        if getattr(PER_SAMPLE_LOSSES[loss], "follows", None) == "bins":
            settings |= {
                "num_bins": self.num_bins,
                "gamma_initial": 1.0 if self.gamma_initial is None else self.gamma_initial,
                "lambda_": self.gamma_lambda,
                "switch": self.gamma_switch,
                "gamma_min": self.gamma_min,
                "gamma_max": self.gamma_max,
            }
        return settings

    def build_loss(self) -> nn.Module:
        """The loss these arguments describe, freshly initialised.

        Raises:
            ValueError: If a setting of the loss is out of range.
        """
        return build_loss(self.loss, **self.loss_settings)

    @property
    def rule(self) -> str | None:
        """The update rule of the loss: `update_rule`, or the one for this loss; None if nothing moves."""
        loss_type = PER_SAMPLE_LOSSES[self._sample_loss]
        return {"temperature": "temperature", "bins": "paper"}.get(getattr(loss_type, "follows", None))

    def _check_rule(self) -> None:
        if self.update_rule not in (None, *UPDATE_RULES):
            raise ValueError(f"update_rule must be one of {', '.join(UPDATE_RULES)}; found {self.update_rule!r}.")
        only = self.rule
        if only is not None and self.update_rule not in (None, only):
            raise ValueError(
                f"{self._sample_loss} moves by the {only} rule alone, found update_rule={self.update_rule!r}. "
                "Leave it out."
            )
        for name in ("calibration_steps", "calibration_samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, found {number}.")
        if self.steering_gain is not None and not 0 <= self.steering_gain < float("inf"):
            raise ValueError(f"steering_gain must be a finite number from 0, found {self.steering_gain}.")

    @property
    def _sample_loss(self) -> str:
        return self.auxiliary_base if self.loss in TERMS else self.loss


def refuse_streaming(streaming: bool, loss_type: type) -> None:
    """Check that a loss's table can move when evaluations are kept in a histogram.

    Raises:
        ValueError: If the loss needs statistics of single classes.
    """
    if streaming and getattr(loss_type, "needs_class_statistics", False):
        raise ValueError(
            "classwise_adafocal needs statistics of single classes, and streaming_calibration keeps one histogram for "
            "all of them. Set streaming_calibration=False (32 bytes a sample), or train with loss='adafocal'."
        )
