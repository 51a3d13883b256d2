"""Controller of adaptive label smoothing: it adjusts epsilon so that the best temperature of the logits stays 1.

Some ten times a run epsilon moves in proportion to log T, the logarithm of the temperature that fits a slice of the
calibration set: an over-confident model (T > 1) gets more smoothing, an under-confident one less.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hf_adafocal.losses.layout import classes_last
from hf_adafocal.preserved_state import evaluating, random_state_kept
from hf_adafocal.training.model_conventions import logits_of
from hf_adafocal.training.sample_rows import CHUNK_VALUES

if TYPE_CHECKING:
    from hf_adafocal.training.trainer import AdaFocalTrainer

PRIOR_CURVATURE = 16.0  # of a prior on 1 / T with mean 1 and standard deviation 1 / 4
MAX_LOG_T = 0.3  # of one update
COMPUTE = 0.05  # of the training compute for calibration; a forward pass is a third of a training step
START = 0.08  # share of the steps before the first update: an untrained model is under-confident, and unlike it later
MOST_UPDATES, MOST_SAMPLES, FEWEST_SAMPLES = 20, 256, 64
FEWEST_SHARES = 10  # of the gain: a run with fewer updates spends a part of it
STEPS_PER_UPDATE = 10  # at least, so that a model has answered one update before the next


def temperature_sums(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Compute the sums of a batch for a Newton step towards the best temperature; batches and processes add up.

    With `m` and `v` the mean and variance of a sample's logits under its own softmax, the NLL of `logits / T` has
    derivative `sum(m - z_label)` and curvature `sum(v)` in `1 / T` at T = 1.

    Args:
        logits: Classes last, shape `(N, C)` or `(N, d1, ..., C)`; computed in float32 or wider.
        labels: Class indices or `ignore_index`, shape `(N,)` or `(N, d1, ...)`.
        ignore_index: Label of samples that do not count.

    Returns:
        Shape `(3,)`: `sum(z_label - m)`, `sum(v)`, the number of samples; float64 on the device of the logits (float32
        on one that has no float64). Not finite if a logit is NaN or infinite; a class of probability 0 may have a
        logit of -inf.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,), found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    flat, size = logits.reshape(-1, logits.shape[-1]), max(1, CHUNK_VALUES // logits.shape[-1])
    parts = zip(flat.split(size), labels.reshape(-1).split(size), strict=True)
    return torch.stack([_sums_of(part, target, ignore_index) for part, target in parts]).sum(0)


def _sums_of(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    counted = labels != ignore_index
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = F.softmax(logits, dim=-1)
    possible = p != 0  # NaN is
    mean = (p * logits.where(possible, 0)).sum(-1, keepdim=True)
    score = (logits.gather(-1, labels.where(counted, 0).long()[:, None]) - mean)[:, 0]
    spread = (p * (logits - mean).where(possible, 0).square()).sum(-1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.stack([values.where(counted, 0).sum(dtype=wide) for values in (score, spread, counted)])


def log_temperature(sums: Tensor) -> float:
    """Estimate the log of the best temperature of held-out samples: one Newton step from T = 1, with a prior on T.

    The curvature is the Fisher information of the samples about 1 / T, and that of a normal prior with mean 1 and
    standard deviation 1/4 is added to it. So a few certain predictions, or an untrained model's, move little.

    Args:
        sums: Of `temperature_sums`, over at least one sample.

    Returns:
        log T, in [-0.3, 0.3]: positive if the model is over-confident.

    Raises:
        ValueError: If there is no sample, or a logit was NaN or infinite.

    >>> round(log_temperature(torch.tensor([-20.0, 84.0, 256.0])), 3)  # 1 / T = 1 - 20 / (84 + 16)
    0.223
    """
    score, curvature, samples = sums.tolist()
    if not samples:
        raise ValueError("Every label of this slice of the calibration set is ignored: nothing to measure.")
    if not math.isfinite(score + curvature):
        raise ValueError(
            "The logits of the calibration set must be finite, found NaN or infinite values. Check the learning rate "
            "and gradient clipping (has training diverged?) and fp16 overflow (use bf16 or float32)."
        )
    lowest, highest = math.exp(-MAX_LOG_T), math.exp(MAX_LOG_T)
    return -math.log(min(max(1 + score / (curvature + PRIOR_CURVATURE), lowest), highest))


def gain_of_update(gain: float, update: int, updates: int) -> float:
    """Return the gain of one update, per unit of log T: shares of the run's gain that rise linearly and sum to it.

    Early calibration says little of the end's: an untrained model is under-confident, one at a high learning rate
    often over-confident, and what the setting gains then it must lose again. Fewer than ten updates take no leaps.

    Args:
        gain: Of the run, in units of the setting.
        update: Number of the update, from 0.
        updates: How many the run has.

    >>> [gain_of_update(120, update, 20) for update in (0, 9, 19)]
    [0.571..., 5.714..., 11.428...]
    """
    return gain / max(updates, FEWEST_SHARES) * 2 * (update + 1) / (updates + 1)


@dataclass(frozen=True)
class Schedule:
    """Steps at which a run updates the smoothing, and on which calibration samples; computed from its length alone.

    Attributes:
        steps: Optimizer steps after which the setting is updated, ascending.
        slice_size: Calibration samples per update.
    """

    steps: tuple[int, ...]
    slice_size: int

    def slice(self, update: int, calibration_size: int, seed: int) -> np.ndarray:
        """Indices of the samples for an update: the next ones of a fixed permutation, from its start after its end.

        Args:
            update: Number of the update, from 0.
            calibration_size: Samples of the calibration set.
            seed: Of the permutation.
        """
        order = np.random.default_rng(seed).permutation(calibration_size)
        first = update * self.slice_size
        return order[np.arange(first, first + self.slice_size) % calibration_size]


def schedule(
    total_steps: int,
    samples_per_step: int,
    calibration_size: int,
    every: int | None = None,
    samples: int | None = None,
    processes: int = 1,
) -> Schedule:
    """Spread updates over a run at about 5 % of its compute: at most 20, each on 64 to 256 samples.

    Args:
        total_steps: Optimizer steps of the run.
        samples_per_step: Samples of one of them, over all processes.
        calibration_size: Samples of the calibration set, at least one a process.
        every: Steps from one update to the next, instead of as many updates as the compute allows.
        samples: Calibration samples of one update, instead of what the compute allows; the whole set if it is smaller.
        processes: Slices are multiples of it, so that every process does the same.

    Returns:
        The schedule; without updates if the run has fewer than 10 steps.

    Raises:
        ValueError: If a number is below 1 or the calibration set is smaller than the number of processes.
    """
    numbers = {"total_steps": total_steps, "samples_per_step": samples_per_step, "calibration_size": calibration_size}
    chosen = {name: n for name, n in (("every", every), ("samples", samples)) if n is not None}
    for name, number in {**numbers, **chosen, "processes": processes}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, found {number}.")
    if calibration_size < processes:
        raise ValueError(f"Expected a calibration sample for each of {processes} processes, found {calibration_size}.")
    start = round(START * total_steps)
    affordable = 3 * COMPUTE * total_steps * samples_per_step
    size = samples or int(min(max(affordable / MOST_UPDATES, FEWEST_SAMPLES), MOST_SAMPLES))
    if every is None:
        updates = min(MOST_UPDATES, int(affordable // size), total_steps // STEPS_PER_UPDATE)
        updates = max(updates, min(1, total_steps // STEPS_PER_UPDATE))
        steps = tuple(start + round(k * (total_steps - start) / (updates + 1)) for k in range(1, updates + 1))
    else:
        steps = tuple(range(start + every, total_steps, every))
    size = min(size, calibration_size)
    return Schedule(steps, max(size // processes, 1) * processes)


def measure_slice(trainer: "AdaFocalTrainer", indices: np.ndarray) -> Tensor:
    """Compute `temperature_sums` of calibration samples under the model in training, over all processes.

    Args:
        trainer: The trainer; training goes on as if nothing had been measured.
        indices: Of calibration samples, the same on every process; data-parallel groups share them out.
    """
    args = trainer.args
    own = indices[trainer.processes.index :: trainer.processes.count].tolist()
    loader = DataLoader(
        Subset(trainer.calibration_dataset, own),
        args.eval_batch_size,
        collate_fn=trainer._get_collator_with_removed_columns(trainer.data_collator, description="calibration"),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
    )
    sums: list[Tensor] = []
    evaluate = getattr(trainer.optimizer, "eval", None)
    if callable(evaluate):
        evaluate()  # schedule-free ones evaluate other weights; the next training step swaps them back
    with torch.no_grad(), evaluating(trainer.model_wrapped), random_state_kept():
        for batch in loader:
            batch = trainer._prepare_inputs(batch)
            targets = trainer.conventions.targets(batch, trainer.ignore_index)
            with trainer.compute_loss_context_manager():
                outputs = trainer.model_wrapped(**trainer.conventions.inputs(batch))
            logits = classes_last(logits_of(outputs, type(trainer.model).__name__), targets)
            sums.append(temperature_sums(logits, targets, trainer.ignore_index))
    total = torch.stack(sums).sum(0)  # of at least one batch: every process has its share of a slice
    return trainer.processes.sum(total.float().to(args.device)).cpu()  # the only copy to the host
