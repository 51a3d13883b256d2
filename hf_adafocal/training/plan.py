"""Resolve what a run trains with, once: the loss, its settings, and the data sets in their roles."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.utils import logging

from hf_adafocal.data.columns import label_column
from hf_adafocal.data.holdout import hold_out
from hf_adafocal.data.overlap import SplitCheck, drop_overlap
from hf_adafocal.losses.adafocal import AdaFocalLoss
from hf_adafocal.losses.base import AdaptiveLoss, ClassificationLoss
from hf_adafocal.losses.class_weights import balanced_class_weights
from hf_adafocal.losses.torch_losses import as_classification_loss
from hf_adafocal.preserved_state import random_state_kept
from hf_adafocal.training.arguments import DEFAULT_BINS, AdaFocalTrainingArguments
from hf_adafocal.training.input_checks import SAMPLES_PER_BIN
from hf_adafocal.training.model_conventions import ModelConventions, has_single_output
from hf_adafocal.training.sample_rows import is_lower_better

logger = logging.get_logger(__name__)

CALIBRATION = "calibration"  # the entry of a dict of evaluation sets that calibrates
DEFAULT_FRACTION = 0.1  # of train, where nothing else is held out


@dataclass(frozen=True)
class RunPlan:
    """The loss, its settings and the data sets of a run.

    Attributes:
        loss: The training loss.
        train_dataset: What the weights see.
        eval_dataset: What the Trainer evaluates: a set, several by name, or None.
        calibration_dataset: What moves the loss and fits the temperature; None if nothing needs it.
        from_arguments: The loss was built from the training arguments, so a search may build it anew.
        held_out: Rows that were split off the training set for calibration.
        num_bins: Bins of the metrics.
        histogram: See `recorder.EvaluationRecorder`.
        reduction: "mean" or "sum" over the samples of an optimizer step.
        calibrate_at_end: Fit and fold a temperature after training.
        split_overlap: Policy for rows that splits share.
        split_check: What `apart` found; None before.
    """

    loss: nn.Module
    train_dataset: Any
    eval_dataset: Any
    calibration_dataset: Any
    from_arguments: bool
    held_out: int = 0
    num_bins: int = DEFAULT_BINS
    histogram: bool | None = None
    reduction: str = "mean"
    calibrate_at_end: bool = False
    split_overlap: str = "drop"
    split_check: SplitCheck | None = None

    @property
    def adaptive(self) -> AdaptiveLoss | None:
        """The part of the loss that is updated from the calibration set; None if nothing is."""
        return adaptive_part(self.loss)

    @property
    def needs_calibration(self) -> bool:
        """Whether a run needs a calibration set."""
        return self.adaptive is not None or self.calibrate_at_end

    @property
    def calibration_size(self) -> int | None:
        """Number of rows of the calibration set; None if there is none or it is a stream."""
        return (
            None
            if is_stream(self.calibration_dataset) or self.calibration_dataset is None
            else len(self.calibration_dataset)
        )

    @property
    def calibration_text(self) -> str:
        """Size of the calibration set in words: samples, sequences or pixels; empty for none and for a stream."""
        size, dataset = self.calibration_size, self.calibration_dataset
        if not size:
            return ""
        with random_state_kept():
            labels = dataset[0].get("labels") if isinstance(dataset[0], Mapping) else None
        shape = np.shape(labels) if labels is not None else ()
        if len(shape) < 2:  # sequences differ in length
            return f"{size:,} calibration {'samples' if not shape else 'sequences'}"
        return f"{size * math.prod(shape):,} calibration pixels of {size:,} images"

    @property
    def calibration_prefix(self) -> str | None:
        """The prefix under which the Trainer evaluates the calibration set anyway; None if it does not."""
        return evaluated_as(self.calibration_dataset, self.eval_dataset)

    @property
    def first_prefix(self) -> str:
        """The prefix of the first evaluation that the Trainer makes when it evaluates."""
        return f"eval_{next(iter(self.eval_dataset))}" if isinstance(self.eval_dataset, Mapping) else "eval"

    def with_loss(self, loss: nn.Module) -> "RunPlan":
        """Return the plan with another loss, as in a trial of a hyperparameter search."""
        return replace(self, loss=loss)

    def weighted(self, args: TrainingArguments, model: Any) -> "RunPlan":
        """Return the plan with the class weights that arguments ask for, counted on the training rows."""
        if not self.from_arguments or getattr(args, "class_weights", None) != "balanced":
            return self
        return self.with_loss(build_run_loss(args, model, self.train_dataset))

    def without_shared_rows(self, train_dataset: Any, **content: Any) -> "RunPlan":
        """Return the plan without the training rows that also occur in a held-out set.

        Args:
            train_dataset: The training set as the Trainer holds it.
            **content: What makes two rows the same, as in `data.overlap.drop_overlap`.

        Raises:
            ValueError: If calibration and test share rows, or as the policy says.
        """
        if not self.needs_calibration or train_dataset is None:
            return self
        held_out = {CALIBRATION: self.calibration_dataset}
        if isinstance(self.eval_dataset, Mapping) and "test" in self.eval_dataset:
            held_out["test"] = self.eval_dataset["test"]
        kept, check = drop_overlap(train_dataset, held_out, self.split_overlap, **content)
        return replace(self, train_dataset=kept, split_check=check)


def evaluated_as(calibration_dataset: Any, eval_dataset: Any) -> str | None:
    """Return the prefix under which a Trainer evaluates the calibration set by itself; None if it does not."""
    if isinstance(eval_dataset, Mapping):
        return next((f"eval_{name}" for name, entry in eval_dataset.items() if entry is calibration_dataset), None)
    return "eval" if eval_dataset is calibration_dataset else None


def adaptive_part(loss: nn.Module) -> AdaptiveLoss | None:
    """Return the part of a loss that is updated from held-out data; None if there is none."""
    return loss.adaptive if isinstance(loss, ClassificationLoss) else None


def resolve_plan(
    args: TrainingArguments,
    model: Any = None,
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    calibration_dataset: Any = None,
    loss: nn.Module | None = None,
) -> RunPlan:
    """Resolve arguments, data sets and a loss into the plan of a run; nothing the caller passed is changed.

    Raises:
        ValueError: If no calibration set can be had although one is needed, it is empty or cannot feed the loss, or
            class weights do not fit the loss.
        TypeError: If `loss` is a name.
    """
    ours = args if isinstance(args, AdaFocalTrainingArguments) else None
    if isinstance(loss, str):
        raise TypeError(f"loss must be a module, found {loss!r}: name it in AdaFocalTrainingArguments(loss=...).")
    if loss is not None and ours is not None:
        ours.check_no_loss_settings()
    built = build_run_loss(args, model) if loss is None else as_classification_loss(loss)
    plan = RunPlan(
        loss=built,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        calibration_dataset=calibration_dataset,
        from_arguments=loss is None and ours is not None,
        num_bins=ours.num_bins if ours else DEFAULT_BINS,
        histogram=ours.streaming_calibration if ours else None,
        reduction="sum" if getattr(built, "reduction", "mean") == "sum" else ours.loss_reduction if ours else "mean",
        calibrate_at_end=ours.calibrate_at_end if ours else False,
        split_overlap=ours.split_overlap if ours else "drop",
    )
    check_histogram(plan.histogram, plan.adaptive)
    plan = _with_calibration_set(plan, ours.calibration_fraction if ours else None, _seed_of(args))
    if plan.train_dataset is not None and plan.needs_calibration:
        _check_calibration_set(plan)
    return plan


def build_run_loss(args: TrainingArguments, model: Any, train_dataset: Any = None) -> nn.Module:
    """Build the loss that arguments describe, with the ignore index of the model and class weights of the data.

    Args:
        args: Training arguments.
        model: The model.
        train_dataset: What balanced class weights are counted on; without it they are left out.
    """
    ignore_index = ModelConventions.of(model).ignore_index
    if not isinstance(args, AdaFocalTrainingArguments):
        return AdaFocalLoss(ignore_index=ignore_index)
    weights = args.parsed_class_weights()
    if weights is None:
        return args.build_loss(ignore_index=ignore_index)
    num_classes = getattr(getattr(model, "config", None), "num_labels", None)
    num_classes = 2 if has_single_output(model) else num_classes
    if weights == "balanced":
        if num_classes is None:
            raise ValueError("class_weights='balanced' needs a model with config.num_labels. Pass a number per class.")
        if train_dataset is None:
            return args.build_loss(ignore_index=ignore_index)
        weight = balanced_class_weights(_labels(train_dataset), num_classes, ignore_index)
    else:
        weight = torch.tensor(weights)
        if num_classes is not None and len(weight) != num_classes:
            raise ValueError(f"class_weights must be {num_classes} numbers, one per class, found {len(weight)}.")
    return args.build_loss(weight, ignore_index)


def _labels(dataset: Any) -> Iterator[Any]:
    """Return the labels of a data set, row by row: one per row, token or pixel."""
    name = label_column(dataset)
    if name is None or is_stream(dataset):
        raise ValueError(
            "class_weights='balanced' counts the labels of the training set, and this one is a stream or has no label "
            "column. Pass one number per class."
        )
    stored = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    with random_state_kept():
        for index in range(len(stored)):
            labels = np.asarray(stored[index][name])
            yield labels.astype(np.int64) if labels.dtype.kind == "f" else labels  # of a single output, checked


def with_direction_of_best_metric(args: TrainingArguments) -> TrainingArguments:
    """Return arguments whose `greater_is_better` suits `metric_for_best_model`; a changed copy where it does not.

    `TrainingArguments` fill in True for every name without "loss" in it, which would keep the worst checkpoint by ECE.
    """
    wrong = args.greater_is_better and is_lower_better(args.metric_for_best_model or "")
    if isinstance(args, AdaFocalTrainingArguments) or not wrong:
        return args
    logger.info(f"{args.metric_for_best_model} is better when it is lower: greater_is_better=False.")
    changed = copy.copy(args)
    changed.greater_is_better = False
    return changed


def check_histogram(histogram: bool | None, adaptive: AdaptiveLoss | None) -> None:
    """Check that a loss can be updated when evaluations are counted in a histogram.

    Raises:
        ValueError: If the loss needs statistics of single classes.
    """
    if histogram and adaptive is not None and adaptive.needs_class_statistics:
        raise ValueError(
            f"{type(adaptive).__name__} needs statistics of single classes, and streaming_calibration keeps one "
            "histogram for all of them. Set streaming_calibration=False (40 bytes per sample), or train with "
            "loss='adafocal'."
        )


def is_stream(dataset: Any) -> bool:
    """Whether a data set is iterable only, without a length."""
    return dataset is not None and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"))


def _seed_of(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _with_calibration_set(plan: RunPlan, fraction: float | None, seed: int) -> RunPlan:
    """Choose the calibration set: the one given, an evaluation set, or a part of the training set."""
    given = plan.calibration_dataset
    if given is None and fraction:
        plan = _split_off(plan, fraction, seed)
    elif given is None and plan.train_dataset is None:
        plan = replace(plan, calibration_dataset=_entry(plan.eval_dataset, required=False))
    elif given is None and plan.eval_dataset is not None:
        plan = replace(plan, calibration_dataset=_entry(plan.eval_dataset, required=plan.needs_calibration))
    elif given is None and plan.needs_calibration and fraction is None:
        plan = _split_off(plan, DEFAULT_FRACTION, seed)
        logger.warning(
            f"No set is held out, so {plan.held_out} training rows ({DEFAULT_FRACTION:.0%}, stratified by label) are "
            "kept from training to calibrate on. Pass eval_dataset or calibration_dataset, or set "
            "calibration_fraction, to choose yourself."
        )
    if plan.eval_dataset is None and plan.calibration_dataset is not None:
        plan = replace(plan, eval_dataset=plan.calibration_dataset)
    return plan


def _split_off(plan: RunPlan, fraction: float, seed: int) -> RunPlan:
    if plan.train_dataset is None:
        return plan
    train, calibration = hold_out(plan.train_dataset, fraction, seed)
    return replace(plan, train_dataset=train, calibration_dataset=calibration, held_out=len(calibration))


def _entry(eval_dataset: Any, *, required: bool) -> Any:
    """Select the calibration set among the evaluation sets."""
    if not isinstance(eval_dataset, Mapping):
        return eval_dataset
    if CALIBRATION not in eval_dataset and required:
        raise ValueError(
            f"The loss must know which of the evaluation sets {sorted(eval_dataset)} it follows: name one "
            f"{CALIBRATION!r}, or pass `calibration_dataset`."
        )
    return eval_dataset.get(CALIBRATION)


def _check_calibration_set(plan: RunPlan) -> None:
    calibration, adaptive = plan.calibration_dataset, plan.adaptive
    if calibration is None:
        raise ValueError(
            "The loss follows a held-out calibration set, but there is none and calibration_fraction is 0. Pass "
            "`calibration_dataset` or `eval_dataset`, or leave calibration_fraction out. Split it off train, not test."
        )
    if is_stream(calibration):
        if adaptive is not None and adaptive.follows == "temperature":
            raise ValueError(
                f"{type(adaptive).__name__} measures slices of the calibration set, and this one is a stream. Pass a "
                "calibration set with a length and an index, or train with loss='adafocal'."
            )
        return
    if len(calibration) == 0:
        raise ValueError("The calibration set is empty: there is nothing to measure a calibration gap on.")


def warn_of_few_samples(num_samples: int, adaptive: AdaptiveLoss | None) -> None:
    """Warn if the bins of the calibration set will hold so few samples that their gaps are noise.

    Args:
        num_samples: Samples, tokens or pixels that count.
        adaptive: What moves by the gaps of its bins.
    """
    if adaptive is None or adaptive.follows != "bins":
        return
    if num_samples < SAMPLES_PER_BIN * adaptive.num_bins:
        logger.warning(
            f"The calibration set has {num_samples} samples for {adaptive.num_bins} bins, fewer than "
            f"{SAMPLES_PER_BIN} per bin, so gamma will follow noise. Hold out more samples or lower num_bins."
        )
