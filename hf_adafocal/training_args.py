"""Arguments of a calibrated fine-tune: those of `TrainingArguments`, and which loss."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_adafocal.losses import LOSSES, FocalFamilyLoss


@dataclass
class AdaFocalTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the loss, its settings and the calibration split.

    Gamma moves once per evaluation, so `eval_strategy` is "epoch" unless you choose otherwise.

    Raises:
        ValueError: If `loss` is unknown, `calibration_fraction` is not in [0, 1), or `label_smoothing_factor` is set.
    """

    loss: str = field(
        default="adafocal", metadata={"help": f"The training loss: {', '.join(LOSSES)}.", "choices": list(LOSSES)}
    )
    num_bins: int = field(default=15, metadata={"help": "Bins of AdaFocal's table and of eval_ece and eval_ada_ece."})
    focal_gamma: float = field(default=3.0, metadata={"help": "Gamma of loss='focal'; below 0 is inverse focal loss."})
    gamma_initial: float = field(default=1.0, metadata={"help": "AdaFocal's gamma before the first update."})
    gamma_lambda: float = field(default=1.0, metadata={"help": "Step size of AdaFocal's update."})
    gamma_switch: float = field(default=0.2, metadata={"help": "Where AdaFocal switches to inverse focal (S_th)."})
    gamma_min: float = field(default=-2.0, metadata={"help": "AdaFocal's lowest gamma."})
    gamma_max: float = field(default=20.0, metadata={"help": "AdaFocal's highest gamma."})
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training set to hold out as the calibration set, stratified."}
    )
    streaming_calibration: bool = field(
        default=False,
        metadata={"help": "Evaluate with a histogram of fixed size, for many millions of tokens or pixels."},
    )
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "When to evaluate, and so to move gamma: epoch, steps or no."}
    )

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; found {self.loss!r}.")
        if not 0 <= self.calibration_fraction < 1:
            raise ValueError(f"calibration_fraction must lie in [0, 1), found {self.calibration_fraction}.")
        super().__post_init__()

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Arguments of the loss, by the names of its constructor."""
        if self.loss == "focal":
            return {"gamma": self.focal_gamma}
        if self.loss == "adafocal":
            return {
                "num_bins": self.num_bins,
                "gamma_initial": self.gamma_initial,
                "lambda_": self.gamma_lambda,
                "switch": self.gamma_switch,
                "gamma_min": self.gamma_min,
                "gamma_max": self.gamma_max,
            }
        return {}

    def build_loss(self) -> FocalFamilyLoss:
        """The loss these arguments describe, freshly initialised.

        Raises:
            ValueError: If a setting of the loss is out of range.
        """
        return LOSSES[self.loss](**self.loss_settings)
