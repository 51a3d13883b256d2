"""After training, fit a temperature or Platt scaling and fold it into the last layer if the evidence supports it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from hf_adafocal.metrics import expected_calibration_error
from hf_adafocal.preserved_state import random_state_kept
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling
from hf_adafocal.scaling.folding import check_foldable, fold_scaling
from hf_adafocal.scaling.platt import fit_platt_scaling
from hf_adafocal.training.model_conventions import has_single_output

if TYPE_CHECKING:
    from hf_adafocal.training.trainer import AdaFocalTrainer

logger = logging.get_logger(__name__)

CONFIDENCE = 0.95  # of the likelihood-ratio test
PREFIX = "calibration"
ECE_RISE = 0.01  # of the calibration set, from which on a user is warned


@dataclass(frozen=True)
class CalibrationOutcome:
    """Result of temperature scaling at the end of training.

    Attributes:
        scaling: The temperature that was fitted; factor and bias of a single output whose layer has a bias.
        folded: Whether it was folded into the model.
        reason: One sentence that says why, or why not; a second one if the scaling that was folded raises the ECE.
    """

    scaling: Scaling
    folded: bool
    reason: str


def check_before_training(trainer: "AdaFocalTrainer") -> None:
    """Check that the model's last layer can hold a temperature, on a batch of the calibration set.

    Raises:
        ValueError: If it cannot: the error says what to change, before anything is trained.
    """
    try:
        check_foldable(trainer.network, _one_row(trainer))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"calibrate_at_end=True folds a temperature into the model's last layer, and this model's cannot hold "
            f"one: {error} Or set calibrate_at_end=False."
        ) from error


def _one_row(trainer: "AdaFocalTrainer") -> dict[str, Any]:
    """Return the model's inputs for one row of the calibration set, to find the last layer with."""
    with random_state_kept():
        batch = next(iter(trainer.get_eval_dataloader(trainer.calibration_dataset)))
        inputs = trainer.conventions.inputs(trainer._prepare_inputs(batch))
        # One row: a model that gets its padding token when training begins cannot take several yet.
        return {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def calibrate_head(trainer: "AdaFocalTrainer") -> CalibrationOutcome:
    """Fit a scaling on the calibration set and fold it into the trained model if the evidence supports it.

    It is a temperature; of a single output whose layer has a bias, Platt scaling. Every process fits the same numbers
    on the same gathered logits.
    """
    inputs = _one_row(trainer)
    platt = has_single_output(trainer.network) and check_foldable(trainer.network, inputs)
    scaling, ece = _fit(trainer, platt)
    factor, bias = float(scaling.scale), float(scaling.bias)  # type: ignore[arg-type]  # a number each
    temperature = 1 / factor
    samples = f"{scaling.num_samples:,} calibration samples"
    what = f"temperature of {temperature:.3g}"
    if platt:
        what = f"factor of {factor:.3g} and a bias of {bias:.3g} (Platt scaling)"
    folded, announce = scaling.is_supported(CONFIDENCE), logger.info
    if not folded:
        reason = (
            f"{samples} cannot tell a {what} from {'none' if platt else '1'} (likelihood-ratio test at "
            f"{CONFIDENCE:.0%}), so none was folded into the model."
        )
    else:
        fold_scaling(trainer.network, scaling, inputs)
        # So that a hyper-parameter search evaluates the model that comes out.
        trainer.objective = None  # type: ignore[has-type]
        reason = (
            f"A {what}, fitted on {samples} (likelihood-ratio test at {CONFIDENCE:.0%}), "
            "was folded into the model's last layer."
        )
        # What lowers the NLL can spoil the confidences of a loss that has calibrated them itself.
        if ece is not None and ece[1] - ece[0] > ECE_RISE:
            reason += (
                f" It raises their ECE from {ece[0]:.2%} to {ece[1]:.2%}: if the confidence of the predicted class "
                "matters more than the NLL, train with calibrate_at_end=False."
            )
            announce = logger.warning
    announce(reason)
    of_platt = {f"{PREFIX}_bias": bias} if platt else {}
    trainer.log({f"{PREFIX}_temperature": temperature, **of_platt, f"{PREFIX}_folded": float(folded)})
    return CalibrationOutcome(scaling, folded, reason)


def _fit(trainer: "AdaFocalTrainer", platt: bool) -> tuple[Scaling, tuple[float, float] | None]:
    """Fit the scaling, and compute the ECE before and after it; None of Platt scaling and where no logits are kept."""
    metrics, kept = trainer.measure(trainer.calibration_dataset, PREFIX)
    if kept is not None and platt:
        return fit_platt_scaling(*map(torch.as_tensor, kept)), None
    if kept is not None:
        logits, labels = map(torch.as_tensor, kept)
        scaling = fit_temperature_scaling(logits, labels)
        scaled = (logits.double() * float(scaling.scale)).softmax(dim=-1)  # type: ignore[arg-type]  # a number
        num_bins = trainer.recorder.num_bins
        return scaling, (metrics["ece"], expected_calibration_error(scaled.numpy(), labels.numpy(), num_bins))
    # Too many logits to keep: the best temperature of the sums on the grid.
    samples = len(trainer.recorder.samples[PREFIX])
    return Scaling(1 / metrics["temperature"], 0.0, metrics["nll"], metrics["refinement"], samples), None
