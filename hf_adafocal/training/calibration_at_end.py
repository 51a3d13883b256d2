"""After training, fit a temperature and fold it into the classifier's last layer if the evidence supports it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from hf_adafocal.preserved_state import random_state_kept
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling
from hf_adafocal.scaling.folding import check_foldable, fold_scaling

if TYPE_CHECKING:
    from hf_adafocal.training.trainer import AdaFocalTrainer

logger = logging.get_logger(__name__)

CONFIDENCE = 0.95  # of the likelihood-ratio test
PREFIX = "calibration"


@dataclass(frozen=True)
class CalibrationOutcome:
    """Result of temperature scaling at the end of training.

    Attributes:
        scaling: The temperature that was fitted.
        folded: Whether it was folded into the model.
        reason: One sentence that says why, or why not.
    """

    scaling: Scaling
    folded: bool
    reason: str


def check_before_training(trainer: "AdaFocalTrainer") -> None:
    """Check that the model's last layer can hold a temperature, on a batch of the calibration set.

    Raises:
        ValueError: If it cannot: the error says what to change, before anything is trained.
    """
    with random_state_kept():
        batch = next(iter(trainer.get_eval_dataloader(trainer.calibration_dataset)))
        inputs = trainer.conventions.inputs(trainer._prepare_inputs(batch))
        # One row: a model that gets its padding token when training begins cannot take several yet.
        inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        try:
            check_foldable(trainer.network, inputs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"calibrate_at_end=True folds a temperature into the model's last layer, and this model's cannot hold "
                f"one: {error} Or set calibrate_at_end=False."
            ) from error


def calibrate_head(trainer: "AdaFocalTrainer") -> CalibrationOutcome:
    """Fit a temperature on the calibration set and fold it into the trained model if the evidence supports it.

    Every process fits the same numbers on the same gathered logits.
    """
    scaling = _fit(trainer)
    temperature = scaling.to_dict()["temperature"]
    samples = f"{scaling.num_samples:,} calibration samples"
    if not scaling.is_supported(CONFIDENCE):
        folded = False
        reason = (
            f"{samples} cannot tell a temperature of {temperature:.3g} from 1 (likelihood-ratio test at "
            f"{CONFIDENCE:.0%}), so none was folded into the model."
        )
    else:
        folded = True
        fold_scaling(trainer.network, scaling)
        # So that a hyper-parameter search evaluates the model that comes out.
        trainer.objective = None  # type: ignore[has-type]
        reason = (
            f"A temperature of {temperature:.3g}, fitted on {samples} (likelihood-ratio test at {CONFIDENCE:.0%}), "
            "was folded into the model's last layer."
        )
    logger.info(reason)
    trainer.log({f"{PREFIX}_temperature": temperature, f"{PREFIX}_folded": float(folded)})
    return CalibrationOutcome(scaling, folded, reason)


def _fit(trainer: "AdaFocalTrainer") -> Scaling:
    metrics, kept = trainer.measure(trainer.calibration_dataset, PREFIX)
    if kept is not None:
        return fit_temperature_scaling(*map(torch.as_tensor, kept))
    # Too many logits to keep: the best temperature of the sums on the grid.
    samples = len(trainer.recorder.samples[PREFIX])
    return Scaling(1 / metrics["temperature"], 0.0, metrics["nll"], metrics["refinement"], samples)
